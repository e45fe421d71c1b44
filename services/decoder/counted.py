"""An expert bank inside the decoder that counts its experts' tokens, as an expert server does."""

from __future__ import annotations

import torch

from chiasm.model.experts import ExpertBank
from chiasm.model.moe import Dispatch, Partial
from chiasm.telemetry import metrics


class CountedBank(ExpertBank):
    """Exports chiasm_expert_tokens_total."""

    def answer(self, dispatch: Dispatch) -> list[Partial]:
        """As ExpertBank's; every shard is here, so every choice counts."""
        counts = torch.bincount(dispatch.expert_ids.flatten()).tolist()
        for expert, count in enumerate(counts):
            if count:
                metrics.EXPERT_TOKENS.labels(str(self.modality), str(expert)).inc(count)
        return super().answer(dispatch)
