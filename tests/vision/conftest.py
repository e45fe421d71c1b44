"""Lets transformers import torchvision beside a CPU build of torch.

The published torchvision wheel expects a CUDA build and fails while it registers its operators;
declaring their schemas first is enough, for nothing here calls them.
"""

from __future__ import annotations

import contextlib

import torch

torch.set_num_threads(2)

TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")
for operator in ("nms", "qnms"):
    with contextlib.suppress(RuntimeError):  # declared already
        TORCHVISION.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
