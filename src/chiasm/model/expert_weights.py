"""Routed experts of a checkpoint as stacks of matrices, in the precision that they are stored in.

A low-precision expert's tensors are named after the matrix they make up: `gate_up_proj`, the rows
of gate first, or `down_proj`.

    model.layers.3.mlp.experts.7.gate_up_proj.codes
    model.layers.3.mlp.experts.7.gate_up_proj.scale

FIELDS tells dtypes and shapes. What they mean is said by kernels/quant/formats.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from chiasm.errors import DataLoss, InvalidArgument
from chiasm.kernels.quant.formats import (
    GROUP,
    DenseMatrices,
    ExpertMatrices,
    Int4Matrices,
    Int8Matrices,
    Tcq2Matrices,
    num_groups,
)
from chiasm.kernels.quant.hadamard import BLOCK, RotatedMatrices
from chiasm.kernels.quant.table import checksum
from chiasm.kernels.quant.wint2 import Wint2Matrices
from chiasm.model.checkpoint import Checkpoint
from chiasm.model.config import ModelConfig
from chiasm.model.quantization import ExpertFormat
from chiasm.model.shapes import Shape, expert_prefix
from chiasm.model.stream import Layout
from chiasm.types import Modality

TABLE_KEY = "chiasm.tcq2_table"
"""int8 [256], once in a checkpoint that needs it."""
TABLE_FILE = "experts-table.safetensors"
TABLE_LAYOUT: Layout = {TABLE_KEY: (torch.int8, (256,))}

GATE_UP, DOWN = "gate_up_proj", "down_proj"


@dataclass(frozen=True, slots=True)
class Field:
    """One tensor of a matrix [n, k]: its dtype, and its shape by n and k."""

    dtype: torch.dtype
    shape: Callable[[int, int], Shape]


FIELDS: Mapping[str, Mapping[str, Field]] = {
    "int8": {
        "codes": Field(torch.int8, lambda n, k: (n, k)),
        "scale": Field(torch.float32, lambda n, k: (n,)),
    },
    "int4": {
        "codes": Field(torch.uint8, lambda n, k: (n, k // 2)),
        "scale": Field(torch.bfloat16, lambda n, k: (n, num_groups(k))),
        "zero": Field(torch.bfloat16, lambda n, k: (n, num_groups(k))),
    },
    "tcq2": {
        "codes": Field(torch.uint8, lambda n, k: (n, k // 4)),
        "local": Field(torch.uint8, lambda n, k: (n, num_groups(k))),
        "row": Field(torch.float32, lambda n, k: (n,)),
    },
}
MULTIPLE = {"int8": 1, "int4": 2, "tcq2": 4}
"""What the number of inputs must be a multiple of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bank:
    """One layer's experts of one modality: how they are stored and how to hold them.

    dtype: of those stored in full width.
    """

    config: ModelConfig
    layer: int
    modality: Modality
    format: ExpertFormat
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def to_encode(
        cls, config: ModelConfig, layer: int, modality: Modality, form: ExpertFormat
    ) -> Bank:
        """A bank that is to be written: encoded on the CPU, from float32."""
        return cls(
            config=config,
            layer=layer,
            modality=modality,
            format=form,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )

    def shape(self, projection: str) -> tuple[int, int]:
        """(N, K) of GATE_UP or DOWN."""
        text = self.config.text
        width = text.expert_intermediate(self.modality)
        if projection == GATE_UP:
            return 2 * width, text.hidden_size
        return text.hidden_size, width

    def prefix(self, expert: int) -> str:
        return expert_prefix(self.config.text, self.layer, self.modality, expert)

    def tensor_names(self, expert: int, projection: str) -> dict[str, str]:
        """Stored name of each field of a matrix."""
        prefix = f"{self.prefix(expert)}{projection}."
        return {field: prefix + field for field in FIELDS[self.format.precision]}

    @property
    def file_name(self) -> str:
        """Of the file that we write the bank to."""
        return f"experts-{self.layer:03d}-{self.modality}.safetensors"

    def check_widths(self) -> None:
        """Raises InvalidArgument when its matrices cannot be stored in its format."""
        for projection in (GATE_UP, DOWN):
            _, k = self.shape(projection)
            check_width(self.format, k, f"{self.modality} experts' {projection}")

    def layout(self) -> Layout:
        """The tensors of that file."""
        fields = FIELDS[self.format.precision]
        return {
            name: (fields[field].dtype, fields[field].shape(*self.shape(projection)))
            for expert in range(self.config.text.num_experts)
            for projection in (GATE_UP, DOWN)
            for field, name in self.tensor_names(expert, projection).items()
        }


