"""Carries out a plan: file by file, matrix by matrix, one in memory at a time.

A file is renamed to its name when it is whole, then the manifest names it with its checksum. A run
that was killed leaves whole files, and a partial one that the next run overwrites; it goes on with
the first file that the manifest does not name, or that is not what the manifest says. config.json
comes last, when all else is on the disk, so what is not complete is no checkpoint that anything
would load.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from chiasm.alone import LOCK, alone
from chiasm.convert.encode import CPU, WEIGHED, Cost, encode
from chiasm.convert.plan import (
    CopyFile,
    DenseFile,
    ExpertFile,
    Plan,
    PlannedFile,
    TableFile,
    file_bytes,
)
from chiasm.durable import sync
from chiasm.errors import InvalidArgument, NotFound
from chiasm.kernels.quant import table
from chiasm.model import manifest
from chiasm.model.checkpoint import PICKLES, Checkpoint
from chiasm.model.expert_weights import DOWN, GATE_UP, TABLE_KEY
from chiasm.model.manifest import FileEntry, Manifest
from chiasm.model.quantization import BAIDU_KEY, KEY, ExpertFormat
from chiasm.model.stream import SafetensorsStream
from chiasm.model.writer import write_json
from chiasm.types import Modality

INDEX = "model.safetensors.index.json"
REPORT = "chiasm_conversion.json"
"""What the conversion cost: see report.py."""
DENSE_ROWS = 4096
"""Of a matrix, encoded at a time: an embedding in float32 would take a gigabyte, several times."""

_WEIGHTS = (".safetensors", ".safetensors.index.json")
_OWN = ("config.json", manifest.NAME, REPORT, LOCK)
"""What a conversion writes itself: a source that was converted has its own."""

Importance = Callable[[int, Modality, int, str], torch.Tensor | None]
"""Mean squares [K] of the inputs of (layer, bank, expert, projection), where they are known."""


def nothing_known(
    layer: int, modality: Modality, expert: int, projection: str
) -> torch.Tensor | None:
    """No calibration: all inputs weigh the same."""
    return None


def run(
    plan: Plan,
    out: Path,
    *,
    calibrated: Callable[[], Importance] = lambda: nothing_known,
    device: torch.device = CPU,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> Manifest:
    """Writes `out`, or what is missing of it; `on_bytes` hears of every piece of plan.num_bytes.

    calibrated: asked once, when a file is missing whose errors are weighed. device: where matrices
    are encoded, one at a time.
    Raises InvalidArgument when `out` holds anything but an unfinished or finished run of the same
    plan, FailedPrecondition when another process is at it, and what reading the source raises.
    """
    if out.resolve() == plan.source.resolve():
        raise InvalidArgument("out", "is the model's own folder")
    out.mkdir(parents=True, exist_ok=True)
    with alone(out, "converting to"):
        done = _resumed(plan, out)
        done.save(out)  # from here on whatever lies there is known to be ours
        missing = [file for file in plan.files if not _is_there(file, done, out)]
        on_bytes(plan.num_bytes - sum(map(file_bytes, missing)))
        importance = calibrated() if any(map(_is_weighed, missing)) else nothing_known
        with Checkpoint(plan.source, plan.config) as checkpoint:
            writer = _Writer(checkpoint, importance, device, on_bytes)
            for file in missing:
                entry = writer.write(file, out)
                done = dataclasses.replace(done, files={**done.files, file.name: entry})
                done.save(out)
        return _finish(plan, out, done)


def _is_there(file: PlannedFile, done: Manifest, out: Path) -> bool:
    """Whether an earlier run has written it, and it is still what that run wrote."""
    entry = done.files.get(file.name)
    return entry is not None and entry.matches(out / file.name)


def _is_weighed(file: PlannedFile) -> bool:
    return isinstance(file, ExpertFile) and file.bank.format.precision in WEIGHED


class _Writer:
    """Writes planned files from an open checkpoint."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        importance: Importance,
        device: torch.device,
        on_bytes: Callable[[int], None],
    ) -> None:
        self._checkpoint, self._importance = checkpoint, importance
        self._device, self._on_bytes = device, on_bytes

    def write(self, file: PlannedFile, out: Path) -> FileEntry:
        notes: Mapping[str, Any] = {}
        with SafetensorsStream(out / file.name, file.layout) as stream:
            if isinstance(file, CopyFile):
                self._copy(file, stream)
            elif isinstance(file, TableFile):
                stream.add(TABLE_KEY, table.load())
            elif isinstance(file, DenseFile):
                notes = self._encode_dense(file, stream)
            else:
                notes = self._encode(file, stream)
        return FileEntry(stream.sha256, stream.num_bytes, notes)

    def _copy(self, file: CopyFile, stream: SafetensorsStream) -> None:
        with safe_open(file.source, framework="pt") as source:
            for key in file.layout:
                tensor = source.get_tensor(key)
                stream.add(key, tensor)
                self._on_bytes(tensor.nbytes)

    def _encode(self, file: ExpertFile, stream: SafetensorsStream) -> dict[str, Any]:
        """Writes a bank's experts; returns what encoding cost each projection."""
        bank = file.bank
        costs = {GATE_UP: Cost(), DOWN: Cost()}
        for expert in range(bank.config.text.num_experts):
            weights = self._checkpoint.expert(bank.layer, bank.modality, expert)
            for projection, weight in zip((GATE_UP, DOWN), weights, strict=True):
                heed = self._importance(bank.layer, bank.modality, expert, projection)
                name = f"{bank.prefix(expert)}{projection}"
                tensors, cost = encode(weight, bank.format, heed, name=name, device=self._device)
                costs[projection] += cost
                for field, stored in bank.tensor_names(expert, projection).items():
                    stream.add(stored, tensors[field])
                    self._on_bytes(tensors[field].nbytes)
            _give_back()
        return {projection: dataclasses.asdict(cost) for projection, cost in costs.items()}

    def _encode_dense(self, file: DenseFile, stream: SafetensorsStream) -> dict[str, Any]:
        """Writes matrices, some rows of one at a time; returns what encoding cost each."""
        costs = {}
        for name in file.matrices:
            weight, cost = self._checkpoint.get(f"{name}.weight"), Cost()
            parts: dict[str, list[torch.Tensor]] = {}
            for rows in torch.split(weight, DENSE_ROWS):  # each has a scale of its own
                tensors, part_cost = encode(
                    rows, ExpertFormat("int8"), None, name=name, device=self._device
                )
                cost += part_cost
                for part, tensor in tensors.items():
                    parts.setdefault(part, []).append(tensor)
            for part, pieces in parts.items():
                tensor = torch.cat(pieces)
                stream.add(f"{name}.{part}", tensor)
                self._on_bytes(tensor.nbytes)
            costs[name] = dataclasses.asdict(cost)
            _give_back()
        return costs


