"""The scheduler as a pure structure: nothing starves, overflows, leaks or reads another's keys."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from decoder.machine import ALL, IMAGE_ID, Machine, scheduler, sequence
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm import errors
from chiasm.services.decoder.sequence import MediaRows, Sequence
from chiasm.types import Modality


class Guesses:
    """Guesses some tokens ahead, each of them right or wrong by chance."""

    def __init__(self, random: Random) -> None:
        self._random = random

    def draft(self, seq: Sequence, room: int) -> tuple[int, ...]:
        assert room > 0
        truth = range(100 + seq.num_generated, 100 + seq.num_generated + room)
        count = self._random.randint(0, room)
        return tuple(t if self._random.random() < 0.7 else 99 for t in truth[:count])


def random_requests(random: Random) -> list[Sequence]:
    """Few token ids and two images, so that beginnings coincide."""
    found = []
    for _ in range(random.randint(1, 14)):
        ids = random.choices([7, 8], k=random.randint(1, 30))
        media: tuple[MediaRows, ...] = ()
        if random.random() < 0.5:
            ids = [IMAGE_ID] * 5 + ids
            media = (MediaRows(0, 5, random.choice(["cat", "dog"]), None),)
        priority = random.randint(0, 1)
        found.append(sequence(ids, random.randint(1, 12), media=media, priority=priority))
    return found


@settings(max_examples=300)
@given(seed=st.integers(0, 2**32 - 1), guesses=st.booleans())
def test_every_request_ends_and_reads_its_own_history(seed: int, guesses: bool) -> None:
    random = Random(seed)
    max_running, max_step_tokens = random.randint(1, 6), random.randint(6, 40)
    target = scheduler(
        random.randint(14, 40),
        max_running=max_running,
        max_step_tokens=max_step_tokens,
        drafter=Guesses(random) if guesses else None,
    )
    machine, pending = Machine(target), random_requests(random)
    aborted, everyone = set(), list(pending)
    for _ in range(5000):
        for seq in pending[: random.randint(0, 3)]:
            target.add(seq)
            pending.remove(seq)
        if any(target) and random.random() < 0.05:
            victim = random.choice(list(target))
            target.remove(victim)
            aborted.add(id(victim))
        if not any(target):
            if not pending:
                break
            continue
        schedule = machine.step()
        assert schedule.chunks, "work is left but nothing runs"
        assert sum(c.num_tokens for c in schedule.chunks) <= max_step_tokens
        assert len(schedule.chunks) <= max_running
    else:
        raise AssertionError("some request never ends")
    for seq in everyone:
        answer = list(range(100, 100 + seq.num_generated))
        assert seq.token_ids[seq.num_prompt :] == answer
        assert id(seq) in aborted or seq.num_generated == seq.sampling.max_tokens
    assert target.blocks.num_held == 0


def test_guesses_preempt_nobody() -> None:
    """The same steps admit and preempt the same requests, however much is guessed."""
    target = scheduler(6, max_step_tokens=64, drafter=Guesses(Random(1)))
    machine, first, second = Machine(target), sequence([1] * 6, 12), sequence([2] * 6, 4)
    target.add(first)
    target.add(second)
    preempted = [s for _ in range(30) for s in machine.step().preempted if any(target)]
    assert not preempted
    assert machine.accepted > 0
    assert (first.num_generated, second.num_generated) == (12, 4)


def test_guesses_leave_a_prefill_its_share() -> None:
    target = scheduler(100, max_step_tokens=8, drafter=Guesses(Random(2)))
    machine, short, long = Machine(target), sequence(3, 60), sequence([5] * 100, 2)
    target.add(short)
    machine.step()
    target.add(long)
    for _ in range(10):
        chunks = machine.step().chunks
        assert {id(c.sequence): c.num_tokens for c in chunks} == {id(short): 1, id(long): 7}


def test_the_oldest_request_advances_in_every_step() -> None:
    """Whatever arrives behind it, with room for little more than one."""
    target = scheduler(16, max_step_tokens=8)
    machine, first = Machine(target), sequence(20, 30)
    target.add(first)
    machine.step()
    for i in range(25):
        target.add(sequence([50 + i] * 9, 20))
        before = first.num_computed
        machine.step()
        assert first.num_computed > before


def test_decoding_requests_are_not_held_up_by_a_long_prefill() -> None:
    target = scheduler(100, max_step_tokens=8)
    machine, short, long = Machine(target), sequence(3, 50), sequence([5] * 100, 2)
    target.add(short)
    machine.step()
    target.add(long)
    for _ in range(10):
        before = short.num_generated
        machine.step()
        assert short.num_generated == before + 1
    assert long.num_computed == 70


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    target = scheduler(200, max_step_tokens=16)
    machine, long, short = Machine(target), sequence([5] * 400, 1), sequence([6] * 12, 1)
    target.add(long)
    machine.step()
    target.add(short)
    machine.step()
    machine.step()
    assert short.num_generated == 1
    assert 0 < long.num_computed < 60


def test_a_short_prompt_of_lower_priority_does_not_pass_one_of_higher() -> None:
    target = scheduler(200, max_step_tokens=16)
    machine, long, next_ = Machine(target), sequence([5] * 400, 1), sequence([6] * 40, 9)
    for waiting in (long, next_):
        target.add(waiting)
    for i in range(6):
        target.add(sequence([7 + i] * 8, 9, priority=5))
        machine.step()
    assert next_.num_generated


@pytest.mark.parametrize(("jump", "is_found"), [(0, True), (3, False)])
def test_an_answer_is_found_by_a_prompt_that_holds_it(jump: int, is_found: bool) -> None:
    """Where generated tokens stand at the positions that the prompt's own text would have."""
    target = scheduler(64)
    machine, first = Machine(target), sequence(6, 9)
    first.positions = np.broadcast_to(np.arange(6), (3, 6))
    first.next_position = 6 + jump
    target.add(first)
    while first.num_generated < 9:
        machine.step()
    target.remove(first)
    again = sequence([*first.token_ids, 7, 8], 2)
    again.positions = np.broadcast_to(np.arange(17), (3, 17))
    target.add(again)
    machine.step()
    # Of 15 tokens the last was never computed: three blocks of four.
    assert again.num_cached == (12 if is_found else 4)


