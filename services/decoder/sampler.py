"""The next token of each sequence, from the model's logits.

A request's choices depend on its own logits, its parameters, its seed and the tokens it has, on
nothing else: not on the requests beside it, not on how often it was preempted or resumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch

from chiasm import errors
from chiasm.services.decoder.draw import draw
from chiasm.services.decoder.processors import Processors, needs_processors
from chiasm.services.decoder.sequence import (
    PromptLogitsEvent,
    PromptLogprobsEvent,
    RankedToken,
    Sequence,
)

PROMPT_ROWS = 64
"""Prompt positions whose logits are computed together: bounds the extra memory."""


class Choice(NamedTuple):
    """A sequence's next token.

    logprob, top: natural log-probability of the token, and the likeliest ids with theirs, when
    asked for; from the unprocessed logits. error: the sequence cannot go on; the rest is void.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    error: errors.ChiasmError | None = None


@torch.inference_mode()
def choose(
    logits: torch.Tensor, sequences: Seq[Sequence], ahead: Seq[int] | None = None
) -> list[Choice]:
    """One choice per row; sequences are not changed but for their `processors`.

    logits: float32 [n, V], left as they are. ahead: how many tokens past its sequence's own a row
    is; rows ahead are for sequences without processors. The caller appends the tokens.
    """
    processed, failed = _process(logits, sequences)
    # One row without a likeliest token must not take the others' step with it.
    for i in (~processed.amax(dim=-1).isfinite()).nonzero()[:, 0].tolist():
        processed = processed.clone() if processed is logits else processed
        processed[i] = 0.0
        failed.setdefault(i, errors.Internal("no token can follow: the logits are not finite"))
    ahead = ahead or [0] * len(sequences)
    steps = [s.num_generated + a for s, a in zip(sequences, ahead, strict=True)]
    ids = draw(processed, [s.sampling for s in sequences], steps)
    choices = [Choice(token_id=token_id, error=failed.get(i)) for i, token_id in enumerate(ids)]
    wanted = [i for i, s in enumerate(sequences) if s.sampling.logprobs is not None]
    if wanted:
        counts = [sequences[i].sampling.logprobs or 0 for i in wanted]
        rows = logits if len(wanted) == len(sequences) else logits[wanted]
        for i, token in zip(wanted, rank(rows, [ids[i] for i in wanted], counts), strict=True):
            choices[i] = choices[i]._replace(logprob=token.logprob, top=token.top)
    return choices


def _process(
    logits: torch.Tensor, sequences: Seq[Sequence]
) -> tuple[torch.Tensor, dict[int, errors.ChiasmError]]:
    """The logits to draw from, and what went wrong with which sequence."""
    places = [i for i, sequence in enumerate(sequences) if needs_processors(sequence)]
    failed: dict[int, errors.ChiasmError] = {}
    if not places:
        return logits, failed
    processed = logits.clone()
    for i in places:
        sequence = sequences[i]
        if sequence.processors is None:
            sequence.processors = Processors(sequence, logits.shape[-1], logits.device)
        try:
            sequence.processors.catch_up(sequence)
            sequence.processors.apply(processed[i])
        except errors.ChiasmError as error:
            failed[i] = error
    return processed, failed


def rank(logits: torch.Tensor, token_ids: Seq[int], counts: Seq[int]) -> list[RankedToken]:
    """Log-probabilities of a token and of the likeliest ones, per row.

    logits: float32 [n, V]; the log-softmax is taken of them as they are. counts: likeliest tokens
    to list, per row.
    """
    logprobs = logits.log_softmax(dim=-1)
    ids = torch.tensor(token_ids, device=logits.device)[:, None]
    chosen: list[float] = logprobs.gather(-1, ids)[:, 0].tolist()
    top = logprobs.topk(min(max(counts), logits.shape[-1]), dim=-1)
    listed = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [
        RankedToken(token_id, logprob, tuple(zip(best_ids[:count], best[:count], strict=True)))
        for token_id, logprob, (best_ids, best), count in zip(
            token_ids, chosen, listed, counts, strict=True
        )
    ]


def prompt_events(
    sequence: Sequence, start: int, logits: torch.Tensor
) -> Iterator[PromptLogitsEvent | PromptLogprobsEvent]:
    """What the sequence's owner is to hear of the logits, float32 [N, V], of positions `start`..

    The logits of a position are those of the token after it.
    """
    if sequence.prompt_logits:
        yield PromptLogitsEvent(offset=start, rows=logits.cpu())
    count = sequence.sampling.prompt_logprobs
    if count is None:
        return
    ids = sequence.token_ids[start + 1 : min(start + 1 + len(logits), sequence.num_prompt)]
    if ids:
        ranked = rank(logits[: len(ids)], ids, [count] * len(ids))
        yield PromptLogprobsEvent(offset=start + 1, tokens=tuple(ranked))
