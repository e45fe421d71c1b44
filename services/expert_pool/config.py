"""Settings of an expert server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from chiasm.config import ServiceSettings
from chiasm.types import Modality, ShardSpec


def _parse_shards(value: object) -> object:
    return ShardSpec.parse(value) if isinstance(value, str) else value


class ExpertPoolSettings(ServiceSettings):
    """One server of one pool. The text and the vision pool are this program with two settings."""

    model: Path = Field(description="Checkpoint directory.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="Element type of weights and activations."
    )
    device: str = Field("cpu", description="torch device of the weights.")
    modality: Modality = Field(description="Expert bank to serve: text or vision.")
    shards: Annotated[ShardSpec, BeforeValidator(_parse_shards)] = Field(
        description="Shards to hold, of how many: 0,1/8."
    )
    max_dispatch_tokens: int = Field(
        4096, ge=1, description="Most tokens of one dispatch; bounds the message size."
    )
    max_queued_dispatches: int = Field(
        256, ge=1, description="Dispatches queued over all streams; one more is refused."
    )
