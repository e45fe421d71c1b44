"""Expert servers behind a network that is cut or slow; answers do not change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from e2e.cluster import Cluster, wait_until
from e2e.disturbed import GREEDY, TEXT, Peace, assert_equal, assert_same, running_cluster, start
from e2e.networks import Network, Relay, fast_network, require_root, slow_network

from chiasm import local
from chiasm.client import Sampling

LANE = 'chiasm_decoder_dispatches_total{modality="text",way="lane"}'
STREAM = 'chiasm_decoder_dispatches_total{modality="text",way="stream"}'
DAMAGED = 'chiasm_decoder_dispatch_failures_total{modality="text",reason="DATA_LOSS"}'
WON = 'chiasm_decoder_hedges_total{modality="text",outcome="won"}'

BRIEF = Sampling(max_tokens=30, temperature=0, ignore_eos=True)
EXACT = Sampling(max_tokens=100, temperature=0, ignore_eos=True, logprobs=3)
QUICK_MS, SLOW_MS = 1.0, 200.0
"""What a relay's link takes one way. A dispatch over the slow one is later than any over others."""


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    require_root()
    with fast_network() as made:
        yield made


@pytest.fixture(scope="module")
def stack(
    network: Network, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """It listens on this end of the network; tests may leave it without a text server."""
    logs = tmp_path_factory.mktemp("logs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(local, "LOOPBACK", network.host)
        with running_cluster(tiny_checkpoint, logs, park_timeout_s=60, text_servers=1) as running:
            yield running


@pytest.fixture(scope="module")
def peace(stack: Cluster) -> Peace:
    """All answers that are compared, from before there is a far server."""
    peace = Peace(stack.endpoint)
    for sampling in (GREEDY, BRIEF, EXACT):
        peace.answer(TEXT, sampling)
    return peace


@pytest.fixture
def far(stack: Cluster, network: Network, peace: Peace) -> Iterator[str]:
    """A text server on the network's other end."""
    with far_server(stack, network) as name:
        yield name
        network.mend()


@contextmanager
def far_server(stack: Cluster, network: Network) -> Iterator[str]:
    """A text server in a network, for the time of the block."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(local, "LOOPBACK", network.address)
        # Only the process is made inside: threads that grpc starts would stay there.
        name = network.run(lambda: stack.add("text-pool-0", wait=False))
    stack.wait_ready(name)
    try:
        yield name
    finally:
        stack.kill(name)


@contextmanager
def relayed_server(stack: Cluster) -> Iterator[tuple[str, Relay]]:
    """A text server behind a relay."""
    with slow_network(QUICK_MS) as (network, relay), far_server(stack, network) as name:
        yield name, relay


def near_server(stack: Cluster, far: str) -> str:
    """The other text server, beside the far one; it is started if there is none."""
    others = [name for name in stack.running("text-pool-0") if name != far]
    return others[0] if others else stack.add("text-pool-0")


def test_the_link_to_a_server_is_cut(
    stack: Cluster, network: Network, peace: Peace, far: str
) -> None:
    """Nobody is told: packets vanish. A replica answers, and the server comes back with the link.

    The near server is the replica; then it dies, and the far one has to do alone.
    """
    expected = peace.answer(TEXT)
    near = near_server(stack, far)
    running = [start(stack, TEXT) for _ in range(3)]
    running[0].wait_tokens(20)
    network.cut()
    for stream in [*running, start(stack, TEXT)]:
        assert_same(stream.result(), expected)
    stack.wait_gone(far)
    network.mend()
    stack.wait_ready(far)
    stack.kill(near)
    stack.wait_gone(near)
    sent_before = stack.metrics("decoder")[STREAM]
    assert_same(start(stack, TEXT).result(), expected)
    assert stack.metrics("decoder")[STREAM] > sent_before  # another network has no lane


def test_the_only_server_of_a_shard_is_cut_off(
    stack: Cluster, network: Network, peace: Peace, far: str
) -> None:
    expected = peace.answer(TEXT)
    for near in set(stack.running("text-pool-0")) - {far}:
        stack.kill(near)
    running = start(stack, TEXT)
    running.wait_tokens(20)
    network.cut()
    waiting = start(stack, TEXT)
    stack.wait_gone(far)
    assert not running.is_done
    assert not waiting.is_done
    network.mend()
    for stream in (running, waiting):
        assert_same(stream.result(), expected)


def test_two_links_are_cut_one_after_the_other(
    stack: Cluster, network: Network, peace: Peace, far: str
) -> None:
    """And the near server is killed: three failures, two of them at once."""
    expected = peace.answer(TEXT)
    near = near_server(stack, far)
    other = stack.add("text-pool-0")
    running = [start(stack, TEXT) for _ in range(3)]
    running[0].wait_tokens(20)
    network.cut()
    stack.kill(near)
    for stream in running:
        assert_same(stream.result(), expected)
    network.mend()
    stack.wait_ready(far)
    stack.kill(other)
    assert_same(start(stack, TEXT).result(), expected)


def test_a_server_is_far_away(stack: Cluster, peace: Peace) -> None:
    """10 ms, where packets are lost and then where none is: it gives the same answers, alone and
    beside a near one."""
    expected = peace.answer(TEXT, BRIEF)
    with relayed_server(stack) as (far, relay):
        for loss in (0.02, 0.0):
            near = near_server(stack, far)
            relay.become(delay_ms=10, loss=loss)
            assert_same(start(stack, TEXT, BRIEF).result(), expected)
            stack.kill(near)
            assert_same(start(stack, TEXT, BRIEF).result(), expected)
            before = stack.metrics("decoder")
            stack.add("text-pool-0")

            def is_near_used(by_lane: float = before[LANE]) -> bool:
                assert_same(start(stack, TEXT, BRIEF).result(), expected)
                return stack.metrics("decoder")[LANE] > by_lane

            wait_until(is_near_used, "the near one is used")
        assert stack.member(far) is not None


def test_packets_are_damaged_on_the_way(stack: Cluster, peace: Peace) -> None:
    """And TCP does not notice: the payloads' own checksums do, and a replica answers."""
    expected = peace.answer(TEXT, BRIEF)
    with relayed_server(stack) as (far, relay):
        near_server(stack, far)
        before = stack.metrics("decoder").get(DAMAGED, 0)
        relay.become(delay_ms=QUICK_MS, damage=0.3)

        def is_noticed() -> bool:
            assert_same(start(stack, TEXT, BRIEF).result(), expected)
            return stack.metrics("decoder").get(DAMAGED, 0) > before

        wait_until(is_noticed, "damage is noticed")


def test_a_server_becomes_slow(stack: Cluster, peace: Peace) -> None:
    """While it is in use, with a replica on a link like its own: what is late is asked for there
    too, which answers first, and not a bit of the answer shows it."""
    expected = peace.answer(TEXT, EXACT)
    with relayed_server(stack) as (first, first_relay), relayed_server(stack) as (second, relay):
        relays = {first: first_relay, second: relay}
        for near in set(stack.running("text-pool-0")) - set(relays):
            stack.kill(near)
        running = start(stack, TEXT, EXACT)
        running.wait_tokens(40)  # hedging knows by then how quick these links are
        slow = relays[stack.in_use("text-pool-0")]
        won = stack.metrics("decoder").get(WON, 0)
        slow.become(delay_ms=SLOW_MS)
        assert_equal(running.result(), expected)

        def is_hedged() -> bool:
            assert_equal(start(stack, TEXT, EXACT).result(), expected)
            return stack.metrics("decoder").get(WON, 0) > won

        wait_until(is_hedged, "the replica answers first")
