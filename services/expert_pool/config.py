"""Settings of an expert server."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from chiasm.config import ComputeSettings
from chiasm.transport.messages import MAX_STEP_TOKENS
from chiasm.types import Modality, ShardSpec


class ExpertPoolSettings(ComputeSettings):
    """One server of one pool. The text and the vision pool are this program with two settings."""

    model: Path = Field(description="Checkpoint directory.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16",
        description="Element type of activations, and of weights that are stored in full width.",
    )
    verify: bool = Field(
        False,
        description="Compare each file with the checkpoint's manifest before it is first read.",
    )
    device: str = Field("cpu", description="torch device of the weights.")
    modality: Modality = Field(description="Expert bank to serve: text or vision.")
    shards: str = Field(
        description="Shards to hold, of how many: 0,1/8; auto/8: those the orchestrator assigns."
    )
    max_shards: int = Field(
        0,
        ge=0,
        description="Most shards to be assigned with --shards auto/N; 0: as many as there are.",
    )
    max_dispatch_tokens: int = Field(
        4096,
        ge=1,
        le=MAX_STEP_TOKENS,
        description="Most tokens of one dispatch; bounds the message size.",
    )
    max_queued_dispatches: int = Field(
        256, ge=1, description="Dispatches queued over all streams; one more is refused."
    )
    max_queued_bytes: int = Field(
        1 << 30,
        gt=0,
        description="Bytes of dispatches queued and of answers not yet written, over all streams; "
        "a dispatch beyond it is refused.",
    )

    @field_validator("shards")
    @classmethod
    def _check_shards(cls, value: str) -> str:
        return str(ShardSpec.parse(value))

    @property
    def shard_spec(self) -> ShardSpec:
        """`shards`, parsed."""
        return ShardSpec.parse(self.shards)

    @property
    def max_assigned(self) -> int:
        """Most shards the orchestrator may assign; 0 with shards of its own."""
        spec = self.shard_spec
        return min(self.max_shards or spec.num_shards, spec.num_shards) if spec.is_auto else 0
