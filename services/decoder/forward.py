"""One step's forward pass: chunks in, final hidden states out."""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from typing import Literal

import torch

from chiasm.model.text import Batch, LanguageModel, Stages, interleave
from chiasm.services.decoder import step
from chiasm.services.decoder.kv_cache import PagedKVCache, Placed
from chiasm.services.decoder.micro_batches import MicroBatchPolicy, halves
from chiasm.services.decoder.pools import ExpertPools
from chiasm.services.decoder.scheduler import Chunk
from chiasm.telemetry import metrics

Mode = Literal["auto", "on", "off"]


class ForwardPass:
    """Runs chunks through the model, as one batch or as two micro-batches that take turns."""

    def __init__(
        self,
        model: LanguageModel,
        cache: PagedKVCache,
        pools: ExpertPools,
        *,
        device: torch.device,
        micro_batches: Mode,
    ) -> None:
        self.model = model
        self._cache, self._pools, self._device = cache, pools, device
        self._mode, self._policy = micro_batches, MicroBatchPolicy()

    def run(self, chunks: Seq[Chunk]) -> torch.Tensor:
        """Hidden states [T, H] of the chunks' tokens, one chunk after the other."""
        start, waited = time.monotonic_ns(), sum(self._pools.wait_ns.values())
        is_split = self._is_split(chunks)
        batches = halves(chunks) if is_split else (list(chunks),)
        # Both parts are laid out before either runs: the second must not wait for it at its turn.
        hidden = torch.cat(interleave([self._stages(batch) for batch in batches]))
        self._policy.record(
            chunks,
            was_split=is_split,
            step_ns=time.monotonic_ns() - start,
            wait_ns=sum(self._pools.wait_ns.values()) - waited,
        )
        metrics.SPLIT_STEPS.labels(str(is_split).lower()).inc()
        return hidden

    def _is_split(self, chunks: Seq[Chunk]) -> bool:
        if self._mode == "auto":
            return self._policy.should_split(chunks)
        return self._mode == "on" and sum(c.num_tokens for c in chunks) > 1

    def _stages(self, chunks: Seq[Chunk]) -> Stages:
        laid_out = step.build(chunks, self.model, self._device)
        batch = Batch(
            positions=laid_out.positions,
            rows=laid_out.rows,
            attention=self._cache.bind(
                [Placed(c.sequence.table, c.start, c.num_tokens) for c in chunks]
            ),
            experts=self._pools,
        )
        return self.model.model.stages(laid_out.embeddings, batch)
