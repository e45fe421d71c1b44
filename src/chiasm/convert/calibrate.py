"""Mean squares of every expert's inputs over questions of the training split.

An input that is always small may be multiplied with a coarse weight. Experts that see too few
tokens are given what their bank saw on the whole.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import structlog
import torch
import torch.nn.functional as F

from chiasm.convert.model import WholeModel
from chiasm.convert.quality import batches
from chiasm.kernels.moe import ShardWeights
from chiasm.model.expert_weights import DOWN, GATE_UP
from chiasm.model.moe import Dispatch
from chiasm.training.data.encode import Encoder
from chiasm.training.data.stream import Stream
from chiasm.types import Modality

log = structlog.get_logger()

DTYPE = torch.float32

MIN_TOKENS = 64
"""Fewer tell little of an expert's inputs."""

_FLOOR = 1e-3
"""Least weight of an error, by the mean: an input that was silent here may speak elsewhere."""


class Squares:
    """Sums by (layer, bank, projection): squares [E, K] and tokens [E]."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, Modality, str], torch.Tensor] = {}
        self._counts: dict[tuple[int, Modality], torch.Tensor] = {}

    def add(self, dispatch: Dispatch, weights: ShardWeights) -> None:
        """Takes note of a dispatch's tokens and of what their experts make of them.

        weights: of the whole bank.
        """
        layer, num_experts = dispatch.layer, weights.num_experts
        counts = self._counts.setdefault((layer, dispatch.modality), torch.zeros(num_experts))
        for expert in torch.unique(dispatch.expert_ids).tolist():
            rows = (dispatch.expert_ids == expert).any(dim=-1)
            x = dispatch.hidden[rows]
            gate, up = weights.gate_up.linear(x, expert).chunk(2, dim=-1)
            for projection, inputs in ((GATE_UP, x), (DOWN, F.silu(gate) * up)):
                key = layer, dispatch.modality, projection
                sums = self._sums.setdefault(key, torch.zeros(num_experts, inputs.shape[-1]))
                sums[expert] += inputs.float().square().sum(dim=0)
            counts[expert] += len(x)

    def importance(
        self, layer: int, modality: Modality, expert: int, projection: str
    ) -> torch.Tensor | None:
        """float32 [K], or None for a bank that saw no token."""
        sums, counts = self._sums.get((layer, modality, projection)), None
        if sums is None:
            return None
        counts = self._counts[layer, modality]
        if counts[expert] >= MIN_TOKENS:
            mean = sums[expert] / counts[expert]
        else:
            mean = sums.sum(dim=0) / counts.sum()
        return mean.clamp(min=float(mean.mean()) * _FLOOR)


def collect(directory: Path, num_samples: int) -> Squares:
    """Runs `num_samples` training questions through the whole model, in DTYPE."""
    log.info("calibrating", questions=num_samples)
    model = WholeModel(directory, DTYPE)
    squares = Squares()

    def add(dispatch: Dispatch) -> None:
        squares.add(dispatch, model.banks[dispatch.modality].weights(dispatch.layer, 0))

    samples = itertools.islice(Stream().samples(), num_samples)
    for batch in batches(Encoder.load(directory), samples):
        model.logits(batch, on_dispatch=add)
    return squares
