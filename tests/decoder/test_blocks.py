"""Blocks: counted right, found by prefix, evicted in order, handed out in runs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm import errors
from chiasm.services.decoder.blocks import BlockPool, BlockTable
from chiasm.services.decoder.prefix import block_digest
from chiasm.services.decoder.sequence import MediaRows

ACTIONS = ["new", "grow", "seal", "share", "forget", "cut", "end"]


def digest(number: int) -> bytes:
    return number.to_bytes(4, "big")


def test_sealed_blocks_are_found_in_order_and_shared() -> None:
    pool = BlockPool(8, 4)
    blocks = pool.allocate(3)
    for i, block in enumerate(blocks):
        pool.seal(block, digest(i))
    assert pool.match([digest(0), digest(1), digest(9)]) == blocks[:2]
    assert pool.match([digest(1)]) == blocks[1:2]
    pool.acquire(blocks[:2])
    pool.release(blocks)
    assert pool.num_held == 2
    assert pool.num_idle == 1
    pool.check()


def test_idle_blocks_are_evicted_least_recently_used_and_ends_before_beginnings() -> None:
    pool = BlockPool(4, 4)
    first, second = pool.allocate(2), pool.allocate(2)
    for i, block in enumerate([*first, *second]):
        pool.seal(block, digest(i))
    pool.release(first)
    pool.release(second)
    assert pool.num_available == 4
    pool.allocate(1)
    assert pool.match([digest(0), digest(1)]) == first[:1]
    pool.acquire(first[:1])
    pool.release(first[:1])  # used again: now the youngest
    pool.allocate(2)
    assert pool.match([digest(2)]) == []
    assert pool.match([digest(0)]) == first[:1]
    pool.check()


def test_too_many_are_refused_and_none_taken() -> None:
    pool = BlockPool(3, 1)
    pool.allocate(2)
    with pytest.raises(errors.ResourceExhausted):
        pool.allocate(2)
    assert pool.num_available == 1


def test_sequences_that_grow_by_turns_keep_long_runs() -> None:
    pool, tables = BlockPool(1024, 16), [BlockTable() for _ in range(8)]
    for table in tables:
        table.extend(pool.allocate(8))
    for _ in range(40):
        for table in tables:
            table.extend(pool.allocate(1, after=table.last))
    assert max(len(table.runs) for table in tables) == 1
    assert all(sum(count for _, count in t.runs) == 48 for t in tables)


@settings(max_examples=100)
@given(st.data())
def test_books_balance_whatever_happens(data: st.DataObject) -> None:
    pool, tables, made = BlockPool(data.draw(st.integers(1, 24)), 2), list[BlockTable](), 0
    for _ in range(data.draw(st.integers(1, 60))):
        action = data.draw(st.sampled_from(ACTIONS))
        if action == "new":
            tables.append(BlockTable())
        elif tables:
            table = data.draw(st.sampled_from(tables))
            if action == "grow" and pool.num_available:
                table.extend(pool.allocate(1, after=table.last))
            elif action == "seal" and len(table):
                made += 1
                pool.seal(data.draw(st.sampled_from(table.blocks)), digest(made))
            elif action == "share" and made:
                blocks = pool.match([digest(data.draw(st.integers(1, made)))])
                if blocks and blocks[0] not in table.blocks:
                    pool.acquire(blocks)
                    table.extend(blocks)
            elif action == "forget" and made:
                forgotten = digest(data.draw(st.integers(1, made)))
                pool.forget(forgotten)
                assert pool.match([forgotten]) == []
            elif action == "cut":
                pool.release(table.cut(data.draw(st.integers(0, len(table)))))
            elif action == "end":
                tables.remove(table)
                pool.release(table.blocks)
        pool.check()
        for table in tables:
            in_runs = [first + i for first, count in table.runs for i in range(count)]
            assert in_runs == table.blocks
        held = {block for table in tables for block in table.blocks}
        assert pool.num_held == len(held)
    for table in tables:
        pool.release(table.blocks)
    pool.check()
    assert pool.num_available == pool.num_blocks
    pool.clear_idle()
    assert pool.num_idle == 0


def test_digests_tell_apart_everything_keys_and_values_depend_on() -> None:
    def one(
        parent: bytes = b"",
        ids: tuple[int, ...] = (5, 5, 5, 5),
        types: bytes = b"\1\1\1\1",
        media: tuple[MediaRows, ...] = (MediaRows(0, 9, "cat", None),),
        start: int = 0,
    ) -> bytes:
        return block_digest(parent, ids, types, media, start)

    assert one() == one()
    variants = [
        one(parent=b"other"),
        one(ids=(5, 5, 5, 6)),
        one(types=b"\1\1\1\0"),
        one(media=(MediaRows(0, 9, "dog", None),)),
        one(media=(MediaRows(1, 9, "cat", None),)),
        one(media=()),
        one(media=(MediaRows(0, 2, "cat", None), MediaRows(2, 7, "cat", None))),
    ]
    assert len({one(), *variants}) == 1 + len(variants)
    assert one(media=(MediaRows(4, 9, "dog", None),)) == one(media=())  # begins after the block
