"""How long an answer stands still when a part of the system fails.

One request streams; something fails while it does; the longest time between two tokens is the
recovery. Every answer is compared with that of the undisturbed stack, token by token.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from chiasm import local
from chiasm.client import Client, Delta, Sampling, user
from chiasm.local import StackConfig
from chiasm.types import Modality

# The tests know how to kill, stop and cut off processes.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
from e2e.cluster import Cluster, wait_until
from e2e.networks import Network, fast_network
from e2e.scaled import Scaled

REPEATS = 5
BEFORE = 40
"""Tokens that are streamed before something fails."""

SAMPLING = Sampling(max_tokens=1000, temperature=0, ignore_eos=True)
PROMPT = [user("Tell me of the sea, the wind and the rain.")]
POOL = "text-pool-0"

_C = TypeVar("_C", bound=Cluster)

Case = Callable[[Cluster], AbstractContextManager[Callable[[], object]]]
"""Gives what makes something fail, and sets the stack right afterwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One answer: its tokens, and the longest time without one after `disturb`."""

    token_ids: list[int]
    longest_gap_s: float


def run(model: Path, report: Callable[[str], None]) -> dict[str, object]:
    """Recovery times in seconds by what failed."""
    found: dict[str, list[float]] = {}
    for is_hedging in (True, False):
        with _stack(model, hedging=is_hedging) as stack:
            cases = HEDGED if is_hedging else UNHEDGED
            for name, case in cases.items():
                found[name] = _measure(stack, case)
                _report(report, name, found[name])
    with _shared_out(model) as shared_out:
        found[SURVIVED] = _measure(shared_out, lambda _: _holder_killed(shared_out))
        _report(report, SURVIVED, found[SURVIVED])
    if os.geteuid() == 0:
        for name, hedging in (("network cut, replica", True), ("network cut, no hedging", False)):
            found[name] = _measure_cuts(model, hedging=hedging)
            _report(report, name, found[name])
    else:
        report("the network is not cut: that needs root")
    return {
        "seconds": found,
        "median_s": {name: statistics.median(gaps) for name, gaps in found.items()},
        "lease_s": 6.0,
        "attempt_timeout_s": 10.0,
    }


def _report(report: Callable[[str], None], name: str, gaps: list[float]) -> None:
    median, longest = statistics.median(gaps), max(gaps)
    report(f"{name}: median {1000 * median:.0f} ms, longest {1000 * longest:.0f} ms")


@contextmanager
def _stack(model: Path, *, hedging: bool, lane: bool = True) -> Iterator[Cluster]:
    """Two servers of one text pool, one decoder."""
    os.environ["CHIASM_HEDGE_BUDGET"] = "0.05" if hedging else "0"
    os.environ["CHIASM_LANE"] = str(lane)
    try:
        with _started(Cluster(StackConfig(model=model, dtype="float32"))) as stack:
            stack.add(POOL)
            yield stack
    finally:
        del os.environ["CHIASM_HEDGE_BUDGET"], os.environ["CHIASM_LANE"]


def _shared_out(model: Path) -> AbstractContextManager[Scaled]:
    """Two servers of one text pool, each with half of its shards, as the orchestrator says."""
    config = StackConfig(
        model=model,
        dtype="float32",
        text_servers=2,
        autoscale=True,
        orchestrator_flags=("--scaling", "off"),
    )
    return _started(Scaled(config))


@contextmanager
def _started(stack: _C) -> Iterator[_C]:
    try:
        stack.endpoint = stack.start()
        yield stack
    finally:
        stack.stop()


def _measure(stack: Cluster, case: Case) -> list[float]:
    expected = _answer(stack, lambda: None).token_ids
    gaps = []
    for _ in range(REPEATS):
        with case(stack) as disturb:
            answer = _answer(stack, disturb)
        if answer.token_ids != expected:
            raise AssertionError("the answer has changed")
        gaps.append(answer.longest_gap_s)
    return gaps


def _answer(stack: Cluster, disturb: Callable[[], object]) -> Run:
    """Streams one answer and disturbs it, from another thread, after some tokens."""
    tokens: list[int] = []
    longest, last = 0.0, None
    disturbed: Future[object] | None = None
    with ThreadPoolExecutor(1) as thread, Client(stack.endpoint, timeout_s=120) as client:
        for event in client.generate(PROMPT, sampling=SAMPLING):
            if not isinstance(event, Delta):
                continue
            now = time.monotonic()
            if last is not None:
                longest = max(longest, now - last)
                last = now
            elif len(tokens) >= BEFORE:
                last = now
                disturbed = thread.submit(disturb)
            tokens += event.token_ids
        is_disturbed = disturbed is not None and disturbed.done()
    if disturbed is not None:
        disturbed.result()
    if not is_disturbed:
        raise AssertionError("the answer was over before the failure")
    return Run(token_ids=tokens, longest_gap_s=longest)


@contextmanager
def _nothing(stack: Cluster) -> Iterator[Callable[[], object]]:
    yield lambda: None


@contextmanager
def _server_killed(stack: Cluster) -> Iterator[Callable[[], object]]:
    victims: list[str] = []

    def kill() -> None:
        victims.append(stack.in_use(POOL))
        stack.kill(victims[0])

    yield kill
    stack.wait_gone(victims[0])
    stack.add(POOL)


def _server_stuck(stack: Cluster) -> AbstractContextManager[Callable[[], object]]:
    return _server_held(stack, stack.stopped)


def _server_slow(stack: Cluster) -> AbstractContextManager[Callable[[], object]]:
    """It stands still for 100 ms of every 110."""
    return _server_held(stack, stack.stuttering)


@contextmanager
def _server_held(
    stack: Cluster, hold: Callable[[str], AbstractContextManager[None]]
) -> Iterator[Callable[[], object]]:
    with ExitStack() as held:
        yield lambda: held.enter_context(hold(stack.in_use(POOL)))
    for name in stack.running(POOL):
        stack.wait_ready(name)


@contextmanager
def _all_servers_killed(stack: Cluster) -> Iterator[Callable[[], object]]:
    """Another one is started at once: the time is mostly that of its start."""
    victims = stack.running(POOL)

    def kill() -> None:
        for victim in victims:
            stack.kill(victim)
        stack.add(POOL, wait=False)

    yield kill
    stack.wait_complete()
    stack.add(POOL)


@contextmanager
def _holder_killed(stack: Scaled) -> Iterator[Callable[[], object]]:
    """The other server is told to take its shards, and loads them."""
    yield lambda: stack.kill(stack.running(POOL)[0])
    stack.add(POOL)
    wait_until(lambda: stack.shards(Modality.TEXT) == [(0,), (1,)], "the shards are spread")


@contextmanager
def _decoder_killed(stack: Cluster) -> Iterator[Callable[[], object]]:
    if len(stack.running("decoder")) < 2:
        stack.add("decoder")
    decoders = stack.running("decoder")

    def kill() -> None:
        stack.kill(max(decoders, key=lambda d: stack.decoder_load(d).running_requests))

    yield kill
    for decoder in decoders:
        if decoder in stack.ended:
            stack.wait_gone(decoder)


@contextmanager
def _gateway_killed(stack: Cluster) -> Iterator[Callable[[], object]]:
    victim, other = stack.add("gateway"), stack.endpoint
    stack.endpoint = f"ipv4:{stack.address(victim)},{other}"
    yield lambda: stack.kill(victim)
    stack.endpoint = other


HEDGED: dict[str, Case] = {
    "nothing": _nothing,
    "expert server killed, replica": _server_killed,
    "expert server stuck, replica": _server_stuck,
    "expert server slow, replica": _server_slow,
    "all expert servers killed, one started": _all_servers_killed,
    "decoder killed, another one": _decoder_killed,
    "gateway killed, another one": _gateway_killed,
}
SURVIVED = "expert server killed, no replica, the other one takes its shards"
UNHEDGED: dict[str, Case] = {
    "expert server stuck, replica, no hedging": _server_stuck,
    "expert server slow, replica, no hedging": _server_slow,
}


def _measure_cuts(model: Path, *, hedging: bool) -> list[float]:
    """The server in use is in a network namespace whose link goes down."""
    with fast_network() as network:
        loopback, local.LOOPBACK = local.LOOPBACK, network.host
        try:
            # Without shared memory the near server is not much nearer, and so not preferred.
            with _stack(model, hedging=hedging, lane=False) as stack:
                local.LOOPBACK = network.address
                far = network.run(lambda: stack.add(POOL, wait=False))
                local.LOOPBACK = network.host
                stack.wait_ready(far)
                for near in [name for name in stack.running(POOL) if name != far]:
                    stack.kill(near)
                    stack.wait_gone(near)
                return _measure(stack, lambda stack: _cut(stack, network, far))
        finally:
            local.LOOPBACK = loopback
            network.mend()


@contextmanager
def _cut(stack: Cluster, network: Network, far: str) -> Iterator[Callable[[], object]]:
    near = stack.add(POOL)
    while stack.running(POOL)[0] != far:  # the first of equals is asked; their order is by chance
        stack.kill(near)
        stack.wait_gone(near)
        near = stack.add(POOL)

    def cut() -> None:
        if stack.in_use(POOL) != far:
            raise AssertionError("the link that was to be cut is not in use")
        network.cut()

    yield cut
    stack.wait_gone(far)
    network.mend()
    stack.wait_ready(far)
    stack.kill(near)
    stack.wait_gone(near)
