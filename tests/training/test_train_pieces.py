"""What a run is made of, each by itself: narrow products, attention, optimiser, average."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from train_models import new_model, short_preset

from chiasm.training.attention import CausalSegments
from chiasm.training.optimizer import OptimizerConfig, WeightAverage, build, set_learning_rate
from chiasm.training.precision import NarrowLinear, narrow_linears

BFLOAT16_RATIO = 0.01
"""RMS of the error over RMS of the value: two factors and the result are rounded to 8 bits."""


def ratio(found: torch.Tensor, exact: torch.Tensor) -> float:
    found, exact = found.detach(), exact.detach()
    return float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt())


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_rows", [1, 127, 128, 129, 300])
def test_a_narrow_layer_is_near_the_one_it_replaces(num_rows: int, has_bias: bool) -> None:
    g = torch.Generator().manual_seed(num_rows)
    layer = nn.Linear(40, 24, bias=has_bias)
    narrow = NarrowLinear.of(layer)
    assert [id(p) for p in narrow.parameters()] == [id(p) for p in layer.parameters()]
    x = torch.randn(num_rows, 40, generator=g).requires_grad_()
    weight = torch.randn(num_rows, 24, generator=g)
    wanted = [x, *layer.parameters()]
    results = []
    for each in (layer, narrow):
        y = each(x)
        results.append([y, *torch.autograd.grad((y * weight).sum(), wanted)])
    for exact, near in zip(*results, strict=True):
        assert near.dtype == torch.float32
        assert near.shape == exact.shape
        assert ratio(near, exact) < BFLOAT16_RATIO
    assert ratio(results[1][0], results[0][0]) > 0


def test_what_is_frozen_gets_no_gradient() -> None:
    layer = NarrowLinear.of(nn.Linear(8, 4))
    layer.weight.requires_grad_(False)
    x = torch.randn(3, 8, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_every_layer_below_is_replaced() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"inner": nn.Linear(4, 2)}))
    names = dict(module.named_parameters())
    narrow_linears(module)
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 2
    assert all(isinstance(layer, NarrowLinear) for layer in linears)
    assert {n: id(p) for n, p in module.named_parameters()} == {n: id(p) for n, p in names.items()}


@pytest.mark.parametrize("lengths", [(1,), (7,), (5, 1, 17, 16, 33, 2), (8, 8, 8)])
def test_segments_attend_each_to_itself(lengths: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(len(lengths))
    query = torch.randn(sum(lengths), 4, 8, generator=g).requires_grad_()
    key, value = (torch.randn(sum(lengths), 2, 8, generator=g).requires_grad_() for _ in "kv")
    weight = torch.randn(query.shape, generator=g)
    expected = torch.cat(
        [
            F.scaled_dot_product_attention(
                *(part.transpose(0, 1)[None] for part in parts), is_causal=True, enable_gqa=True
            )[0].transpose(0, 1)
            for parts in zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
        ]
    )
    found = CausalSegments(lengths).attend(0, query, key, value)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    grads = [
        torch.autograd.grad((y * weight).sum(), (query, key, value)) for y in (found, expected)
    ]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_matrices_decay_and_parts_have_rates_of_their_own(tmp_path: Path) -> None:
    """With gradients of zero a step is decay alone: of matrices, by rate, scale and strength."""
    model = new_model(tmp_path / "description", short_preset(1, 1, 1, 1))
    config = OptimizerConfig(weight_decay=0.5, gate_scale=0.25, vit_scale=0.5)
    optimizer = build(model, config)
    set_learning_rate(optimizer, 0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() > 1 and not name.endswith("e_score_correction_bias")
        is_gate = name.endswith(("gate.weight", "gate.weight_1"))
        scale = 0.25 if is_gate else 0.5 if name.startswith("vision.") else 1.0
        kept = 1 - 0.1 * scale * 0.5 if is_matrix else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * kept, msg=name)


def test_the_average_begins_as_a_mean_and_forgets_later(tmp_path: Path) -> None:
    model = new_model(tmp_path / "description", short_preset(1, 1, 1, 1))
    average = WeightAverage(model, decay=0.75)
    name, parameter = next(iter(model.named_parameters()))
    seen = []
    for value in range(1, 5):
        with torch.no_grad():
            parameter.fill_(value)
        average.update(model)
        seen.append(float(average.weights[name].flatten()[0]))
    assert seen == pytest.approx([1, 1.5, 2, 2.5])  # means of 1; 1, 2; 1, 2, 3; and so on
    with torch.no_grad():
        parameter.fill_(10)
    average.update(model)
    assert float(average.weights[name].flatten()[0]) == pytest.approx(0.75 * 2.5 + 0.25 * 10)
