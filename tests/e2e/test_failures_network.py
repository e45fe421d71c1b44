"""Expert servers behind a network that is cut or slow; answers do not change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from e2e.cluster import Cluster, wait_until
from e2e.disturbed import TEXT, Peace, assert_same, running_cluster, start
from e2e.networks import Network, fast_network, require_root, slow_network

from chiasm import local
from chiasm.client import Result, Sampling

LANE = 'chiasm_decoder_dispatches_total{modality="text",way="lane"}'
STREAM = 'chiasm_decoder_dispatches_total{modality="text",way="stream"}'
DAMAGED = 'chiasm_decoder_dispatch_failures_total{modality="text",reason="DATA_LOSS"}'

BRIEF = Sampling(max_tokens=30, temperature=0, ignore_eos=True)


@contextmanager
def cluster_on(
    network: Network, monkeypatch: pytest.MonkeyPatch, model: Path, logs: Path
) -> Iterator[Cluster]:
    """A stack that listens on this end of a network."""
    monkeypatch.setattr(local, "LOOPBACK", network.host)
    with running_cluster(model, logs, park_timeout_s=60, text_servers=1) as running:
        yield running


def add_far(stack: Cluster, network: Network, monkeypatch: pytest.MonkeyPatch) -> str:
    """Another text server, on the network's other end."""
    monkeypatch.setattr(local, "LOOPBACK", network.address)
    # Only the process is made inside: threads that grpc starts would stay there.
    name = network.run(lambda: stack.add("text-pool-0", wait=False))
    monkeypatch.setattr(local, "LOOPBACK", network.host)
    stack.wait_ready(name)
    return name


@pytest.fixture
def far(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Cluster, Network, str]]:
    """A stack with a second text server behind a link."""
    require_root()
    with ExitStack() as until_end:
        network = until_end.enter_context(fast_network())
        stack = until_end.enter_context(cluster_on(network, monkeypatch, tiny_checkpoint, tmp_path))
        yield stack, network, add_far(stack, network, monkeypatch)
        network.mend()


def test_the_link_to_a_server_is_cut(far: tuple[Cluster, Network, str]) -> None:
    """Nobody is told: packets vanish. A replica answers, and the server comes back with the link.

    The near server is the replica; then it dies, and the far one has to do alone.
    """
    stack, network, name = far
    peace = Peace(stack.endpoint)
    expected = peace.answer(TEXT)
    near = stack.children["text-pool-0"]
    assert near.exit_code is None
    running = [start(stack, TEXT) for _ in range(3)]
    running[0].wait_tokens(20)
    network.cut()
    for stream in [*running, start(stack, TEXT)]:
        assert_same(stream.result(), expected)
    stack.wait_gone(name)
    network.mend()
    stack.wait_ready(name)
    stack.kill("text-pool-0")
    stack.wait_gone("text-pool-0")
    sent_before = stack.metrics("decoder")[STREAM]
    assert_same(start(stack, TEXT).result(), expected)
    assert stack.metrics("decoder")[STREAM] > sent_before  # another network has no lane


def test_the_only_server_of_a_shard_is_cut_off(far: tuple[Cluster, Network, str]) -> None:
    stack, network, name = far
    expected = Peace(stack.endpoint).answer(TEXT)
    stack.kill("text-pool-0")
    running = start(stack, TEXT)
    running.wait_tokens(20)
    network.cut()
    waiting = start(stack, TEXT)
    stack.wait_gone(name)
    assert not running.is_done
    assert not waiting.is_done
    network.mend()
    for stream in (running, waiting):
        assert_same(stream.result(), expected)


def test_two_links_are_cut_one_after_the_other(
    far: tuple[Cluster, Network, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the near server is killed: three failures, two of them at once."""
    stack, network, name = far
    expected = Peace(stack.endpoint).answer(TEXT)
    add_near = stack.add("text-pool-0")
    running = [start(stack, TEXT) for _ in range(3)]
    running[0].wait_tokens(20)
    network.cut()
    stack.kill("text-pool-0")
    for stream in running:
        assert_same(stream.result(), expected)
    network.mend()
    stack.wait_ready(name)
    stack.kill(add_near)
    assert_same(start(stack, TEXT).result(), expected)


def test_a_server_is_far_away(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 ms, where packets are lost and then where none is: it gives the same answers, alone and
    beside a near one."""
    require_root()
    with (
        slow_network(10, loss=0.02) as (network, relay),
        cluster_on(network, monkeypatch, tiny_checkpoint, tmp_path) as stack,
    ):
        expected = Peace(stack.endpoint).answer(TEXT, BRIEF)
        far = add_far(stack, network, monkeypatch)
        near = near_one_is_replaced(stack, "text-pool-0", expected)
        relay.restart(loss=0.0)
        near_one_is_replaced(stack, near, expected)
        assert stack.member(far) is not None


def test_packets_are_damaged_on_the_way(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And TCP does not notice: the payloads' own checksums do, and a replica answers."""
    require_root()
    with (
        slow_network(1, loss=0.0) as (network, relay),
        cluster_on(network, monkeypatch, tiny_checkpoint, tmp_path) as stack,
    ):
        expected = Peace(stack.endpoint).answer(TEXT, BRIEF)
        add_far(stack, network, monkeypatch)
        relay.restart(loss=0.0, damage=0.3)

        def is_noticed() -> bool:
            assert_same(start(stack, TEXT, BRIEF).result(), expected)
            return stack.metrics("decoder").get(DAMAGED, 0) > 0

        wait_until(is_noticed, "damage is noticed")


def near_one_is_replaced(stack: Cluster, near: str, expected: Result) -> str:
    """Answers beside it, without it, and beside its successor, whose name is returned."""
    assert_same(start(stack, TEXT, BRIEF).result(), expected)
    stack.kill(near)
    assert_same(start(stack, TEXT, BRIEF).result(), expected)
    before = stack.metrics("decoder")
    successor = stack.add("text-pool-0")

    def is_near_used() -> bool:
        assert_same(start(stack, TEXT, BRIEF).result(), expected)
        return stack.metrics("decoder")[LANE] > before[LANE]

    wait_until(is_near_used, "the near one is used")
    return successor
