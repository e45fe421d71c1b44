"""Channel and server options: every number of the wire in one place."""

from __future__ import annotations

import grpc

from chiasm.transport import tls
from chiasm.types import TlsFiles

KEEPALIVE_MS = 10_000
"""Ping an idle peer this often: a peer that is gone without a FIN is noticed within two pings."""

KEEPALIVE_TIMEOUT_MS = 5_000
"""A ping unanswered for this long closes the connection."""

CONNECT_TIMEOUT_MS = 5_000
"""An attempt to connect may take this long: a busy peer is slow to accept, not away."""

RECONNECT_MAX_MS = 1_000
"""Ceiling of grpc's reconnect back-off; its default of two minutes would outlive most restarts."""


def options(
    max_message_bytes: int, *, max_received_bytes: int | None = None
) -> list[tuple[str, int]]:
    """Options common to both ends. `max_message_bytes` bounds one message in either direction,
    `max_received_bytes` those that come in, where they are to be smaller."""
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_received_bytes or max_message_bytes),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
        ("grpc.initial_reconnect_backoff_ms", 50),
        # Despite its name: how long one attempt to connect may take.
        ("grpc.min_reconnect_backoff_ms", CONNECT_TIMEOUT_MS),
        ("grpc.max_reconnect_backoff_ms", RECONNECT_MAX_MS),
        # Services talk to each other directly, whatever proxy the environment names for the web.
        ("grpc.enable_http_proxy", 0),
        # A new channel connects at once instead of sharing an older channel's back-off.
        ("grpc.use_local_subchannel_pool", 1),
    ]


def open_channel(
    address: str, *, max_message_bytes: int, files: TlsFiles | None = None
) -> grpc.aio.Channel:
    """An asyncio channel to host:port; with `files`, or else those of the process, by TLS."""
    files = files or tls.of_peers()
    if files is None:
        return grpc.aio.insecure_channel(address, options=options(max_message_bytes))
    return grpc.aio.secure_channel(
        address,
        tls.channel_credentials(files),
        options=[*options(max_message_bytes), *tls.channel_options(files)],
    )


def open_blocking_channel(
    address: str, *, max_message_bytes: int, files: TlsFiles | None = None
) -> grpc.Channel:
    """The same for callers without an event loop."""
    files = files or tls.of_peers()
    if files is None:
        return grpc.insecure_channel(address, options=options(max_message_bytes))
    return grpc.secure_channel(
        address,
        tls.channel_credentials(files),
        options=[*options(max_message_bytes), *tls.channel_options(files)],
    )
