"""Digests of a sequence's beginnings: what a block of the prefix cache is found by.

A digest stands for everything the keys and values of a block depend on: all token ids up to its
end, their routing types, and the content digest and place of every media item among them. Two
images at the same placeholder ids never collide.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Seq

import numpy as np

from chiasm.services.decoder.sequence import MediaRows


def block_digest(
    parent: bytes,
    token_ids: Seq[int],
    token_types: bytes,
    media: Seq[MediaRows],
    start: int,
) -> bytes:
    """Digest of the block that begins at token `start`, after the block with digest `parent`."""
    state = hashlib.sha256(parent)
    state.update(np.asarray(token_ids, dtype=np.uint32).tobytes())
    state.update(token_types)
    for item in media:
        if item.offset < start + len(token_ids) and start < item.offset + item.num_tokens:
            state.update(f"{item.offset - start}:{item.num_tokens}:{item.digest};".encode())
    return state.digest()
