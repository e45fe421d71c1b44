"""Settings of a vision encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from chiasm.config import ComputeSettings

_MIB = 1024 * 1024


class EncoderSettings(ComputeSettings):
    """One vision encoder process."""

    model: Path = Field(description="Checkpoint directory.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="Element type of weights and embeddings."
    )
    device: str = Field("cpu", description="torch device of the ViT and the resampler.")

    max_media_bytes: int = Field(64 * _MIB, gt=0, description="Most bytes of one media item.")
    max_image_pixels: int = Field(
        100_000_000,
        gt=0,
        description="Most pixels an image or a video frame may declare; a frame never more than 36 "
        "million.",
    )
    max_upload_bytes: int = Field(
        512 * _MIB, gt=0, description="Most bytes of files that are held until they are decoded."
    )
    max_memory_bytes: int = Field(
        8 * _MIB,
        ge=0,
        description="Larger files are held in the folder of temporary files (TMPDIR) instead of in "
        "memory.",
    )
    max_queue_patches: int = Field(
        500_000,
        gt=0,
        description="Patches queued or running from which on no further item is taken.",
    )
    max_batch_patches: int = Field(
        32_768,
        gt=0,
        description="Patches per pass of the ViT; longer videos take several such passes.",
    )
    cache_bytes: int = Field(
        1024 * _MIB, gt=0, description="Bytes of embeddings kept for the decoders to fetch."
    )
