"""Which precision a checkpoint stores its weights in: routed experts by layer and bank, and the
language model's other matrices. Needs no torch.

Two blocks of config.json are read: `chiasm_quantization`, which `chiasm convert` writes, and the
`quantization_config` of Baidu's WINT2 checkpoints. Of the latter the WINT2 layers are read; layers
and dense weights in its other formats are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from chiasm.errors import InvalidArgument
from chiasm.model.section import Section
from chiasm.types import Modality

KEY, BAIDU_KEY = "chiasm_quantization", "quantization_config"
VERSION = 1
WRITTEN = ("int8", "int4", "tcq2")
"""What `chiasm convert` writes."""

WRITTEN_DENSE = ("int8",)
"""The same for the matrices of the language model that every token goes through."""

STORED = "stored"
"""As the checkpoint has them: float32 or bfloat16."""

_WINT2, _WINT4, _WINT8 = "wint2", "wint4", "wint8"
_BAIDU_CODES = re.compile(r"\.layers\.(\d+)\..*\.quant_weight$")


@dataclass(frozen=True, slots=True)
class ExpertFormat:
    """precision: `stored`, one of WRITTEN, or `wint2`. is_rotated: see kernels.quant.hadamard."""

    precision: str = STORED
    is_rotated: bool = False

    @property
    def is_stored(self) -> bool:
        return self.precision == STORED


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """Formats by (layer, bank); those that are not named are stored in full width.

    table_sha256: of the table that tcq2 needs, as it lies in the checkpoint. dense: of the matrices
    of model.linear, STORED or one of WRITTEN_DENSE.
    """

    formats: Mapping[tuple[int, Modality], ExpertFormat] = field(default_factory=dict)
    table_sha256: str = ""
    dense: str = STORED

    @property
    def is_stored(self) -> bool:
        """Whether nothing is in low precision."""
        return not self.formats and self.dense == STORED

    def of(self, layer: int, modality: Modality) -> ExpertFormat:
        return self.formats.get((layer, modality), ExpertFormat())

    def block(self) -> dict[str, Any]:
        """What config.json holds under KEY; `read` gives the same value back."""
        banks = {
            str(modality): [
                {"layer": layer, "precision": form.precision, "rotated": form.is_rotated}
                for (layer, bank), form in sorted(self.formats.items())
                if bank is modality and not form.is_stored
            ]
            for modality in Modality
        }
        return {
            "version": VERSION,
            "tcq2_table_sha256": self.table_sha256,
            "experts": banks,
            "dense": self.dense,
        }

    def check_stored(self, names: Iterable[str]) -> None:
        """Raises InvalidArgument, with formats and layers, for tensors that are stored as Baidu's
        WINT2 checkpoints have those that are not WINT2: experts of the first layers in WINT4, the
        matrices that every token goes through in WINT8.

        names: stored ones.
        """
        if all(form.precision != _WINT2 for form in self.formats.values()):
            return
        found: dict[str, dict[int, str]] = {}  # format -> layer -> one of its tensors
        for name in names:
            if match := _BAIDU_CODES.search(name):
                layer, is_expert = int(match[1]), ".mlp.experts." in name
                if not is_expert or self.of(layer, Modality.TEXT).precision != _WINT2:
                    found.setdefault(_WINT4 if is_expert else _WINT8, {})[layer] = name
        if found:
            raise InvalidArgument(
                f"config.json:{BAIDU_KEY}",
                f"{' and '.join(_told(*entry) for entry in sorted(found.items()))}: that is the "
                "layout of FastDeploy's GPU kernels and is not read; convert from full width",
            )


def _told(form: str, tensors: Mapping[int, str]) -> str:
    """One format's layers, with a tensor of the first of them."""
    first, last = min(tensors), max(tensors)
    layers = f"layer {first} is" if first == last else f"layers {first} to {last} are"
    return f"{layers} in {form} ({tensors[first]})"


def read(root: Section, num_layers: int) -> Quantization:
    """The block of a config.json. Raises InvalidArgument for one that cannot be read."""
    if root.has(KEY):
        return _own(root.section(KEY), num_layers)
    if root.has(BAIDU_KEY):
        return _baidu(root.section(BAIDU_KEY), num_layers)
    return Quantization()


def _own(block: Section, num_layers: int) -> Quantization:
    block.require("version", VERSION)
    dense = block.values.get("dense", STORED)
    if dense not in (STORED, *WRITTEN_DENSE):
        raise block.error("dense", f"{dense!r} is none of {STORED}, {', '.join(WRITTEN_DENSE)}")
    experts = block.section("experts")
    formats = {}
    for modality in Modality:
        entries = experts.values.get(modality, [])
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise experts.error(modality, "must be a list of objects")
        for values in entries:
            entry = Section(f"{experts.path}:{modality}", values)
            layer = entry.integer("layer", low=0, high=num_layers - 1)
            precision = entry.values.get("precision")
            if precision not in WRITTEN:
                raise entry.error("precision", f"{precision!r} is none of {', '.join(WRITTEN)}")
            formats[layer, modality] = ExpertFormat(precision, entry.boolean("rotated", False))
    return Quantization(
        formats=formats,
        table_sha256=str(block.values.get("tcq2_table_sha256", "")),
        dense=dense,
    )


def _baidu(block: Section, num_layers: int) -> Quantization:
    """FastDeploy's rule: up to the last WINT4 layer WINT4, from there on WINT2."""
    if block.values.get("quantization") != _WINT2:
        raise block.error("quantization", "only Baidu's wint2 is read; convert from full width")
    experts = block.section("moe_quant_config")
    wint4, wint2 = (experts.section(f"moe_{w}_quant_config") for w in ("w4", "w2"))
    wint2.require("quant_type", _WINT2)
    wint4.require("quant_type", _WINT4)
    block.require("dense_quant_type", _WINT8)
    first = wint2.integer("quant_start_layer", 0, low=0)
    if wint4.has("quant_end_layer"):
        first = max(first, wint4.integer("quant_end_layer", low=0) + 1)
    last = min(wint2.integer("quant_end_layer", num_layers - 1, low=0), num_layers - 1)
    return Quantization(
        formats={
            (layer, modality): ExpertFormat(_WINT2)
            for layer in range(first, last + 1)
            for modality in Modality
        }
    )
