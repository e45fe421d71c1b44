"""What a run leaves to look at: metrics.csv, load.csv, TensorBoard where installed, and plots."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from chiasm.training.routing import Usage
from chiasm.types import Modality

METRICS, LOADS = "metrics.csv", "load.csv"
COLUMNS = (
    "step",
    "stage",
    "tokens",
    "learning_rate",
    "loss",
    "load_balance",
    "z",
    "orthogonality",
    "grad_norm",
    "text_imbalance",
    "vision_imbalance",
    "tokens_per_s",
)
"""Losses are means over gates; an imbalance is the busiest expert's load over the mean one."""


class Records:
    """The files of a run; a resumed one drops what was written after its checkpoint."""

    def __init__(self, directory: Path, *, resumed_at: int = 0) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(directory) if int(row["step"]) <= resumed_at]
        self._file = (directory / METRICS).open("w", newline="", encoding="utf-8")
        self._rows = csv.DictWriter(self._file, COLUMNS)
        self._rows.writeheader()
        self._rows.writerows(kept)
        self._file.flush()
        self._board = _tensorboard(directory / "tensorboard")

    def write(self, row: Mapping[str, float | int | str], usage: Usage) -> None:
        """Adds a row of COLUMNS without the imbalances, and replaces the load by `usage`."""
        imbalances = {f"{m}_imbalance": imbalance(usage, m) for m in Modality}
        full = {**row, **imbalances}
        self._rows.writerow({name: _short(value) for name, value in full.items()})
        self._file.flush()
        if self._board is not None:
            for name, value in full.items():
                if not isinstance(value, str):
                    self._board.add_scalar(name, value, int(row["step"]))
        _write_loads(self._directory / LOADS, usage)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def imbalance(usage: Usage, modality: Modality) -> float:
    """The busiest expert's load over the mean load, averaged over layers; 0 without tokens."""
    ratios = [
        float(counts.max() / counts.float().mean())
        for (which, _), counts in usage.items()
        if which is modality
    ]
    return sum(ratios) / len(ratios) if ratios else 0.0


def read_metrics(directory: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv; none where there is no such file."""
    file = directory / METRICS
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def _short(value: float | int | str) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _write_loads(file: Path, usage: Usage) -> None:
    with file.open("w", newline="", encoding="utf-8") as lines:
        rows = csv.writer(lines)
        rows.writerow(("modality", "layer", "expert", "share"))
        for (modality, layer), counts in sorted(usage.items()):
            for expert, share in enumerate((counts / counts.sum()).tolist()):
                rows.writerow((modality, layer, expert, _short(share)))


def _tensorboard(directory: Path) -> Any:
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory))


def plot(directory: Path) -> None:
    """Draws loss.png, load.png and orthogonality.png from the run's files, with matplotlib."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    rows = read_metrics(directory)
    for name, log_scale in (("loss", True), ("orthogonality", False)):
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        for stage in dict.fromkeys(row["stage"] for row in rows):
            own = [row for row in rows if row["stage"] == stage and row[name]]
            axes.plot([int(r["step"]) for r in own], [float(r[name]) for r in own], label=stage)
        axes.set(xlabel="step", ylabel=name, yscale="log" if log_scale else "linear")
        if rows:
            axes.legend()
        figure.savefig(directory / f"{name}.png", dpi=120)
        plt.close(figure)
    _plot_load(directory, plt)


def _plot_load(directory: Path, plt: Any) -> None:
    """Layers down, experts across; the colour is the load over the mean load."""
    if not (directory / LOADS).exists():  # a run that ended before its first line
        return
    with (directory / LOADS).open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    figure, axes = plt.subplots(
        len(Modality), figsize=(9, 4), layout="constrained", squeeze=False, sharex=True
    )
    for axis, modality in zip(axes[:, 0], Modality, strict=True):
        own = [row for row in rows if row["modality"] == modality]
        layers = sorted({int(row["layer"]) for row in own})
        shares = [[float(r["share"]) for r in own if int(r["layer"]) == layer] for layer in layers]
        if shares:
            relative = torch.tensor(shares) * len(shares[0])
            image = axis.imshow(relative.numpy(), aspect="auto", vmin=0, vmax=2)
            axis.set_yticks(range(len(layers)), [str(layer) for layer in layers])
            figure.colorbar(image, ax=axis, label="load / mean")
        axis.set(ylabel="layer", title=f"{modality} tokens")
    axes[-1, 0].set_xlabel("expert")
    figure.savefig(directory / "load.png", dpi=120)
    plt.close(figure)
