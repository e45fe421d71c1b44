"""A scheduler's requests, and a machine that plays the engine for it."""

from __future__ import annotations

from typing import Any

import numpy as np

from chiasm.services.decoder.blocks import BlockPool
from chiasm.services.decoder.scheduler import Chunk, Schedule, Scheduler
from chiasm.services.decoder.sequence import MediaRows, Sampling, Sequence
from chiasm.services.decoder.speculation import num_accepted
from chiasm.types import TOKEN_IMAGE, TOKEN_TEXT, Modality

ALL = frozenset(Modality)
IMAGE_ID = 3


def sequence(
    prompt: list[int] | int,
    max_tokens: int,
    *,
    media: tuple[MediaRows, ...] = (),
    types: bytes | None = None,
    priority: int = 0,
) -> Sequence:
    ids = list(range(10, 10 + prompt)) if isinstance(prompt, int) else prompt
    if types is None:
        types = bytes(TOKEN_IMAGE if i == IMAGE_ID else TOKEN_TEXT for i in ids)
    return Sequence(
        request_id="r",
        token_ids=list(ids),
        prompt_types=types,
        positions=np.zeros((3, len(ids)), dtype=np.int64),
        next_position=len(ids),
        media=media,
        sampling=Sampling(max_tokens=max_tokens),
        prompt_logits=False,
        priority=priority,
    )


def scheduler(num_blocks: int, block_size: int = 4, **settings: Any) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks, block_size),
        **{"max_running": 4, "max_waiting": 100, "max_step_tokens": 16, **settings},
    )


class Machine:
    """Plays the engine, with a memory that knows whose history each slot holds."""

    def __init__(self, target: Scheduler) -> None:
        self.target = target
        self.memory: dict[int, object] = {}
        self.computed = self.accepted = 0

    def step(self, pools: frozenset[Modality] = ALL) -> Schedule:
        schedule = self.target.schedule(pools)
        rows = [(c, slot, i) for c in schedule.chunks for slot, i in self._slots(c)]
        assert len({slot for _, slot, _ in rows}) == len(rows), "two tokens in one slot"
        for chunk, slot, i in rows:
            self.memory[slot] = history(chunk.sequence, i, chunk.draft)
        for chunk in schedule.chunks:
            self._compute(chunk)
        self.target.blocks.check()
        return schedule

    def _slots(self, chunk: Chunk) -> list[tuple[int, int]]:
        size, blocks = self.target.blocks.block_size, chunk.sequence.table.blocks
        return [(blocks[i // size] * size + i % size, i) for i in range(chunk.start, chunk.stop)]

    def _compute(self, chunk: Chunk) -> None:
        seq, size = chunk.sequence, self.target.blocks.block_size
        assert chunk.start == seq.num_computed
        for i in range(chunk.stop):
            slot = seq.table.blocks[i // size] * size + i % size
            assert self.memory[slot] == history(seq, i, chunk.draft), "reads somebody else's keys"
        self.computed += chunk.num_tokens
        if not chunk.is_last:
            self.target.commit(seq, chunk.stop)
            return
        truth = range(100 + seq.num_generated, 100 + seq.num_generated + len(chunk.draft) + 1)
        accepted = num_accepted(chunk.draft, truth)
        self.accepted += accepted
        for token_id in truth[: accepted + 1]:
            seq.token_ids.append(token_id)
            self.target.commit(seq, len(seq.token_ids) - 1)
        if seq.num_generated == seq.sampling.max_tokens:
            self.target.remove(seq)


def history(seq: Sequence, index: int, draft: tuple[int, ...] = ()) -> object:
    """Everything the keys and values of token `index` depend on."""
    media = tuple((m.offset, m.digest) for m in seq.media if m.offset <= index)
    types = seq.prompt_types[: index + 1].ljust(index + 1, bytes((TOKEN_TEXT,)))
    is_generated = index >= seq.num_prompt
    jump = seq.next_position - int(seq.positions[0, -1]) - 1 if is_generated else 0
    return (*seq.token_ids, *draft)[: index + 1], types, media, jump
