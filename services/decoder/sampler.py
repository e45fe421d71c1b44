"""Next token from logits. A request's choices depend on its seed and the step, on nothing else."""

from __future__ import annotations

import numpy as np
import torch

from chiasm.services.decoder.sequence import Sampling


def sample(logits: torch.Tensor, params: Sampling, step: int) -> int:
    """Chooses the token number `step` (from 0) of a request.

    logits: float32 [V]. Temperature first, then top-k, then top-p on what is left, as vLLM orders
    them; temperature 0 is argmax, the lowest id winning a tie. The random number comes from a
    counter-based generator (Philox) keyed by the seed and counted by the step, so a resumed request
    goes on where it was.
    """
    if params.temperature == 0:
        return int(logits.argmax())
    scaled = logits.cpu().double() / params.temperature
    ordered, ids = scaled.sort(descending=True, stable=True)
    if params.top_k:
        ordered = ordered[: params.top_k]
    probs = torch.softmax(ordered, dim=-1)
    cumulative = probs.cumsum(dim=-1)
    if params.top_p < 1:
        # Keep a token while the mass before it is below top_p; the first one always stays.
        kept = int((cumulative - probs < params.top_p).sum())
        cumulative = cumulative[: max(kept, 1)]
    generator = np.random.Generator(np.random.Philox(key=params.seed, counter=step))
    threshold = generator.random() * float(cumulative[-1])
    index = int(torch.searchsorted(cumulative, threshold, right=True))
    return int(ids[min(index, cumulative.numel() - 1)])
