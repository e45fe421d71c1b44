"""What answers have taken, by kind."""

from __future__ import annotations

import pytest
from decoder.test_scheduler import ALL, IMAGE_ID, sequence

from chiasm.load import DecoderLoad
from chiasm.services.decoder.scheduler import Chunk
from chiasm.services.decoder.sequence import MediaRows
from chiasm.services.decoder.workload import Workload

STEP_NS = 1_000_000_000


def report(workload: Workload) -> DecoderLoad:
    return workload.report(
        [], ALL, running=0, max_running=4, waiting=0, kv_tokens_used=0, kv_tokens_capacity=8
    )


def test_answers_are_counted_when_they_end_with_all_they_took() -> None:
    workload = Workload()
    plain = sequence(6, 4)
    media = sequence([5, IMAGE_ID, IMAGE_ID, 6], 4, media=(MediaRows(1, 2, "cat", None),))
    workload.add_step(
        [
            Chunk(sequence=plain, start=0, num_tokens=6),
            Chunk(sequence=media, start=0, num_tokens=4),
        ],
        STEP_NS,
    )
    plain.token_ids.append(7)
    workload.add_step([Chunk(sequence=plain, start=6, num_tokens=1)], 2 * STEP_NS)
    now = report(workload)
    assert (now.text_tokens_total, now.vision_tokens_total) == (6 + 2 + 1, 2)
    assert (now.plain_answers_total, now.media_answers_total) == (0, 0)
    assert (now.plain_held_s_total, now.plain_tokens_total) == (0, 0)

    workload.add_end(plain)
    now = report(workload)
    assert (now.plain_answers_total, now.media_answers_total) == (1, 0)
    assert now.plain_held_s_total == pytest.approx(3.0)
    assert now.plain_tokens_total == 7

    workload.add_end(media)
    now = report(workload)
    assert (now.plain_answers_total, now.media_answers_total) == (1, 1)
    assert now.media_held_s_total == pytest.approx(1.0)
    assert now.media_tokens_total == 2


def test_guesses_count_as_computed() -> None:
    workload = Workload()
    guessed = sequence(4, 8)
    workload.add_step([Chunk(sequence=guessed, start=0, num_tokens=7, draft=(1, 2, 3))], STEP_NS)
    workload.add_end(guessed)
    assert report(workload).plain_tokens_total == report(workload).text_tokens_total == 7
