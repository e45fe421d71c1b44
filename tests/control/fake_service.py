"""A service process without a model: holds shards, or waits for the text pool as a decoder does."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from pydantic import Field

from chiasm.config import ComputeSettings
from chiasm.flags import settings_command
from chiasm.membership import Role, ShardSet
from chiasm.services.expert_pool.worker import Worker
from chiasm.transport.service import Service, ServiceProcess, serve
from chiasm.types import Modality, ShardSpec


class Settings(ComputeSettings):
    """One fake."""

    role: Role = Field(Role.EXPERT_POOL, description="What to be.")
    shards: str = Field("0/1", description="Shards of the text pool to hold, as 0,1/8.")
    load_s: float = Field(0.0, description="Seconds that loading takes.")
    fail: bool = Field(False, description="Fail to load.")
    drain_s: float = Field(0.0, description="Seconds that draining takes.")
    stuck_until: Path | None = Field(None, description="File for which the compute thread waits.")


def build(settings: Settings, process: ServiceProcess) -> Service:
    worker = Worker("fake")
    worker.start()

    def hang() -> None:
        while settings.stuck_until and not settings.stuck_until.exists():
            time.sleep(0.02)

    async def load() -> None:
        await asyncio.to_thread(time.sleep, settings.load_s)
        if settings.fail:
            raise ValueError("weights.bin is not a checkpoint")
        worker.submit(hang)
        if settings.role is Role.EXPERT_POOL:
            spec = ShardSpec.parse(settings.shards)
            held = ShardSet(
                modality=Modality.TEXT,
                num_shards=spec.num_shards,
                shards=spec.shards,
                weights="w",
            )
            process.member.update(shard_sets=(held,))

    async def drain() -> None:
        await asyncio.sleep(settings.drain_s)

    if settings.role is Role.DECODER:
        return Service(
            register=lambda _: None,
            load=load,
            is_ready=lambda topology: topology.covered(Modality.TEXT),
            watch_topology=True,
        )
    return Service(
        register=lambda _: None,
        load=load,
        is_alive=lambda: worker.pulse.stalled_s() <= settings.stall_s,
        drain=drain,
    )


def run(settings: Settings) -> int:
    return serve(
        settings,
        name="fake",
        role=settings.role,
        services=["fake.Service"],
        max_message_bytes=1 << 20,
        build=lambda process: build(settings, process),
    )


main = settings_command(Settings, run, prog="fake")

if __name__ == "__main__":
    main()