def test_a_prefix_is_computed_once_and_shared() -> None:
    target = scheduler(40, max_step_tokens=64)
    machine, prefix = Machine(target), [5, 6] * 10
    first, second = sequence([*prefix, 1], 5), sequence([*prefix, 2, 4], 5)
    target.add(first)
    machine.step()
    target.add(second)
    before = machine.computed
    machine.step()
    assert second.num_cached == 20
    assert machine.computed - before == 1 + 2  # a decode step of the first, two new tokens here
    assert target.blocks.num_held == 5 + 1 + 1


def test_two_images_at_the_same_placeholders_do_not_share() -> None:
    target = scheduler(40, max_step_tokens=64)
    machine = Machine(target)
    for digest in ("cat", "dog"):
        target.add(sequence([IMAGE_ID] * 8 + [9], 3, media=(MediaRows(0, 8, digest, None),)))
        machine.step()
    assert [s.num_cached for s in target.running] == [0, 0]
    target.add(sequence([IMAGE_ID] * 8 + [9], 3, media=(MediaRows(0, 8, "cat", None),)))
    machine.step()
    assert target.running[-1].num_cached == 8


def test_a_whole_known_prompt_still_computes_its_last_token() -> None:
    target = scheduler(40, max_step_tokens=64)
    machine = Machine(target)
    for _ in range(2):
        target.add(sequence(8, 2))
        machine.step()
    assert target.running[-1].num_cached == 4


def test_the_last_to_come_is_preempted_and_ends_later() -> None:
    target = scheduler(6, max_step_tokens=64)
    machine, first, second = Machine(target), sequence([1] * 6, 16), sequence([2] * 6, 14)
    target.add(first)
    target.add(second)
    preempted = [s for _ in range(60) for s in machine.step().preempted if any(target)]
    assert preempted
    assert all(s is second for s in preempted)
    assert first.num_generated == 16
    assert second.num_generated == 14


