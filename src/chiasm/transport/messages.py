"""What both ends of a call must agree on: bounds of messages, computed from what they carry."""

from __future__ import annotations

SLACK_BYTES = 64 << 10
"""Headers and fields around the payload."""

CONTROL_BYTES = 4 << 20
"""Bound of messages whose payload is a list of tokens or less."""

MAX_STEP_TOKENS = 16_384
"""Most tokens of one step and so of one dispatch: its answer is a message below grpc's 2 GiB."""

MAX_EPOCH = (1 << 62) - 1
"""Largest placement epoch: whoever counts on from it by ones does not leave uint64."""


def request_bytes(num_tokens: int, hidden_size: int, top_k: int) -> int:
    """Bound of a dispatch: per token one row, of float32 at most, and top_k ids and weights."""
    return num_tokens * (4 * hidden_size + 8 * top_k) + SLACK_BYTES


def answer_bytes(num_tokens: int, hidden_size: int, num_shards: int) -> int:
    """Bound of a dispatch's answer, which is larger: per token and shard one float32 row and its
    number.

    num_shards: most shards that a token needs of those asked for, never more than its experts.
    """
    return num_tokens * num_shards * (4 * hidden_size + 8) + SLACK_BYTES
