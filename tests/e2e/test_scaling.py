"""Processes that come and go by load, and shards that follow them: no request notices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.cluster import Stream, wait_until
from e2e.disturbed import TEXT, Peace, assert_same, picture_prompt
from e2e.scaled import QUICK, Scaled, scaled

from chiasm.client import Sampling
from chiasm.membership import Role
from chiasm.types import Modality

SHORT = Sampling(max_tokens=30, temperature=0, ignore_eos=True)
LONG = Sampling(max_tokens=200, temperature=0, ignore_eos=True)
LONGER = Sampling(max_tokens=400, temperature=0, ignore_eos=True)
"""Outlasts the start of a process, or its end."""

PICTURES = range(4)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Iterator[Scaled]:
    """One replica of everything to begin with, two at most."""
    with scaled(tiny_checkpoint, tmp_path_factory.mktemp("logs"), text_servers=1) as running:
        yield running


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Iterator[Scaled]:
    """Two text servers with one shard each, and nobody who starts a third."""
    logs, flags = tmp_path_factory.mktemp("logs"), ("--scaling", "off")
    with scaled(tiny_checkpoint, logs, *flags, text_servers=2) as running:
        yield running


@pytest.fixture(scope="module")
def peace(stack: Scaled) -> Peace:
    """Answers to compare with."""
    return Peace(stack.endpoint)


def ask(stack: Scaled, prompt: object, sampling: Sampling = SHORT) -> Stream:
    return Stream(stack.endpoint, prompt, sampling, prompt_logits=True)  # type: ignore[arg-type]


def test_idle_vision_goes_to_zero_text_stays_and_a_picture_wakes_it(
    stack: Scaled, peace: Peace
) -> None:
    expected = {n: peace.answer(picture_prompt(n), SHORT) for n in PICTURES}
    text = peace.answer(TEXT, SHORT)
    stack.wait_encoders(0)
    stack.wait_experts(Modality.VISION, 0)
    assert_same(ask(stack, TEXT).result(), text)
    assert not stack.topology().encoders()
    # Several at once: all wait for the same processes, none is lost.
    streams = {n: ask(stack, picture_prompt(n)) for n in PICTURES}
    for n, stream in streams.items():
        assert_same(stream.result(), expected[n])


def test_a_burst_scales_out_and_its_end_scales_in(stack: Scaled, peace: Peace) -> None:
    expected = peace.answer(TEXT, LONG)
    stack.wait_experts(Modality.TEXT, 1)
    streams = [ask(stack, TEXT, LONG)]

    def is_out() -> bool:
        """Keeps the burst up until the shards are spread over two servers."""
        nonlocal streams
        if all(stream.is_done for stream in streams[-2:]):
            streams += [ask(stack, TEXT, LONG), ask(stack, TEXT, LONG)]
        return stack.shards(Modality.TEXT) == [(0,), (1,)]

    wait_until(is_out, "two text servers share the shards")
    for stream in streams:
        assert_same(stream.result(), expected)
    stack.wait_experts(Modality.TEXT, 1)
    assert stack.shards(Modality.TEXT) == [(0, 1)]
    assert_same(ask(stack, TEXT, SHORT).result(), peace.answer(TEXT, SHORT))


def test_a_server_is_taken_away_under_load(stack: Scaled, peace: Peace) -> None:
    """By a maximum that comes down: the pool is busy all the time."""
    expected = peace.answer(TEXT, LONG)
    streams = [ask(stack, TEXT, LONG) for _ in range(2)]

    def keep_busy() -> None:
        if all(stream.is_done for stream in streams[-2:]):
            streams.append(ask(stack, TEXT, LONG))

    def is_out() -> bool:
        keep_busy()
        return stack.shards(Modality.TEXT) == [(0,), (1,)]

    wait_until(is_out, "two text servers share the shards")
    flags = [*QUICK, "--scaling", "builtin", "--text-experts-max", "1"]
    stack.new_orchestrator(flags)

    def is_in() -> bool:
        keep_busy()
        topology = stack.topology()
        return (
            not topology.settling
            and stack.shards(Modality.TEXT) == [(0, 1)]
            and (len([m for m in topology.members if m.shard_set(Modality.TEXT)]) == 1)
        )

    wait_until(is_in, "one text server holds all shards")
    for stream in streams:
        assert_same(stream.result(), expected)


def test_shards_of_a_killed_server_go_to_the_survivor(pair: Scaled) -> None:
    peace = Peace(pair.endpoint)
    expected, answer = peace.answer(TEXT, LONGER), peace.answer(picture_prompt(0), SHORT)
    assert pair.shards(Modality.TEXT) == [(0,), (1,)]
    streams = [ask(pair, TEXT, LONGER) for _ in range(2)]
    for stream in streams:
        stream.wait_tokens(5)
    pair.kill("text-pool-0")
    for stream in streams:
        assert_same(stream.result(), expected)
    wait_until(lambda: pair.shards(Modality.TEXT) == [(0, 1)], "the survivor has all")
    # One that joins takes its part again, under load.
    streams = [ask(pair, TEXT, LONGER), ask(pair, picture_prompt(0))]
    pair.add("text-pool-1")
    wait_until(lambda: pair.shards(Modality.TEXT) == [(0,), (1,)], "the shards are spread")
    assert_same(streams[0].result(), expected)
    assert_same(streams[1].result(), answer)
    assert len(pair.topology().ready(Role.EXPERT_POOL)) == 3


def test_a_server_that_is_told_to_stop_hands_its_shards_over_first(pair: Scaled) -> None:
    """As when somebody else deletes a pod: nobody waits, nothing is lost."""
    expected = Peace(pair.endpoint).answer(TEXT, LONGER)
    assert pair.shards(Modality.TEXT) == [(0,), (1,)]
    victim = pair.running("text-pool-1")[0]
    decoder_log = pair.log_dir / "decoder.log"
    said_before = len(decoder_log.read_text())
    streams = [ask(pair, TEXT, LONGER) for _ in range(2)]
    for stream in streams:
        stream.wait_tokens(5)
    pair.terminate(victim)
    assert pair.wait_exit(victim) == 0
    for stream in streams:
        assert_same(stream.result(), expected)
    wait_until(lambda: pair.shards(Modality.TEXT) == [(0, 1)], "the one that is left has all")
    left = (pair.log_dir / f"{victim}.log").read_text()
    assert '"handing_over"' in left
    assert "not_handed_over" not in left
    said = decoder_log.read_text()[said_before:]
    assert '"pool_away"' not in said, "no request waited for the pool"
