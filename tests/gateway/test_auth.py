"""API keys, over a real server: who gets in, with what, and when the file changes."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import processes
import pytest
from control.certificates import Authority
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from lost_status import told

from chiasm import errors
from chiasm.client import AsyncClient, Client
from chiasm.services.gateway.auth import ApiKeyGuard, ApiKeys
from chiasm.transport import status
from chiasm.transport.interceptors import Guards
from chiasm.transport.server import Server
from chiasm.types import TlsFiles

KINDS = ["unary_unary", "unary_stream", "stream_unary", "stream_stream"]
BIG = b"x" * (1 << 20)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("# ours\nfirst-key\n\n  second-key  \n")
    return path


class Echo(grpc.GenericRpcHandler):  # type: ignore[type-arg] # not generic at run time
    """A method of every kind; `seen` are the messages that reached one."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        kind = details.method.rpartition("/")[2]
        if kind not in KINDS:
            return None
        asks_many, answers_many = (part == "stream" for part in kind.split("_"))

        async def one(request: Any, _: Any) -> bytes:
            messages = [m async for m in request] if asks_many else [request]
            self.seen += messages
            return messages[-1]

        async def many(request: Any, context: Any) -> AsyncIterator[bytes]:
            yield await one(request, context)

        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(many if answers_many else one)


@asynccontextmanager
async def serving(
    keys: Path, keyless: str = "health"
) -> AsyncIterator[tuple[grpc.aio.Channel, Echo]]:
    interceptor = Guards(ApiKeyGuard(ApiKeys(keys), keyless=keyless))
    server = Server(services=["echo.Echo"], max_message_bytes=4 << 20, interceptors=[interceptor])
    echo = Echo()
    server.grpc.add_generic_rpc_handlers((echo,))
    port = await server.start("127.0.0.1:0")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel, echo
    await server.grpc.stop(0)


async def call(channel: grpc.aio.Channel, kind: str, authorization: str | None) -> list[bytes]:
    """Calls a method of Echo. Raises chiasm.errors."""
    metadata = () if authorization is None else (("authorization", authorization),)
    asks_many, answers_many = (part == "stream" for part in kind.split("_"))
    method = getattr(channel, kind)(f"/echo.Echo/{kind}")

    async def answers() -> list[bytes]:
        started = method(iter([BIG]) if asks_many else BIG, metadata=metadata, timeout=20)
        return [answer async for answer in started] if answers_many else [await started]

    try:
        return await told(answers)
    except grpc.RpcError as error:
        raise status.from_rpc_error(error) from None


@pytest.mark.parametrize("kind", KINDS)
async def test_a_known_key_gets_in(keys: Path, kind: str) -> None:
    async with serving(keys) as (channel, echo):
        for key in ("first-key", "second-key"):
            assert await call(channel, kind, f"Bearer {key}") == [BIG]
        assert await call(channel, kind, "bearer   first-key ") == [BIG]
    assert len(echo.seen) == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "authorization",
    [
        *(None, "", "Bearer", "Bearer ", "first-key", "Basic first-key"),
        *("Bearer first-ke", "Bearer first-key2", "Bearer # ours", "Bearer first-key second-key"),
    ],
)
async def test_others_are_refused_before_anything_is_read(
    keys: Path, kind: str, authorization: str | None
) -> None:
    async with serving(keys) as (channel, echo):
        with pytest.raises(errors.Unauthenticated) as caught:
            await call(channel, kind, authorization)
    assert caught.value.reason == "UNAUTHENTICATED"
    assert "first-key" not in caught.value.message
    assert echo.seen == []


