"""The scheduler as a pure structure: nothing starves, nothing overflows, nothing leaks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm import errors
from chiasm.services.decoder.scheduler import Scheduler
from chiasm.services.decoder.sequence import Sampling, Sequence
from chiasm.types import TOKEN_IMAGE, TOKEN_TEXT, Modality

ALL = frozenset(Modality)


class Budget:
    """Reservations without memory."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.held: dict[int, int] = {}

    def can_reserve(self, num_tokens: int) -> bool:
        return sum(self.held.values()) + num_tokens <= self.num_tokens

    def reserve(self, sequence_id: int, num_tokens: int) -> None:
        assert sequence_id not in self.held
        assert self.can_reserve(num_tokens)
        self.held[sequence_id] = num_tokens

    def release(self, sequence_id: int) -> None:
        del self.held[sequence_id]


def sequence(num_prompt: int, max_tokens: int, types: bytes | None = None) -> Sequence:
    return Sequence(
        request_id="r",
        token_ids=list(range(num_prompt)),
        prompt_types=types or bytes([TOKEN_TEXT]) * num_prompt,
        positions=np.zeros((3, num_prompt), dtype=np.int64),
        next_position=num_prompt,
        media=(),
        sampling=Sampling(max_tokens=max_tokens),
        prompt_logits=False,
    )


def scheduler(budget: Budget, **limits: int) -> Scheduler:
    return Scheduler(
        budget, **{"max_running": 4, "max_waiting": 100, "max_step_tokens": 16, **limits}
    )


def run_step(target: Scheduler, pools: frozenset[Modality] = ALL) -> list[tuple[Sequence, int]]:
    """Plays the engine: computes the chunks, appends a token, ends what is done."""
    ran = []
    for chunk in target.schedule(pools).chunks:
        seq = chunk.sequence
        assert chunk.start == seq.num_computed
        is_last = chunk.is_last
        seq.num_computed = chunk.stop
        if is_last:
            seq.token_ids.append(7)
            if seq.num_generated == seq.sampling.max_tokens:
                target.remove(seq)
        ran.append((seq, chunk.num_tokens))
    return ran


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 12)), min_size=1, max_size=20),
    max_running=st.integers(1, 6),
    max_step_tokens=st.integers(6, 40),
)
def test_every_request_ends_within_the_bounds(
    shapes: list[tuple[int, int]], max_running: int, max_step_tokens: int
) -> None:
    budget = Budget(100)
    target = scheduler(budget, max_running=max_running, max_step_tokens=max_step_tokens)
    sequences = [sequence(*shape) for shape in shapes]
    for seq in sequences:
        target.add(seq)
    steps = 0
    while any(target):
        ran = run_step(target)
        assert ran, "work is left but nothing runs"
        assert sum(n for _, n in ran) <= max_step_tokens
        assert len(ran) <= max_running
        steps += 1
        assert steps < 10_000
    assert all(s.num_generated == s.sampling.max_tokens for s in sequences)
    assert not budget.held


def test_decoding_requests_are_not_held_up_by_a_long_prefill() -> None:
    target = scheduler(Budget(1000), max_step_tokens=8)
    short, long = sequence(3, 50), sequence(100, 2)
    target.add(short)
    run_step(target)
    target.add(long)
    for _ in range(10):
        before = short.num_generated
        run_step(target)
        assert short.num_generated == before + 1
    assert long.num_computed == 70


def test_first_come_first_admitted() -> None:
    """A request that would fit does not overtake one that has to wait for room."""
    target = scheduler(Budget(50))
    first, big, small = sequence(30, 10), sequence(40, 5), sequence(2, 2)
    for seq in (first, big, small):
        target.add(seq)
    run_step(target)
    assert target.running == [first]
    assert list(target.waiting) == [big, small]


def test_full_queue_is_refused_with_a_time_to_come_back() -> None:
    target = scheduler(Budget(10), max_waiting=1)
    target.add(sequence(1, 1))
    with pytest.raises(errors.ResourceExhausted) as raised:
        target.add(sequence(1, 1))
    assert raised.value.retry_after_s


def test_requests_that_need_an_absent_pool_are_parked_and_others_run() -> None:
    target = scheduler(Budget(100))
    text = sequence(4, 5)
    image = sequence(4, 5, bytes([TOKEN_TEXT, TOKEN_IMAGE, TOKEN_IMAGE, TOKEN_TEXT]))
    target.add(image)
    target.add(text)
    schedule = target.schedule(frozenset({Modality.TEXT}))
    assert [c.sequence for c in schedule.chunks] == [text]
    assert schedule.parked == (image,)
    assert [s for s, _ in run_step(target)] == [image, text]


def test_generated_tokens_need_the_text_pool_only() -> None:
    seq = sequence(2, 5, bytes([TOKEN_IMAGE, TOKEN_IMAGE]))
    assert seq.modalities(0, 2) == {Modality.VISION}
    assert seq.modalities(1, 3) == {Modality.VISION, Modality.TEXT}
    assert seq.modalities(2, 3) == {Modality.TEXT}


def test_removing_a_running_request_frees_its_room() -> None:
    budget = Budget(20)
    target = scheduler(budget)
    seq = sequence(10, 10)
    target.add(seq)
    target.schedule(ALL)
    assert budget.held
    target.remove(seq)
    assert not budget.held
    assert not any(target)
