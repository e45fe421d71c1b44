"""Settings of the decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from chiasm.config import ComputeSettings
from chiasm.transport.messages import MAX_STEP_TOKENS


class DecoderSettings(ComputeSettings):
    """One decoder process."""

    model: Path = Field(description="Checkpoint directory.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="Element type of weights and activations."
    )
    device: str = Field("cpu", description="torch device of the model and the KV cache.")
    video_advance: Literal["original", "transformers"] | None = Field(
        None, description="Rule by which positions advance after a video; unset: the checkpoint's."
    )
    colocate: bool = Field(False, description="Run both expert pools inside this process.")
    text_shards: int = Field(1, ge=1, description="Shards of the colocated text pool.")
    vision_shards: int = Field(1, ge=1, description="Shards of the colocated vision pool.")
    max_running: int = Field(32, ge=1, description="Requests that decode together.")
    max_waiting: int = Field(256, ge=1, description="Requests that may wait beside a full batch.")
    max_step_tokens: int = Field(
        512,
        ge=1,
        le=MAX_STEP_TOKENS,
        description="Tokens of one engine step, more than max_running; longer prompts are "
        "prefilled in chunks.",
    )
    kv_cache_tokens: int = Field(
        0, ge=0, description="Tokens the KV cache holds; 0: four times the model's context."
    )
    block_size: int = Field(16, ge=1, le=1024, description="Tokens of one block of the KV cache.")
    micro_batches: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Run a step as two halves that take turns at attention and experts; auto: "
        "where measured steps of several requests are faster so.",
    )
    speculation: Literal["off", "ngram"] = Field(
        "off",
        description="Guess the next tokens of a request from earlier ones and check them in one "
        "step; the answer is the same. ngram: what followed the same tokens before.",
    )
    speculation_tokens: int = Field(
        8, ge=1, le=64, description="Most tokens that are guessed at once for one request."
    )
    embedding_cache_bytes: int = Field(
        256 << 20, ge=0, description="Bytes of the cache of media embeddings."
    )
    park_timeout_s: float = Field(
        30.0, gt=0, description="Seconds a request waits for an expert pool that is away."
    )
    attempt_timeout_s: float = Field(
        10.0,
        gt=0,
        description="Seconds a dispatch of up to 512 tokens may take before its server counts as "
        "hung and another replica is tried; more tokens have more time, in proportion.",
    )
    dispatch_timeout_s: float = Field(
        30.0, gt=0, description="Seconds such a dispatch may take over all attempts."
    )
    hedge_budget: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Share of dispatches that may go to a replica too when their server is slow; "
        "0: none.",
    )
    hedge_after_s: float = Field(
        0.0,
        ge=0,
        description="Seconds after which a server is slow; 0: later than 99 of 100 of late.",
    )
    lane: bool = Field(
        True, description="Reach expert servers of the same host through shared memory."
    )
    fetch_timeout_s: float = Field(
        30.0, gt=0, description="Seconds fetching one item's embeddings may take."
    )

    @model_validator(mode="after")
    def _check_step(self) -> Self:
        if self.max_step_tokens <= self.max_running:
            raise ValueError(
                "--max-step-tokens must be more than --max-running: a step in which all requests "
                "decode would have no room for a prompt"
            )
        return self
