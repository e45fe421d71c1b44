"""Fills a module with a checkpoint's weights, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from chiasm.model import dense_weights
from chiasm.model.checkpoint import Checkpoint
from chiasm.model.linear import Matrix
from chiasm.model.quantization import STORED


def load_module(
    module: nn.Module,
    checkpoint: Checkpoint,
    prefix: str,
    dtype: torch.dtype,
    *,
    device: str | torch.device = "cpu",
    on_parameter: Callable[[int], None] | None = None,
) -> None:
    """Gives every parameter of a module built on the meta device its weight, for inference.

    Parameter `name` is the checkpoint's tensor `prefix + name`, cast to `dtype` and moved to
    `device`. Names that end with one of the module's `fp32_parameters` stay float32. Where the
    checkpoint has the language model's matrices in int8 they stay so. `on_parameter` is called with
    the number of elements of each parameter loaded.

    Raises what Checkpoint.get raises for a tensor that is missing or of another shape.
    """
    if checkpoint.config.quantization.dense != STORED:
        for name, matrix in module.named_modules():
            if isinstance(matrix, Matrix):
                rows, width = matrix.weight.shape
                matrix.hold(dense_weights.read(checkpoint, prefix + name, (rows, width), device))
                if on_parameter is not None:
                    on_parameter(rows * width)
    suffixes: tuple[str, ...] = getattr(module, "fp32_parameters", ())
    for name, parameter in list(module.named_parameters()):
        wanted = torch.float32 if name.endswith(suffixes) else dtype
        tensor = checkpoint.get(prefix + name, shape=tuple(parameter.shape))
        loaded = nn.Parameter(tensor.to(device=device, dtype=wanted), requires_grad=False)
        path, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(path), leaf, loaded)
        if on_parameter is not None:
            on_parameter(parameter.numel())
    module.eval()
