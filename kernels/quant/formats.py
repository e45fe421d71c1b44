"""Stacks of E matrices [N out, K in] as the kernels see them, one class for each precision.

Each `dequantize` here is plain torch and the specification of every other decoder. A weight comes
of integers by one float32 multiplication or addition that rounds, so it is the same bits wherever
it is decoded: with or without fused multiply-add, on any device. It is rounded once more when the
dtype asked for is narrower than float32.

Groups are runs of GROUP weights along K; where K is no multiple of GROUP the last one is shorter,
and there are ceil(K / GROUP) of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F

GROUP = 128
"""Weights along K that share a scale."""


class ExpertMatrices(Protocol):
    """E matrices of one shape, whatever their precision."""

    @property
    def num_experts(self) -> int: ...

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K): rows are outputs."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        ...

    def dequantize(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """One matrix, [N, K]."""
        ...

    def linear(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """x [M, K] @ matrix^T -> [M, N] in x's dtype, on a CPU by whatever is fastest for M."""
        ...


@dataclass(frozen=True, slots=True)
class DenseMatrices:
    """weight: [E, N, K] float32 or bfloat16."""

    weight: torch.Tensor

    @property
    def num_experts(self) -> int:
        return self.weight.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[1], self.weight.shape[2]

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def dequantize(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        return self.weight[expert].to(dtype)

    def linear(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        return F.linear(x, self.weight[expert])


@dataclass(frozen=True, slots=True)
class CodedMatrices(ABC):
    """What stacks of codes have in common. codes: [E, N, K / PER_CODE]; a subclass adds scales."""

    PER_CODE: ClassVar[int]
    """Weights along K to a code."""

    codes: torch.Tensor

    @property
    def num_experts(self) -> int:
        return self.codes.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[1], self.PER_CODE * self.codes.shape[2]

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, field.name).nbytes for field in fields(self))

    @abstractmethod
    def dequantize(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """One matrix, [N, K]."""

    def linear(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        if x.device.type != "cpu":
            return self.widened_linear(x, expert)
        from chiasm.kernels.quant import cpu  # which is built on this module

        return cpu.linear(self, x, expert)

    def widened_linear(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """`linear` by torch alone, on any device."""
        return F.linear(x, self.dequantize(expert, x.dtype))


@dataclass(frozen=True, slots=True)
class Int8Matrices(CodedMatrices):
    """w = codes * scale. codes: int8 [E, N, K]; scale: float32 [E, N]."""

    PER_CODE: ClassVar[int] = 1

    scale: torch.Tensor

    def dequantize(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        return (self.codes[expert].float() * self.scale[expert, :, None]).to(dtype)

    def widened_linear(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """Scales the sums: codes are exact in every dtype, so that no matrix is made in float32."""
        sums = F.linear(x, self.codes[expert].to(x.dtype))
        return (sums.float() * self.scale[expert]).to(x.dtype)


@dataclass(frozen=True, slots=True)
class Int4Matrices(CodedMatrices):
    """w = (q - 8) * scale + zero, q in 0..15, scale and zero of its group.

    codes: uint8 [E, N, K/2], the even k in the low nibble; scale, zero: bfloat16
    [E, N, ceil(K / GROUP)].
    """

    PER_CODE: ClassVar[int] = 2

    scale: torch.Tensor
    zero: torch.Tensor

    def dequantize(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        codes = self.codes[expert]
        q = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)  # [N, K]
        scale, zero = (per_weight(t[expert].float(), q.shape[-1]) for t in (self.scale, self.zero))
        return ((q.float() - 8) * scale + zero).to(dtype)


@dataclass(frozen=True, slots=True)
class Tcq2Matrices(CodedMatrices):
    """w = (table[state] * local) * row: the product of integers, then one multiplication.

    The state of weight k = 4i + j is 8 bits of the row's bytes, read as one big-endian number with
    a zero byte before it: (((codes[i - 1] << 8) | codes[i]) >> (6 - 2j)) & 255.

    codes: uint8 [E, N, K/4]; local: uint8 [E, N, ceil(K / GROUP)]; row: float32 [E, N];
    table: int8 [256].
    """

    PER_CODE: ClassVar[int] = 4

    local: torch.Tensor
    row: torch.Tensor
    table: torch.Tensor

    def dequantize(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        codes = self.codes[expert].int()  # [N, K/4]
        pair = (F.pad(codes, (1, 0))[:, :-1] << 8) | codes
        states = torch.stack([(pair >> (6 - 2 * j)) & 255 for j in range(4)], dim=-1).flatten(-2)
        level = self.table.int()[states]  # [N, K]
        local = per_weight(self.local[expert].int(), level.shape[-1])
        return ((level * local).float() * self.row[expert, :, None]).to(dtype)


def num_groups(k: int) -> int:
    """Groups of a row of k weights."""
    return -(-k // GROUP)


def per_weight(per_group: torch.Tensor, k: int) -> torch.Tensor:
    """[..., groups] -> [..., k]: each group's value for each of its weights."""
    return per_group.repeat_interleave(GROUP, dim=-1)[..., :k]
