"""What both ends of a call must agree on: bounds of messages, computed from what they carry."""

from __future__ import annotations

SLACK_BYTES = 64 << 10
"""Headers and fields around the payload."""

CONTROL_BYTES = 4 << 20
"""Bound of messages whose payload is a list of tokens or less."""

ACCEPTED_KEY = "chiasm-accepted"
"""Initial metadata of a decoder that has taken a request in hand."""


def dispatch_bytes(num_tokens: int, hidden_size: int, top_k: int) -> int:
    """Bound of a dispatch and of its answer.

    The answer is the larger one: at most top_k shards per token, one float32 row and one row number
    each.
    """
    return num_tokens * top_k * (4 * hidden_size + 8) + SLACK_BYTES
