"""The expert server as a process: the open contract, message by message."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import grpc
import pytest
import torch
from google.rpc import code_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from processes import ServiceProcess, running

from chiasm import errors
from chiasm.model.checkpoint import Checkpoint
from chiasm.model.config import ModelConfig
from chiasm.model.experts import ExpertBank
from chiasm.transport import status, tensors
from chiasm.transport.messages import answer_bytes, request_bytes
from chiasm.types import Modality, ShardSpec
from chiasm.v1 import common_pb2, experts_pb2, experts_pb2_grpc, tensor_pb2

TIMEOUT_S = 20.0
MODULE = "chiasm.services.expert_pool"
LAYER = 2
TOLERANCE = 1e-5
LONG_SHAPE = tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_INT32, shape=[1] * 100_000)

Stub = experts_pb2_grpc.ExpertPoolStub


def await_serving(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        answer = health.Check(
            health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S, wait_for_ready=True
        )
        if answer.status == health_pb2.HealthCheckResponse.SERVING:
            return
        time.sleep(0.05)
    raise AssertionError("never served")


def bank(path: Path, config: ModelConfig, modality: Modality, num_shards: int) -> ExpertBank:
    """The whole pool in this process."""
    found = ExpertBank(
        config,
        modality=modality,
        num_shards=num_shards,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    with Checkpoint(path, config) as checkpoint:
        for shard in range(num_shards):
            found.load(checkpoint, shard)
    return found


def tokens(
    config: ModelConfig, num_tokens: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    text = config.text
    hidden = torch.randn(num_tokens, text.hidden_size, generator=g)
    ids = torch.stack(
        [torch.randperm(text.num_experts, generator=g)[: text.moe_k] for _ in range(num_tokens)]
    )
    return hidden, ids.to(torch.int32), torch.rand(num_tokens, text.moe_k, generator=g)


def request(
    config: ModelConfig,
    *,
    num_tokens: int = 5,
    seed: int = 0,
    dispatch_id: int = 1,
    **fields: object,
) -> experts_pb2.DispatchRequest:
    hidden, ids, weights = tokens(config, num_tokens, seed)
    defaults: dict[str, object] = {
        "dispatch_id": dispatch_id,
        "modality": common_pb2.MODALITY_TEXT,
        "layer": LAYER,
        "shards": [1, 3],
        "num_shards": 4,
        "hidden": tensors.to_wire(hidden),
        "expert_ids": tensors.to_wire(ids),
        "expert_weights": tensors.to_wire(weights),
        "timeout_ns": 10**10,
    }
    return experts_pb2.DispatchRequest(**{**defaults, **fields})  # type: ignore[arg-type]


def dispatch(
    stub: Stub, requests: Iterable[experts_pb2.DispatchRequest]
) -> dict[int, experts_pb2.DispatchResponse]:
    return {r.dispatch_id: r for r in stub.Dispatch(iter(list(requests)), timeout=TIMEOUT_S)}


def test_partials_are_those_of_the_whole_pool(
    stub: Stub, tiny_checkpoint: Path, config: ModelConfig
) -> None:
    whole = bank(tiny_checkpoint, config, Modality.TEXT, 4)
    sizes = [1, 2, 17, 64]
    answers = dispatch(stub, (request(config, num_tokens=n, seed=n, dispatch_id=n) for n in sizes))
    for n in sizes:
        expected = whole.partials(LAYER, [1, 3], *tokens(config, n, n))
        found = answers[n].partials.shards
        assert [p.shard for p in found] == [1, 3]
        for mine, theirs in zip(found, expected, strict=True):
            assert torch.equal(tensors.from_wire(mine.rows, name="rows"), theirs.rows)
            values = tensors.from_wire(mine.values, name="values")
            assert torch.allclose(values, theirs.values, atol=TOLERANCE)
        assert answers[n].compute_ns > 0


def test_a_dispatch_keeps_to_the_shards_that_are_held_when_it_begins(
    tiny_checkpoint: Path, config: ModelConfig
) -> None:
    held = bank(tiny_checkpoint, config, Modality.TEXT, 4)
    begun = held.partials(LAYER, [1, 3], *tokens(config, 5, 0))
    held.drop(3)
    assert [p.shard for p in begun] == [1, 3]
    with pytest.raises(errors.NotFound, match="shard 3"):
        held.partials(LAYER, [1, 3], *tokens(config, 5, 0))


def test_a_replica_gives_the_same_bits(
    stub: Stub, tiny_checkpoint: Path, config: ModelConfig
) -> None:
    """Another process, which holds other shards besides: failover cannot change an answer."""
    flags = ("--model", str(tiny_checkpoint), "--modality", "text", "--dtype", "float32")
    sent = [request(config, num_tokens=n, seed=n, dispatch_id=n) for n in (1, 3, 40, 100)]
    with (
        running(MODULE, *flags, "--shards", "0,1,2,3/4") as replica,
        grpc.insecure_channel(replica.address) as channel,
    ):
        await_serving(channel)
        theirs = dispatch(Stub(channel), sent)
    mine = dispatch(stub, sent)
    assert {i: r.partials for i, r in mine.items()} == {i: r.partials for i, r in theirs.items()}


def test_one_stream_answers_many_dispatches_each_once(stub: Stub, config: ModelConfig) -> None:
    sent = [request(config, seed=i, dispatch_id=100 + i) for i in range(150)]
    received = [r.dispatch_id for r in stub.Dispatch(iter(sent), timeout=TIMEOUT_S)]
    assert sorted(received) == [100 + i for i in range(150)]


@pytest.mark.parametrize(
    ("fields", "code", "word"),
    [
        ({"modality": common_pb2.MODALITY_VISION}, code_pb2.INVALID_ARGUMENT, "modality"),
        ({"layer": 0}, code_pb2.INVALID_ARGUMENT, "layer"),
        ({"layer": 999}, code_pb2.INVALID_ARGUMENT, "layer"),
        ({"shards": []}, code_pb2.INVALID_ARGUMENT, "shards"),
        ({"shards": [3, 1]}, code_pb2.INVALID_ARGUMENT, "shards"),
        ({"shards": [4]}, code_pb2.INVALID_ARGUMENT, "shards"),
        ({"shards": [1] * 100_000}, code_pb2.INVALID_ARGUMENT, "shards"),
        ({"hidden": LONG_SHAPE}, code_pb2.INVALID_ARGUMENT, "hidden.shape"),
        ({"expert_ids": LONG_SHAPE}, code_pb2.INVALID_ARGUMENT, "expert_ids.shape"),
        ({"shards": [0]}, code_pb2.NOT_FOUND, "shard 0"),
        ({"num_shards": 8}, code_pb2.INVALID_ARGUMENT, "num_shards"),
        ({"timeout_ns": 0}, code_pb2.DEADLINE_EXCEEDED, "deadline"),
    ],
)
def test_bad_envelopes_are_answered_one_by_one(
    stub: Stub, config: ModelConfig, fields: dict[str, object], code: int, word: str
) -> None:
    answers = dispatch(
        stub, [request(config, dispatch_id=1, **fields), request(config, dispatch_id=2)]
    )
    assert answers[1].error.code == code
    assert word in answers[1].error.message
    assert len(answers[1].error.message) < 200
    assert answers[2].HasField("partials")


def test_bad_payloads_are_refused(stub: Stub, config: ModelConfig) -> None:
    flipped = request(config, dispatch_id=1)
    flipped.hidden.data = bytes([flipped.hidden.data[0] ^ 1]) + flipped.hidden.data[1:]
    short = request(config, dispatch_id=2)
    short.hidden.data = short.hidden.data[:-4]
    ids = torch.zeros(5, config.text.moe_k, dtype=torch.int32)
    out_of_bank = request(config, dispatch_id=3, expert_ids=tensors.to_wire(ids - 1))
    half = request(
        config, dispatch_id=4, hidden=tensors.to_wire(tokens(config, 5, 0)[0].bfloat16())
    )
    many = request(config, dispatch_id=5)
    many.hidden.shape[0] = 2**31
    answers = dispatch(
        stub, [flipped, short, out_of_bank, half, many, request(config, dispatch_id=6)]
    )
    codes = {i: answers[i].error.code for i in range(1, 6)}
    assert codes == {
        1: code_pb2.DATA_LOSS,
        2: code_pb2.INVALID_ARGUMENT,
        3: code_pb2.INVALID_ARGUMENT,
        4: code_pb2.INVALID_ARGUMENT,
        5: code_pb2.INVALID_ARGUMENT,
    }
    assert answers[6].HasField("partials")


def test_bytes_that_are_no_message_do_not_harm_the_server(
    server: ServiceProcess, stub: Stub, config: ModelConfig
) -> None:
    with grpc.insecure_channel(server.address) as channel:
        raw = channel.stream_stream("/chiasm.v1.ExpertPool/Dispatch")
        with pytest.raises(grpc.RpcError):
            list(raw(iter([b"\xff\xff\xff"]), timeout=TIMEOUT_S))
    assert dispatch(stub, [request(config)])[1].HasField("partials")


def test_a_request_has_a_smaller_bound_than_its_answer(
    server: ServiceProcess, stub: Stub, config: ModelConfig
) -> None:
    size = (4096, config.text.hidden_size, config.text.moe_k)
    assert request_bytes(*size) < answer_bytes(*size)
    with grpc.insecure_channel(server.address) as channel:
        raw = channel.stream_stream("/chiasm.v1.ExpertPool/Dispatch")
        with pytest.raises(grpc.RpcError) as refused:
            list(raw(iter([bytes(request_bytes(*size) + 1)]), timeout=TIMEOUT_S))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dispatch(stub, [request(config)])[1].HasField("partials")


def assert_refused(stub: Stub, assignment: experts_pb2.AssignRequest) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        stub.Assign(assignment, timeout=TIMEOUT_S)
    codes = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT)
    assert refused.value.code() in codes


def test_describe_assign_and_drain(tiny_checkpoint: Path, config: ModelConfig) -> None:
    flags = ("--model", str(tiny_checkpoint), "--modality", "vision", "--dtype", "float32")
    with (
        running(MODULE, *flags, "--shards", "0/2") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        await_serving(channel)
        stub = Stub(channel)
        vision = {"modality": common_pb2.MODALITY_VISION, "num_shards": 2}

        def describe() -> experts_pb2.PoolDescription:
            return stub.Describe(experts_pb2.DescribeRequest(), timeout=TIMEOUT_S)

        before = describe()
        assert list(before.loaded_shards) == [0]
        assert before.precision == "float32"
        stub.Assign(experts_pb2.AssignRequest(shards=[1], epoch=7), timeout=TIMEOUT_S)
        end = time.monotonic() + TIMEOUT_S
        while time.monotonic() < end:
            after = describe()
            if list(after.loaded_shards) == [1]:
                break
            time.sleep(0.02)
        assert list(after.loaded_shards) == [1]
        assert after.epoch == 7
        assert after.weight_bytes == before.weight_bytes
        answers = dispatch(
            stub,
            [
                request(config, dispatch_id=1, shards=[1], **vision),
                request(config, dispatch_id=2, shards=[0], **vision),
            ],
        )
        assert answers[1].HasField("partials")
        assert answers[2].error.code == code_pb2.NOT_FOUND
        for stale in (
            experts_pb2.AssignRequest(shards=[0], epoch=6),
            experts_pb2.AssignRequest(shards=[0], epoch=7),
            experts_pb2.AssignRequest(shards=[2], epoch=8),
            experts_pb2.AssignRequest(shards=[0, 1, 1], epoch=8),
            experts_pb2.AssignRequest(shards=[0], epoch=2**62),
        ):
            assert_refused(stub, stale)
        again = experts_pb2.AssignRequest(shards=[1], epoch=7)
        assert list(stub.Assign(again, timeout=TIMEOUT_S).loaded_shards) == [1]
        lease = experts_pb2.DrainRequest(lease_ms=300)
        assert stub.Drain(lease, timeout=TIMEOUT_S).draining
        end = time.monotonic() + TIMEOUT_S
        while describe().draining:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert dispatch(stub, [request(config, shards=[1], **vision)])[1].HasField("partials")
        assert stub.Drain(lease, timeout=TIMEOUT_S).draining
        assert stub.Drain(experts_pb2.DrainRequest(), timeout=TIMEOUT_S).draining
        time.sleep(0.5)
        assert describe().draining, "a drain without a lease holds"
        with pytest.raises(grpc.RpcError) as refused:
            dispatch(stub, [request(config, shards=[1], **vision)])
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert status.from_rpc_error(refused.value).reason == "DRAINING"


def test_describe_tells_the_load_of_each_shard(
    stub: Stub, tiny_checkpoint: Path, config: ModelConfig
) -> None:
    def loads() -> dict[int, tuple[int, int]]:
        described = stub.Describe(experts_pb2.DescribeRequest(), timeout=TIMEOUT_S)
        assert [x.shard for x in described.shard_loads] == sorted(
            {x.shard for x in described.shard_loads}
        )
        return {x.shard: (x.tokens, x.compute_ns) for x in described.shard_loads}

    sizes = [1, 9, 30]
    before = loads()
    sent = [request(config, num_tokens=n, seed=n, dispatch_id=n) for n in sizes]
    sent.append(request(config, num_tokens=4, seed=4, dispatch_id=4, shards=[3]))
    answers = dispatch(stub, sent)
    after = loads()
    expected = {1: 0, 3: 0}
    for answer in answers.values():
        for partial in answer.partials.shards:
            expected[partial.shard] += partial.rows.shape[0]
    for shard, tokens in expected.items():
        tokens_before, ns_before = before.get(shard, (0, 0))
        assert after[shard][0] - tokens_before == tokens > 0
        assert after[shard][1] > ns_before
    assert set(after) == {1, 3}


def test_sharding_covers_every_expert_once() -> None:
    from chiasm.types import shard_experts

    for experts in (1, 7, 16, 64):
        for shards in range(1, experts + 1):
            held = [e for s in range(shards) for e in shard_experts(s, shards, experts)]
            assert held == list(range(experts))
    assert ShardSpec.parse("3,1/8") == ShardSpec((1, 3), 8)
    for wrong in ("", "1", "8/8", "-1/8", "a/2", "1/0", "0,1/"):
        with pytest.raises(ValueError, match=r".+"):
            ShardSpec.parse(wrong)
