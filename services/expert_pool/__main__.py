"""The expert server as a process."""

from __future__ import annotations

from functools import partial

import torch

from chiasm.flags import settings_command
from chiasm.membership import Role, ShardSet
from chiasm.model import identity
from chiasm.model.config import ModelConfig
from chiasm.model.experts import ExpertBank
from chiasm.services.expert_pool.config import ExpertPoolSettings
from chiasm.services.expert_pool.engine import ExpertEngine
from chiasm.services.expert_pool.handover import GRACE_SHARE, hand_over
from chiasm.services.expert_pool.servicer import ExpertPoolServicer
from chiasm.services.expert_pool.wire import DispatchLimits
from chiasm.telemetry.progress import loading
from chiasm.transport import service
from chiasm.transport.messages import answer_bytes, request_bytes
from chiasm.v1 import experts_pb2, experts_pb2_grpc


def build(
    settings: ExpertPoolSettings, config: ModelConfig, process: service.ServiceProcess
) -> service.Service:
    """The server, without its weights yet."""
    engine = _engine(settings, config)
    bank = engine.bank
    limits = DispatchLimits(
        modality=settings.modality,
        num_shards=bank.num_shards,
        dtype=bank.dtype,
        max_tokens=settings.max_dispatch_tokens,
        max_queued=settings.max_queued_dispatches,
        max_queued_bytes=settings.max_queued_bytes,
        text=config.text,
    )
    spec = settings.shard_spec
    weights = f"{bank.precision}-{identity.digest(settings.model)}"

    def report() -> None:
        # A server on its way out has nothing to offer and takes nothing.
        shard_set = ShardSet(
            modality=bank.modality,
            num_shards=bank.num_shards,
            shards=() if servicer.draining else bank.shards,
            max_shards=settings.max_assigned if not servicer.draining else 0,
            weights=weights,
        )
        process.member.update(shard_sets=(shard_set,))
        process.recheck()

    servicer = ExpertPoolServicer(
        engine,
        limits,
        max_assigned=settings.max_assigned or bank.num_shards,
        on_change=report,
    )

    async def load() -> None:
        if spec.is_auto:
            report()
            return
        shards = spec.shards
        with loading(f"{bank.modality} experts", len(shards) * len(config.text.moe_layers)) as bar:
            await engine.assign(shards, epoch=0, on_layer=lambda: bar(1), on_change=report)

    async def close() -> None:
        engine.close()

    return service.Service(
        register=partial(experts_pb2_grpc.add_ExpertPoolServicer_to_server, servicer),
        load=load,
        is_ready=lambda _: bool(bank.shards) and not servicer.draining,
        is_alive=lambda: engine.stalled_s() <= settings.stall_s,
        hand_over=partial(hand_over, process, bank, timeout_s=GRACE_SHARE * settings.grace_s),
        drain=servicer.drain,
        close=close,
        watch_topology=spec.is_auto,
        report_load=servicer.load,
    )


def _engine(settings: ExpertPoolSettings, config: ModelConfig) -> ExpertEngine:
    bank = ExpertBank(
        config,
        modality=settings.modality,
        num_shards=settings.shard_spec.num_shards,
        dtype=getattr(torch, settings.dtype),
        device=torch.device(settings.device),
    )
    return ExpertEngine(
        bank,
        model=settings.model,
        config=config,
        verify=settings.verify,
    )


def serve(settings: ExpertPoolSettings) -> int:
    """Runs the server until SIGTERM; returns the exit code."""
    config = ModelConfig.load(settings.model)
    size = (settings.max_dispatch_tokens, config.text.hidden_size, config.text.moe_k)
    return service.serve(
        settings,
        name=f"{settings.modality}-experts",
        role=Role.EXPERT_POOL,
        services=[experts_pb2.DESCRIPTOR.services_by_name["ExpertPool"].full_name],
        max_message_bytes=answer_bytes(*size),
        max_request_bytes=request_bytes(*size),
        build=partial(build, settings, config),
    )


main = settings_command(ExpertPoolSettings, serve, prog="chiasm expert-pool")

if __name__ == "__main__":
    main()
