"""What a measurement ran on."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

from chiasm import cores

_NVIDIA = Path("/proc/driver/nvidia/version")


def describe() -> dict[str, object]:
    """Processor, cores, memory and versions, as far as the system tells."""
    return {
        "processor": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": cores.usable(),
        "memory": _field("/proc/meminfo", "MemTotal"),
        "gpu": _gpu(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "grpcio": version("grpcio"),
    }


def _gpu() -> str:
    if not _NVIDIA.exists():
        return "none"
    import torch  # seconds to import: only where there is something to ask

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def _field(path: str, name: str) -> str:
    try:
        for line in Path(path).read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    except OSError:
        return ""
    return ""
