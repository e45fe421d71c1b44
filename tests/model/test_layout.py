"""Laid-out prompts and positions against transformers' processor and get_rope_index."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Ernie4_5_VLMoeConfig
from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import Ernie4_5_VLMoeModel

from chiasm.errors import InvalidArgument
from chiasm.model.chat import ChatMessage, MediaPart, Placeholder, TextPart, Tokens, render_chat
from chiasm.model.config import ModelConfig
from chiasm.model.geometry import num_tokens
from chiasm.model.images import preprocess_image
from chiasm.model.layout import Prompt, lay_out_pieces, lay_out_tokens
from chiasm.model.positions import position_ids
from chiasm.model.video import preprocess_video
from chiasm.types import Grid, MediaKind

FIELD = "tokens.token_ids"


@pytest.fixture(scope="session")
def judge(checkpoint) -> Any:
    with torch.device("meta"):
        return Ernie4_5_VLMoeModel(Ernie4_5_VLMoeConfig.from_pretrained(checkpoint))


def _with_advance(config: ModelConfig, advance: str) -> ModelConfig:
    return replace(config, video_advance=advance)


def _mix(draw: random.Random, config: ModelConfig) -> tuple[list[Tokens | Placeholder], list[Grid]]:
    """Text, delimited images and videos of random grids."""
    tokens = config.tokens
    pieces: list[Tokens | Placeholder] = []
    grids: list[Grid] = []
    for _ in range(draw.randint(0, 7)):
        pieces.append(Tokens(tuple(draw.randrange(20, 500) for _ in range(draw.randint(0, 9)))))
        kind = draw.choice(list(MediaKind))
        frames = 1 if kind is MediaKind.IMAGE else 2 * draw.randint(1, 12)
        grids.append(Grid(frames, 2 * draw.randint(1, 7), 2 * draw.randint(1, 7)))
        start, end = (
            (tokens.image_start, tokens.image_end)
            if kind is MediaKind.IMAGE
            else (tokens.video_start, tokens.video_end)
        )
        pieces += [Tokens((start,)), Placeholder(len(grids) - 1, kind), Tokens((end,))]
    pieces.append(Tokens(tuple(draw.randrange(20, 500) for _ in range(draw.randint(1, 9)))))
    return pieces, grids


def _grids(prompt: Prompt, kind: MediaKind) -> list[Grid]:
    return [item.grid for item in prompt.media if item.kind is kind]


@pytest.mark.parametrize("seed", range(3))
def test_whole_prompts_are_those_of_transformers(
    seed, checkpoint, reference, tokenizer, processing, config, png, film, judge
):
    """From files and messages to ids, types, pixels, grids and positions."""
    draw = np.random.default_rng(seed)
    images = [
        draw.integers(0, 256, (*draw.integers(20, 150, 2), 3), dtype=np.uint8) for _ in range(2)
    ]
    video = draw.integers(0, 256, (2 + 7 * seed, 60, 80, 3), dtype=np.uint8)
    image_patches = [preprocess_image(png(image), processing) for image in images]
    video_patches = preprocess_video(film(video), processing)
    parts = (
        TextPart("Compare "),
        MediaPart(MediaKind.IMAGE, 0),
        MediaPart(MediaKind.VIDEO, 1),
        TextPart(" with "),
        MediaPart(MediaKind.IMAGE, 2),
    )
    grids = [image_patches[0].grid, video_patches.grid, image_patches[1].grid]
    pieces = render_chat([ChatMessage("user", parts)], tokenizer, config)
    prompt = lay_out_pieces(pieces, grids, config)

    picture = "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
    expected = reference(
        text=[
            f"<|begin_of_sentence|>User: Compare Picture 1:{picture}"
            f"Video 1:<|VIDEO_START|><|VIDEO_PLACEHOLDER|><|VIDEO_END|> with Picture 2:{picture}"
            "\nAssistant: <think>\n\n</think>\n\n"
        ],
        images=[Image.fromarray(image) for image in images],
        videos=[video],
        return_tensors="pt",
    )
    assert list(prompt.token_ids) == expected["input_ids"][0].tolist()
    assert list(prompt.token_types) == expected["moe_mm_token_type_ids"][0].tolist()
    placeholders = [0] * prompt.num_tokens
    for item in prompt.media:
        of_kind = 1 if item.kind is MediaKind.IMAGE else 2
        placeholders[item.offset : item.offset + item.num_tokens] = [of_kind] * item.num_tokens
    assert placeholders == expected["mm_token_type_ids"][0].tolist()
    pixels = torch.cat([patches.pixels for patches in image_patches])
    assert torch.equal(pixels, expected["pixel_values"])
    assert torch.equal(video_patches.pixels, expected["pixel_values_videos"])
    positions, delta = judge.get_rope_index(
        expected["input_ids"],
        expected["mm_token_type_ids"],
        expected["image_grid_thw"],
        expected["video_grid_thw"],
    )
    ours, following = position_ids(
        prompt.num_tokens, prompt.media, _with_advance(config, "transformers")
    )
    assert np.array_equal(ours, positions[:, 0].numpy())
    assert following == prompt.num_tokens + int(delta)


@pytest.mark.parametrize("seed", range(40))
def test_positions_of_random_mixes(seed, config, judge):
    draw = random.Random(seed)
    prompt = lay_out_pieces(*_mix(draw, config), config)
    types = torch.zeros(1, prompt.num_tokens, dtype=torch.int32)
    for item in prompt.media:
        of_kind = 1 if item.kind is MediaKind.IMAGE else 2
        types[0, item.offset : item.offset + item.num_tokens] = of_kind
    expected, delta = judge.get_rope_index(
        torch.tensor([prompt.token_ids]),
        types,
        torch.tensor(_grids(prompt, MediaKind.IMAGE)),
        torch.tensor(_grids(prompt, MediaKind.VIDEO)),
    )
    positions, following = position_ids(
        prompt.num_tokens, prompt.media, _with_advance(config, "transformers")
    )
    assert positions.dtype == np.int64
    assert np.array_equal(positions, expected[:, 0].numpy())
    assert following == prompt.num_tokens + int(delta)


@pytest.mark.parametrize("seed", range(10))
def test_original_advance_moves_past_every_position(seed, config):
    """An independent, slow rendering of the original rule."""
    prompt = lay_out_pieces(*_mix(random.Random(100 + seed), config), config)
    rows: list[tuple[int, int, int]] = []
    starts = {item.offset: item for item in prompt.media}
    while len(rows) < prompt.num_tokens:
        current = max((max(row) for row in rows), default=-1) + 1
        item = starts.get(len(rows))
        if item is None:
            rows.append((current, current, current))
            continue
        t, h, w = item.grid
        rows += [
            (current + a, current + b, current + c)
            for a in range(max(t // 2, 1))
            for b in range(h // 2)
            for c in range(w // 2)
        ]
    positions, following = position_ids(
        prompt.num_tokens, prompt.media, _with_advance(config, "original")
    )
    assert positions.T.tolist() == [list(row) for row in rows]
    assert following == max(max(row) for row in rows) + 1


def test_positions_of_text_alone(config):
    positions, following = position_ids(5, (), config)
    assert positions.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert following == 5


@pytest.mark.parametrize("seed", range(40))
def test_token_prompts_may_be_expanded_or_not(seed, config):
    draw = random.Random(seed)
    pieces, grids = _mix(draw, config)
    expected = lay_out_pieces(pieces, grids, config)
    tokens = config.tokens
    ids: list[int] = []
    for piece in pieces:
        if isinstance(piece, Tokens):
            ids.extend(piece.ids)
            continue
        # Videos may carry their own placeholder or, in the original spelling, the image's.
        spellings = [tokens.image] + [tokens.video] * (piece.kind is MediaKind.VIDEO)
        count = draw.choice([1, num_tokens(grids[piece.index], config.vision)])
        ids.extend([draw.choice(spellings)] * count)
    prompt = lay_out_tokens(
        ids, _grids(expected, MediaKind.IMAGE), _grids(expected, MediaKind.VIDEO), config
    )
    assert prompt.token_ids == expected.token_ids
    assert prompt.token_types == expected.token_types
    num_images = len(_grids(expected, MediaKind.IMAGE))
    by_kind = {MediaKind.IMAGE: 0, MediaKind.VIDEO: num_images}
    for item, other in zip(prompt.media, expected.media, strict=True):
        assert replace(item, index=other.index) == other
        assert item.index == by_kind[item.kind]
        by_kind[item.kind] += 1


def test_counts_by_modality(config):
    tokens = config.tokens
    ids = [20, tokens.image_start, tokens.image, tokens.image_end]
    ids += [tokens.video_start, tokens.video, tokens.video_end, 21]
    prompt = lay_out_tokens(ids, [Grid(1, 4, 6)], [Grid(4, 4, 4)], config)
    assert (prompt.num_image_tokens, prompt.num_video_tokens, prompt.num_text_tokens) == (6, 8, 6)
    assert prompt.num_tokens == 20
    assert list(prompt.token_types) == [0, *[1] * 8, *[2] * 10, 0]


def test_one_placeholder_id_for_both_kinds(config):
    """Checkpoints without a video placeholder of their own."""
    shared = replace(config, tokens=replace(config.tokens, video=config.tokens.image))
    tokens = shared.tokens
    ids = [tokens.image, 20, tokens.video_start, *[tokens.image] * 4, tokens.video_end, 20]
    ids += [tokens.image_start, tokens.image, tokens.image_end]
    prompt = lay_out_tokens(ids, [Grid(1, 2, 4), Grid(1, 2, 2)], [Grid(4, 2, 4)], shared)
    assert [(m.kind, m.offset, m.num_tokens, m.index) for m in prompt.media] == [
        (MediaKind.IMAGE, 0, 2, 0),
        (MediaKind.VIDEO, 4, 4, 2),
        (MediaKind.IMAGE, 11, 1, 1),
    ]
    assert set(prompt.token_ids) == set(ids)


@pytest.mark.parametrize(
    ("length", "counts"),
    [(2, [3, 4]), (7, [3, 4]), (3, [3]), (1, [5]), (3, [3, 2, 1]), (2, [1, 1]), (2, [2, 2])],
)
def test_items_side_by_side(length, counts, config):
    grids = [Grid(1, 2, 2 * count) for count in counts]
    prompt = lay_out_tokens([9, *[config.tokens.image] * length, 9][1:-1], grids, [], config)
    assert [item.num_tokens for item in prompt.media] == counts
    assert prompt.token_ids == (config.tokens.image,) * sum(counts)


def test_readings_are_weighed_over_the_whole_prompt(config):
    """Two placeholders are one expanded item, or two items: what follows decides."""
    image = config.tokens.image
    grids = [Grid(1, 2, 4), Grid(1, 2, 6)]
    assert len(lay_out_tokens([image, image], grids, [], config).media) == 2
    prompt = lay_out_tokens([image, image, 20, image], grids, [], config)
    assert [(m.offset, m.num_tokens) for m in prompt.media] == [(0, 2), (3, 3)]


@pytest.mark.parametrize(
    ("ids", "images", "videos"),
    [
        ([20], 1, 0),
        ([20], 0, 1),
        (["image"], 0, 0),
        (["video"], 1, 0),
        (["image"], 0, 1),
        (["image", "image"], 1, 0),
        (["image"] * 5, 1, 0),
        (["image", 20, "image"], 1, 0),
        (["image"] * 7, 2, 0),
        ([f"{kind}" for kind in ["image"] * 3], 2, 0),
        (["image", 20] * 1000, 64, 0),
    ],
)
def test_bad_token_prompts_are_refused(ids, images, videos, config):
    named = {"image": config.tokens.image, "video": config.tokens.video}
    with pytest.raises(InvalidArgument) as error:
        lay_out_tokens(
            [named.get(i, i) for i in ids],
            [Grid(1, 4, 4)] * images,
            [Grid(2, 4, 4)] * videos,
            config,
        )
    assert error.value.field == FIELD
