"""A local stack whose processes can be killed, stopped, ended and started again."""

from __future__ import annotations

import re
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from processes import memory_bytes

from chiasm.child import Child
from chiasm.client import Client, Delta, Prompt, Result, Sampling
from chiasm.client.assembly import Assembler
from chiasm.local import LocalStack, StackConfig
from chiasm.membership import MemberInfo, MemberState
from chiasm.transport.channel import options
from chiasm.transport.messages import CONTROL_BYTES
from chiasm.v1 import decoder_pb2, decoder_pb2_grpc, encoder_pb2, encoder_pb2_grpc

WAIT_S = 60.0

DEFECTS = re.compile(
    r"was never retrieved|never awaited|it is pending|Traceback|rpc_failed|step_failed|pool_failed"
    r"|INTERNAL"
)
"""What no log may say, whatever dies: a defect, not a failure."""


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Polls until the condition holds; fails after WAIT_S."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {WAIT_S} s"
        time.sleep(0.05)


def defects(log_dir: Path) -> list[str]:
    """Lines of any log that should not be there."""
    return [
        f"{path.name}: {line[:400]}"
        for path in sorted(log_dir.glob("*.log"))
        for line in path.read_text(errors="replace").splitlines()
        if DEFECTS.search(line)
    ]


class Cluster(LocalStack):
    """Processes by name; those that a test has ended on purpose are in `ended`."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__(config)
        self.endpoint = ""
        self.ended: set[str] = set()

    def add(self, like: str, *more: str, wait: bool = True) -> str:
        """Starts another process with the flags of `like` and more; its name, once it is ready."""
        number = sum(name.startswith(f"{like}+") for name in self.children) + 1
        name = f"{like}+{number}"
        for known, module, flags in self._services():
            if known == like:
                self._spawn(name, module, 0, "--orchestrator", self.orchestrator, *flags, *more)
        if wait:
            self.wait_ready(name)
        return name

    def restart_orchestrator(self) -> None:
        """A new orchestrator on the old one's port."""
        port = int(self.orchestrator.rpartition(":")[2])
        self._spawn("orchestrator+1", "chiasm.orchestrator", port)

    def address(self, name: str) -> str:
        child = self.children[name]
        wait_until(lambda: child.address() or child.exit_code is not None, f"{name} listens")
        address = child.address()
        assert address, "\n".join(child.last_lines())
        return address

    def member(self, name: str) -> MemberInfo | None:
        """What the orchestrator knows of a process."""
        address = self.address(name)
        return next((m for m in self.topology().members if m.address == address), None)

    def wait_ready(self, name: str) -> None:
        wait_until(lambda: (m := self.member(name)) is not None and m.is_ready, f"{name} ready")

    def wait_gone(self, name: str) -> None:
        wait_until(lambda: self.member(name) is None, f"{name} gone")

    def wait_complete(self) -> None:
        wait_until(lambda: self.topology().is_complete(), "every part is ready")

    def kill(self, name: str) -> None:
        """SIGKILL; returns when the process is gone."""
        self.ended.add(name)
        self.children[name].signal(signal.SIGKILL)
        wait_until(lambda: self.children[name].exit_code is not None, f"{name} dies")

    @contextmanager
    def stopped(self, name: str) -> Iterator[None]:
        """SIGSTOP for the time of the block: stuck, with all its connections open."""
        self.children[name].signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.children[name].signal(signal.SIGCONT)

    @contextmanager
    def stuttering(self, name: str) -> Iterator[None]:
        """A process that stands still most of the time: 100 ms of 110."""
        end = threading.Event()

        def stutter() -> None:
            while not end.is_set():
                with self.stopped(name):
                    end.wait(0.1)
                end.wait(0.01)

        thread = threading.Thread(target=stutter)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()

    def wait_exit(self, name: str) -> int:
        """The exit code of a process that was told to end."""
        child = self.children[name]
        wait_until(lambda: child.exit_code is not None, f"{name} exits")
        assert child.exit_code is not None
        return child.exit_code

    def terminate(self, name: str) -> None:
        """SIGTERM."""
        self.ended.add(name)
        self.children[name].signal(signal.SIGTERM)

    def running(self, like: str) -> list[str]:
        """`like` and those added like it, as far as they are ready; a gateway prefers the first."""
        order = [m.address for m in self.topology().members if m.is_ready]
        mine = {
            child.address(): name
            for name, child in self.children.items()
            if name.partition("+")[0] == like and name not in self.ended
        }
        return [mine[address] for address in order if address in mine]

    def state(self, name: str) -> MemberState | None:
        member = self.member(name)
        return member.state if member is not None else None

    def metrics(self, name: str) -> dict[str, float]:
        """What a process exports, by sample name with its labels."""
        member = self.member(name)
        assert member is not None
        with urllib.request.urlopen(f"http://{member.metrics_address}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {key: float(value) for key, _, value in samples}

    def in_use(self, pool: str) -> str:
        """The server of a pool that computes now: that whose count of tokens grows most."""

        def num_tokens(name: str) -> float:
            samples = self.metrics(name).items()
            return sum(v for k, v in samples if k.startswith("chiasm_expert_tokens_total{"))

        before = {name: num_tokens(name) for name in self.running(pool)}
        wait_until(
            lambda: any(num_tokens(name) > count for name, count in before.items()),
            f"{pool} computes",
        )
        return max(before, key=lambda name: num_tokens(name) - before[name])

    def decoder_load(self, name: str) -> decoder_pb2.DecoderLoad:
        with self._channel(name) as channel:
            stub: Any = decoder_pb2_grpc.DecoderStub(channel)
            load: decoder_pb2.DecoderLoad = stub.GetLoad(
                decoder_pb2.GetDecoderLoadRequest(), timeout=WAIT_S
            )
        return load

    def encoder_load(self, name: str) -> encoder_pb2.EncoderLoad:
        with self._channel(name) as channel:
            stub: Any = encoder_pb2_grpc.VisionEncoderStub(channel)
            load: encoder_pb2.EncoderLoad = stub.GetLoad(
                encoder_pb2.GetEncoderLoadRequest(), timeout=WAIT_S
            )
        return load

    def abort(self, decoder: str, request_id: str) -> None:
        with self._channel(decoder) as channel:
            stub: Any = decoder_pb2_grpc.DecoderStub(channel)
            stub.Abort(decoder_pb2.AbortRequest(request_id=request_id), timeout=WAIT_S)

    def wait_idle(self, decoder: str = "decoder") -> None:
        """Nothing runs, waits or holds keys and values in a decoder."""

        def is_idle() -> bool:
            load = self.decoder_load(decoder)
            return not (load.running_requests or load.waiting_requests or load.kv_tokens_used)

        wait_until(is_idle, f"{decoder} idle")

    def resident_bytes(self, name: str) -> int:
        """Anonymous memory of a process."""
        return memory_bytes(self.children[name].pid, "RssAnon")

    def _channel(self, name: str) -> grpc.Channel:
        return grpc.insecure_channel(self.address(name), options=options(CONTROL_BYTES))


@contextmanager
def cluster(config: StackConfig) -> Iterator[Cluster]:
    """A running stack; asserts that it ends without a defect in any log."""
    stack = Cluster(config)
    stack.endpoint = stack.start()
    try:
        yield stack
        children = dict(stack.children)
    finally:
        stack.stop()
    assert_ended_well(stack, children)


def assert_ended_well(stack: Cluster, children: dict[str, Child]) -> None:
    """Every process that nobody killed has ended by itself, without a defect in any log."""
    codes = {name: c.exit_code for name, c in children.items() if name not in stack.ended}
    assert codes == dict.fromkeys(codes, 0), codes
    assert defects(stack.log_dir) == []


class Stream:
    """A generation under way, in a thread and over a connection of its own."""

    def __init__(
        self,
        endpoint: str,
        prompt: Prompt,
        sampling: Sampling,
        *,
        prompt_logits: bool = False,
        request_id: str = "",
        timeout_s: float = WAIT_S,
        resume_timeout_s: float = WAIT_S,
    ) -> None:
        self._client = Client(endpoint, resume_timeout_s=resume_timeout_s)
        self._events = self._client.generate(
            prompt,
            sampling=sampling,
            prompt_token_ids=True,
            prompt_logits=prompt_logits,
            request_id=request_id,
            timeout_s=timeout_s,
        )
        self._assembler = Assembler()
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self.num_tokens = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def wait_tokens(self, count: int) -> None:
        """Returns once so many tokens have come; raises what ended the stream before."""
        with self._changed:
            assert self._changed.wait_for(
                lambda: self.num_tokens >= count or self._error is not None, WAIT_S
            )
        if self.num_tokens < count and self._error is not None:
            raise self._error

    def wait_end(self) -> None:
        """Returns when the stream has ended, well or not."""
        self._thread.join(WAIT_S)
        assert self.is_done, "the stream does not end"

    def result(self) -> Result:
        """The answer; raises what ended the stream otherwise."""
        self.wait_end()
        if self._error is not None:
            raise self._error
        return self._assembler.result()

    def cancel(self) -> None:
        """Drops the connection."""
        self._client.close()

    def _run(self) -> None:
        try:
            for event in self._events:
                self._assembler.add(event)
                if isinstance(event, Delta):
                    with self._changed:
                        self.num_tokens += len(event.token_ids)
                        self._changed.notify_all()
        except Exception as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
        finally:
            self._client.close()
