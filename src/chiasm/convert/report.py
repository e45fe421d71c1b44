"""What a conversion did to the weights, layer by layer, from the notes in its manifest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from chiasm.convert.encode import Cost
from chiasm.convert.plan import DenseFile, ExpertFile, Plan
from chiasm.model.manifest import Manifest

DENSE = "dense"
"""The part of matrices that every token goes through."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One file's matrices together. layer: None for those of no layer. part: the bank whose experts
    they are, or DENSE. file_bits: of the file, headers too."""

    layer: int | None
    part: str
    precision: str
    cost: Cost
    file_bits: int

    @property
    def bound(self) -> float:
        """The least mean squared error, by variance, that any code of as many bits can reach on
        independent Gaussian weights (Shannon 1959): 2^(-2 R)."""
        return 2 ** (-2 * self.cost.bits_per_weight)

    @property
    def gap_db(self) -> float:
        """The error by that bound, in decibels. Weights that are not independent can go below 0."""
        return 10 * math.log10(self.cost.mse / self.bound) if self.cost.mse else -math.inf


def rows(plan: Plan, manifest: Manifest) -> list[Row]:
    """One row for each file in low precision, in the order of writing."""
    found = []
    layer: int | None
    for file in plan.files:
        if isinstance(file, ExpertFile):
            form = file.bank.format
            layer, part = file.bank.layer, str(file.bank.modality)
            precision = form.precision + ("+rotated" if form.is_rotated else "")
        elif isinstance(file, DenseFile):
            layer, part, precision = file.layer, DENSE, plan.quantization.dense
        else:
            continue
        entry = manifest.files[file.name]
        found.append(
            Row(
                layer=layer,
                part=part,
                precision=precision,
                cost=sum((Cost(**notes) for notes in entry.notes.values()), Cost()),
                file_bits=8 * entry.num_bytes,
            )
        )
    return found


def document(found: list[Row]) -> dict[str, Any]:
    """The rows, and all of them together by precision, as one JSON object."""
    experts = [row for row in found if row.part != DENSE]
    return {
        "layers": [_numbers(row) for row in found],
        "by_precision": {
            precision: {
                "bits_per_weight": total.bits_per_weight,
                "mse": total.mse,
                "relative_error": total.relative_error,
            }
            for precision, total in _totals(found).items()
        },
        "experts_bits_per_weight": sum(row.file_bits for row in experts)
        / max(1, sum(row.cost.num_weights for row in experts)),
    }


def table(found: list[Row]) -> Table:
    """The rows for a person."""
    view = Table(
        "layer", "part", "precision", title="weights, before and after", title_justify="left"
    )
    for header in ("bits/weight", "rel. error", "MSE", "bound", "gap"):
        view.add_column(header, justify="right")
    for row in found:
        view.add_row(
            "" if row.layer is None else str(row.layer),
            row.part,
            row.precision,
            f"{row.cost.bits_per_weight:.3f}",
            f"{row.cost.relative_error:.4f}",
            f"{row.cost.mse:.2e}",
            f"{row.bound:.2e}",
            f"{row.gap_db:+.2f} dB",
        )
    return view


def _numbers(row: Row) -> dict[str, Any]:
    return {
        "layer": row.layer,
        "part": row.part,
        "precision": row.precision,
        "num_weights": row.cost.num_weights,
        "bits_per_weight": row.cost.bits_per_weight,
        "file_bits_per_weight": row.file_bits / row.cost.num_weights,
        "mse": row.cost.mse,
        "relative_error": row.cost.relative_error,
        "gaussian_bound": row.bound,
        "gap_db": row.gap_db if math.isfinite(row.gap_db) else None,
    }


def _totals(found: list[Row]) -> dict[str, Cost]:
    totals: dict[str, Cost] = {}
    for row in found:
        totals[row.precision] = totals.get(row.precision, Cost()) + row.cost
    return totals
