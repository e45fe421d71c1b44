"""The text decoder: embeddings, attention, gates, shared experts, head, under the hub's names.

It works on a flat batch: the tokens of all sequences of one step, one after the other. Where keys
and values live and which tokens see which is the attention context's business; where routed experts
live is the Experts' business.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from chiasm.model.config import TextConfig
from chiasm.model.linear import Embedding, Linear, Matrix
from chiasm.model.moe import Experts, MoeBlock, SwiGLU
from chiasm.model.norm import RMSNorm
from chiasm.model.rope import rotary_tables, rotate
from chiasm.types import Modality

Stages = Generator[None, None, torch.Tensor]
"""A computation that yields where it could wait for experts, and returns its result."""


class AttentionContext(Protocol):
    """Keys, values and masks of the sequences in a batch."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Stores the new keys and values [T, kv_heads, d] and attends.

        query and result: [T, heads, d]. Scale d^-0.5, causal within each sequence.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What the layers need besides the hidden states.

    positions: int64 [3, T], rows T, H, W. rows: int64 indices of the tokens of each modality
    present; together they are 0..T-1.
    """

    positions: torch.Tensor
    rows: dict[Modality, torch.Tensor]
    attention: AttentionContext
    experts: Experts


class Attention(nn.Module):
    """Grouped-query attention without biases; rotation before the cache."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        query_size, kv_size = (
            heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads)
        )
        self.q_proj = Linear(config.hidden_size, query_size)
        self.k_proj = Linear(config.hidden_size, kv_size)
        self.v_proj = Linear(config.hidden_size, kv_size)
        self.o_proj = Linear(query_size, config.hidden_size)

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        context: AttentionContext,
    ) -> torch.Tensor:
        query, key, value = (
            proj(x).unflatten(-1, (-1, self.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = context.attend(self.layer, rotate(query, *rotary), rotate(key, *rotary), value)
        projected: torch.Tensor = self.o_proj(out.flatten(-2))
        return projected


class DecoderLayer(nn.Module):
    """x + Attn(RMS(x)), then x + FFN(RMS(x)); the FFN is dense or a MoE block."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp: MoeBlock | SwiGLU = (
            MoeBlock(config, layer)
            if config.sparse_layers[layer]
            else SwiGLU(config.hidden_size, config.intermediate_size)
        )

    def stages(
        self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], batch: Batch
    ) -> Stages:
        """The layer's output; yields while routed experts are under way."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, batch.attention)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoeBlock):
            out: torch.Tensor = yield from self.mlp.stages(normed, batch.rows, batch.experts)
        else:
            out = self.mlp(normed)
        return x + out


class TextModel(nn.Module):
    """Embeddings, layers and final norm."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer) for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def stages(self, embeddings: torch.Tensor, batch: Batch) -> Stages:
        """embeddings [T, H], media rows already in place -> normed hidden states [T, H]."""
        rotary = rotary_tables(batch.positions, self.config)
        x = embeddings
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            x = yield from layer.stages(x, rotary, batch)
        out: torch.Tensor = self.norm(x)
        return out


class LanguageModel(nn.Module):
    """Everything of the decoder but the routed experts; parameter names are the hub's, whole."""

    fp32_parameters = ("mlp.gate.weight", "mlp.gate.weight_1", "e_score_correction_bias")
    """Suffixes of parameters that stay float32 in a bfloat16 model."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.model = TextModel(config)
        self.lm_head = (
            None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        )

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 [T] -> [T, H]."""
        return self.model.embed_tokens.rows(token_ids, self.model.norm.weight.dtype)

    def forward(self, embeddings: torch.Tensor, batch: Batch) -> torch.Tensor:
        """embeddings [T, H] -> final hidden states [T, H]; see TextModel."""
        return interleave([self.model.stages(embeddings, batch)])[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [N, H] -> float32 [N, V]; the product is in the model's dtype."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return head.multiply(hidden).float()


def matrices(config: TextConfig) -> dict[str, tuple[int, int]]:
    """Shapes [N, K] of the language model's matrices by canonical name without `.weight`: all its
    weights but norms, gates and routed experts."""
    with torch.device("meta"):
        model = LanguageModel(config)
    return {
        name: (module.weight.shape[0], module.weight.shape[1])
        for name, module in model.named_modules()
        if isinstance(module, Matrix)
    }


def interleave(computations: Sequence[Stages]) -> list[torch.Tensor]:
    """Runs computations in turns, each up to its next yield; returns their results.

    While one waits for its experts the others do attention. The first is ahead at every layer, so
    tokens of a later one may attend to tokens of an earlier one.
    """
    results: dict[int, torch.Tensor] = {}
    while len(results) < len(computations):
        for index, computation in enumerate(computations):
            if index not in results:
                try:
                    next(computation)
                except StopIteration as end:
                    results[index] = end.value
    return [results[index] for index in range(len(computations))]
