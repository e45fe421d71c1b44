"""What every service's settings share.

Sources, strongest first: command-line flags, environment variables (CHIASM_<FIELD>), the YAML file
named by CHIASM_CONFIG, defaults.
"""

from __future__ import annotations

import os
from typing import Literal

from pydantic import Field
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)


class ProcessSettings(BaseSettings):
    """Settings of any process, the orchestrator included."""

    model_config = SettingsConfigDict(env_prefix="CHIASM_", extra="ignore", frozen=True)

    bind: str = Field("127.0.0.1:0", description="host:port to listen on; port 0 takes a free one.")
    advertise_host: str = Field(
        "127.0.0.1", description="Host under which the other services reach this one."
    )
    metrics_port: int = Field(
        0, ge=0, le=65535, description="Port of /metrics; 0 takes a free one."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe events to log."
    )
    grace_s: float = Field(
        10.0, gt=0, description="Seconds that work in flight may take after SIGTERM."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        yaml = YamlConfigSettingsSource(settings_cls, yaml_file=os.environ.get("CHIASM_CONFIG"))
        return init_settings, env_settings, yaml


class ServiceSettings(ProcessSettings):
    """Settings of a member; each service extends it in its config.py."""

    orchestrator: str = Field(
        "", description="host:port of the orchestrator; empty: the service runs alone."
    )
