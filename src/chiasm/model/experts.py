"""Routed experts held by one process: some shards of one bank, loaded from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from chiasm import errors
from chiasm.kernels.moe import ShardWeights, shard_partial
from chiasm.model.checkpoint import Checkpoint
from chiasm.model.config import ModelConfig
from chiasm.model.moe import Partial
from chiasm.types import Modality, shard_experts


class ExpertBank:
    """Shards of one modality's experts. Read while another thread loads or drops shards: safe."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        modality: Modality,
        num_shards: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if not 1 <= num_shards <= config.text.num_experts:
            raise errors.InvalidArgument(
                "num_shards", f"{num_shards} shards of {config.text.num_experts} experts"
            )
        self.config, self.modality, self.num_shards = config, modality, num_shards
        self.dtype, self.device = dtype, device
        self._shards: dict[int, dict[int, ShardWeights]] = {}  # shard -> layer -> weights

    @property
    def shards(self) -> tuple[int, ...]:
        """Loaded shards, ascending."""
        return tuple(sorted(self._shards))

    @property
    def weight_bytes(self) -> int:
        """Bytes of expert weights held."""
        return sum(
            weights.gate_up.nbytes + weights.down.nbytes
            for layers in self._shards.values()
            for weights in layers.values()
        )

    def load(
        self, checkpoint: Checkpoint, shard: int, *, on_layer: Callable[[], None] | None = None
    ) -> None:
        """Reads one shard, and nothing else, from the checkpoint."""
        layers = {}
        for layer in self.config.text.moe_layers:
            layers[layer] = self._read(checkpoint, layer, shard)
            if on_layer is not None:
                on_layer()
        self._shards = {**self._shards, shard: layers}

    def drop(self, shard: int) -> None:
        """Forgets a shard; dispatches that already hold its weights finish with them."""
        self._shards = {s: layers for s, layers in self._shards.items() if s != shard}

    def partials(
        self,
        layer: int,
        shards: Iterable[int],
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        expert_weights: torch.Tensor,
    ) -> list[Partial]:
        """One partial per shard, ascending. Shapes as in Dispatch.

        Raises NotFound for a shard that is not loaded.
        """
        held = self._shards
        found = []
        for shard in sorted(shards):
            layers = held.get(shard)
            if layers is None:
                raise errors.NotFound(
                    f"{self.modality} shard {shard} is not loaded here", reason="SHARD_NOT_HELD"
                )
            rows, values = shard_partial(hidden, expert_ids, expert_weights, layers[layer])
            found.append(Partial(shard=shard, rows=rows, values=values))
        return found

    def _read(self, checkpoint: Checkpoint, layer: int, shard: int) -> ShardWeights:
        """Copies the shard's experts of one layer into two contiguous tensors."""
        text = self.config.text
        experts = shard_experts(shard, self.num_shards, text.num_experts)
        width = text.expert_intermediate(self.modality)
        shape = (len(experts), 2 * width, text.hidden_size)
        gate_up = torch.empty(shape, dtype=self.dtype, device=self.device)
        shape = (len(experts), text.hidden_size, width)
        down = torch.empty(shape, dtype=self.dtype, device=self.device)
        for i, expert in enumerate(experts):
            stored_gate_up, stored_down = checkpoint.expert(layer, self.modality, expert)
            gate_up[i].copy_(stored_gate_up)
            down[i].copy_(stored_down)
        return ShardWeights(first=experts.start, gate_up=gate_up, down=down)
