"""Requests whose pool or reader is away hold nobody up, give way, and lose nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decoder.test_scheduler import ALL, IMAGE_ID, Machine, scheduler, sequence

from chiasm.services.decoder.engine import Engine
from chiasm.services.decoder.scheduler import Scheduler
from chiasm.services.decoder.sequence import Sequence
from chiasm.types import Modality

TEXT_ONLY = frozenset({Modality.TEXT})


def picture(max_tokens: int = 2) -> Sequence:
    return sequence([5, IMAGE_ID, IMAGE_ID, IMAGE_ID, 6], max_tokens)


def submitted(target: Scheduler, *sequences: Sequence) -> None:
    for entry in sequences:
        target.add(entry)


def run_to_end(machine: Machine, *sequences: Sequence) -> None:
    for _ in range(200):
        if all(s.num_generated >= s.sampling.max_tokens for s in sequences):
            return
        machine.step()
    pytest.fail("they do not come to an end")


@pytest.mark.parametrize("num_pictures", [4, 9])
def test_pictures_without_their_pool_take_no_place_in_the_batch(num_pictures: int) -> None:
    target = scheduler(64)
    pictures = [picture() for _ in range(num_pictures)]
    text = sequence(4, 1)
    submitted(target, *pictures, text)
    schedule = target.schedule(TEXT_ONLY)
    assert [c.sequence for c in schedule.chunks] == [text]
    assert set(schedule.parked) == set(pictures)
    assert target.blocks.num_held == len(text.table)


def test_pictures_in_the_batch_give_their_places_up() -> None:
    target = scheduler(64, max_running=3)
    pictures = [picture() for _ in range(3)]
    submitted(target, *pictures)
    assert len(target.schedule(ALL).admitted) == 3  # and then the pool goes away
    texts = [sequence(4, 3) for _ in range(2)]
    submitted(target, *texts)
    schedule = target.schedule(TEXT_ONLY)
    assert [c.sequence for c in schedule.chunks] == texts
    assert set(schedule.parked) == set(pictures)
    assert list(schedule.preempted) == pictures[:0:-1]
    assert pictures[0] in target.running


def test_pictures_in_the_batch_give_their_blocks_up() -> None:
    target = scheduler(6, max_running=4)
    machine = Machine(target)
    pictures = [picture(), picture()]
    submitted(target, *pictures)
    assert len(target.schedule(ALL).admitted) == 2
    text = sequence(12, 8)
    submitted(target, text)
    while text.num_generated < 8:
        schedule = machine.step(TEXT_ONLY)
        assert [c.sequence for c in schedule.chunks] == [text]
    target.remove(text)
    run_to_end(machine, *pictures)


def test_pictures_give_nothing_up_for_one_that_does_not_fit_all_the_same() -> None:
    target = scheduler(10, max_running=4)
    running, pictures = sequence(12, 8), [picture(), picture()]
    submitted(target, running, *pictures)
    assert len(target.schedule(ALL).admitted) == 3
    submitted(target, sequence(28, 1))
    schedule = target.schedule(TEXT_ONLY)
    assert not schedule.preempted
    assert set(pictures) <= set(target.running)


def test_an_answer_that_is_not_read_stands_still_and_gives_way() -> None:
    target = scheduler(64, max_running=1)
    machine = Machine(target)
    unread, other = sequence(4, 3), sequence(4, 2)
    submitted(target, unread)
    machine.step()
    unread.is_behind = lambda: True
    schedule = machine.step()
    assert (schedule.chunks, schedule.parked) == ((), ()), "it waits for its reader, not for a pool"
    submitted(target, other)
    for _ in range(2):
        assert [c.sequence for c in machine.step().chunks] == [other]
    assert not machine.step().chunks
    unread.is_behind = lambda: False
    run_to_end(machine, unread)


def test_a_growing_answer_takes_the_blocks_of_pictures_first() -> None:
    target = scheduler(8, max_running=4)
    machine = Machine(target)
    first, last, stuck = sequence(4, 12), sequence(4, 8), picture()
    submitted(target, first, stuck, last)
    while first.num_generated < 1 or last.num_generated < 1:
        machine.step(ALL if stuck not in target.running else TEXT_ONLY)
    preempted: set[Sequence] = set()
    while first.num_generated < 12:
        preempted |= set(machine.step(TEXT_ONLY).preempted)
        if last.num_generated >= 8 and last in target.running:
            target.remove(last)
    assert preempted <= {stuck}
    target.remove(first)
    run_to_end(machine, stuck)


def test_when_the_pool_is_back_they_run_in_their_order() -> None:
    target = scheduler(64, max_running=2)
    machine = Machine(target)
    pictures = [picture() for _ in range(4)]
    submitted(target, *pictures)
    for _ in range(3):
        assert not machine.step(TEXT_ONLY).chunks
    schedule = machine.step(ALL)
    assert list(schedule.admitted) == pictures[:2]
    assert schedule.parked == ()


def test_a_picture_that_the_prefix_cache_knows_needs_no_pool() -> None:
    target = scheduler(64)
    machine = Machine(target)
    ids = [5, IMAGE_ID, IMAGE_ID, 6, 7]
    submitted(target, first := sequence(ids, 1))
    run_to_end(machine, first)
    target.remove(first)
    submitted(target, again := sequence(ids, 1))
    schedule = machine.step(TEXT_ONLY)
    assert [c.sequence for c in schedule.chunks] == [again]


def test_the_clock_of_parking_stops_while_a_request_waits_for_something_else() -> None:
    """Two short absences of a pool, far apart, are no long one."""
    pools: Any = SimpleNamespace(covered=lambda: covered, wait_ns=dict.fromkeys(Modality, 0))
    model = SimpleNamespace(logits=lambda hidden: torch.zeros(len(hidden), 200))
    forward_pass: Any = SimpleNamespace(
        run=lambda chunks: torch.zeros(sum(c.num_tokens for c in chunks), 2), model=model
    )
    target = scheduler(4)
    engine = Engine(forward_pass, target, pools, park_timeout_s=60)
    covered, text, image = ALL, sequence(9, 6), picture()
    submitted(target, text)
    engine._step()
    submitted(target, image)  # there are no blocks for it while the text is there
    covered = TEXT_ONLY
    engine._step()
    assert image.parked_since is not None
    since = image.parked_since
    engine._step()
    assert image.parked_since == since
    covered = ALL
    engine._step()
    assert image in target.waiting
    assert image.parked_since is None
