"""What a measurement ran on."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

from chiasm import cores

_NVIDIA = Path("/proc/driver/nvidia/version")
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512vbmi", "avx512_bf16", "amx_bf16", "amx_int8")
"""Instructions that products take."""


def describe() -> dict[str, object]:
    """Processor, cores, memory and versions, as far as the system tells."""
    return {
        "processor": _processor(),
        "cores": cores.usable(),
        "memory": _field("/proc/meminfo", "MemTotal"),
        "gpu": _gpu(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "grpcio": version("grpcio"),
    }


def _processor() -> str:
    """Its name, which hosts of virtual machines often hide, and what tells it all the same."""
    name = _cpu("model name") or platform.processor()
    numbers = [f"{key} {value}" for key in ("cpu family", "model") if (value := _cpu(key))]
    flags = set(_cpu("flags").split())
    has = [flag for flag in _FLAGS if flag in flags]
    return ", ".join([name, *numbers, *has])


def _cpu(name: str) -> str:
    return _field("/proc/cpuinfo", name)


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
