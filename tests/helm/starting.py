"""What the tests of rendered objects share: values to render, and processes started from them."""

from __future__ import annotations

from pathlib import Path

import pytest
from helm.rendering import EXAMPLES, NAME, Object, container, environment

from chiasm.config import ProcessSettings
from chiasm.flags import parse_settings
from chiasm.orchestrator.config import OrchestratorSettings
from chiasm.services.decoder.config import DecoderSettings
from chiasm.services.expert_pool.config import ExpertPoolSettings
from chiasm.services.gateway.config import GatewaySettings
from chiasm.services.vision_encoder.config import EncoderSettings

VALUES = [(), *((path,) for path in EXAMPLES)]
EXAMPLE = {path.stem: (path,) for path in EXAMPLES}

SETTINGS: dict[str, type[ProcessSettings]] = {
    "gateway": GatewaySettings,
    "encoder": EncoderSettings,
    "decoder": DecoderSettings,
    "text-experts": ExpertPoolSettings,
    "vision-experts": ExpertPoolSettings,
    "orchestrator": OrchestratorSettings,
}


def name(values: tuple[Path, ...]) -> str:
    return values[0].stem if values else "defaults"


def started(
    found: dict[str, Object], component: str, monkeypatch: pytest.MonkeyPatch
) -> ProcessSettings:
    """The settings a component's process would start with, read by its own program."""
    variables = environment(container(found, component))
    fields = {"$(POD_IP)": "10.1.2.3", "$(POD_NAME)": f"{NAME}-{component}-0"}
    for key, value in variables.items():
        monkeypatch.setenv(key, fields.get(value, value))
    return parse_settings(SETTINGS[component], [], prog=component)
