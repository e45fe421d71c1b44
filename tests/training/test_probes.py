"""What probes are told is what the pictures show, and they read the right embeddings."""

from __future__ import annotations

from itertools import islice

import looking
import pytest
import torch

from chiasm.training.data import words
from chiasm.training.data.encode import Encoder
from chiasm.training.data.names import COLOURS, SHAPES
from chiasm.training.data.packing import pack
from chiasm.training.data.probes import CELL, CELL_LETTERS, LETTERS, PROBES, WORD_LETTERS
from chiasm.training.data.sample import Sample
from chiasm.training.data.stream import Stream
from chiasm.training.data.tasks import PRACTICE, SEE, TASKS

WORD_COLUMNS, WORD_ROWS = words.WIDTH // CELL, words.HEIGHT // CELL
BLUR = 2
"""Pixels at the ends of a thin line that are too light to be taken for ink."""
TOLD = {**TASKS, **PRACTICE}


def samples(task: str, count: int = 12) -> list[Sample]:
    return list(islice(Stream({task: 1}, seed=3).samples(), count))


def spelt(labels: torch.Tensor) -> str:
    return "".join(LETTERS[label - 1] for label in labels.tolist() if label)


@pytest.mark.parametrize("task", TOLD)
def test_labels_fit_the_embeddings_and_the_classes(encoder: Encoder, task: str) -> None:
    examples = [encoder.encode(sample) for sample in samples(task)]
    batch = pack(examples, 1 << 20)
    num_embeddings = sum(example.num_embeddings for example in examples)
    assert set(batch.seen) <= set(PROBES)
    assert batch.seen or task not in SEE
    for name, (rows, labels) in batch.seen.items():
        probe = PROBES[name]
        assert rows.shape == (len(labels), probe.tokens)
        assert labels.shape[1] == probe.slots
        assert 0 <= int(labels.min()) <= int(labels.max()) < probe.classes
        assert 0 <= int(rows.min()) <= int(rows.max()) < num_embeddings
        assert len(rows.unique()) == rows.numel()


def test_rows_of_several_samples_are_their_own(encoder: Encoder) -> None:
    """Words among pictures of other sizes, and text without any."""
    kinds = [samples(task) for task in ("words", "motion", "sums", "letters")]
    mixed = [sample for group in zip(*kinds, strict=True) for sample in group]
    examples = [encoder.encode(sample) for sample in mixed]
    seen = pack(examples, 1 << 20).seen["word"]
    start, found = 0, 0
    for sample, example in zip(mixed, examples, strict=True):
        if sample.task == "words":
            assert seen.rows[found].tolist() == list(range(start, start + 8))
            assert spelt(seen.labels[found]) == sample.answer
            found += 1
        start += example.num_embeddings
    assert found == len(seen.rows)


def test_words_letters_and_digits_are_spelt_as_answered() -> None:
    for sample in samples("lines"):
        labels = torch.tensor(sample.shows["word"]).view(-1, WORD_LETTERS)
        assert [spelt(row) for row in labels] == sample.answer.split()
    for sample in samples("letters"):
        assert "".join(LETTERS[i] for i in sample.shows["cell_letter"]) == sample.answer
    for sample in samples("digits"):
        assert sample.shows["digit"] == (int(sample.answer),)


@pytest.mark.parametrize("task", ["words", "lines"])
def test_letters_are_told_where_their_ink_is(task: str) -> None:
    """Line by line, the cells of one row spell the word, and none of them is without ink."""
    for sample in samples(task, 60):
        lines = looking.picture(sample).reshape(-1, WORD_ROWS * CELL, WORD_COLUMNS * CELL, 3)
        cells = torch.tensor(sample.shows["letters"]).view(
            len(lines), WORD_ROWS, WORD_COLUMNS, CELL_LETTERS
        )
        for pixels, found, word in zip(lines, cells, sample.answer.split(), strict=True):
            inked = torch.from_numpy(pixels.mean(-1) < 150)
            (row,) = found.flatten(1).any(1).nonzero().flatten().tolist()
            assert spelt(found[row].flatten()) == word
            middle = inked.any(1).nonzero().float().mean()
            assert abs(middle - CELL * (row + 0.5)) < CELL / 2 + BLUR
            columns = inked.view(WORD_ROWS * CELL, WORD_COLUMNS, CELL).any(2).any(0)
            assert bool(columns[found[row].any(1)].all())


@pytest.mark.parametrize("task", ["inventory", "colour", "count", "place", "relation"])
def test_cells_hold_what_can_be_seen_in_them(task: str) -> None:
    for sample in samples(task):
        pixels = looking.picture(sample)
        columns = pixels.shape[1] // CELL
        found = {}
        for mask in looking.blobs(pixels):
            x, y = looking.middle(mask)
            kind = SHAPES.index(looking.shape(mask)), looking.colour(pixels, mask)
            found[int(y // CELL) * columns + int(x // CELL)] = kind
        for cell, (shape, colour) in enumerate(
            zip(sample.shows["cell_shape"], sample.shows["cell_colour"], strict=True)
        ):
            assert (shape == 0) == (colour == 0) == (cell not in found)
            if shape:
                assert found[cell] == (shape - 1, tuple(COLOURS)[colour - 1])
        places = [
            (cell // columns, cell % columns) for cell in range(len(sample.shows["cell_shape"]))
        ]
        assert sample.shows["cell_place"] == tuple(at for place in places for at in place)


def test_a_figure_is_told_where_its_picture_has_the_probes_size(encoder: Encoder) -> None:
    told = [bool(sample.shows) for sample in samples("description", 60)]
    sizes = [encoder.encode(sample).num_embeddings for sample in samples("description", 60)]
    assert {size for size, is_told in zip(sizes, told, strict=True) if is_told} == {4}
    assert {size for size, is_told in zip(sizes, told, strict=True) if not is_told} == {9, 16}
