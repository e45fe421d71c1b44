"""The gateway as a process."""

from __future__ import annotations

import asyncio
from functools import partial

from chiasm.flags import settings_command
from chiasm.membership import Role
from chiasm.model.config import ModelConfig
from chiasm.model.tokenizer import Tokenizer
from chiasm.services.gateway import engine, utf8
from chiasm.services.gateway.admission import AdmissionGuard
from chiasm.services.gateway.auth import ApiKeyGuard, ApiKeys
from chiasm.services.gateway.channels import Channels
from chiasm.services.gateway.config import GatewaySettings
from chiasm.services.gateway.servicer import InferenceServicer
from chiasm.transport import service
from chiasm.transport.interceptors import Guards
from chiasm.v1 import inference_pb2

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"]


def build(settings: GatewaySettings, process: service.ServiceProcess) -> service.Service:
    """The gateway, without its tokenizer yet."""
    servicer = InferenceServicer(settings)
    channels = Channels(
        max_message_bytes=engine.MAX_PEER_MESSAGE_BYTES, grace_s=settings.default_timeout_s
    )
    process.topology.subscribe(channels.follow)

    async def load() -> None:
        config = await asyncio.to_thread(ModelConfig.load, settings.model)
        tokenizer = await asyncio.to_thread(Tokenizer.load, settings.model)
        servicer.engine = engine.build(settings, config, tokenizer, process.topology, channels)

    return service.Service(
        register=lambda server: server.add_generic_rpc_handlers(
            (utf8.handlers(SERVICE, servicer),)
        ),
        load=load,
        # Text is answered even while the vision side is away; nothing is without a decoder.
        is_ready=lambda topology: bool(topology.decoders()),
        drain=servicer.drain,
        moves_callers=True,
        close=channels.close,
        watch_topology=True,
        report_load=lambda: servicer.engine.load() if servicer.engine else None,
    )


def serve(settings: GatewaySettings) -> int:
    """Runs the gateway until SIGTERM; returns the exit code."""
    keys = [] if settings.api_keys is None else [ApiKeys(settings.api_keys)]
    return service.serve(
        settings,
        name="gateway",
        role=Role.GATEWAY,
        services=[SERVICE.full_name],
        max_message_bytes=settings.max_request_bytes,
        build=partial(build, settings),
        interceptors=[
            Guards(
                *(ApiKeyGuard(k, keyless=settings.keyless) for k in keys),
                AdmissionGuard(
                    SERVICE.full_name,
                    max_in_flight=settings.max_in_flight,
                    retry_after_s=settings.retry_after_s,
                ),
            )
        ],
    )


main = settings_command(GatewaySettings, serve, prog="chiasm gateway")

if __name__ == "__main__":
    main()
