"""What each precision loses of random weights: squared error by variance, and bits a weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from chiasm.kernels.quant import int4, int8, tcq2
from chiasm.kernels.quant.formats import ExpertMatrices
from chiasm.kernels.quant.hadamard import RotatedMatrices, rotate

ROWS = 256
SEED = 0
_ENCODERS: dict[str, Callable[[torch.Tensor], ExpertMatrices]] = {
    "int8": int8.encode,
    "int4": int4.encode,
    "tcq2": tcq2.encode,
    "tcq2, rotated": lambda weight: RotatedMatrices(tcq2.encode(rotate(weight))),
}


def run(_: Path, report: Callable[[str], None]) -> dict[str, object]:
    """Errors and bits by weights and precision; the same on every machine, but for rounding."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, weight in _weights().items():
        found[name] = {
            precision: _measure(weight, encode) for precision, encode in _ENCODERS.items()
        }
        errors = ", ".join(f"{p} {row['error']:.5f}" for p, row in found[name].items())
        report(f"{name}: {errors}")
    bits = ", ".join(f"{p} {row['bits']:.3f}" for p, row in found["Gaussian, K = 2560"].items())
    report(f"bits a weight, K = 2560: {bits}")
    return {"rows": ROWS, "seed": SEED, "weights": found}


def _weights() -> dict[str, torch.Tensor]:
    """[1, ROWS, K] each."""
    torch.manual_seed(SEED)
    found = {f"Gaussian, K = {k}": torch.randn(1, ROWS, k) for k in (2560, 1536, 512)}
    for degrees in (8, 4):
        student = torch.distributions.StudentT(degrees)
        found[f"Student's t, {degrees} degrees of freedom"] = student.sample((1, ROWS, 2560))
    return found


def _measure(
    weight: torch.Tensor, encode: Callable[[torch.Tensor], ExpertMatrices]
) -> dict[str, float]:
    matrices = encode(weight)
    lost = (matrices.dequantize(0, torch.float32) - weight[0]).square().mean()
    return {
        "error": float(lost / weight.var()),
        "bits": 8 * matrices.nbytes / weight.numel(),
    }
