"""Expert servers that stall, die, drain and lose shards while answers flow; answers do not change.

Besides, what the way between decoder and servers leaves behind: nothing.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
from e2e.cluster import Cluster, wait_until
from e2e.disturbed import ENDLESS, GREEDY, SEEDED, TEXT, Peace, assert_same, picture_prompt, start

from chiasm.v1 import experts_pb2, experts_pb2_grpc

TIMEOUT_S = 20.0
LONG = replace(GREEDY, max_tokens=100)


def experts(stack: Cluster, name: str) -> Any:
    """A stub of an expert server."""
    return experts_pb2_grpc.ExpertPoolStub(grpc.insecure_channel(stack.address(name)))


def total(stack: Cluster, metric: str, **labels: str) -> float:
    """The sum of the decoder's metric over the samples with these labels."""
    (decoder,) = stack.running("decoder")
    return sum(
        value
        for key, value in stack.metrics(decoder).items()
        if key.startswith(f"{metric}{{") and all(f'{k}="{v}"' in key for k, v in labels.items())
    )


def num_arenas(stack: Cluster, name: str) -> int:
    """Mappings of lanes in a process."""
    maps = Path(f"/proc/{stack.children[name].pid}/maps").read_text()
    return maps.count("memfd:chiasm-arena")


def test_dispatches_of_one_host_go_through_shared_memory(stack: Cluster, peace: Peace) -> None:
    for prompt in (TEXT, picture_prompt(1)):
        peace.answer(prompt)
    assert total(stack, "chiasm_decoder_lanes_total", outcome="opened") >= 3
    # A first dispatch may come before its lane is open.
    by_lane = total(stack, "chiasm_decoder_dispatches_total", way="lane")
    assert by_lane > 100
    assert total(stack, "chiasm_decoder_dispatches_total", way="stream") < by_lane / 20


def test_a_stalled_server_is_hidden_by_its_replica(stack: Cluster, peace: Peace) -> None:
    """For every stall one dispatch is late, for as long as a hedge takes to be sent."""
    expected = peace.answer(TEXT)
    stack.add("text-pool-0")
    replicas = stack.running("text-pool-0")
    won = total(stack, "chiasm_decoder_hedges_total", modality="text", outcome="won")
    for victim in replicas:
        running = start(stack, TEXT)
        running.wait_tokens(10)
        with stack.stopped(victim):
            assert_same(running.result(), expected)
            assert_same(start(stack, TEXT).result(), expected)
        stack.wait_ready(victim)
    assert total(stack, "chiasm_decoder_hedges_total", modality="text", outcome="won") > won


def test_a_server_stutters(stack: Cluster, peace: Peace) -> None:
    """One in use: what it is late with is asked for at its replica."""
    expected = [peace.answer(TEXT, s) for s in (GREEDY, SEEDED)]
    while len(stack.running("text-pool-0")) < 2:
        stack.add("text-pool-0")
    background = start(stack, TEXT, ENDLESS)
    victim = stack.in_use("text-pool-0")
    sent = total(stack, "chiasm_decoder_hedges_total", modality="text", outcome="sent")
    with stack.stuttering(victim):
        for _ in range(2):
            running = [start(stack, TEXT, s) for s in (GREEDY, SEEDED)]
            for stream, answer in zip(running, expected, strict=True):
                assert_same(stream.result(), answer)
    background.cancel()
    assert total(stack, "chiasm_decoder_hedges_total", modality="text", outcome="sent") > sent
    stack.wait_ready(victim)


def test_one_server_dies_while_another_is_stuck(stack: Cluster, peace: Peace) -> None:
    """Of different shards, each with a replica; and then the same of one shard with three."""
    expected = peace.answer(TEXT)
    while len(stack.running("text-pool-1")) < 2:
        stack.add("text-pool-1")
    dies, stuck = stack.running("text-pool-0")[0], stack.running("text-pool-1")[0]
    running = [start(stack, TEXT) for _ in range(2)]
    running[0].wait_tokens(20)
    with stack.stopped(stuck):
        stack.kill(dies)
        for stream in running:
            assert_same(stream.result(), expected)
    stack.wait_ready(stuck)
    while len(stack.running("text-pool-0")) < 3:
        stack.add("text-pool-0")
    dies, stuck, _ = stack.running("text-pool-0")
    running = [start(stack, TEXT) for _ in range(2)]
    running[0].wait_tokens(20)
    with stack.stopped(stuck):
        stack.kill(dies)
        for stream in [*running, start(stack, TEXT)]:
            assert_same(stream.result(), expected)
    stack.wait_ready(stuck)


