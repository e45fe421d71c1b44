"""An expert bank inside the decoder that counts its experts' tokens, as an expert server does."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from chiasm.model.experts import ExpertBank
from chiasm.model.moe import Partial
from chiasm.telemetry import metrics


class CountedBank(ExpertBank):
    """Exports chiasm_expert_tokens_total."""

    def partials(
        self,
        layer: int,
        shards: Iterable[int],
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        expert_weights: torch.Tensor,
    ) -> list[Partial]:
        """As ExpertBank's; every shard is here, so every choice counts."""
        counts = torch.bincount(expert_ids.flatten()).tolist()
        for expert, count in enumerate(counts):
            if count:
                metrics.EXPERT_TOKENS.labels(str(self.modality), str(expert)).inc(count)
        return super().partials(layer, shards, hidden, expert_ids, expert_weights)
