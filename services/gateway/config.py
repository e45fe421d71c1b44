"""Settings of the gateway: the model it speaks for and the bounds it holds every request to."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from chiasm.config import ServiceSettings
from chiasm.types import TlsFiles

_MIB = 1024 * 1024
_ENVELOPE_BYTES = _MIB
"""Room in a message for everything that is neither media nor text: token ids, names, framing."""


class GatewaySettings(ServiceSettings):
    """One gateway process."""

    model: Path = Field(description="Model directory; its config and tokenizer are read.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="Element type the decoders compute in; clients are told."
    )
    model_name: str = Field("", description="Name clients use; empty: the directory's name.")

    max_media_items: int = Field(64, ge=0, description="Most images and videos of one request.")
    max_media_bytes: int = Field(64 * _MIB, gt=0, description="Most bytes of one media item.")
    max_request_media_bytes: int = Field(
        128 * _MIB, gt=0, le=1024 * _MIB, description="Most bytes of all media of one request."
    )
    max_image_pixels: int = Field(
        100_000_000,
        gt=0,
        description="Most pixels an image or a video frame may declare; a frame never more than 36 "
        "million.",
    )
    max_text_bytes: int = Field(
        4 * _MIB, gt=0, le=256 * _MIB, description="Most UTF-8 bytes of text of one request."
    )
    max_prompt_logits_bytes: int = Field(
        256 * _MIB, ge=0, description="Most bytes of prompt logits of one answer."
    )
    max_in_flight: int = Field(
        256, gt=0, description="Requests worked on at once; more are refused, to come back later."
    )
    max_held_media_bytes: int = Field(
        512 * _MIB,
        gt=0,
        description="Most bytes of media of all requests worked on at once; more are refused, to "
        "come back later. A single request may have more.",
    )
    max_concurrent_encodes: int = Field(
        8, gt=0, description="Media items of one request that are encoded at the same time."
    )

    default_timeout_s: float = Field(
        600.0, gt=0, description="Deadline of a request whose client sets none."
    )
    park_timeout_s: float = Field(
        30.0, ge=0, description="How long a request waits for a missing encoder or decoder."
    )
    retry_after_s: float = Field(
        1.0, gt=0, description="What refused clients are told to wait before they come back."
    )

    public_tls_cert: Path | None = Field(
        None, description="PEM certificate shown to clients; unset: that of --tls-cert."
    )
    public_tls_key: Path | None = Field(None, description="PEM key of --public-tls-cert.")
    public_tls_ca: Path | None = Field(
        None,
        description="PEM certificate of the CA of clients; unset: they need no certificate.",
    )
    api_keys: Path | None = Field(
        None, description="File of API keys, one a line; unset: calls need none."
    )
    keyless: Literal["none", "health", "health+reflection"] = Field(
        "health", description="What may be called without an API key."
    )

    @model_validator(mode="after")
    def _check_public_tls(self) -> Self:
        if (self.public_tls_cert is None) != (self.public_tls_key is None):
            raise ValueError("--public-tls-cert and --public-tls-key belong together")
        if self.public_tls_ca is not None and self.port_tls is None:
            raise ValueError("--public-tls-ca needs a certificate to show as well")
        return self

    @property
    def port_tls(self) -> TlsFiles | None:
        """What the port uses: clients are no services, so they need no certificate of theirs."""
        ca = self.public_tls_ca
        if self.public_tls_cert is not None:
            return TlsFiles(cert=self.public_tls_cert, key=self.public_tls_key, ca=ca)
        if self.tls_cert is not None:
            return TlsFiles(cert=self.tls_cert, key=self.tls_key, ca=ca)
        return None

    @property
    def served_name(self) -> str:
        """The name GetModel gives and GenerateRequest.model must equal."""
        return self.model_name or self.model.resolve().name

    @property
    def max_request_bytes(self) -> int:
        """Bound of one message: media may come base64-coded, which takes 4/3 of their size."""
        return self.max_request_media_bytes * 4 // 3 + self.max_text_bytes + _ENVELOPE_BYTES
