"""Decisions that were written down, and made again from what was written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from control.scaling_signals import CONFIG, IDLE, signals

from chiasm.load import EncoderLoad, GatewayLoad, Load
from chiasm.orchestrator.journal import Journal, replay
from chiasm.orchestrator.planner import Planner
from chiasm.orchestrator.types import Pool, Signals

TEXT = Pool.TEXT_EXPERTS
TICK_S = 2.0


def course(load: Callable[[float], Mapping[str, Load]]) -> list[Signals]:
    return [signals(at * TICK_S, load(at * TICK_S)) for at in range(60)]


def burst(at: float) -> Mapping[str, Load]:
    patches = int(max(0.0, at - 40.0) * 900)
    return {
        **IDLE,
        "gateway": GatewayLoad(waiting_encoder=int(at > 60)),
        "encoder": EncoderLoad(
            queued_items=patches // 1000,
            queued_patches=patches,
            admitted_patches_total=3 * patches,
            encoded_patches_total=2 * patches,
            busy_s_total=patches / 500,
        ),
    }


def test_a_journal_replays_to_the_same_decisions(tmp_path: Path) -> None:
    configs = {pool: replace(CONFIG, min_replicas=int(pool is TEXT)) for pool in Pool}
    path = tmp_path / "decisions.jsonl"
    for _ in range(2):  # a second life of the orchestrator goes on in the same file
        planner, journal = Planner(configs), Journal(path, configs)
        made = []
        for moment in course(burst):
            made.append(planner.step(moment))
            journal.add(moment, made[-1])
    replayed = list(replay(path))
    assert [was for was, _ in replayed] == made * 2
    assert [again for _, again in replayed] == made * 2
    assert any(decision.replicas[Pool.ENCODER] > 1 for decision in made)


def test_what_is_no_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "no.jsonl"
    path.write_text('{"signals": 3}\n')
    with pytest.raises(ValueError, match="signals"):
        list(replay(path))


def test_a_full_journal_gives_way_to_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chiasm.orchestrator.journal.MAX_BYTES", 5000)
    configs = dict.fromkeys(Pool, CONFIG)
    path = tmp_path / "decisions.jsonl"
    planner, journal = Planner(configs), Journal(path, configs)
    for moment in course(burst):
        journal.add(moment, planner.step(moment))
    assert {p.name for p in tmp_path.iterdir()} == {"decisions.jsonl", "decisions.jsonl.1"}
    assert list(replay(path))
