"""DecodeRequest to a Sequence, every bound checked, and events back to messages."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import torch
from chiasm.model.layout import LaidOutMedia

from chiasm import errors
from chiasm.model.config import ModelConfig
from chiasm.services.decoder.sequence import FinishReason, Sampling, SequenceTimings
from chiasm.transport import tensors
from chiasm.types import TOKEN_VIDEO, Grid, MediaKind, Modality
from chiasm.v1 import common_pb2, decoder_pb2, inference_pb2, tensor_pb2

LOGITS_CHUNK_BYTES = 1 << 20

_KINDS = {
    common_pb2.MEDIA_KIND_IMAGE: MediaKind.IMAGE,
    common_pb2.MEDIA_KIND_VIDEO: MediaKind.VIDEO,
}
_REASONS = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}


def check(request: decoder_pb2.DecodeRequest, config: ModelConfig) -> None:
    """Raises InvalidArgument with the field named."""
    num_tokens, limit = len(request.token_ids), config.text.max_position_embeddings
    if not 1 <= num_tokens < limit:
        raise errors.InvalidArgument("token_ids", f"1 to {limit - 1} tokens, got {num_tokens}")
    if max(request.token_ids) >= config.text.vocab_size:
        raise errors.InvalidArgument("token_ids", f"ids must lie below {config.text.vocab_size}")
    if len(request.token_types) != num_tokens or max(request.token_types) > TOKEN_VIDEO:
        raise errors.InvalidArgument("token_types", "one byte of 0, 1 or 2 per token")
    end = 0
    for i, ref in enumerate(request.media):
        if ref.kind not in _KINDS:
            raise errors.InvalidArgument(f"media[{i}].kind", "image or video")
        if ref.offset < end or ref.offset + ref.num_tokens > num_tokens or not ref.num_tokens:
            raise errors.InvalidArgument(
                f"media[{i}].offset", "items must lie in order, in the prompt"
            )
        end = ref.offset + ref.num_tokens
    if request.sampling.max_tokens > limit - num_tokens:
        raise errors.InvalidArgument(
            "sampling.max_tokens",
            f"{num_tokens} prompt + {request.sampling.max_tokens} new tokens exceed {limit}",
        )


def media(request: decoder_pb2.DecodeRequest) -> tuple[LaidOutMedia, ...]:
    """The items' places and extents."""
    return tuple(
        LaidOutMedia(
            kind=_KINDS[ref.kind],
            grid=Grid(ref.grid.t, ref.grid.h, ref.grid.w),
            offset=ref.offset,
            num_tokens=ref.num_tokens,
            index=i,
        )
        for i, ref in enumerate(request.media)
    )


def sampling(request: decoder_pb2.DecodeRequest, config: ModelConfig) -> Sampling:
    """Sampling parameters with every default filled in."""
    wire = request.sampling
    room = config.text.max_position_embeddings - len(request.token_ids)
    eos = () if wire.ignore_eos else config.tokens.eos
    return Sampling(
        max_tokens=wire.max_tokens or room,
        temperature=wire.temperature if wire.HasField("temperature") else 1.0,
        top_p=wire.top_p if wire.HasField("top_p") else 1.0,
        top_k=wire.top_k,
        seed=wire.seed if wire.HasField("seed") else secrets.randbits(64),
        stop_token_ids=frozenset((*wire.stop_token_ids, *eos)),
    )


def token(token_id: int) -> decoder_pb2.DecodeEvent:
    return decoder_pb2.DecodeEvent(tokens=decoder_pb2.DecodedTokens(token_ids=[token_id]))


def prompt_logits(
    offset: int, rows: torch.Tensor, total_rows: int
) -> Iterator[decoder_pb2.DecodeEvent]:
    """Rows float32 [N, V] in messages of bounded size."""
    step = max(1, LOGITS_CHUNK_BYTES // (rows.shape[1] * rows.element_size()))
    for start in range(0, rows.shape[0], step):
        chunk = tensor_pb2.TensorChunk(
            row_offset=offset + start,
            total_rows=total_rows,
            rows=tensors.to_wire(rows[start : start + step]),
        )
        yield decoder_pb2.DecodeEvent(prompt_logits=chunk)


def finished(
    reason: FinishReason, timings: SequenceTimings, fetch_ns: int
) -> decoder_pb2.DecodeEvent:
    wire = inference_pb2.Timings(
        fetch_ns=fetch_ns,
        queue_ns=timings.admitted - timings.submitted,
        prefill_ns=timings.first_token - timings.admitted,
        decode_ns=timings.finished - timings.first_token,
        text_expert_wait_ns=timings.expert_wait[Modality.TEXT],
        vision_expert_wait_ns=timings.expert_wait[Modality.VISION],
    )
    return decoder_pb2.DecodeEvent(
        finished=decoder_pb2.DecodeFinished(reason=_REASONS[reason], timings=wire)
    )
