"""Experts as Baidu's WINT2 checkpoints store them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Stored = dict[str, torch.Tensor]

QUANTIZATION: dict[str, Any] = {
    "dense_quant_type": "wint8",
    "moe_quant_type": "w4w2",
    "quantization": "wint2",
    "moe_quant_config": {
        "moe_w2_quant_config": {
            "quant_type": "wint2",
            "quant_granularity": "pp_acc",
            "quant_group_size": 64,
            "quant_start_layer": 0,
            "quant_end_layer": 53,
        },
    },
}


def random_matrix(k: int, n: int, seed: int) -> Stored:
    """Tensors of one projection by suffix, [K, N] as on disk, with weights near 1 / sqrt(K)."""
    g = torch.Generator().manual_seed(seed)
    return {
        "quant_weight": torch.randint(0, 256, (k // 4, n), generator=g).to(torch.uint8),
        "weight_scale": torch.randint(0, 256, (k // 128, n), generator=g).to(torch.uint8),
        "code_scale": 110 + 20 * torch.rand(n, generator=g),
        "code_zp": 1000 * torch.rand(n, generator=g),
        "super_scales": torch.rand(n, generator=g) / (150 * k**0.5),
    }


def add_wint4_and_wint8(directory: Path, first_layer: int, *, dense: bool) -> None:
    """Stores the experts before a layer as WINT4 of a released checkpoint, and with `dense` the
    matrices that every token goes through as WINT8: FastDeploy's names, and shapes as they come
    from its weight_quantize."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name in [n for n in tensors if ".layers." in n and n.endswith("_proj.weight")]:
        is_expert = ".mlp.experts." in name
        layer = int(name.split(".layers.")[1].split(".")[0])
        if layer < first_layer if is_expert else dense:
            k, n = tensors.pop(name).shape
            prefix = name.removesuffix("weight")
            codes = torch.zeros(n // 2 if is_expert else n, k, dtype=torch.int8)
            tensors[f"{prefix}quant_weight"] = codes
            tensors[f"{prefix}weight_scale"] = torch.ones(n)
    save_file(tensors, file)


def rewrite(directory: Path, first_layer: int) -> None:
    """Replaces the experts of a -Paddle checkpoint from a layer on; says so in its config.json."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name in [n for n in tensors if ".mlp.experts." in n]:
        layer = int(name.split(".layers.")[1].split(".")[0])
        if layer < first_layer:
            continue
        k, n = tensors.pop(name).shape
        for suffix, tensor in random_matrix(k, n, seed=len(tensors)).items():
            tensors[f"{name.removesuffix('weight')}{suffix}"] = tensor
    save_file(tensors, file)
    config = json.loads((directory / "config.json").read_text())
    block = json.loads(json.dumps(QUANTIZATION))
    block["moe_quant_config"]["moe_w4_quant_config"] = {
        "quant_type": "wint4",
        "quant_granularity": "per_channel",
        "quant_start_layer": 0,
        "quant_end_layer": first_layer - 1,
    }
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": block}))
