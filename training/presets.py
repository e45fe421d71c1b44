"""What `chiasm train` can train: dimensions, stages and recipe, as data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

from chiasm.errors import InvalidArgument
from chiasm.model.writer import Dimensions
from chiasm.training.data.stream import Lesson
from chiasm.training.data.tasks import ARRANGE, LOOK, MIX, READ, SEE
from chiasm.training.model import Part
from chiasm.training.objective import Objective
from chiasm.training.optimizer import OptimizerConfig, Schedule

_T = TypeVar("_T")

_TEXT_ONLY = frozenset({Part.TEXT})
_SIGHT = frozenset({Part.VIT, Part.ADAPTER, Part.PROBES})
_EVERYTHING = frozenset(Part) - {Part.PROBES}


def _among(field: str, name: str, choices: Mapping[str, _T]) -> _T:
    if name not in choices:
        raise InvalidArgument(field, f"{name!r} is none of {', '.join(choices)}")
    return choices[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage: what is trained, on what, for how long."""

    name: str
    trains: frozenset[Part]
    mix: Mapping[str, float]
    """Weights of tasks."""
    batch_tokens: int
    """Of a micro-batch."""
    schedule: Schedule
    lessons: tuple[Lesson, ...] = ()
    """Mixes of the stage's first samples, before `mix`."""
    detach_text: bool = False
    """In batches with media, text parameters get no gradient: ERNIE's optional `modality_detach`,
    which keeps what a language model has learnt. No preset has it: here text learns from media."""
    sight_alone: bool = False
    """Probes read the media, and no language model runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A whole run."""

    dimensions: Dimensions
    stages: tuple[Stage, ...]
    objective: Objective = field(default_factory=Objective)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    shared_pool: bool = False
    """No isolation of modalities: one gate over one pool."""
    micro_batches: int = 2
    """Of a step; each has a core to itself, but the number is part of the recipe."""
    checkpoint_every: int = 500
    log_every: int = 10

    @property
    def num_steps(self) -> int:
        return sum(stage.schedule.steps for stage in self.stages)

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of all that the preset says; mixes count in their order, in which tasks
        are drawn. What tasks draw and losses compute is code, and not in it."""
        return hashlib.sha256(json.dumps(self, default=_plain).encode()).hexdigest()

    def stage(self, name: str) -> Stage:
        """Raises InvalidArgument that lists the stages there are."""
        return _among("stage", name, {stage.name: stage for stage in self.stages})


def _plain(value: Any) -> object:
    """What JSON does not know, by what it does."""
    if is_dataclass(value):
        return {each.name: getattr(value, each.name) for each in fields(value)}
    return dict(value) if isinstance(value, Mapping) else sorted(value)  # else a set


_BUNDLED = Preset(
    dimensions=Dimensions(
        num_bpe_tokens=0,  # the data's tokenizer decides
        hidden_size=128,
        intermediate_size=384,
        num_layers=6,
        num_heads=4,
        num_kv_heads=2,
        mrope_section=(6, 6, 4),
        max_position_embeddings=4096,
        moe_k=6,
        num_experts=64,
        text_intermediate=48,
        vision_intermediate=16,
        num_shared_experts=2,
        vision_depth=3,
        vision_hidden_size=128,
        vision_num_heads=4,
        vision_mlp_ratio=4,
        max_pixels=28 * 28 * 16,
        shard_bytes=64 << 20,
    ),
    stages=(
        Stage(
            name="language",
            trains=_TEXT_ONLY,
            mix={"retold": 3, "lookup": 3, "alike": 2, "sums": 1, "copy": 1},
            batch_tokens=2048,
            schedule=Schedule(steps=650, warmup=60, peak=1.5e-3, floor=1e-3),
        ),
        Stage(
            name="longer",
            trains=_TEXT_ONLY,
            # Half of the tokens are recalls, of up to 800 tokens; the others have tens.
            mix={
                "retold": 2,
                "lookup": 2,
                "alike": 2,
                "told": 3,
                "sums": 5,
                "copy": 2,
                "recall": 1.5,
            },
            batch_tokens=2048,
            schedule=Schedule(steps=500, warmup=30, peak=1.5e-3, floor=3e-4),
        ),
        Stage(
            name="sight",
            trains=_SIGHT,
            mix=SEE,
            batch_tokens=2048,
            schedule=Schedule(steps=3600, warmup=100, peak=2e-3, floor=4e-5),
            sight_alone=True,
        ),
        Stage(
            name="joint",
            trains=_EVERYTHING,
            mix=MIX,
            batch_tokens=1024,
            schedule=Schedule(steps=5800, warmup=100, peak=6e-4, floor=1e-5),
            # Letters have most of the labels: from the start they would drown what text and vision
            # experts have to learn before.
            lessons=(
                Lesson(num_samples=20_000, mix=LOOK),
                Lesson(num_samples=45_000, mix=ARRANGE),
            ),
        ),
        Stage(
            name="words",
            trains=_EVERYTHING,
            mix=READ,
            batch_tokens=1024,
            schedule=Schedule(steps=1400, warmup=50, peak=3e-4, floor=5e-6),
        ),
    ),
    # Chosen by short runs on a few tasks: at 2e-3 the ViT learns nothing for thousands of steps.
    optimizer=OptimizerConfig(vit_scale=0.5),
)

_SMOKE_STEPS = {"language": 10, "longer": 10, "sight": 10, "joint": 20, "words": 5}

_SMOKE = Preset(
    dimensions=replace(
        _BUNDLED.dimensions,
        hidden_size=32,
        intermediate_size=64,
        num_layers=3,
        num_heads=2,
        num_kv_heads=1,
        mrope_section=(3, 3, 2),
        moe_k=2,
        num_experts=8,
        text_intermediate=24,
        vision_intermediate=8,
        vision_depth=2,
        vision_hidden_size=32,
        vision_num_heads=2,
    ),
    stages=tuple(
        replace(
            stage,
            batch_tokens=256,
            # A recall is longer than these batches.
            mix={task: weight for task, weight in stage.mix.items() if task != "recall"},
            lessons=(),
            schedule=Schedule(steps=_SMOKE_STEPS[stage.name], warmup=4, peak=5e-3, floor=1e-3),
        )
        for stage in _BUNDLED.stages
    ),
    # ERNIE's z-loss and its callback, and a bias that moves far enough to be seen in few steps.
    objective=Objective(z=1e-4, orthogonality_by="step", bias_step=1e-3),
    checkpoint_every=25,
    log_every=5,
)

# What the parts of the recipe are worth is measured in minutes: the tasks that are learnt first,
# and no stages of text before them.
_ABLATION = replace(
    _BUNDLED,
    stages=(
        replace(
            _BUNDLED.stage("sight"),
            schedule=Schedule(steps=250, warmup=25, peak=2e-3, floor=1e-4),
        ),
        replace(
            _BUNDLED.stage("joint"),
            mix={"digits": 2, "description": 4, "colour": 2, "count": 1, "more": 1, "sums": 1},
            lessons=(),
            batch_tokens=2048,
            schedule=Schedule(steps=350, warmup=40, peak=6e-4, floor=3e-5),
        ),
    ),
    micro_batches=1,
)

PRESETS: Mapping[str, Preset] = {"bundled": _BUNDLED, "smoke": _SMOKE, "ablation": _ABLATION}


def _without_orthogonality(preset: Preset) -> Preset:
    return replace(preset, objective=replace(preset.objective, orthogonality=0.0))


def _without_balance(preset: Preset) -> Preset:
    return replace(preset, objective=replace(preset.objective, is_token_balanced=False))


def _with_shared_pool(preset: Preset) -> Preset:
    """One bank of both banks' experts, all of the mean width; the shared experts stay as wide."""
    old = preset.dimensions
    width = (old.text_intermediate + old.vision_intermediate) // 2
    dimensions = replace(
        old,
        num_experts=2 * old.num_experts,
        text_intermediate=width,
        vision_intermediate=width,
        num_shared_experts=old.num_shared_experts * old.text_intermediate // width,
    )
    return replace(preset, dimensions=dimensions, shared_pool=True)


ABLATIONS = {
    "no-orthogonality": _without_orthogonality,
    "no-isolation": _with_shared_pool,
    "no-token-balance": _without_balance,
}


def find(name: str, ablation: str | None = None, stage: str | None = None) -> Preset:
    """A preset by name, changed by an ablation, cut down to one stage.

    Raises InvalidArgument that lists what there is.
    """
    preset = _among("preset", name, PRESETS)
    if ablation is not None:
        preset = _among("ablation", ablation, ABLATIONS)(preset)
    if stage is not None:
        preset = replace(preset, stages=(preset.stage(stage),))
    return preset