@pytest.mark.parametrize(
    ("keyless", "health", "reflection"),
    [("none", False, False), ("health", True, False), ("health+reflection", True, True)],
)
async def test_what_needs_no_key(keys: Path, keyless: str, health: bool, reflection: bool) -> None:
    async def is_open(calling: Any) -> bool:
        try:
            await calling
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                return False
            raise
        return True

    async with serving(keys, keyless) as (channel, _):
        probe = health_pb2_grpc.HealthStub(channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        # One message is sent with the call; a stream of them could find it refused already.
        look = channel.unary_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        assert await is_open(probe.Check(health_pb2.HealthCheckRequest(), timeout=20)) == health
        answers = look(question, timeout=20)
        assert await is_open(answers.__aiter__().__anext__()) == reflection
        known = (("authorization", "Bearer first-key"),)
        assert await is_open(
            probe.Check(health_pb2.HealthCheckRequest(), timeout=20, metadata=known)
        )


async def test_a_method_that_does_not_exist_is_not_a_matter_of_keys(keys: Path) -> None:
    async with serving(keys) as (channel, _):
        with pytest.raises(grpc.RpcError) as caught:
            await channel.unary_unary("/echo.Echo/nothing")(b"", timeout=20)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_changed_file_counts_at_once(keys: Path) -> None:
    known = ApiKeys(keys)
    assert known.holds("first-key")
    keys.write_text("third-key\n")
    assert known.holds("third-key")
    assert not known.holds("first-key")
    for break_it in (lambda: keys.write_text("\n# none\n"), keys.unlink):
        break_it()
        assert known.holds("third-key")


@pytest.mark.parametrize("text", ["", "# only a remark\n", "x" * (1 << 20) + "y"])
def test_a_file_without_keys_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(errors.InvalidArgument):
        ApiKeys(path)
    with pytest.raises(errors.InvalidArgument):
        ApiKeys(tmp_path / "absent")


@pytest.mark.parametrize("key", ["line\nbreak", "schlüssel", "tab\t"])
def test_a_client_refuses_a_key_that_cannot_travel(key: str) -> None:
    with pytest.raises(errors.InvalidArgument):
        Client("127.0.0.1:1", api_key=key)


async def test_gateway_with_keys_and_tls(tiny_checkpoint: Path, keys: Path, tmp_path: Path) -> None:
    """The real program, the client and the commands."""
    files = Authority.new(tmp_path / "pki").issue("localhost", "127.0.0.1")
    flags = ["--model", str(tiny_checkpoint), "--api-keys", str(keys), "--keyless", "none"]
    flags += ["--public-tls-cert", str(files.cert), "--public-tls-key", str(files.key)]
    trusted = TlsFiles(ca=files.ca)
    with processes.running("chiasm.services.gateway", *flags) as gateway:
        async with AsyncClient(gateway.address, tls=trusted, api_key="second-key") as client:
            for _ in range(100):
                try:
                    assert (await client.get_model()).name == tiny_checkpoint.name
                    break
                except errors.Unavailable:
                    await asyncio.sleep(0.2)  # its tokenizer is loading
            assert (await client.count_tokens("Hello!")).prompt_tokens > 0
        async with AsyncClient(gateway.address, tls=trusted, api_key="wrong") as client:
            with pytest.raises(errors.Unauthenticated):
                await client.get_model()
            with pytest.raises(errors.Unauthenticated):
                await client.wait_ready()
        stranger = Client(gateway.address, tls=trusted, api_key="wrong")
        with stranger, pytest.raises(errors.Unauthenticated):
            stranger.wait_ready()
        with Client(gateway.address) as plain, pytest.raises(errors.Unavailable):
            plain.get_model(timeout_s=3)
        for command in (["generate", "--prompt", "x"], ["eval"], ["bench", "serve"]):
            program = [sys.executable, "-m", "chiasm", *command, "--endpoint", gateway.address]
            refused = await asyncio.to_thread(
                subprocess.run,
                program,
                capture_output=True,
                check=False,
                timeout=60,
                env={
                    **os.environ,
                    "CHIASM_API_KEY": "wrong",
                    "CHIASM_TLS_CA": str(files.ca),
                },
            )
            assert refused.returncode == 1, command
            assert b"error: the API key is not known" in refused.stderr, command