def test_priority_goes_before_arrival() -> None:
    target = scheduler(40, max_running=1)
    machine = Machine(target)
    late, urgent = sequence([2] * 4, 1, priority=0), sequence([3] * 4, 1, priority=-1)
    target.add(late)
    target.add(urgent)
    assert [c.sequence for c in machine.step().chunks] == [urgent]
    assert [c.sequence for c in machine.step().chunks] == [late]


@pytest.mark.parametrize(("max_running", "num_blocks"), [(1, 40), (4, 5)])
def test_less_urgent_requests_make_room(max_running: int, num_blocks: int) -> None:
    """In the batch as in the cache; equals do not."""
    target = scheduler(num_blocks, max_running=max_running)
    machine = Machine(target)
    patient, equal = sequence([2] * 9, 6, priority=1), sequence([3] * 9, 6, priority=1)
    target.add(patient)
    machine.step()
    target.add(equal)
    assert not machine.step().preempted
    urgent = sequence([4] * 9, 6)
    target.add(urgent)
    schedule = machine.step()
    assert schedule.preempted == (patient,)
    assert schedule.admitted == (urgent,)
    while any(target):
        assert not machine.step().preempted
    assert [seq.num_generated for seq in (patient, equal, urgent)] == [6, 6, 6]


def test_wrong_guesses_give_their_blocks_back() -> None:
    class Wrong:
        def draft(self, _: Sequence, room: int) -> tuple[int, ...]:
            return (99,) * min(room, 5)

    target = scheduler(12, block_size=1, drafter=Wrong())
    machine, first = Machine(target), sequence([1] * 3, 9)
    target.add(first)
    machine.step()
    machine.step()
    assert target.blocks.num_held == 3 + 1 + 5
    target._drafter = None
    machine.step()
    assert target.blocks.num_held == 3 + 2
    target.add(sequence([2] * 6, 1))
    assert not machine.step().preempted, "there is room for both"
    assert len(target.running) + len(target.waiting) == 1


def test_first_come_first_admitted() -> None:
    """A request that would fit does not overtake one that has to wait for room."""
    target = scheduler(12)
    first, big, small = sequence([1] * 30, 10), sequence([2] * 40, 5), sequence([3] * 2, 2)
    for seq in (first, big, small):
        target.add(seq)
    target.schedule(ALL)
    assert target.running == [first]
    assert target.waiting == [big, small]


def test_what_can_never_run_is_refused_at_once() -> None:
    target = scheduler(4)
    with pytest.raises(errors.ResourceExhausted) as raised:
        target.add(sequence(10, 7))
    assert raised.value.retry_after_s is None
    target.add(sequence(10, 6))


def test_the_queue_is_bounded_beside_those_that_have_a_place() -> None:
    target = scheduler(40, max_running=2, max_waiting=1)
    for _ in range(3):
        target.add(sequence(1, 1))
    with pytest.raises(errors.ResourceExhausted) as raised:
        target.add(sequence(1, 1))
    assert raised.value.retry_after_s
    Machine(target).step()
    target.add(sequence(1, 1))


def test_requests_that_need_an_absent_pool_are_parked_and_others_run() -> None:
    target = scheduler(40)
    machine = Machine(target)
    text, image = sequence(4, 5), sequence([9, IMAGE_ID, IMAGE_ID, 9], 5)
    target.add(image)
    target.add(text)
    schedule = machine.step(frozenset({Modality.TEXT}))
    assert [c.sequence for c in schedule.chunks] == [text]
    assert schedule.parked == (image,)
    assert {id(c.sequence) for c in machine.step().chunks} == {id(image), id(text)}


def test_generated_tokens_need_the_text_pool_only() -> None:
    seq = sequence([IMAGE_ID, IMAGE_ID], 5)
    assert seq.modalities(0, 2) == {Modality.VISION}
    assert seq.modalities(1, 3) == {Modality.VISION, Modality.TEXT}
    assert seq.modalities(2, 3) == {Modality.TEXT}