def _give_back() -> None:
    """To the system what is free: glibc keeps it, in pieces that fit the next matrix badly, until
    it holds as much as the model."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _resumed(plan: Plan, out: Path) -> Manifest:
    """What an earlier run of the plan has done."""
    try:
        done = Manifest.load(out)
    except NotFound:
        if any(path.name != LOCK and path.suffix != ".partial" for path in out.iterdir()):
            raise InvalidArgument("out", f"{out} is not empty") from None
        return Manifest(fingerprint=plan.fingerprint, files={})
    if done.fingerprint != plan.fingerprint:
        raise InvalidArgument(
            "out", f"{out} holds a conversion of another model or with other options"
        )
    return done


def _finish(plan: Plan, out: Path, done: Manifest) -> Manifest:
    """Index, the other files of the model, and config.json, the last."""
    weight_map = {key: file.name for file in plan.files for key in file.layout}
    index = {"metadata": {"total_size": plan.num_bytes}, "weight_map": weight_map}
    _replace(out / INDEX, partial(write_json, value=index))
    copied = {}
    for path in sorted(plan.source.iterdir()):
        is_other = path.is_file() and not path.name.endswith((*_WEIGHTS, *PICKLES))
        if is_other and path.name not in _OWN:
            copy = out / path.name
            _replace(copy, partial(shutil.copyfile, path))
            copied[path.name] = FileEntry(manifest.sha256(copy), copy.stat().st_size, {})
    done = dataclasses.replace(done, files={**done.files, **copied})
    done.save(out)
    sync(out)  # the names of everything so far, before the one that says it is complete
    config = json.loads((plan.source / "config.json").read_text(encoding="utf-8"))
    config.pop(BAIDU_KEY, None)
    if not plan.quantization.is_stored:
        config[KEY] = plan.quantization.block()
    _replace(out / "config.json", partial(write_json, value=config))
    sync(out)
    return done


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Has a file written; under its name it is whole and on the disk."""
    unfinished = path.with_name(f"{path.name}.partial")
    write(unfinished)
    sync(unfinished)
    unfinished.replace(path)