def read_experts(
    checkpoint: Checkpoint, bank: Bank, experts: range
) -> tuple[ExpertMatrices, ExpertMatrices]:
    """The stacks of gate_up and down of some experts; reads nothing else.

    Raises what Checkpoint.get raises, InvalidArgument for dimensions that the format cannot have.
    """
    if bank.format.is_stored:
        return _dense(checkpoint, bank, experts)
    gate_up, down = (_packed(checkpoint, bank, experts, part) for part in (GATE_UP, DOWN))
    return gate_up, down


def check_width(form: ExpertFormat, k: int, name: str) -> None:
    """Raises InvalidArgument when a matrix of k inputs cannot be stored so."""
    multiple = math.lcm(MULTIPLE[form.precision], BLOCK if form.is_rotated else 1)
    if k % multiple:
        stored = f"rotated {form.precision}" if form.is_rotated else form.precision
        raise InvalidArgument(name, f"{stored} takes a multiple of {multiple} inputs, not {k}")


def _dense(
    checkpoint: Checkpoint, bank: Bank, experts: range
) -> tuple[ExpertMatrices, ExpertMatrices]:
    gate_up, down = (
        torch.empty((len(experts), *bank.shape(part)), dtype=bank.dtype, device=bank.device)
        for part in (GATE_UP, DOWN)
    )
    for i, expert in enumerate(experts):
        stored_gate_up, stored_down = checkpoint.expert(bank.layer, bank.modality, expert)
        gate_up[i].copy_(stored_gate_up)
        down[i].copy_(stored_down)
    return DenseMatrices(gate_up), DenseMatrices(down)


def _packed(checkpoint: Checkpoint, bank: Bank, experts: range, projection: str) -> ExpertMatrices:
    precision = bank.format.precision
    if precision == "wint2":
        return _wint2(checkpoint, bank, experts, projection)
    n, k = bank.shape(projection)
    check_width(bank.format, k, projection)
    prefixes = [f"{bank.prefix(expert)}{projection}." for expert in experts]
    stacks = read_stacks(checkpoint, precision, (n, k), prefixes, bank.device)
    return _matrices(checkpoint, bank, stacks)


def read_stacks(
    checkpoint: Checkpoint,
    precision: str,
    shape: tuple[int, int],
    prefixes: Sequence[str],
    device: str | torch.device,
) -> dict[str, torch.Tensor]:
    """The tensors of matrices of one shape [N, K] by field, one matrix after the other.

    prefixes: what their names begin with. Raises what Checkpoint.read_into raises.
    """
    stacks = {}
    for name, field in FIELDS[precision].items():
        stack = torch.empty((len(prefixes), *field.shape(*shape)), dtype=field.dtype)
        for i, prefix in enumerate(prefixes):
            checkpoint.read_into(prefix + name, stack[i])
        stacks[name] = stack.to(device)
    return stacks


def _matrices(
    checkpoint: Checkpoint, bank: Bank, stacks: Mapping[str, torch.Tensor]
) -> ExpertMatrices:
    matrices: ExpertMatrices
    if bank.format.precision == "int8":
        matrices = Int8Matrices(**stacks)
    elif bank.format.precision == "int4":
        matrices = Int4Matrices(**stacks)
    else:
        table = torch.empty(256, dtype=torch.int8)
        checkpoint.read_into(TABLE_KEY, table)
        if checksum(table) != bank.config.quantization.table_sha256:
            raise DataLoss(
                f"{TABLE_KEY} does not match its checksum in config.json",
                reason="CHECKPOINT_CORRUPT",
            )
        matrices = Tcq2Matrices(**stacks, table=table.to(bank.device))
    return RotatedMatrices(matrices) if bank.format.is_rotated else matrices


def _wint2(checkpoint: Checkpoint, bank: Bank, experts: range, projection: str) -> ExpertMatrices:
    """Baidu's names and orientation: K first, the matrix of gate and up called up_gate."""
    n, k = bank.shape(projection)
    if k % GROUP:
        raise InvalidArgument(projection, f"wint2 takes a multiple of {GROUP} inputs, not {k}")
    count = len(experts)
    codes = torch.empty(count, n, k // 4, dtype=torch.uint8)
    local = torch.empty(count, n, k // GROUP, dtype=torch.uint8)
    code_scale, code_zp, super_scale = (torch.empty(count, n) for _ in range(3))
    name = "up_gate_proj" if projection == GATE_UP else projection
    for i, expert in enumerate(experts):
        prefix = f"{checkpoint.stored_name(bank.prefix(expert))}{name}."
        checkpoint.read_into(f"{prefix}quant_weight", codes[i].t())
        checkpoint.read_into(f"{prefix}weight_scale", local[i].t())
        checkpoint.read_into(f"{prefix}code_scale", code_scale[i])
        checkpoint.read_into(f"{prefix}code_zp", code_zp[i])
        checkpoint.read_into(f"{prefix}super_scales", super_scale[i])
    tensors = (codes, local, code_scale, code_zp, super_scale)
    return Wint2Matrices(*(tensor.to(bank.device) for tensor in tensors))
