"""What is trained is what is served: the training graph and the exported checkpoint agree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from train_models import new_model, random_batch, served_logits, short_preset

from chiasm.training.data.packing import PackedBatch
from chiasm.training.export import export
from chiasm.training.gradients import accumulate, one_core_each
from chiasm.training.model import Part, TrainingModel, initialize, part_of
from chiasm.training.objective import Objective, Whole
from chiasm.training.routing import choices_by_gate, choices_by_modality
from chiasm.types import Grid, Modality

TOLERANCE = 1e-5
Segments = list[tuple[int, list[Grid]]]
MIXED: Segments = [
    (9, [Grid(1, 4, 6)]),
    (5, []),
    (14, [Grid(4, 2, 4), Grid(1, 2, 2)]),
    (1, []),
    (33, [Grid(1, 4, 6)]),
]
TEXT: Segments = [(12, []), (31, []), (3, [])]


def exported(model: TrainingModel, directory: Path) -> Path:
    weights = dict(model.named_parameters())
    export(model, weights, directory / "description", directory / "model", shard_bytes=1 << 18)
    return directory / "model"


@pytest.mark.parametrize("ablation", [None, "no-isolation"])
@pytest.mark.parametrize(("segments", "seed"), [(MIXED, 0), (MIXED, 1), (TEXT, 2)])
def test_logits_are_those_of_the_serving_path(
    tmp_path: Path, ablation: str | None, segments: Segments, seed: int
) -> None:
    preset = short_preset(1, 1, 1, 1, ablation=ablation)
    model = new_model(tmp_path / "description", preset, seed=seed)
    batch = random_batch(model.config, segments, seed)
    with torch.no_grad():
        logits = model.logits(batch)
    served = served_logits(exported(model, tmp_path), batch)
    assert logits.std() > 0.1
    assert (logits - served).abs().max() < TOLERANCE


@pytest.mark.parametrize("seed", [0, 7])
def test_a_new_model_attends_to_its_like(tmp_path: Path, seed: int) -> None:
    """Each query head begins as the key head of its group, and passes on what it attends to."""
    model = new_model(tmp_path / "description", short_preset(1, 1, 1, 1))
    initialize(model, seed)
    text = model.config.text
    group = text.num_heads // text.num_kv_heads
    for layer in model.language.model.layers:
        queries = layer.self_attn.q_proj.weight.split(text.head_dim)
        keys = layer.self_attn.k_proj.weight.split(text.head_dim)
        assert all(torch.equal(query, keys[head // group]) for head, query in enumerate(queries))
        assert keys[0].std() > 0
        values = layer.self_attn.v_proj.weight.split(text.head_dim)
        outputs = layer.self_attn.o_proj.weight.T.split(text.head_dim)
        alike = [
            torch.cosine_similarity(output.flatten(), values[head // group].flatten(), dim=0)
            for head, output in enumerate(outputs)
        ]
        assert all(0.5 < each < 0.9 for each in alike)
        assert not torch.equal(outputs[0], outputs[1])


def test_parts_cover_the_model_and_a_stage_trains_its_own(tmp_path: Path) -> None:
    model = new_model(tmp_path / "description", short_preset(1, 1, 1, 1))
    names = [name for name, _ in model.named_parameters()]
    assert {part_of(name) for name in names} == set(Part)
    for parts in (frozenset({Part.TEXT}), frozenset(Part), frozenset({Part.VIT, Part.ADAPTER})):
        model.train_only(parts)
        learning = {name for name, p in model.named_parameters() if p.requires_grad}
        assert {part_of(name) for name in learning} == parts
        assert not any(name.endswith("e_score_correction_bias") for name in learning)


def test_every_part_gets_gradients_from_a_mixed_batch(tmp_path: Path) -> None:
    model = new_model(tmp_path / "description", short_preset(1, 1, 1, 1))
    model.train_only(frozenset(Part))
    batch = random_batch(model.config, MIXED)
    passed = model(batch)
    loss, values = Objective().loss(model, batch, passed, Whole.of([batch]))
    loss.backward()  # type: ignore[no-untyped-call]  # no annotations in torch
    still = [
        name
        for name, parameter in model.named_parameters()
        if part_of(name) is not Part.PROBES and (parameter.grad is None or not parameter.grad.any())
    ]
    # What the last layer's experts make of media tokens, nobody reads: only text has labels.
    unread = f"experts.banks.{Modality.VISION}_{model.config.text.moe_layers[-1]}."
    assert any(name.startswith(unread) for name in still)
    assert all(n.endswith("e_score_correction_bias") or n.startswith(unread) for n in still)
    losses = model.token_losses(passed.hidden, batch.labels)
    assert values["loss"] == pytest.approx(float(losses.mean().detach()), rel=1e-5)


@pytest.mark.parametrize("is_token_balanced", [True, False])
def test_micro_batches_add_up(tmp_path: Path, is_token_balanced: bool) -> None:
    """Cut in two or not, a step has the same loss and, gates' own losses aside, the same
    gradients."""
    model = new_model(tmp_path / "description", short_preset(1, 1, 1, 1))
    model.train_only(frozenset(Part))
    objective = Objective(is_token_balanced=is_token_balanced, load_balance=0, z=0, orthogonality=0)
    cuts = [random_batch(model.config, part, seed=3) for part in (MIXED, TEXT)]
    found = []
    for parts in ([join(cuts)], cuts):
        with one_core_each(2) as pool:
            result = accumulate(model, objective, parts, pool)
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((result, grads))
    (one, one_grads), (two, two_grads) = found
    assert one.values["loss"] == pytest.approx(two.values["loss"], rel=1e-5)
    assert one_grads.keys() == two_grads.keys()
    for name, grad in one_grads.items():
        torch.testing.assert_close(grad, two_grads[name], atol=1e-6, rtol=1e-4, msg=name)
    assert all(torch.equal(one.by_gate[key], two.by_gate[key]) for key in one.by_gate)


def join(parts: list[PackedBatch]) -> PackedBatch:
    """The parts as one batch."""
    return PackedBatch(
        token_ids=torch.cat([part.token_ids for part in parts]),
        token_types=torch.cat([part.token_types for part in parts]),
        positions=torch.cat([part.positions for part in parts], dim=1),
        labels=torch.cat([part.labels for part in parts]),
        lengths=tuple(length for part in parts for length in part.lengths),
        pixels=torch.cat([part.pixels for part in parts]),
        grids=tuple(grid for part in parts for grid in part.grids),
        tasks=tuple(task for part in parts for task in part.tasks),
        seen={},
    )


def test_vision_does_not_reach_the_text_bank(tmp_path: Path) -> None:
    """Modality isolation: each bank sees its own modality's tokens, and only those."""
    model = new_model(tmp_path / "description", short_preset(1, 1, 1, 1))
    batch = random_batch(model.config, MIXED)
    records = model(batch).records
    counts = choices_by_modality(records, batch.token_types, model.config.text.num_experts)
    top_k, num_vision = model.config.text.moe_k, int((batch.token_types > 0).sum())
    num_tokens = {Modality.VISION: num_vision, Modality.TEXT: batch.num_tokens - num_vision}
    assert {modality for modality, _ in counts} == set(Modality)
    for (modality, _), chosen in counts.items():
        assert int(chosen.sum()) == top_k * num_tokens[modality]


