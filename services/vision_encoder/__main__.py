"""The vision encoder as a process."""

from __future__ import annotations

import asyncio
from functools import partial

from chiasm.flags import settings_command
from chiasm.membership import Role
from chiasm.services.vision_encoder.config import EncoderSettings
from chiasm.services.vision_encoder.engine import EncoderEngine
from chiasm.services.vision_encoder.model import VisionModel
from chiasm.services.vision_encoder.servicer import MAX_MESSAGE_BYTES, VisionEncoderServicer
from chiasm.services.vision_encoder.upload import Uploads
from chiasm.transport import service
from chiasm.v1 import encoder_pb2, encoder_pb2_grpc


def build(settings: EncoderSettings, _: service.ServiceProcess) -> service.Service:
    """The encoder, without its weights yet."""
    uploads = Uploads(
        max_media_bytes=settings.max_media_bytes,
        max_upload_bytes=settings.max_upload_bytes,
        max_memory_bytes=settings.max_memory_bytes,
    )
    servicer = VisionEncoderServicer(uploads)

    async def load() -> None:
        model = await asyncio.to_thread(VisionModel.load, settings)
        engine = EncoderEngine(
            model, cache_bytes=settings.cache_bytes, max_queue_patches=settings.max_queue_patches
        )
        engine.start()
        servicer.engine = engine

    return service.Service(
        register=partial(encoder_pb2_grpc.add_VisionEncoderServicer_to_server, servicer),
        load=load,
        is_alive=lambda: (
            not servicer.engine or servicer.engine.pulse.stalled_s() <= settings.stall_s
        ),
        drain=servicer.drain,
        close=servicer.close,
        report_load=lambda: servicer.engine.load() if servicer.engine else None,
    )


def serve(settings: EncoderSettings) -> int:
    """Runs the encoder until SIGTERM; returns the exit code."""
    return service.serve(
        settings,
        name="vision-encoder",
        role=Role.VISION_ENCODER,
        services=[encoder_pb2.DESCRIPTOR.services_by_name["VisionEncoder"].full_name],
        max_message_bytes=MAX_MESSAGE_BYTES,
        build=partial(build, settings),
    )


main = settings_command(EncoderSettings, serve, prog="chiasm vision-encoder")

if __name__ == "__main__":
    main()
