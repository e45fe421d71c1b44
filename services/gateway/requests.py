"""What a decoder is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from chiasm.services.gateway.domain import Encoded, Generation
from chiasm.services.gateway.prompts import LaidOut
from chiasm.transport.enums import WIRE_MEDIA_KINDS
from chiasm.v1 import common_pb2, decoder_pb2, inference_pb2

_SEEDS = 2**64


def decode_request(
    generation: Generation,
    laid_out: LaidOut,
    encoded: Sequence[Encoded],
    *,
    index: int,
    seed: int,
    thought_end: int | None,
) -> decoder_pb2.DecodeRequest:
    """The request for answer `index`. Only the first one asks for the prompt's logits.

    encoded: where the embeddings are now. seed: of the first answer; the others' follow it.
    """
    is_first, grammar = index == 0, generation.sampling.grammar
    return decoder_pb2.DecodeRequest(
        # No client's id has a space in it, so no other request can bear the name.
        request_id=generation.request_id if is_first else f"{generation.request_id} {index}",
        token_ids=laid_out.prompt.token_ids,
        token_types=laid_out.prompt.token_types,
        media=[
            decoder_pb2.MediaRef(
                digest=encoded[item.index].digest,
                kind=WIRE_MEDIA_KINDS[item.kind],
                grid=common_pb2.GridThw(t=item.grid.t, h=item.grid.h, w=item.grid.w),
                offset=item.offset,
                num_tokens=item.num_tokens,
                encoder_address=encoded[item.index].encoder_address,
            )
            for item in laid_out.prompt.media
        ],
        sampling=_sampling(generation, is_first=is_first, seed=(seed + index) % _SEEDS),
        prompt_logits=generation.prompt_logits and is_first,
        think_end_ids=() if thought_end is None else (thought_end,),
        grammar=grammar.source if grammar else "",
        priority=generation.priority,
    )


def _sampling(generation: Generation, *, is_first: bool, seed: int) -> inference_pb2.SamplingParams:
    sampling = generation.sampling
    return inference_pb2.SamplingParams(
        max_tokens=sampling.max_tokens,  # 0: the decoder knows how many fit
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        seed=seed,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        min_tokens=sampling.min_tokens,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs if is_first else None,
        thinking_budget=sampling.thinking_budget,
    )
