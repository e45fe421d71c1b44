"""The losses and balance rules of the recipe, as functions of tensors.

Source of all formulas, unless another is named: PaddlePaddle/ERNIE, `ernie/moe/topk_gate.py`,
`ernie/moe/moe_layer.py`, `ernie/modeling.py`, `ernie/callbacks/`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def token_balanced(losses: torch.Tensor, num_tokens: int, num_labels: int) -> torch.Tensor:
    """Reports the mean over labelled tokens, but has the gradient of sum(losses) / num_tokens.

    L = L_tb - sg(L_tb) + sg(L_mean), L_tb = sum(CE) / num_tokens, L_mean = sum(CE) / num_labels,
    sg = stop gradient; num_tokens counts all tokens of a step, masked or not, num_labels the
    labelled ones. A mean alone would weigh a text token the more, the more of its step is masked:
    in image-heavy steps. Source: `ErniePretrainingCriterion` with token_balance_loss.

    losses: float32 [N], cross-entropy of the labelled tokens of a micro-batch; the results of a
    step's micro-batches add up.
    """
    balanced = losses.sum() / num_tokens
    return balanced - balanced.detach() + losses.detach().sum() / num_labels


def orthogonality(weight: torch.Tensor) -> torch.Tensor:
    """||W^ W^T - I||_F^2 / E^2 of one bank's gate, w^_e = w_e / max(||w_e||, 1e-12).

    Pushes the experts' directions apart. Text and vision banks are never mixed. Source:
    `topk_gate.py`; strength 1e-2.

    weight: float32 [H, E], one column per expert.
    """
    directions = F.normalize(weight, dim=0, eps=1e-12)
    gram = directions.T @ directions  # [E, E]
    return (gram - torch.eye(len(gram))).square().sum() / len(gram) ** 2


@torch.no_grad()
def orthogonalize_(weight: torch.Tensor, step_size: float) -> None:
    """W <- W - step_size * dL_orth/dW in place, after and apart from the optimiser's step.

    As the gradient does not pass through the optimiser, its moments see the task alone. Source:
    `OrthogonalCallback`; step_size = learning rate * strength.
    """
    with torch.enable_grad():
        leaf = weight.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(orthogonality(leaf), leaf)
    weight.sub_(gradient, alpha=step_size)


def load_balance(probs: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
    """E * sum_e me_e * ce_e over the tokens of one modality.

    me_e = mean probability of expert e, ce_e = tokens that chose e / tokens, without a gradient.
    Source: `topk_gate.py`, after Shazeer et al. 2017 and GShard; strength 1e-2,
    or 0 where the correction bias balances.

    probs: float32 [T, E]. expert_ids: int64 [T, K]: the top k of `probs`, not of biased ones.
    """
    num_tokens, num_experts = probs.shape
    share = torch.bincount(expert_ids.flatten(), minlength=num_experts) / num_tokens
    return num_experts * (probs.mean(0) * share).sum()


def router_z(logits: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of logsumexp(logits)^2: keeps gate logits small.

    Source: `topk_gate.py`, after ST-MoE, arXiv:2202.08906; strength 1e-4.

    logits: float32 [T, E] of one modality.
    """
    return torch.logsumexp(logits, dim=-1).square().mean()


@torch.no_grad()
def correct_(bias: torch.Tensor, usage: torch.Tensor, step_size: float) -> None:
    """bias += step_size * sign(mean(usage) - usage) in place: balance without a loss.

    Experts used less than the mean become easier to select; the weights of the selected ones do not
    change. Source: `ernie/callbacks`, after Wang et al. 2024, arXiv:2408.15664.

    bias: float32 [E]. usage: [E], how often each expert was chosen since the last step.
    """
    usage = usage.float()
    bias.add_(torch.sign(usage.mean() - usage), alpha=step_size)
