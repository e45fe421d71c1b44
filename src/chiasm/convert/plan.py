"""What a conversion will write: files, their tensors and formats. Reads headers, no weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from chiasm.errors import InvalidArgument
from chiasm.kernels.quant import table
from chiasm.model import dense_weights
from chiasm.model.checkpoint import Checkpoint
from chiasm.model.config import ModelConfig
from chiasm.model.expert_weights import (
    DOWN,
    GATE_UP,
    TABLE_FILE,
    TABLE_LAYOUT,
    Bank,
)
from chiasm.model.quantization import (
    STORED,
    WRITTEN,
    WRITTEN_DENSE,
    ExpertFormat,
    Quantization,
)
from chiasm.model.stream import DTYPES, Layout, tensor_bytes
from chiasm.types import Modality

VERSION = 1
PRECISIONS = (STORED, *WRITTEN)
"""The one of most bits first."""

_FIRST_PART = 8
"""By default one in so many layers of a bank in two bits, rounded up, is kept wider."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Precisions by bank; the first layers, which suffer most, may have their own.

    first_layers: of every bank that is converted; None: an eighth of those of a bank in tcq2,
    rounded up, and none of other banks. dense: of the language model's matrices that every token
    goes through. is_rotated: rotate the inputs of tcq2 matrices. num_calibration: questions whose
    activations weigh the errors of int4 and tcq2; 0: none.
    """

    text_experts: str = STORED
    vision_experts: str = STORED
    first_layers: int | None = None
    first_precision: str = "int8"
    dense: str = STORED
    is_rotated: bool = False
    num_calibration: int = 0

    def __post_init__(self) -> None:
        for field in ("text_experts", "vision_experts", "first_precision", "dense"):
            known = (STORED, *WRITTEN_DENSE) if field == "dense" else PRECISIONS
            if getattr(self, field) not in known:
                raise InvalidArgument(
                    field, f"{getattr(self, field)!r} is none of {', '.join(known)}"
                )
        if self.first_layers is not None and self.first_layers < 0:
            raise InvalidArgument("first_layers", "must be at least 0")
        for modality, precision in self._banks.items():
            is_narrower = PRECISIONS.index(self.first_precision) > PRECISIONS.index(precision)
            if is_narrower and self._num_first(precision, num_layers=1):
                raise InvalidArgument(
                    "first_precision",
                    f"{self.first_precision} has fewer bits than the {modality} experts' "
                    f"{precision}",
                )

    @property
    def _banks(self) -> dict[Modality, str]:
        return {Modality.TEXT: self.text_experts, Modality.VISION: self.vision_experts}

    def _num_first(self, precision: str, num_layers: int) -> int:
        """How many of a bank's layers count as the first ones."""
        if precision == STORED:  # a bank that stays as it is stays so in all layers
            return 0
        if self.first_layers is None:
            return -(-num_layers // _FIRST_PART) if precision == "tcq2" else 0
        return self.first_layers

    def quantization(self, config: ModelConfig) -> Quantization:
        """The format of every layer and bank, and of the rest."""
        layers = config.text.moe_layers
        formats = {}
        for modality, precision in self._banks.items():
            num_first = self._num_first(precision, len(layers))
            for number, layer in enumerate(layers):
                chosen = self.first_precision if number < num_first else precision
                if chosen != STORED:
                    formats[layer, modality] = ExpertFormat(
                        chosen, self.is_rotated and chosen == "tcq2"
                    )
        needs_table = any(form.precision == "tcq2" for form in formats.values())
        checksum = table.checksum(table.load()) if needs_table else ""
        return Quantization(formats=formats, table_sha256=checksum, dense=self.dense)


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyFile:
    """Tensors of one source file that stay as they are, under their stored names."""

    name: str
    source: Path
    layout: Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class TableFile:
    """The table of tcq2."""

    name: str
    layout: Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertFile:
    """One layer's experts of one bank, in their new format."""

    name: str
    bank: Bank
    layout: Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseFile:
    """The matrices of one layer that every token goes through, or those of no layer, in int8.

    matrices: their names in the source, without `.weight`.
    """

    name: str
    layer: int | None
    matrices: tuple[str, ...]
    layout: Layout


PlannedFile = CopyFile | TableFile | ExpertFile | DenseFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """files: in the order of writing. fingerprint: of the source and everything that decides."""

    source: Path
    config: ModelConfig
    quantization: Quantization
    files: tuple[PlannedFile, ...]
    fingerprint: str

    @property
    def num_bytes(self) -> int:
        """Of all tensors to be written."""
        return sum(file_bytes(file) for file in self.files)


def file_bytes(file: PlannedFile) -> int:
    """Of a file's tensors."""
    return sum(tensor_bytes(dtype, shape) for dtype, shape in file.layout.values())


def make(source: Path, options: Options) -> Plan:
    """Raises InvalidArgument for a checkpoint that is in low precision already, and for a format
    that the model's dimensions do not allow; what Checkpoint raises for one that cannot be read."""
    config = ModelConfig.load(source)
    if not config.quantization.is_stored:
        raise InvalidArgument("model", f"{source} is in low precision already")
    quantization = options.quantization(config)
    dense = list(_dense_files(config, quantization))
    with Checkpoint(source, config) as checkpoint:
        banks = [
            _bank(config, quantization, layer, modality)
            for layer in config.text.moe_layers
            for modality in Modality
            if not quantization.of(layer, modality).is_stored
        ]
        replaced = set().union(*(_keys(checkpoint, bank) for bank in banks))
        replaced.update(*(checkpoint.keys_of(f"{n}.weight") for f in dense for n in f.matrices))
        copies = list(_copies(checkpoint, replaced))
    experts = [ExpertFile(name=bank.file_name, bank=bank, layout=bank.layout()) for bank in banks]
    files: list[PlannedFile] = [*copies, *dense, *experts]
    if quantization.table_sha256:
        files.append(TableFile(name=TABLE_FILE, layout=TABLE_LAYOUT))
    return Plan(
        source=source,
        config=config,
        quantization=quantization,
        files=tuple(files),
        fingerprint=_fingerprint(source, options, quantization),
    )


def _bank(config: ModelConfig, quantization: Quantization, layer: int, modality: Modality) -> Bank:
    form = quantization.of(layer, modality)
    bank = Bank.to_encode(config, layer, modality, form)
    bank.check_widths()
    return bank


def _keys(checkpoint: Checkpoint, bank: Bank) -> set[str]:
    """Keys of the stored tensors that a bank's experts are read from."""
    keys = set()
    for expert in range(bank.config.text.num_experts):
        for projection in (GATE_UP, DOWN):
            keys |= checkpoint.keys_of(f"{bank.prefix(expert)}{projection}.weight")
    return keys


def _copies(checkpoint: Checkpoint, replaced: set[str]) -> Iterator[CopyFile]:
    """One file for each source file that keeps any of its tensors."""
    by_file: dict[Path, list[str]] = {}
    files = checkpoint.files
    for key in sorted(files.keys() - replaced):
        by_file.setdefault(files[key], []).append(key)
    for number, (path, keys) in enumerate(sorted(by_file.items()), start=1):
        layout = {}
        for key in keys:
            stored, shape = checkpoint.stored(key)
            dtype = DTYPES.get(stored)
            if dtype is None:
                raise InvalidArgument(key, f"has the dtype {stored}")
            layout[key] = (dtype, shape)
        yield CopyFile(name=f"model-{number:05d}.safetensors", source=path, layout=layout)


def _dense_files(config: ModelConfig, quantization: Quantization) -> Iterator[DenseFile]:
    if quantization.dense == STORED:
        return
    for layer, shapes in dense_weights.by_layer(config.text).items():
        yield DenseFile(
            name=dense_weights.file_name(layer),
            layer=layer,
            matrices=tuple(shapes),
            layout=dense_weights.layout(shapes),
        )


def _fingerprint(source: Path, options: Options, quantization: Quantization) -> str:
    """Changes when anything does that the output depends on, but for the last bits of scales: those
    may differ by device."""
    files = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(source.glob("*"))
        if path.is_file()
    ]
    decided = {
        "version": VERSION,
        "files": files,
        "block": quantization.block(),
        "calibration": options.num_calibration,
    }
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()
