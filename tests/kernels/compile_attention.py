"""Compiles the attention kernels for GPUs that need not be here; run in a process of its own.

Each argument: compute capability, dtype as triton spells it, head dimension, heads per group; with
commas between.
Triton's interpreter accepts programs that its compiler refuses.
"""

from __future__ import annotations

import sys
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from chiasm.kernels.attention import launch
from chiasm.kernels.attention import triton as kernels
from chiasm.kernels.attention.metadata import SPLIT_TOKENS, TILE_ROWS

ELEMENTS = {"out", "query", "keys", "values"}
ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
INT32 = {"work", "pages", "spread"}
FLOAT32 = {"partial", "partial_max", "partial_sum"}


def build(
    kernel: Any, capability: int, dtype: str, constants: dict[str, int], **options: Any
) -> None:
    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in ELEMENTS:
            return f"*{dtype}"
        if name in FLOAT32:
            return "*fp32"
        return "*i32" if name in INT32 else "fp32" if name == "scale" else "i32"

    names = kernel.arg_names
    # Or one kernel would be compiled for every alignment of the parts of a step's array.
    assert {p.name for p in kernel.params if p.do_not_specialize} == INT32.intersection(names)
    source = ASTSource(
        kernel,
        {name: kind(name) for name in names},
        {(names.index(name),): value for name, value in constants.items()},
    )
    target = GPUTarget("cuda", capability, 32)
    assert compile(source, target=target, options=options).asm["cubin"]


def build_both(capability: int, dtype: str, dim: int, group: int) -> None:
    block_d = launch.dim_block(dim)
    shape = {"GROUP": group, "HEAD_DIM": dim, "BLOCK_D": block_d}
    blocks = {
        "PAGE": 16,
        "SPLIT": SPLIT_TOKENS,
        "BLOCK_M": TILE_ROWS,
        "BLOCK_N": launch.key_block(block_d, ELEMENT_BYTES[dtype]),
    }
    build(
        kernels.paged_attention_kernel,
        capability,
        dtype,
        shape | blocks,
        num_warps=launch.num_warps(block_d),
        num_stages=launch.NUM_STAGES,
        enable_fp_fusion=False,
    )
    build(kernels.combine_kernel, capability, dtype, shape, num_warps=1, enable_fp_fusion=False)


if __name__ == "__main__":
    for case in sys.argv[1:]:
        capability, dtype, dim, group = case.split(",")
        build_both(int(capability), dtype, int(dim), int(group))
