"""Top-k gate: softmax, correction bias, selection, normalisation.

    reference.py  plain torch; the specification
    triton.py     one kernel for GPUs
    launch.py     checks, grid and launch

Tensors on a CUDA device take the kernel where triton is installed and the bank has no more than 512
experts. It has no backward pass: what autograd must follow takes the reference. Which of several
experts with equal biased probabilities is chosen, the reference leaves to torch.topk, which
promises nothing; the kernel takes the lowest ids. What has run of the kernel: Triton's interpreter;
it compiles for compute capability 8.0 and 9.0, but has not run on a GPU yet.
"""

from __future__ import annotations

import torch

from chiasm.kernels.device import is_triton
from chiasm.kernels.gate import launch, reference

__all__ = ["topk_gate"]


def topk_gate(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    correction_bias: torch.Tensor,
    *,
    top_k: int,
    norm_min: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses `top_k` experts of one bank for each token; see reference.py for the statement.

    hidden [T, H], any float dtype. weight float32 [H, E]. correction_bias float32 [E].
    Returns expert ids int32 [T, K], highest biased probability first, and weights float32 [T, K].
    """
    is_trained = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    is_small = weight.shape[1] <= launch.MAX_EXPERTS
    if is_triton(hidden.device) and is_small and not is_trained:
        with torch.cuda.device(hidden.device):  # triton launches on the current device
            return launch.topk_gate(hidden, weight, correction_bias, top_k=top_k, norm_min=norm_min)
    return reference.topk_gate(hidden, weight, correction_bias, top_k=top_k, norm_min=norm_min)
