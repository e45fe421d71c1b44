"""Recipes are data: stages by name, known again by a digest, ablations of one thing each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from types import MappingProxyType

import pytest

from chiasm.errors import InvalidArgument
from chiasm.training.model import Part
from chiasm.training.optimizer import Schedule
from chiasm.training.presets import ABLATIONS, PRESETS, Preset, Stage, find

BUNDLED = find("bundled")


def test_stages_have_names() -> None:
    for preset in PRESETS.values():
        names = [stage.name for stage in preset.stages]
        assert len(set(names)) == len(names)
        assert [preset.stage(name) for name in names] == list(preset.stages)
    assert BUNDLED.stage("sight").sight_alone
    assert find("bundled", stage="joint").stages == (BUNDLED.stage("joint"),)
    with pytest.raises(InvalidArgument, match="language, longer, sight, joint, words") as no:
        BUNDLED.stage("fourth")
    assert no.value.field == "stage"


def test_smoke_has_the_stages_of_the_bundled_model() -> None:
    smoke = find("smoke")
    assert [stage.name for stage in smoke.stages] == [stage.name for stage in BUNDLED.stages]
    for stage in smoke.stages:
        assert stage.trains == BUNDLED.stage(stage.name).trains


def test_the_ablations_begin_with_sight_and_have_no_text_stages() -> None:
    small = find("ablation")
    assert [stage.name for stage in small.stages] == ["sight", "joint"]
    assert small.stage("sight").mix == BUNDLED.stage("sight").mix
    assert (small.objective, small.optimizer) == (BUNDLED.objective, BUNDLED.optimizer)
    assert small.dimensions == BUNDLED.dimensions


CHANGES: Mapping[str, set[str]] = {
    "no-orthogonality": {"objective.orthogonality"},
    "no-isolation": {
        "shared_pool",
        "dimensions.num_experts",
        "dimensions.text_intermediate",
        "dimensions.vision_intermediate",
        "dimensions.num_shared_experts",
    },
    "no-token-balance": {"objective.is_token_balanced"},
}


def settings(value: object, path: str = "") -> dict[str, object]:
    """All fields of a preset and of what it is made of, by path."""
    if not is_dataclass(value):
        return {path: value}
    found: dict[str, object] = {}
    for each in fields(value):
        found |= settings(getattr(value, each.name), f"{path}.{each.name}".removeprefix("."))
    return found


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_change_one_thing(name: str, preset: str) -> None:
    plain, changed = settings(find(preset)), settings(find(preset, name))
    assert plain.keys() == changed.keys()
    assert {path for path in plain if plain[path] != changed[path]} == CHANGES[name]


def test_one_pool_has_as_many_weights_as_two_banks() -> None:
    two, one = BUNDLED.dimensions, find("bundled", "no-isolation").dimensions
    both = two.text_intermediate + two.vision_intermediate
    assert one.num_experts * one.text_intermediate == two.num_experts * both
    wide = two.num_shared_experts * two.text_intermediate
    assert one.num_shared_experts * one.text_intermediate == wide


def test_a_digest_is_the_same_in_every_process() -> None:
    """Sets of parts come in another order in each."""
    asked = "from chiasm.training.presets import find; print(find('bundled').digest)"
    told = subprocess.run(
        [sys.executable, "-P", "-c", asked],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        check=True,
        text=True,
    )
    assert told.stdout.strip() == BUNDLED.digest


def changed(preset: Preset, name: str, change: Callable[[Stage], Stage]) -> Preset:
    """With one stage changed."""
    stages = (change(each) if each.name == name else each for each in preset.stages)
    return replace(preset, stages=tuple(stages))


def backwards(mix: Mapping[str, float]) -> dict[str, float]:
    return dict(reversed(mix.items()))


def test_a_digest_tells_recipes_apart() -> None:
    plain = BUNDLED
    joint = plain.stage("joint")
    first, second = joint.lessons
    others = [
        replace(plain, objective=replace(plain.objective, z=2e-6)),
        replace(plain, optimizer=replace(plain.optimizer, beta2=0.96)),
        replace(plain, dimensions=replace(plain.dimensions, num_layers=7)),
        replace(plain, micro_batches=3),
        replace(plain, stages=plain.stages[::-1]),
        *(
            changed(plain, "joint", change)
            for change in (
                lambda stage: replace(stage, schedule=replace(stage.schedule, floor=2e-5)),
                lambda stage: replace(stage, trains=frozenset({Part.TEXT})),
                lambda stage: replace(stage, mix={**stage.mix, "sums": 10}),
                lambda stage: replace(stage, mix=backwards(stage.mix)),  # draws other samples
                lambda stage: replace(stage, lessons=(second, first)),
                lambda stage: replace(stage, lessons=(replace(first, num_samples=9), second)),
            )
        ),
        *(find("bundled", ablation) for ablation in ABLATIONS),
        find("bundled", stage="joint"),
    ]
    digests = {plain.digest, *(other.digest for other in others)}
    assert len(digests) == 1 + len(others)
    same = changed(plain, "joint", lambda stage: replace(stage, mix=dict(stage.mix)))
    frozen = changed(plain, "joint", lambda stage: replace(stage, mix=MappingProxyType(stage.mix)))
    assert same.digest == frozen.digest == plain.digest


def test_schedule() -> None:
    schedule = Schedule(steps=100, warmup=10, peak=1.0, floor=0.1)
    rates = [schedule.learning_rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert all(one >= other for one, other in pairwise(rates[10:]))
