"""A local stack that follows the orchestrator's orders while a test talks to it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from e2e.cluster import Cluster, assert_ended_well, wait_until

from chiasm.local import StackConfig
from chiasm.membership import MemberInfo, Role
from chiasm.types import Modality

LEASE_MS = 3000
FOLLOW_S = 0.1

QUICK = (
    *("--lease-ms", str(LEASE_MS)),
    *("--scaling-interval-ms", "200"),
    *("--scale-up-dwell-s", "1", "--scale-down-dwell-s", "1"),
    *("--scale-down-window-s", "3", "--warm-up-s", "0.5"),
    # So that whatever works at all is busy, whatever machine this is.
    *("--scale-up-at", "0.05", "--scale-down-at", "0.01"),
    *("--encoder-target-s", "0.05"),
)
"""Flags of an orchestrator that makes up its mind within seconds."""


class Scaled(Cluster):
    """A cluster whose replicas come and go by themselves."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__(config)
        self._stop_following = threading.Event()
        self._follower = threading.Thread(target=self._follow, daemon=True)

    def stop(self) -> None:
        self._stop_following.set()
        if self._follower.is_alive():
            self._follower.join()
        super().stop()

    def follow(self) -> None:
        """Begins to carry orders out."""
        self._follower.start()

    def _follow(self) -> None:
        while not self._stop_following.wait(FOLLOW_S):
            self.reconcile()

    def experts(self, modality: Modality) -> list[MemberInfo]:
        """Expert servers of a pool that are ready."""
        return [m for m in self.topology().ready(Role.EXPERT_POOL) if m.shard_set(modality)]

    def shards(self, modality: Modality) -> list[tuple[int, ...]]:
        """What each of them holds."""
        return sorted(m.shard_sets[0].shards for m in self.experts(modality))

    def wait_experts(self, modality: Modality, count: int) -> None:
        """Returns when a pool has so many servers, each ready, and no others."""

        def is_so() -> bool:
            members = [m for m in self.topology().members if m.shard_set(modality)]
            return len(members) == count == len(self.experts(modality))

        wait_until(is_so, f"{count} {modality} servers")

    def wait_encoders(self, count: int) -> None:
        """The same for encoders."""
        wait_until(
            lambda: (
                len([m for m in self.topology().members if m.role is Role.VISION_ENCODER])
                == count
                == len(self.topology().encoders())
            ),
            f"{count} encoders",
        )

    def new_orchestrator(self, flags: Sequence[str]) -> None:
        """Kills the orchestrator; another one with other flags takes its port."""
        self.kill("orchestrator")
        port = int(self.orchestrator.rpartition(":")[2])
        self._spawn("orchestrator+1", "chiasm.orchestrator", port, *flags)


@contextmanager
def scaled(
    model: Path, log_dir: Path, *flags: str, text_servers: int, park_timeout_s: float = 60.0
) -> Iterator[Scaled]:
    """A running stack with autoscaling; asserts that it ends without a defect in any log."""
    config = StackConfig(
        model=model,
        dtype="float32",
        text_servers=text_servers,
        autoscale=True,
        max_replicas=2,
        orchestrator_flags=(*QUICK, *flags),
        grace_s=60,
        log_dir=log_dir,
    )
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CHIASM_PARK_TIMEOUT_S", str(park_timeout_s))
        stack = Scaled(config)
        stack.endpoint = stack.start()
        try:
            stack.follow()
            yield stack
            children = dict(stack.children)
        finally:
            stack.stop()
    assert_ended_well(stack, children)
