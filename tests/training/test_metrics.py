"""What a run leaves to look at: rows, loads, plots, and events where TensorBoard is installed."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from chiasm.training import metrics
from chiasm.training.metrics import Records, imbalance, plot, read_metrics
from chiasm.training.routing import Usage
from chiasm.types import Modality

USAGE: Usage = {
    (Modality.TEXT, 1): torch.tensor([3, 1, 0, 0]),
    (Modality.TEXT, 2): torch.tensor([2, 2, 2, 2]),
    (Modality.VISION, 1): torch.tensor([7, 0, 0, 0]),
}


def row(step: int, stage: str = "joint", loss: float = 2.0) -> dict[str, float | int | str]:
    return {"step": step, "stage": stage, "loss": loss, "orthogonality": 0.25 / step}


def loads(directory: Path) -> dict[tuple[str, int], list[float]]:
    """Shares of the experts in order, by modality and layer."""
    with (directory / "load.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    found: dict[tuple[str, int], list[float]] = {}
    for each in rows:
        shares = found.setdefault((each["modality"], int(each["layer"])), [])
        assert int(each["expert"]) == len(shares)
        shares.append(float(each["share"]))
    return found


def test_loads_are_shares_of_the_last_line(tmp_path: Path) -> None:
    with Records(tmp_path) as records:
        records.write(row(1), {(Modality.TEXT, 9): torch.tensor([1, 1])})
        records.write(row(2), USAGE)
    assert loads(tmp_path) == {
        ("text", 1): [0.75, 0.25, 0, 0],
        ("text", 2): [0.25] * 4,
        ("vision", 1): [1, 0, 0, 0],
    }


def test_an_imbalance_is_the_busiest_over_the_mean(tmp_path: Path) -> None:
    assert imbalance(USAGE, Modality.TEXT) == (3 + 1) / 2  # the mean of two layers
    assert imbalance(USAGE, Modality.VISION) == 4
    assert imbalance({}, Modality.VISION) == 0
    with Records(tmp_path) as records:
        records.write(row(1), USAGE)
    (found,) = read_metrics(tmp_path)
    assert (found["text_imbalance"], found["vision_imbalance"]) == ("2", "4")


def test_a_new_run_and_a_resumed_one_keep_what_was_before(tmp_path: Path) -> None:
    with Records(tmp_path) as records:
        for step in (5, 10, 15):
            records.write(row(step), USAGE)
    with Records(tmp_path, resumed_at=10) as records:
        records.write(row(12), USAGE)
    assert [found["step"] for found in read_metrics(tmp_path)] == ["5", "10", "12"]
    with Records(tmp_path):
        pass
    assert read_metrics(tmp_path) == []


def picture(file: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    with Image.open(file) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_plots_show_every_stage(tmp_path: Path) -> None:
    with Records(tmp_path) as records:
        for step in (1, 2, 3):
            records.write(row(step, "language", 4.0 / step), USAGE)
    plot(tmp_path)
    names = ("loss.png", "orthogonality.png", "load.png")
    before = {name: picture(tmp_path / name) for name in names}
    assert all(pixels.std() > 1 for pixels in before.values())
    with Records(tmp_path, resumed_at=3) as records:
        for step in (4, 5):
            records.write(row(step, "sight", 1.0), {(Modality.TEXT, 1): torch.tensor([1, 0])})
    plot(tmp_path)
    assert all(not np.array_equal(picture(tmp_path / name), before[name]) for name in names)


def test_a_run_without_lines_has_plots_of_nothing(tmp_path: Path) -> None:
    plot(tmp_path)
    assert picture(tmp_path / "loss.png").shape[2] == 3
    assert not (tmp_path / "load.png").exists()


class Board:
    """Stands in for TensorBoard's writer, which no extra brings."""

    opened: list[Board]

    def __init__(self, directory: str) -> None:
        self.directory, self.is_closed = directory, False
        self.scalars: list[tuple[str, float, int]] = []
        self.opened.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize("is_installed", [True, False])
def test_events_are_written_where_tensorboard_is_installed(
    tmp_path: Path, is_installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Board, "opened", [], raising=False)
    monkeypatch.setattr(metrics, "find_spec", lambda name: object() if is_installed else None)
    module = SimpleNamespace(SummaryWriter=Board)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with Records(tmp_path) as records:
        records.write(row(7), USAGE)
    if not is_installed:
        assert not Board.opened
        return
    (board,) = Board.opened
    assert Path(board.directory) == tmp_path / "tensorboard"
    assert board.is_closed
    told = {name: value for name, value, step in board.scalars if step == 7}
    assert told["loss"] == 2.0
    assert told["vision_imbalance"] == 4
    assert "stage" not in told
