"""Routed experts held by one process: some shards of one bank, loaded from a checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator

import torch

from chiasm import errors
from chiasm.kernels import native
from chiasm.kernels.moe import ShardWeights, compile_ahead, shard_partial
from chiasm.model.checkpoint import Checkpoint
from chiasm.model.config import ModelConfig
from chiasm.model.expert_weights import Bank, read_experts
from chiasm.model.moe import Dispatch, Partial
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
        self._changing = threading.Lock()

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

    @property
    def precision(self) -> str:
        """How the weights are stored: one word, or several joined by + where layers differ."""
        layers = self.config.text.moe_layers
        formats = (self.config.quantization.of(layer, self.modality) for layer in layers)
        dense = str(self.dtype).removeprefix("torch.")
        words = [dense if form.is_stored else form.precision for form in formats]
        return "+".join(dict.fromkeys(words)) or dense

    def weights(self, layer: int, shard: int) -> ShardWeights:
        """A loaded shard's weights of one layer."""
        return self._shards[shard][layer]

    def load(
        self, checkpoint: Checkpoint, shard: int, *, on_layer: Callable[[], None] | None = None
    ) -> None:
        """Reads one shard, and nothing else, from the checkpoint.

        It is held once all that it needs has been compiled.
        """
        if self.device.type == "cpu":
            native.library()  # compiled now rather than during the first dispatch
        layers: dict[int, ShardWeights] = {}
        formats = set()
        for layer in self.config.text.moe_layers:
            layers[layer] = self._read(checkpoint, layer, shard)
            form = self.config.quantization.of(layer, self.modality)
            if form not in formats:  # a kernel serves all layers of one format
                formats.add(form)
                compile_ahead(
                    layers[layer],
                    top_k=self.config.text.moe_k,
                    dtype=self.dtype,
                    device=self.device,
                )
            if on_layer is not None:
                on_layer()
        with self._changing:
            self._shards = {**self._shards, shard: layers}

    def drop(self, shard: int) -> None:
        """Forgets a shard; dispatches that already hold its weights finish with them."""
        with self._changing:
            self._shards = {s: layers for s, layers in self._shards.items() if s != shard}

    def partials(
        self,
        layer: int,
        shards: Iterable[int],
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        expert_weights: torch.Tensor,
        spent: torch.Tensor | None = None,
    ) -> Iterator[Partial]:
        """One partial per shard, ascending, computed when it is asked for. Shapes as in Dispatch.

        spent: int64 [E] by expert of the bank, see `kernels.moe.shard_partial`.

        Raises NotFound for a shard that is not loaded, before any is computed; one that is dropped
        later is computed all the same.
        """
        held, wanted = self._shards, sorted(shards)
        for shard in wanted:
            if shard not in held:
                raise errors.NotFound(
                    f"{self.modality} shard {shard} is not loaded here", reason="SHARD_NOT_HELD"
                )

        def compute() -> Iterator[Partial]:
            for shard in wanted:
                weights = held[shard][layer]
                given = (hidden, expert_ids, expert_weights, weights)
                own = slice(weights.first, weights.first + weights.num_experts)
                rows, values = shard_partial(*given, None if spent is None else spent[own])
                yield Partial(shard=shard, rows=rows, values=values)

        return compute()

    def answer(self, dispatch: Dispatch) -> list[Partial]:
        """The partials of every shard that is loaded."""
        return list(
            self.partials(
                dispatch.layer,
                self.shards,
                dispatch.hidden,
                dispatch.expert_ids,
                dispatch.expert_weights,
            )
        )

    def _read(self, checkpoint: Checkpoint, layer: int, shard: int) -> ShardWeights:
        experts = shard_experts(shard, self.num_shards, self.config.text.num_experts)
        bank = Bank(
            config=self.config,
            layer=layer,
            modality=self.modality,
            format=self.config.quantization.of(layer, self.modality),
            dtype=self.dtype,
            device=self.device,
        )
        gate_up, down = read_experts(checkpoint, bank, experts)
        return ShardWeights(first=experts.start, gate_up=gate_up, down=down)
