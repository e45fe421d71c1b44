"""Settings of placement and scaling, and the loop put together from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from chiasm import errors
from chiasm.config import ProcessSettings
from chiasm.orchestrator.expert_servers import ExpertServers
from chiasm.orchestrator.journal import Journal
from chiasm.orchestrator.launcher import Launcher
from chiasm.orchestrator.loop import ScalingLoop
from chiasm.orchestrator.members import Membership
from chiasm.orchestrator.placer import Placer
from chiasm.orchestrator.planner import Planner
from chiasm.orchestrator.types import Backend, Pool, PoolConfig


class ScalingSettings(ProcessSettings):
    """Which number of replicas each pool gets, and how shards are spread over expert servers."""

    scaling: Literal["off", "builtin", "external"] = Field(
        "off",
        description="Who sets the number of replicas: nobody, the orchestrator, or somebody else, "
        "as KEDA, by its decisions. Shards are placed in any case.",
    )
    backend: Literal["local", "kubernetes"] = Field(
        "local", description="What runs the replicas: `chiasm up`, or StatefulSets."
    )
    workload_prefix: str = Field(
        "chiasm", description="The StatefulSets are named PREFIX-encoder, PREFIX-text-experts..."
    )
    scaling_interval_ms: int = Field(
        2000, ge=100, le=60_000, description="Time from one decision to the next."
    )
    encoder_min: int = Field(0, ge=0, description="Fewest vision encoders; 0: none while idle.")
    encoder_max: int = Field(8, ge=0, description="Most vision encoders.")
    encoder_target_s: float = Field(
        2.0, gt=0, description="Seconds in which queued patches should be encoded."
    )
    decoder_min: int = Field(1, ge=1, description="Fewest decoders.")
    decoder_max: int = Field(8, ge=1, description="Most decoders.")
    decoder_target_s: float = Field(
        0.1, gt=0, description="Seconds a step of a decoder should take: the time between tokens."
    )
    text_experts_min: int = Field(1, ge=1, description="Fewest text expert servers.")
    text_experts_max: int = Field(8, ge=1, description="Most text expert servers.")
    text_experts_target_s: float = Field(
        0.005,
        gt=0,
        description="Seconds a dispatch should wait for the compute thread, on average.",
    )
    vision_experts_min: int = Field(
        0, ge=0, description="Fewest vision expert servers; 0: none while idle."
    )
    vision_experts_max: int = Field(8, ge=0, description="Most vision expert servers.")
    vision_experts_target_s: float = Field(
        2.0, gt=0, description="Seconds in which queued vision tokens should be computed."
    )
    scale_up_at: float = Field(
        0.8, gt=0, le=1, description="Use of a pool above which it gets replicas."
    )
    scale_down_at: float = Field(
        0.4, ge=0, le=1, description="Use of a pool below which it gives one back."
    )
    scale_up_dwell_s: float = Field(
        10.0, ge=0, description="Least seconds from one change of a pool to more replicas."
    )
    scale_down_dwell_s: float = Field(
        60.0, ge=0, description="Least seconds from one change of a pool to fewer replicas."
    )
    scale_down_window_s: float = Field(
        300.0, gt=0, description="Seconds of which the busiest moment must have fitted on fewer."
    )
    warm_up_s: float = Field(
        10.0, ge=0, description="Seconds for which a new member's pace does not count."
    )
    shard_holders: int = Field(
        1, ge=1, description="Servers that should hold each shard, where there are enough."
    )
    rebalance_s: float = Field(
        60.0, gt=0, description="Seconds from one look at the load of the shards to the next."
    )
    decision_log: Path | None = Field(
        None, description="File that gets every decision with its inputs, for replay."
    )

    def pool_configs(self, report_s: float) -> Mapping[Pool, PoolConfig]:
        """The configuration of each pool; `report_s`: how often members report.

        Raises InvalidArgument for thresholds and bounds that cannot be.
        """
        if self.scale_down_at >= self.scale_up_at:
            raise errors.InvalidArgument("scale_down_at", "must lie below scale_up_at")
        return {pool: self._pool_config(pool, report_s) for pool in Pool}

    def _pool_config(self, pool: Pool, report_s: float) -> PoolConfig:
        name = pool.replace("-", "_")
        low, high = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
        if low > high:
            raise errors.InvalidArgument(f"{name}_min", f"must not be above {name}_max")
        interval_s = self.scaling_interval_ms / 1000
        return PoolConfig(
            min_replicas=low,
            max_replicas=high,
            up=self.scale_up_at,
            down=self.scale_down_at,
            target_s=getattr(self, f"{name}_target_s"),
            up_tau_s=2 * interval_s,
            down_window_s=self.scale_down_window_s,
            up_dwell_s=self.scale_up_dwell_s,
            down_dwell_s=self.scale_down_dwell_s,
            warm_up_s=self.warm_up_s,
            stale_s=max(3 * report_s, 2 * interval_s),
        )


class Scaling:
    """The loop and what it needs; `launcher` is set where `chiasm up` runs the replicas."""

    def __init__(
        self,
        settings: ScalingSettings,
        membership: Membership,
        *,
        report_s: float,
        may_act: Callable[[], bool],
        kubernetes: Callable[[], Backend],
    ) -> None:
        configs = settings.pool_configs(report_s)
        servers = ExpertServers()
        self.launcher: Launcher | None = None
        backend: Backend | None = None
        if settings.scaling != "off":
            if settings.backend == "kubernetes":
                backend = kubernetes()
            else:
                backend = self.launcher = Launcher()
        self.loop = ScalingLoop(
            membership,
            planner=Planner(configs),
            placer=Placer(
                servers,
                min_holders=settings.shard_holders,
                rebalance_s=settings.rebalance_s,
            ),
            servers=servers,
            backend=backend,
            applies=settings.scaling == "builtin",
            interval_s=settings.scaling_interval_ms / 1000,
            may_act=may_act,
            journal=Journal(settings.decision_log, configs) if settings.decision_log else None,
        )
