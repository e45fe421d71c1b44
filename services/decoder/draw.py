"""Tokens from processed logits: greedy, or drawn after temperature, min-p, top-k and top-p.

The order and the meaning of the filters are vLLM's. A row's token depends on its own logits,
parameters and random number alone, not on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch

from chiasm.services.decoder.sequence import Sampling

_WIDTH = 1024
"""Likeliest tokens looked at first; sorting the whole vocabulary is the exception."""

_BELOW_ONE = 1 - 2.0**-52
"""Times any float64, it is less than that number: a draw never falls behind the last token."""


def draw(logits: torch.Tensor, samplings: Seq[Sampling], steps: Seq[int]) -> list[int]:
    """A token per row.

    logits: float32 [n, V]; -inf stands for what must not come. Temperature 0 is argmax, the lowest
    id winning a tie. The random number of a row comes from a counter-based generator (Philox) keyed
    by its seed and counted by its step: the number of tokens generated before.
    """
    greedy = [i for i, sampling in enumerate(samplings) if sampling.temperature == 0]
    if len(greedy) == len(samplings):
        return logits.argmax(dim=-1).tolist()
    ids = [0] * len(samplings)
    is_ranked = [s.temperature != 0 and (s.top_k > 0 or s.top_p < 1) for s in samplings]
    ranked = [i for i, is_so in enumerate(is_ranked) if is_so]
    whole = [i for i, s in enumerate(samplings) if s.temperature != 0 and not is_ranked[i]]
    if greedy:
        _put(ids, greedy, _rows(logits, greedy).argmax(dim=-1).tolist())
    for group, choose in ((whole, _draw_whole), (ranked, _draw_ranked)):
        if group:
            chosen = [samplings[i] for i in group]
            uniform = [_uniform(samplings[i].seed, steps[i]) for i in group]
            _put(ids, group, choose(_rows(logits, group), chosen, uniform))
    return ids


def _put(ids: list[int], places: list[int], found: list[int]) -> None:
    for place, token_id in zip(places, found, strict=True):
        ids[place] = token_id


def _rows(logits: torch.Tensor, places: list[int]) -> torch.Tensor:
    return logits if len(places) == len(logits) else logits[places]


def _uniform(seed: int, step: int) -> float:
    """In [0, 1)."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=step))
    return min(generator.random(), _BELOW_ONE)


def _column(values: Seq[float], like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None]


def _weights(logits: torch.Tensor, samplings: Seq[Sampling]) -> torch.Tensor:
    """Probabilities over the likeliest one's, float32 [n, V]; 0 for what min-p leaves out."""
    temperature = _column([s.temperature for s in samplings], logits, torch.float32)
    weights = (logits - logits.amax(dim=-1, keepdim=True)).div_(temperature).exp_()
    if any(s.min_p for s in samplings):
        min_p = _column([s.min_p for s in samplings], logits, torch.float32)
        weights.masked_fill_(weights < min_p, 0.0)
    return weights


def _draw_whole(logits: torch.Tensor, samplings: Seq[Sampling], uniform: Seq[float]) -> list[int]:
    """Without top-k and top-p: the distribution function is inverted in order of ids."""
    cumulative = _weights(logits, samplings).cumsum(dim=-1, dtype=torch.float64)
    threshold = _column(uniform, logits, torch.float64) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].tolist()


def _draw_ranked(logits: torch.Tensor, samplings: Seq[Sampling], uniform: Seq[float]) -> list[int]:
    """With top-k or top-p: in order of likelihood, among the likeliest where they suffice."""
    weights = _weights(logits, samplings)
    found, left = [0] * len(samplings), list(range(len(samplings)))
    for width in (min(_WIDTH, logits.shape[-1]), logits.shape[-1]):
        ids, is_exact = _ranked(
            _rows(logits, left),
            _rows(weights, left),
            [samplings[i] for i in left],
            [uniform[i] for i in left],
            width,
        )
        _put(found, left, ids.tolist())
        left = [i for i, is_so in zip(left, is_exact.tolist(), strict=True) if not is_so]
        if not left:
            break
    return found


def _ranked(
    logits: torch.Tensor,
    weights: torch.Tensor,
    samplings: Seq[Sampling],
    uniform: Seq[float],
    width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [n] drawn from the `width` likeliest tokens; whether looking at all gives the same."""
    vocab_size = logits.shape[-1]
    values, ids = _likeliest(logits, width)
    mass = weights.gather(-1, ids).double()
    cumulative = mass.cumsum(dim=-1)
    ranks = [min(s.top_k or vocab_size, width) - 1 for s in samplings]
    kth = values.gather(-1, torch.tensor(ranks, device=ids.device)[:, None])
    has_k = _column([s.top_k > 0 for s in samplings], logits, torch.bool)
    # Equals of the k-th likeliest token stay, as in vLLM.
    in_k = (values >= kth) | ~has_k
    last_in_k = in_k.sum(dim=-1, keepdim=True) - 1
    total = torch.where(
        has_k, cumulative.gather(-1, last_in_k), weights.sum(-1, keepdim=True, dtype=torch.float64)
    )
    top_p = _column([s.top_p for s in samplings], logits, torch.float64)
    # A token stays while the mass before it is below top-p; the first one always does.
    is_kept = in_k & ((cumulative - mass < top_p * total) | (top_p >= 1))
    last = is_kept.sum(dim=-1, keepdim=True).clamp(min=1) - 1
    threshold = _column(uniform, logits, torch.float64) * cumulative.gather(-1, last)
    place = torch.searchsorted(cumulative, threshold, right=True)
    lowest = values[:, -1:]
    is_exact = (values.gather(-1, last) > lowest) & (~has_k | (kth > lowest))
    return ids.gather(-1, place)[:, 0], is_exact[:, 0] | (width == vocab_size)


def _likeliest(logits: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest logits and their ids [n, width], in falling order; equals in order of ids."""
    if width == logits.shape[-1]:
        values, ids = logits.sort(dim=-1, descending=True, stable=True)
        return values, ids
    ids = logits.topk(width, dim=-1, sorted=False).indices.sort(dim=-1).values
    values, order = logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)
