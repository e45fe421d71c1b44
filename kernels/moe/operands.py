"""Matrices of any format as the kernels take them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from chiasm import errors
from chiasm.kernels.quant.formats import (
    GROUP,
    DenseMatrices,
    ExpertMatrices,
    Int4Matrices,
    Int8Matrices,
    Tcq2Matrices,
)
from chiasm.kernels.quant.hadamard import BLOCK, RotatedMatrices

Format = Literal["dense", "int8", "int4", "tcq2"]
GROUPED: tuple[Format, ...] = ("int4", "tcq2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Operands:
    """E matrices [N, K]; what a format does not have is None.

    codes: [E, N, ...]: weights, int8 codes, or bytes of packed codes.
    group_scale, group_zero: [E, N, ceil(K / GROUP)]: int4's scale and zero, tcq2's local scale.
    row_scale: float32 [E, N]: int8's scale, tcq2's row. table: int8 [256].
    is_rotated: whether the matrices stand for products with rotated rows (kernels.quant.hadamard).
    """

    format: Format
    shape: tuple[int, int]
    codes: torch.Tensor
    group_scale: torch.Tensor | None = None
    group_zero: torch.Tensor | None = None
    row_scale: torch.Tensor | None = None
    table: torch.Tensor | None = None
    is_rotated: bool = False

    @property
    def num_experts(self) -> int:
        return self.codes.shape[0]

    @property
    def arguments(self) -> tuple[torch.Tensor | None, ...]:
        """In the order of the kernels' parameters."""
        return self.codes, self.group_scale, self.group_zero, self.row_scale, self.table

    def of_experts(self, experts: slice) -> Operands:
        """Some of the matrices, without a copy."""

        def cut(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return tensor if tensor is None else tensor[experts]

        return replace(
            self,
            codes=self.codes[experts],
            group_scale=cut(self.group_scale),
            group_zero=cut(self.group_zero),
            row_scale=cut(self.row_scale),
        )


def has_kernels(matrices: ExpertMatrices) -> bool:
    """Whether `operands` takes them."""
    inner = matrices.inner if isinstance(matrices, RotatedMatrices) else matrices
    return isinstance(inner, DenseMatrices | Int8Matrices | Int4Matrices | Tcq2Matrices)


def operands(matrices: ExpertMatrices) -> Operands:
    """Raises Internal for a format without kernels and for tensors that do not fit together."""
    found = _of_format(matrices)
    (rows, depth), num_experts = found.shape, found.num_experts
    groups = (num_experts, rows, -(-depth // GROUP))
    expected = {"group_scale": groups, "group_zero": groups, "row_scale": groups[:2]}
    for name, shape in expected.items():
        tensor = getattr(found, name)
        if tensor is not None and tensor.shape != shape:
            raise errors.Internal(f"{found.format} {name} {list(tensor.shape)}, not {list(shape)}")
    if found.is_rotated and depth % BLOCK:
        raise errors.Internal(f"rotated {found.format} of {depth} inputs")
    held = [t for t in found.arguments if t is not None]
    if not all(t.is_contiguous() and t.device == found.codes.device for t in held):
        raise errors.Internal(f"{found.format} matrices that are strided or spread over devices")
    return found


def _of_format(matrices: ExpertMatrices) -> Operands:
    match matrices:
        case RotatedMatrices(inner):
            return replace(_of_format(inner), is_rotated=True)
        case DenseMatrices(weight):
            return Operands(format="dense", shape=matrices.shape, codes=weight)
        case Int8Matrices(codes, scale):
            return Operands(format="int8", shape=matrices.shape, codes=codes, row_scale=scale)
        case Int4Matrices(codes, scale, zero):
            return Operands(
                format="int4",
                shape=matrices.shape,
                codes=codes,
                group_scale=scale,
                group_zero=zero,
            )
        case Tcq2Matrices(codes, local, row, table):
            return Operands(
                format="tcq2",
                shape=matrices.shape,
                codes=codes,
                group_scale=local,
                row_scale=row,
                table=table,
            )
    raise errors.Internal(f"no kernels for {type(matrices).__name__}")