def test_decoder_and_expert_server_die_together(stack: Cluster, peace: Peace) -> None:
    """The answer goes on at another decoder, with another server, and nothing is left mapped."""
    expected = peace.answer(TEXT)
    stack.add("decoder")
    while len(stack.running("text-pool-0")) < 2:
        stack.add("text-pool-0")
    first, second = stack.running("decoder")
    running = start(stack, TEXT)
    running.wait_tokens(20)
    victim, survivor = stack.running("text-pool-0")[:2]
    before = num_arenas(stack, survivor)
    stack.kill(first)
    stack.kill(victim)
    found = running.result()
    assert found.token_ids == expected.token_ids
    assert found.text == expected.text
    wait_until(lambda: num_arenas(stack, survivor) < before, "the dead decoder's lane is unmapped")
    assert num_arenas(stack, survivor) == 2
    names = [f"{pool}-pool-{n}" for pool, n in (("text", 0), ("text", 1), ("vision", 0))]
    servers = sum(len(stack.running(name)) for name in names)
    start(stack, TEXT).result()
    start(stack, picture_prompt(1)).result()
    wait_until(lambda: num_arenas(stack, second) == 2 * servers, "the dead server's lane is gone")


def test_shards_move_while_answers_flow(stack: Cluster, peace: Peace) -> None:
    """Two servers take over from each other, again and again: a shard is asked for at one that has
    just dropped it, and no request notices."""
    expected = peace.answer(TEXT, LONG)
    names = [stack.running("text-pool-0")[0], stack.running("text-pool-1")[0]]
    for spare in [*stack.running("text-pool-0"), *stack.running("text-pool-1")]:
        if spare not in names:
            stack.kill(spare)
            stack.wait_gone(spare)
    stubs = [experts(stack, name) for name in names]
    described = stubs[0].Describe(experts_pb2.DescribeRequest(), timeout=TIMEOUT_S)
    all_shards = list(range(described.num_shards))
    assert len(all_shards) >= 2

    def assign(server: int, shards: list[int], epoch: int) -> None:
        """Returns when the server holds them, as the topology has it."""
        stubs[server].Assign(
            experts_pb2.AssignRequest(shards=shards, epoch=epoch), timeout=TIMEOUT_S
        )

        def is_told() -> bool:
            member = stack.member(names[server])
            return member is not None and member.shard_sets[0].shards == tuple(shards)

        wait_until(is_told, f"{names[server]} holds {shards}")

    half = len(all_shards) // 2
    cuts = [half, 0, half, len(all_shards), half]
    epochs, loads = itertools.count(1), []
    for _ in range(3):
        running = [start(stack, TEXT, LONG) for _ in range(3)]
        running[0].wait_tokens(5)
        for cut in cuts:  # the last one is where they began
            # Whoever gives a shard up does so after the other has it.
            for server in (0, 1):
                assign(server, all_shards, next(epochs))
            for server, kept in enumerate((all_shards[:cut], all_shards[cut:])):
                assign(server, kept or all_shards[:1], next(epochs))
        for stream in running:
            assert_same(stream.result(), expected)
        loads.append(
            [stub.Describe(experts_pb2.DescribeRequest(), timeout=TIMEOUT_S) for stub in stubs]
        )
    for before, after in zip(loads[0], loads[-1], strict=True):
        assert sum(x.tokens for x in after.shard_loads) > sum(x.tokens for x in before.shard_loads)


def test_servers_drain_while_answers_flow(stack: Cluster, peace: Peace) -> None:
    """One after the other, told by Drain or by SIGTERM; each has been replaced before."""
    expected = peace.answer(TEXT)
    failed = total(stack, "chiasm_decoder_dispatch_failures_total", reason="UNAVAILABLE")
    for turn in range(4):
        like = f"text-pool-{turn % 2}"
        (old,) = stack.running(like)[:1]
        stack.add(like)
        running = [start(stack, TEXT) for _ in range(3)]
        running[0].wait_tokens(5)
        if turn < 2:
            drained = experts(stack, old).Drain(experts_pb2.DrainRequest(), timeout=TIMEOUT_S)
            assert drained.draining
            time.sleep(0.1)
        stack.terminate(old)
        assert stack.wait_exit(old) == 0
        for stream in running:
            assert_same(stream.result(), expected)
    # Draining is announced first, so at most a few dispatches came too late for it.
    now = total(stack, "chiasm_decoder_dispatch_failures_total", reason="UNAVAILABLE")
    assert now - failed < 50
