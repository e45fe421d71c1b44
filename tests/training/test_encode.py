"""Samples as the model gets them, and batches of them."""

from __future__ import annotations

import io
import multiprocessing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from chiasm.errors import InvalidArgument
from chiasm.model.config import ModelConfig
from chiasm.model.images import preprocess_image
from chiasm.model.processing import ProcessingConfig
from chiasm.model.tokenizer import Tokenizer
from chiasm.model.video import preprocess_video
from chiasm.training import presets
from chiasm.training.data import tokenizer
from chiasm.training.data.encode import Encoder, Example
from chiasm.training.data.files import to_mp4, to_png
from chiasm.training.data.names import COLOUR_NAMES, SHAPE_NAMES, Language
from chiasm.training.data.packing import NO_LABEL, Batches, PackedBatch, pack
from chiasm.training.data.sample import Clip, Picture, Sample
from chiasm.training.data.stream import Stream
from chiasm.training.data.tasks import TASKS

MAX_ANSWER_TOKENS = 17
MAX_PIXEL_CHANGE = 12.0
"""Mean over a frame, in grey levels: what H.264 and halved colour do to sharp edges."""


def samples(task: str, count: int = 6) -> list[Sample]:
    return list(islice(Stream({task: 1}, seed=11).samples(), count))


def clip(num_frames: int = 6) -> Clip:
    (found,) = samples("motion", 1)[0].media
    assert isinstance(found, Clip)
    return replace(found, frames=np.resize(found.frames, (num_frames, *found.frames.shape[1:])))


