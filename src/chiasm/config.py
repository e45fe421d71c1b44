"""What every service's settings share.

Sources, strongest first: command-line flags, environment variables (CHIASM_<FIELD>), the YAML file
named by CHIASM_CONFIG, defaults.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from chiasm.types import TlsFiles


class ProcessSettings(BaseSettings):
    """Settings of any process, the orchestrator included."""

    model_config = SettingsConfigDict(env_prefix="CHIASM_", extra="ignore", frozen=True)

    bind: str = Field("127.0.0.1:0", description="host:port to listen on; port 0 takes a free one.")
    advertise_host: str = Field(
        "127.0.0.1", description="Host under which the other services reach this one."
    )
    metrics_host: str = Field("", description="Host of /metrics; empty: that of --bind.")
    metrics_port: int = Field(
        0, ge=0, le=65535, description="Port of /metrics; 0 takes a free one."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe events to log."
    )
    grace_s: float = Field(
        10.0, gt=0, description="Seconds that work in flight may take after SIGTERM."
    )
    tls_cert: Path | None = Field(
        None, description="PEM certificate shown to and by the other services; unset: plain text."
    )
    tls_key: Path | None = Field(None, description="PEM key of --tls-cert.")
    tls_ca: Path | None = Field(
        None, description="PEM certificate of the CA that has signed those of all services."
    )
    tls_name: str = Field(
        "", description="Name in the certificates of the services; empty: the host called."
    )
    health_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="Port of a second server, in plain text and with health alone, for probes "
        "that speak no TLS; unset: none.",
    )

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        given = [value is not None for value in (self.tls_cert, self.tls_key, self.tls_ca)]
        if any(given) and not all(given):
            raise ValueError("--tls-cert, --tls-key and --tls-ca belong together")
        return self

    @property
    def peer_tls(self) -> TlsFiles | None:
        """With what this process calls the other services; None: plain text."""
        if self.tls_cert is None:
            return None
        return TlsFiles(cert=self.tls_cert, key=self.tls_key, ca=self.tls_ca, name=self.tls_name)

    @property
    def port_tls(self) -> TlsFiles | None:
        """What the process's port uses: callers must be services of the system."""
        return self.peer_tls

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _yaml(settings_cls)


def _yaml(settings_cls: type[BaseSettings]) -> YamlConfigSettingsSource:
    """The file that CHIASM_CONFIG names. Raises SettingsError for one that is not there or no YAML:
    what it says, of keys and certificates for instance, must not be passed over."""
    file = os.environ.get("CHIASM_CONFIG") or None
    if file is not None and not Path(file).is_file():
        raise SettingsError(f"CHIASM_CONFIG: there is no file {file}")
    try:
        return YamlConfigSettingsSource(settings_cls, yaml_file=file)
    except Exception as error:  # of the parser, or of whoever expected a mapping
        raise SettingsError(f"CHIASM_CONFIG: {file}: {' '.join(str(error).split())}") from None


class ServiceSettings(ProcessSettings):
    """Settings of a member; each service extends it in its config.py."""

    orchestrator: str = Field(
        "", description="host:port of the orchestrator; empty: the service runs alone."
    )
    member_name: str = Field(
        "",
        max_length=200,
        description="Begin of the member id, as the name of the pod; empty: the kind of service.",
    )


class ComputeSettings(ServiceSettings):
    """Settings of a member that computes, in a loop of its own."""

    stall_s: float = Field(
        300.0,
        gt=0,
        description="Seconds without a step, while there is work, after which the process is not "
        "live; longer than its longest step.",
    )
