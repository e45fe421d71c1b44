"""The simulator of scaling policies, on a short day."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))  # benchmarks are not part of the package

from benchmarks.elasticity import RATES, plots
from benchmarks.elasticity.compare import Run, compare, configs, simulate
from benchmarks.elasticity.rates import Rates, read
from benchmarks.elasticity.scalers import Chiasm
from benchmarks.elasticity.system import System
from benchmarks.elasticity.traces import Request, Scenario, requests, scenarios
from chiasm.orchestrator.types import Pool

RATE = Rates(
    patch_s=0.001,
    vision_token_s=0.001,
    text_token_s=0.001,
    step_s=0.01,
    step_request_s=0.001,
    prefill_token_s=0.0005,
    boot_s=dict.fromkeys(Pool, 10.0),
)
BURST = Scenario(
    name="burst",
    seconds=240,
    text=lambda _: 0.3,
    images=lambda at: 2.0 if 120 <= at < 180 else 0.0,
)


class Still:
    """Changes nothing."""

    def decide(self, system: System) -> dict[Pool, int]:
        return {pool: fleet.wanted for pool, fleet in system.fleets.items()}


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    return dict(compare(BURST, RATE, seed=1))


def test_the_same_seed_gives_the_same_numbers(runs: dict[str, Run]) -> None:
    again = compare(BURST, RATE, seed=1)
    assert {n: r.summary() for n, r in again.items()} == {n: r.summary() for n, r in runs.items()}
    other = compare(BURST, RATE, seed=2)
    assert other["chiasm"].summary() != runs["chiasm"].summary()


def test_every_scaler_serves_every_request_in_the_end(runs: dict[str, Run]) -> None:
    made = requests(BURST, RATE, seed=1)
    for name, run in runs.items():
        assert [job.request for job in run.jobs] == list(made), name
        assert all(job.finished_at is not None for job in run.jobs), name
        assert all((job.first_token_at or 0) >= job.request.at for job in run.jobs), name


def test_the_policy_grows_with_the_burst_and_the_oracle_before_it(runs: dict[str, Run]) -> None:
    def first_growth(run: Run) -> float:
        counts = run.replicas[Pool.ENCODER]
        return next(at for at, count in zip(run.times, counts, strict=True) if count > 1)

    assert first_growth(runs["oracle"]) < 120 < first_growth(runs["chiasm"]) < 135
    assert runs["oracle"].summary()["image misses %"] <= runs["chiasm"].summary()["image misses %"]
    assert runs["oracle"].replica_s.keys() == set(Pool)
    assert min(runs["hpa on cpu"].replicas[Pool.ENCODER]) == 1, "an HPA cannot go to zero"


def test_a_queue_takes_as_long_as_its_work() -> None:
    """Two images of a second each, then an answer of 100 steps, alone."""
    request = Request(at=0.0, prompt_tokens=10, answer_tokens=100, images=(1000, 1000))
    run = simulate([request], 20.0, RATE, Still())
    (job,) = run.jobs
    assert job.first_token_at == pytest.approx(2.0 + 0.5 + 0.02, abs=0.5)
    assert job.finished_at == pytest.approx(2.5 + 100 * 0.011, abs=0.75)
    assert run.summary()["image misses %"] == 0.0


def test_a_known_image_needs_no_encoder() -> None:
    viral = [
        Request(at=float(at), prompt_tokens=5, answer_tokens=5, images=(1000,), digest=1)
        for at in range(8)
    ]
    system = System(RATE, dict.fromkeys(Pool, 1))
    for request in viral:
        for quarter in range(4):
            system.step([request] if not quarter else [], 0.25)
    assert system.fleets[Pool.ENCODER].replicas[0].done == pytest.approx(1000)
    assert system.fleets[Pool.VISION_EXPERTS].replicas[0].done == pytest.approx(8 * 250)


def test_a_replica_serves_after_its_start_and_costs_before() -> None:
    system = System(RATE, dict.fromkeys(Pool, 0))
    fleet = system.fleets[Pool.ENCODER]
    fleet.scale(2, system.now)
    for _ in range(39):
        system.step([], 0.25)
    assert not fleet.ready(system.now)
    assert fleet.replica_s == pytest.approx(2 * 39 * 0.25)
    system.step([], 0.25)
    assert len(fleet.ready(system.now)) == 2


def test_slow_experts_slow_the_steps_down() -> None:
    request = Request(at=0.0, prompt_tokens=1, answer_tokens=100)
    slow = replace(RATE, text_token_s=0.1)
    fast_s, slow_s = (
        simulate([request] * 4, 60.0, rates, Still()).jobs[0].finished_at for rates in (RATE, slow)
    )
    assert fast_s is not None
    assert slow_s is not None
    assert slow_s == pytest.approx(4 * 101 * 0.1, rel=0.1)
    assert fast_s < 3


def test_the_scenarios_of_the_benchmark(tmp_path: Path) -> None:
    rates = read(RATES)
    named = {scenario.name for scenario in scenarios(3600.0, 0)}
    assert named == {"diurnal text", "image bursts", "viral image", "flash crowd"}
    bursts = next(s for s in scenarios(120.0, 0) if s.name == "image bursts")
    made = requests(bursts, rates, 0)
    assert any(request.images for request in made)
    assert [r.at for r in made] == sorted(r.at for r in made)
    run = simulate(made, 120.0, rates, Chiasm(configs(rates)))
    rates.write(tmp_path / "rates.json", "the same")
    assert read(tmp_path / "rates.json") == rates
    plots.draw(bursts, {"chiasm": run}, tmp_path / "bursts.png")
    assert (tmp_path / "bursts.png").read_bytes().startswith(b"\x89PNG")
