"""Workloads: shares, sizes, prefixes, traces; the same seed gives the same requests."""

from __future__ import annotations

import io
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chiasm.bench import content, lengths, trace, workload
from chiasm.bench.workload import Conversation, Passage, Picture, RandomWorkload, Size

NUM = 4000


def _take(mix: RandomWorkload, num: int = NUM, shape: int = 0, text: int = 0) -> list[Conversation]:
    return list(islice(mix.conversations(shape=(shape,), content=(text,)), num))


def _mix(**options: object) -> RandomWorkload:
    defaults: dict[str, object] = {
        "input_len": lengths.Uniform(8, 8),
        "output_len": lengths.Uniform(4, 4),
    }
    return RandomWorkload(**(defaults | options))  # type: ignore[arg-type]  # options of a test


def test_lengths() -> None:
    rng = np.random.default_rng(0)
    drawn = [lengths.parse("uniform:3,6").draw(rng) for _ in range(NUM)]
    assert set(drawn) == {3, 4, 5, 6}
    assert {lengths.parse("17").draw(rng) for _ in range(5)} == {17}
    drawn = [lengths.parse("lognormal:100,0.5,250").draw(rng) for _ in range(NUM)]
    assert np.median(drawn) == pytest.approx(100, rel=0.05)
    assert np.std(np.log(np.array(drawn)[np.array(drawn) < 250])) == pytest.approx(0.45, abs=0.05)
    assert max(drawn) == 250


@pytest.mark.parametrize(
    "text", ["", "x", "0", "-3", "uniform:5", "uniform:6,5", "lognormal:9,1", "lognormal:9,-1,20",
             "lognormal:30,1,20", "normal:1,2", "99999999", "lognormal:nan,1,20"],
)  # fmt: skip
def test_refused_lengths(text: str) -> None:
    with pytest.raises(ValueError, match=r"length|must lie"):
        lengths.parse(text)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_image_share(share: float) -> None:
    sizes = (Size(32, 32), Size(64, 32))
    found = _take(_mix(image_share=share, images_per_request=2, image_sizes=sizes))
    pictures = [c.turns[0].pictures for c in found]
    assert {len(p) for p in pictures} <= {0, 2}
    assert np.mean([bool(p) for p in pictures]) == pytest.approx(share, abs=0.03)
    flat = [p for ps in pictures for p in ps]
    assert len(set(flat)) == len(flat)
    if flat:
        assert {Size(p.width, p.height) for p in flat} == set(sizes)


def test_image_pool_repeats() -> None:
    sizes = (Size(32, 32), Size(64, 32))
    found = _take(_mix(image_share=1.0, image_pool=5, image_sizes=sizes))
    assert len({c.turns[0].pictures[0] for c in found}) == 5


def test_prefix_groups() -> None:
    found = _take(_mix(prefix_groups=3, prefix_tokens=20, turns=2))
    assert len({c.turns[0].prefix for c in found}) == 3
    assert all(c.turns[1].prefix is None for c in found)
    assert {c.turns[0].num_text_tokens for c in found} == {28}
    assert len({t.passage for c in found for t in c.turns}) == 2 * NUM


def test_seeds_of_shape_and_content() -> None:
    mix = _mix(input_len=lengths.Uniform(1, 99), image_share=0.5)
    first, again = _take(mix, 50), _take(mix, 50)
    assert first == again
    other_text, other_shape = _take(mix, 50, text=1), _take(mix, 50, shape=1)

    def shapes(found: list[Conversation]) -> list[tuple[int, int]]:
        turns = [c.turns[0] for c in found]
        return [(t.passage.num_tokens, len(t.pictures)) for t in turns]

    assert shapes(other_text) == shapes(first) != shapes(other_shape)
    assert not {c.turns[0].passage.seed for c in first} & {
        c.turns[0].passage.seed for c in other_text
    }


def test_limited_counts_turns() -> None:
    found = list(workload.limited(iter(_take(_mix(turns=3), 10)), 7))
    assert [len(c.turns) for c in found] == [3, 3, 1]


def test_content_follows_its_seed() -> None:
    a, b = Passage((1, 2), 40), Passage((1, 3), 40)
    assert content.token_ids(a, 3, 90) == content.token_ids(a, 3, 90) != content.token_ids(b, 3, 90)
    ids = content.token_ids(Passage((5,), 5000), 3, 20)
    assert len(ids) == 5000
    assert set(ids) == set(range(3, 20))
    assert len(content.text(a).split()) == 40
    assert content.text(a) == content.text(a) != content.text(b)
    file = content.jpeg(Picture((1,), 50, 30))
    assert Image.open(io.BytesIO(file)).size == (50, 30)
    assert file == content.jpeg(Picture((1,), 50, 30)) != content.jpeg(Picture((2,), 50, 30))


def test_trace(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 5.5, "prompt_tokens": 7, "output_tokens": 3, "images": [[40, 30], [8, 9]]},
        {"timestamp": 2, "prompt_tokens": 9, "output_tokens": 1},
        {"timestamp": 3, "prompt_tokens": 9, "output_tokens": 2, "images": 2},
    ]
    file = tmp_path / "trace.jsonl"
    file.write_text("\n\n".join(map(json.dumps, rows)))
    read = trace.read(file, Size(56, 56))
    assert [row.timestamp for row in read] == [2, 3, 5.5]
    turns = [c.turns[0] for c in workload.replay(read, content=(0,))]
    assert [t.passage.num_tokens for t in turns] == [9, 9, 7]
    assert [t.max_tokens for t in turns] == [1, 2, 3]
    sizes = [[(p.width, p.height) for p in t.pictures] for t in turns]
    assert sizes == [[], [(56, 56)] * 2, [(40, 30), (8, 9)]]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"prompt_tokens": 1, "output_tokens": 1}',
        '{"timestamp": NaN, "prompt_tokens": 1, "output_tokens": 1}',
        '{"timestamp": 0, "prompt_tokens": 0, "output_tokens": 1}',
        '{"timestamp": 0, "prompt_tokens": 1, "output_tokens": 1, "images": [[1]]}',
        '{"timestamp": 0, "prompt_tokens": 1, "output_tokens": 1, "images": 99}',
        " " * 70_000,
    ],
)
def test_malformed_trace(line: str, tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"timestamp": 0, "prompt_tokens": 1, "output_tokens": 1}\n' + line)
    with pytest.raises(ValueError, match="line 2"):
        trace.read(file, Size(56, 56))