def test_a_shared_pool_has_one_gate_and_counts_both_modalities(tmp_path: Path) -> None:
    preset = short_preset(1, 1, 1, 1, ablation="no-isolation")
    model = new_model(tmp_path / "description", preset)
    batch = random_batch(model.config, MIXED)
    records = model(batch).records
    assert {record.modality for record in records} == {Modality.TEXT}
    counts = choices_by_modality(records, batch.token_types, model.config.text.num_experts)
    assert {modality for modality, _ in counts} == set(Modality)
    isolated = short_preset(1, 1, 1, 1).dimensions
    assert model.config.text.num_experts == 2 * isolated.num_experts


def test_after_step_moves_gates_apart_and_biases_towards_balance(tmp_path: Path) -> None:
    model = new_model(tmp_path / "description", short_preset(1, 1, 1, 1))
    model.train_only(frozenset({Part.TEXT}))
    batch = random_batch(model.config, MIXED)
    passed = model(batch)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    chosen = choices_by_gate(passed.records, model.config.text.num_experts)
    objective = Objective(orthogonality=1.0, orthogonality_by="step", bias_step=0.01)
    objective.after_step(model, chosen, learning_rate=1.0)
    for name, parameter in model.named_parameters():
        changed = (parameter.detach() != before[name]).any(-1)
        if name.endswith("e_score_correction_bias"):
            assert changed.tolist() == [True, False]  # the frozen vision row stands still
        else:
            assert bool(changed.any()) == name.endswith("gate.weight"), name
