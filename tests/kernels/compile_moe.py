"""Compiles the kernels of the MoE layer for GPUs that need not be here; in a process of its own.

Each argument: compute capability, dtype as triton spells it, format or `rest`, tokens per expert;
with commas between. Sizes are the published model's; widths and depths are no constants of the
products, so text and vision experts share what is built. One line per kernel: shared memory,
registers, and bytes spilled per thread. More than the smallest of those GPUs has is an error, and
so are spills, but in float32, which nobody serves. Triton's interpreter accepts programs that its
compiler refuses.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from chiasm.kernels.gate import launch as gate_launch
from chiasm.kernels.gate import triton as gate_kernels
from chiasm.kernels.moe import launch, permute, transform
from chiasm.kernels.moe.configs import Operation, Problem, default_tile
from chiasm.kernels.moe.operands import GROUPED, Format, Operands
from chiasm.kernels.moe.triton import dequantise, experts, rotate
from chiasm.kernels.moe.triton import permute as permute_kernels
from chiasm.kernels.quant.hadamard import BLOCK

HIDDEN, TEXT, VISION, NUM_EXPERTS, TOP_K = 2560, 1536, 512, 64, 6
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MAX_SHARED_BYTES = 99 << 10
"""Of one program on the smallest of the GPUs that run bfloat16."""

OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
MAX_REGISTERS = 255
CODES = {"int8": "*i8", "int4": "*u8", "tcq2": "*u8"}
ABSENT = {
    "dense": {"group_scale", "group_zero", "row_scale", "table"},
    "int8": {"group_scale", "group_zero", "table"},
    "int4": {"row_scale", "table"},
    "tcq2": {"group_zero"},
}
FLOAT32 = {"values", "results", "expert_weights", "row_scale", "gate", "bias", "weights"}
INT32 = {"order", "place", "rows", "starts", "summary", "counts", "expert_ids", "ids"}
UNALIGNED = {
    "starts",
    "num_experts",
    "num_tokens",
    "num_blocks",
    "first_expert",
    "norm_min",
    "num_rows",
}


def build(
    kernel: Any,
    capability: int,
    types: dict[str, str],
    constants: dict[str, Any],
) -> None:
    """Compiles a kernel as its launcher would have it compiled, and looks at what it needs."""
    options = {"enable_fp_fusion": True}
    options |= {name: constants.pop(name) for name in OPTIONS if name in constants}
    names = kernel.arg_names

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in FLOAT32:
            return "*fp32"
        return "*i32" if name in INT32 else types.get(name, "i32")

    aligned = [i for i, n in enumerate(names) if n not in constants and n not in UNALIGNED]
    source = ASTSource(
        kernel,
        {name: kind(name) for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    built = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    used = usage(built.asm["cubin"])
    spilled = used["STACK"] + used["LOCAL"]
    line = f"sm_{capability} {kernel.__name__} {constants.get('FORMAT', '')}: "
    line += f"{built.metadata.shared} B shared, {used['REG']} registers, {spilled} B spilled"
    sys.stdout.write(line + "\n")
    assert built.metadata.shared <= MAX_SHARED_BYTES, line
    assert used["REG"] <= MAX_REGISTERS, line
    assert not spilled or "*fp32" in (types.get("hidden"), types.get("x")), line


def usage(cubin: bytes) -> dict[str, int]:
    """What cuobjdump says of a kernel's registers (REG) and spilled bytes (STACK, LOCAL)."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", done.stdout)}


def build_product(
    operation: Operation, capability: int, dtype: str, format: Format, tokens: int
) -> None:
    is_gate_up = operation == "gate_up"
    shape = (2 * TEXT, HIDDEN) if is_gate_up else (HIDDEN, TEXT)
    problem = Problem(operation=operation, format=format, dtype=DTYPES[dtype], shape=shape)
    tile = default_tile(problem, tokens)
    assert not any(depth % tile.block_k for depth in (HIDDEN, TEXT, VISION))
    matrices = Operands(format=format, shape=shape, codes=torch.empty(NUM_EXPERTS, 0, 0))
    constants = launch.constants(matrices, tile) | dict.fromkeys(ABSENT[format])
    if is_gate_up:
        constants["TOP_K"] = TOP_K
    pointer = f"*{dtype}"
    types = {"out": pointer if is_gate_up else "*fp32", "hidden": pointer, "inner": pointer}
    kernel = experts.gate_up_kernel if is_gate_up else experts.down_kernel
    build(kernel, capability, stored(dtype, format) | types, constants)


def stored(dtype: str, format: Format) -> dict[str, str]:
    """Pointers to a format's tensors."""
    return {
        "codes": CODES.get(format, f"*{dtype}"),
        "group_scale": "*u8" if format == "tcq2" else "*bf16",
        "group_zero": "*bf16",
        "table": "*i8",
    }


def build_dequantise(capability: int, dtype: str, format: Format) -> None:
    constants: dict[str, Any] = {"FORMAT": format, "BLOCK_N": transform.DEQUANTISE_ROWS}
    constants |= dict.fromkeys(ABSENT[format])
    types = {"out": f"*{dtype}"} | stored(dtype, format)
    build(dequantise.dequantise_kernel, capability, types, constants | {"num_warps": 4})


def build_rest(capability: int, dtype: str) -> None:
    """The kernels that no format changes."""
    blocks = permute.block_sizes(TOP_K, NUM_EXPERTS)
    shape: dict[str, Any] = {"NUM_EXPERTS": NUM_EXPERTS, "TOP_K": TOP_K, **blocks, "num_warps": 8}
    build(permute_kernels.count_kernel, capability, {}, dict(shape))
    for is_single in (True, False):
        build(permute_kernels.scatter_kernel, capability, {}, shape | {"IS_SINGLE": is_single})
    for is_first in (True, False):
        constants = {"TOP_K": TOP_K, "BLOCK_K": 8, "BLOCK_N": launch.COMBINE_BLOCK}
        build(experts.combine_kernel, capability, {}, constants | {"IS_FIRST": is_first})
    constants = {"SCALE": BLOCK**-0.5, "BLOCK": BLOCK, "BLOCK_M": transform.ROTATE_ROWS}
    types = dict.fromkeys(("out", "x", "matrix"), f"*{dtype}")
    build(rotate.rotate_kernel, capability, types, constants | {"num_warps": 4})
    block_e = gate_launch.expert_block(NUM_EXPERTS)
    constants = {
        "NUM_EXPERTS": NUM_EXPERTS,
        "TOP_K": TOP_K,
        "BLOCK_T": gate_launch.TILE_TOKENS,
        "BLOCK_H": gate_launch.depth_block(block_e),
        "BLOCK_E": block_e,
        "BLOCK_K": 8,
        "num_warps": gate_launch.num_warps(block_e),
    }
    types = {"hidden": f"*{dtype}", "norm_min": "fp32"}
    build(gate_kernels.topk_gate_kernel, capability, types, constants)


def main() -> None:
    for case in sys.argv[1:]:
        capability, dtype, name, tokens = case.split(",")
        if name == "rest":
            build_rest(int(capability), dtype)
            continue
        format = cast(Format, name)
        build_product("gate_up", int(capability), dtype, format, int(tokens))
        build_product("down", int(capability), dtype, format, int(tokens))
        if format in GROUPED:
            build_dequantise(int(capability), dtype, format)


if __name__ == "__main__":
    main()