@pytest.mark.parametrize("task", TASKS)
def test_prompt_is_what_the_checkpoints_own_template_gives(
    checkpoint: Path, encoder: Encoder, task: str
) -> None:
    """transformers renders the chat template of tokenizer_config.json."""
    reference = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    config = ModelConfig.load(checkpoint)
    media_ids = {config.tokens.image, config.tokens.video}
    for sample in samples(task):
        parts = [
            {"type": "text", "text": part.text}
            if hasattr(part, "text")
            else {"type": str(part.kind)}
            for part in sample.messages[0].parts
        ]
        text = reference.apply_chat_template(
            [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
        )
        prompt = reference(text, add_special_tokens=False)["input_ids"]
        example = encoder.encode(sample)
        ids = example.token_ids[~example.labels_mask].tolist()
        merged = [
            token
            for i, token in enumerate(ids)
            if token not in media_ids or i == 0 or ids[i - 1] != token
        ]
        assert merged == prompt


@pytest.mark.parametrize("task", TASKS)
def test_the_answer_and_its_end_are_learnt_and_nothing_else(
    checkpoint: Path, encoder: Encoder, task: str
) -> None:
    known = Tokenizer.load(checkpoint)
    end = ModelConfig.load(checkpoint).tokens.eos[-1]
    for sample in samples(task):
        example = encoder.encode(sample)
        learnt = example.token_ids[example.labels_mask].tolist()
        assert known.decode(learnt[:-1]) == sample.answer
        assert learnt[-1] == end
        assert 2 <= len(learnt) <= MAX_ANSWER_TOKENS + 1
        assert example.labels_mask.int().diff().abs().sum() == 1, "one run, up to the end"


@pytest.mark.parametrize("task", TASKS)
def test_fields_fit_each_other(checkpoint: Path, encoder: Encoder, task: str) -> None:
    tokens = ModelConfig.load(checkpoint).tokens
    for sample in samples(task, 3):
        example = encoder.encode(sample)
        length = example.num_tokens
        assert example.token_types.shape == example.labels_mask.shape == (length,)
        assert example.positions.shape == (3, length)
        assert example.pixels.shape == (sum(grid.num_patches for grid in example.grids), 588)
        is_media = torch.isin(example.token_ids, torch.tensor([tokens.image, tokens.video]))
        num_clips = sum(isinstance(item, Clip) for item in sample.media)
        assert is_media.sum() == len(example.pixels) // (8 if num_clips else 4)
        assert (example.token_types > 0).sum() == is_media.sum() + 2 * len(sample.media)
        assert set(example.token_types[is_media].tolist()) <= {2 if num_clips else 1}
        tail = example.positions[:, example.labels_mask]
        assert torch.equal(tail, tail[:1].expand(3, -1))
        assert (tail.diff() == 1).all()


@pytest.mark.parametrize("size", [(56, 56), (112, 56), (200, 130), (28, 300)])
def test_a_picture_is_prepared_as_a_file_of_it(
    checkpoint: Path, encoder: Encoder, size: tuple[int, int]
) -> None:
    pixels = np.random.default_rng(size).integers(0, 256, (*size, 3), np.uint8)
    sample = replace(samples("shape", 1)[0], media=(Picture(pixels),), shows={})
    processing = ProcessingConfig.load(checkpoint, ModelConfig.load(checkpoint))
    served = preprocess_image(to_png(pixels), processing)
    example = encoder.encode(sample)
    assert example.grids == (served.grid,)
    assert torch.equal(example.pixels, served.pixels)


@pytest.mark.parametrize("num_frames", [1, 4, 5])
def test_frames_are_prepared_as_a_video_file_of_them(
    checkpoint: Path, encoder: Encoder, num_frames: int
) -> None:
    found = clip(num_frames)
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264rgb", rate=found.fps, options={"qp": "0"})
        stream.height, stream.width = found.frames.shape[1:3]
        stream.pix_fmt = "rgb24"
        for pixels in found.frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    processing = ProcessingConfig.load(checkpoint, ModelConfig.load(checkpoint))
    expected = preprocess_video(out.getvalue(), processing)
    example = encoder.encode(replace(samples("motion", 1)[0], media=(found,)))
    assert example.grids == (expected.grid,)
    assert torch.equal(example.pixels, expected.pixels)


def test_sent_videos_look_like_the_frames_trained_on() -> None:
    for sample in samples("motion"):
        (found,) = sample.media
        assert isinstance(found, Clip)
        with av.open(io.BytesIO(to_mp4(found))) as container:
            decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert np.shape(decoded) == found.frames.shape
        assert np.abs(np.float32(decoded) - found.frames).mean() < MAX_PIXEL_CHANGE


def test_packed_examples_are_the_examples(encoder: Encoder) -> None:
    examples = [encoder.encode(sample) for task in TASKS for sample in samples(task, 2)]
    batch = pack(examples, 10_000)
    start = patch = 0
    grids = list(batch.grids)
    for example, length in zip(examples, batch.lengths, strict=True):
        here = slice(start, start + length)
        assert length == example.num_tokens
        assert torch.equal(batch.token_ids[here], example.token_ids)
        assert torch.equal(batch.token_types[here], example.token_types)
        assert torch.equal(batch.positions[:, here], example.positions)
        pixels = batch.pixels[patch : patch + len(example.pixels)]
        assert torch.equal(pixels, example.pixels)
        assert tuple(grids[: len(example.grids)]) == example.grids
        del grids[: len(example.grids)]
        start, patch = start + length, patch + len(example.pixels)
    assert (start, patch, grids) == (batch.num_tokens, len(batch.pixels), [])
    assert batch.tasks == tuple(example.task for example in examples)


def test_labels_are_the_next_tokens_within_an_example(encoder: Encoder) -> None:
    examples = [encoder.encode(sample) for sample in samples("words", 4)]
    batch = pack(examples, 10_000)
    for example, labels in zip(examples, batch.labels.split(list(batch.lengths)), strict=True):
        has_label = labels != NO_LABEL
        assert torch.equal(labels[has_label], example.token_ids[example.labels_mask])
        assert torch.equal(has_label[:-1], example.labels_mask[1:])
        assert not has_label[-1], "the end of an answer is followed by another conversation"


def test_bounds_of_a_batch(encoder: Encoder) -> None:
    examples = [encoder.encode(sample) for sample in samples("sums", 3)]
    total = sum(example.num_tokens for example in examples)
    assert pack(examples, total).num_tokens == total
    for refused, limit in ((examples, total - 1), ([], 10)):
        with pytest.raises(InvalidArgument) as caught:
            pack(refused, limit)
        assert caught.value.field == "examples"


def equal(one: PackedBatch, other: PackedBatch) -> bool:
    tensors = ("token_ids", "token_types", "positions", "labels", "pixels")
    rest = ("lengths", "grids", "tasks")
    return all(torch.equal(getattr(one, n), getattr(other, n)) for n in tensors) and all(
        getattr(one, n) == getattr(other, n) for n in rest
    )


def test_batches_are_full_and_go_on_where_they_stopped(checkpoint: Path) -> None:
    batches = Batches(stream=Stream(seed=2), checkpoint=checkpoint, max_tokens=300)
    first = list(islice(batches, 4))
    assert all(200 < batch.num_tokens <= 300 for batch in first)
    start = first[0].num_examples + first[1].num_examples
    resumed = list(islice(replace(batches, start=start), 2))
    assert all(map(equal, resumed, first[2:]))
    expected = [Stream(seed=2).sample(i).task for i in range(start)]
    assert [*first[0].tasks, *first[1].tasks] == expected


def test_a_sample_too_long_for_any_batch_is_refused(checkpoint: Path) -> None:
    batches = Batches(stream=Stream({"copy": 1}), checkpoint=checkpoint, max_tokens=20)
    with pytest.raises(InvalidArgument):
        list(islice(batches, 4))


@pytest.mark.parametrize("started_by", ["fork", "spawn"])
def test_batches_made_in_the_background_are_the_same(checkpoint: Path, started_by: str) -> None:
    """However this process would start others: benchmarks train in spawned ones."""
    batches = Batches(stream=Stream(seed=4), checkpoint=checkpoint, max_tokens=200)
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(started_by, force=True)
    try:
        assert all(map(equal, islice(batches.in_background(), 5), islice(batches, 5)))
    finally:
        multiprocessing.set_start_method(before, force=True)


def spelled(known: Tokenizer, text: str) -> list[str]:
    return [known.decode([token]) for token in known.encode(text)]


def test_codes_are_recalled_over_hundreds_of_tokens(encoder: Encoder) -> None:
    """And fit every batch that they may come in."""
    most = min(
        stage.batch_tokens
        for stage in presets.find("bundled").stages
        if any("recall" in mix for mix in (stage.mix, *(each.mix for each in stage.lessons)))
    )
    lengths = [
        encoder.encode(sample).num_tokens
        for sample in islice(Stream({"recall": 1.0}, seed=3).samples(), 200)
    ]
    assert min(lengths) > 100
    assert most / 2 < max(lengths) < most


def test_tokenizer(checkpoint: Path) -> None:
    known = Tokenizer.load(checkpoint)
    assert known.vocab_size == tokenizer.VOCAB_SIZE
    for text in ("47", "K7Q2", "ZEBRA", "9"):
        assert spelled(known, text) == list(text)
    for name in (*COLOUR_NAMES.values(), *SHAPE_NAMES.values()):
        assert len(known.encode(name.zh)) == 1
        assert spelled(known, f"图中的{name.zh}在哪里")[-2:] != [], name
        assert name.zh in spelled(known, f"请说出{name.zh}的颜色")
    for text in ("Größe? 図。\n\t <|end_of_sentence|> 👍", "请数一数"):
        assert known.decode(known.encode(text)) == text
    assert all(known.token_id(name) for name in ("<|end_of_sentence|>", "<|IMAGE_START|>"))


def test_tokenizer_is_the_same_every_time(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer.train().save(str(tmp_path / "tokenizer.json"))
    again = (tmp_path / "tokenizer.json").read_bytes()
    assert again == (checkpoint / "tokenizer.json").read_bytes()


def test_language_of_the_answer(encoder: Encoder) -> None:
    found = {sample.language: sample for sample in samples("shape", 20)}
    assert found[Language.CHINESE].answer in {name.zh for name in SHAPE_NAMES.values()}
    assert found[Language.ENGLISH].answer in {name.en for name in SHAPE_NAMES.values()}
    assert isinstance(encoder.encode(found[Language.CHINESE]), Example)
