"""The decoder as a process."""

from __future__ import annotations

import asyncio
from functools import partial

import torch

from chiasm.flags import settings_command
from chiasm.kernels import native
from chiasm.membership import Role, ShardSet, Topology
from chiasm.model.checkpoint import Checkpoint
from chiasm.model.config import ModelConfig
from chiasm.model.experts import ExpertBank
from chiasm.model.load import load_module
from chiasm.model.text import LanguageModel
from chiasm.services.decoder.blocks import BlockPool
from chiasm.services.decoder.config import DecoderSettings
from chiasm.services.decoder.counted import CountedBank
from chiasm.services.decoder.dispatches import patience
from chiasm.services.decoder.embeddings import EmbeddingStore
from chiasm.services.decoder.engine import Engine
from chiasm.services.decoder.forward import ForwardPass
from chiasm.services.decoder.grammars import Grammars
from chiasm.services.decoder.kv_cache import PagedKVCache
from chiasm.services.decoder.pools import ExpertPools, LocalPool, Pool
from chiasm.services.decoder.remote import RemotePool, RemoteSettings
from chiasm.services.decoder.scheduler import Scheduler
from chiasm.services.decoder.servicer import DecoderServicer
from chiasm.services.decoder.speculation import Speculation
from chiasm.telemetry.progress import loading
from chiasm.transport import service
from chiasm.transport.messages import CONTROL_BYTES, answer_bytes
from chiasm.types import Modality
from chiasm.v1 import decoder_pb2, decoder_pb2_grpc


def build(
    settings: DecoderSettings, config: ModelConfig, process: service.ServiceProcess
) -> service.Service:
    """The decoder, without its weights yet."""
    embeddings = EmbeddingStore(
        hidden_size=config.text.hidden_size,
        budget_bytes=settings.embedding_cache_bytes,
        timeout_s=settings.fetch_timeout_s,
        max_message_bytes=CONTROL_BYTES,
    )
    servicer = DecoderServicer(config, embeddings, Grammars(settings.model, config))
    remote: list[RemotePool] = []

    async def load() -> None:
        model, banks = await asyncio.to_thread(_load_weights, settings, config)
        pools: dict[Modality, Pool] = {bank.modality: LocalPool(bank) for bank in banks}
        if not pools:
            remote.extend(_remote_pool(m, settings, config, process) for m in Modality)
            pools = dict(zip(Modality, remote, strict=True))
        servicer.engine = _engine(settings, config, model, pools)
        servicer.engine.start()
        process.member.update(
            shard_sets=tuple(
                ShardSet(modality=b.modality, num_shards=b.num_shards, shards=b.shards)
                for b in banks
            )
        )

    def is_ready(topology: Topology) -> bool:
        return settings.colocate or topology.covered(Modality.TEXT)

    async def close() -> None:
        if servicer.engine is not None:
            await asyncio.to_thread(servicer.engine.close)
        await asyncio.gather(embeddings.close(), *(pool.close() for pool in remote))

    return service.Service(
        register=partial(decoder_pb2_grpc.add_DecoderServicer_to_server, servicer),
        load=load,
        is_ready=is_ready,
        is_alive=lambda: (
            not servicer.engine or servicer.engine.pulse.stalled_s() <= settings.stall_s
        ),
        drain=servicer.drain,
        close=close,
        report_load=lambda: servicer.engine.report() if servicer.engine else None,
        watch_topology=not settings.colocate,
    )


def _load_weights(
    settings: DecoderSettings, config: ModelConfig
) -> tuple[LanguageModel, list[ExpertBank]]:
    """The decoder's own weights and, colocated, both banks."""
    dtype, device = getattr(torch, settings.dtype), torch.device(settings.device)
    if device.type == "cpu":
        native.library()  # compiled now rather than during the first step
    with torch.device("meta"):
        model = LanguageModel(config.text)
    num_elements = sum(p.numel() for p in model.parameters())
    with Checkpoint(settings.model, config) as checkpoint:
        with loading("decoder", num_elements) as advance:
            load_module(model, checkpoint, "", dtype, device=device, on_parameter=advance)
        banks: list[ExpertBank] = []
        if settings.colocate:
            for modality, num_shards in (
                (Modality.TEXT, settings.text_shards),
                (Modality.VISION, settings.vision_shards),
            ):
                bank = CountedBank(
                    config, modality=modality, num_shards=num_shards, dtype=dtype, device=device
                )
                for shard in range(num_shards):
                    bank.load(checkpoint, shard)
                banks.append(bank)
    return model, banks


def _remote_pool(
    modality: Modality,
    settings: DecoderSettings,
    config: ModelConfig,
    process: service.ServiceProcess,
) -> RemotePool:
    text = config.text
    return RemotePool(
        modality,
        process.topology,
        RemoteSettings(
            attempt_timeout_s=settings.attempt_timeout_s,
            timeout_s=settings.dispatch_timeout_s,
            hedge_budget=settings.hedge_budget,
            hedge_after_s=settings.hedge_after_s,
            use_lane=settings.lane,
            max_message_bytes=answer_bytes(settings.max_step_tokens, text.hidden_size, text.moe_k),
        ),
        num_experts=text.num_experts,
    )


def _engine(
    settings: DecoderSettings,
    config: ModelConfig,
    model: LanguageModel,
    pools: dict[Modality, Pool],
) -> Engine:
    device = torch.device(settings.device)
    num_tokens = settings.kv_cache_tokens or 4 * config.text.max_position_embeddings
    blocks = BlockPool(-(-num_tokens // settings.block_size), settings.block_size)
    cache = PagedKVCache(config.text, blocks, dtype=getattr(torch, settings.dtype), device=device)
    scheduler = Scheduler(
        blocks,
        max_running=settings.max_running,
        max_waiting=settings.max_waiting,
        max_step_tokens=settings.max_step_tokens,
        drafter=Speculation(settings.speculation_tokens) if settings.speculation != "off" else None,
    )
    # The engine's own wait is a last resort: a pool gives up before it.
    wait_s = settings.dispatch_timeout_s + settings.attempt_timeout_s
    experts = ExpertPools(pools, timeout_s=wait_s * patience(settings.max_step_tokens))
    forward_pass = ForwardPass(
        model, cache, experts, device=device, micro_batches=settings.micro_batches
    )
    return Engine(forward_pass, scheduler, experts, park_timeout_s=settings.park_timeout_s)


def serve(settings: DecoderSettings) -> int:
    """Runs the decoder until SIGTERM; returns the exit code."""
    config = ModelConfig.load(settings.model, settings.video_advance)
    return service.serve(
        settings,
        name="decoder",
        role=Role.DECODER,
        services=[decoder_pb2.DESCRIPTOR.services_by_name["Decoder"].full_name],
        max_message_bytes=CONTROL_BYTES,
        build=partial(build, settings, config),
    )


main = settings_command(DecoderSettings, serve, prog="chiasm decoder")

if __name__ == "__main__":
    main()
