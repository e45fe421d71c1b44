"""Both kinds of tokenizer files against transformers, and text streamed token by token."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from chiasm.errors import InvalidArgument, NotFound
from chiasm.model.tokenizer import IncrementalDecoder, Tokenizer

BENIGN = [
    "What is in the picture?",
    "  leading, trailing  ",
    "你好, 世界! 这张图片里有什么?",
    "12 345 6789 a1b2",
    "naïve café — \U0001f98a\U0001f468\u200d\U0001f469\u200d\U0001f467 \u0000\t\n\n\n x",
    "",
    "a",
    "def f(x):\n    return x  # ok",
]
SPELLED = "a <|IMAGE_START|> b</s> <think> <|begin_of_sentence|>1"
CONTROL = ["<|begin_of_sentence|>", "<|end_of_sentence|>", "<|IMAGE_PLACEHOLDER|>"]
CONTROL += ["<|IMAGE_START|>", "<|IMAGE_END|>"]


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as the original hub repository: tokenizer.model and its JSON files."""
    directory = tmp_path_factory.mktemp("original")
    model = io.BytesIO()
    corpus = [line for text in [*BENIGN, SPELLED] for line in [text] * 9 if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        model_type="bpe",
        vocab_size=460,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=0.98,
        user_defined_symbols=[*map(str, range(10)), *CONTROL],
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "additional_special_tokens": CONTROL,
                "add_bos_token": False,
                "tokenizer_class": "LlamaTokenizer",
            }
        )
    )
    (directory / "added_tokens.json").write_text(json.dumps({"<think>": 460, "~new~": 461}))
    (directory / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "</s>"}, "additional_special_tokens": ["<think>"]})
    )
    return directory


@pytest.fixture(scope="session")
def converted(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as transformers converts it: tokenizer.json with byte fallback."""
    directory = tmp_path_factory.mktemp("converted")
    tokenizer = LlamaTokenizer.from_pretrained(
        original, add_bos_token=False, add_prefix_space=False
    )
    tokenizer.add_tokens([AddedToken(str(digit), normalized=False) for digit in range(10)])
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(params=["json", "converted", "original"])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    name = {"json": "checkpoint"}.get(request.param, request.param)
    return Tokenizer.load(request.getfixturevalue(name))


@pytest.fixture(params=["json", "converted", "original"])
def streamed_and_judge(request: pytest.FixtureRequest) -> tuple[Tokenizer, Tokenizer]:
    """A tokenizer, and one with the same ids whose `decode` leaves the characters of a run of
    bytes that has a wrong one: tokenizer.json spoils all of them."""
    name = {"json": "checkpoint"}.get(request.param, request.param)
    judge = {"json": "checkpoint"}.get(request.param, "original")
    return tuple(Tokenizer.load(request.getfixturevalue(n)) for n in (name, judge))


@pytest.mark.parametrize("text", BENIGN)
def test_json_encodes_as_transformers(text, checkpoint, tokenizer):
    judge = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    ids = judge.encode(text, add_special_tokens=False)
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == judge.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.vocab_size == len(judge)


@pytest.mark.parametrize("text", [text for text in BENIGN if "\0" not in text])
def test_sentencepiece_encodes_as_transformers_after_conversion(text, original, converted):
    judge = PreTrainedTokenizerFast.from_pretrained(converted)
    ids = judge.encode(text, add_special_tokens=False)
    for directory in (original, converted):
        tokenizer = Tokenizer.load(directory)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text


def test_spelled_out_special_tokens_stay_text(any_tokenizer):
    for control in ("<|IMAGE_START|>", "</s>", "<|begin_of_sentence|>", "<|end_of_sentence|>"):
        token_id = any_tokenizer.token_id(control)
        assert token_id is not None
        for text in (control, f"x{control}y", control * 3, SPELLED):
            ids = any_tokenizer.encode(text)
            assert not {any_tokenizer.token_id(c) for c in (*CONTROL, "</s>")} & set(ids)
            assert any_tokenizer.decode(ids) == text


def test_token_id_knows_added_tokens_alone(any_tokenizer):
    assert any_tokenizer.token_id("<s>") == any_tokenizer.token_id("<s>")
    assert any_tokenizer.token_id("7") is not None
    assert any_tokenizer.token_id("a") is None
    assert any_tokenizer.token_id("<|no such token|>") is None


def test_digits_stay_single_tokens(any_tokenizer):
    ids = any_tokenizer.encode("2024")
    assert ids == [any_tokenizer.token_id(digit) for digit in "2024"]


def test_special_tokens_are_left_out_of_text(any_tokenizer):
    control = any_tokenizer.token_id("<|IMAGE_START|>")
    ids = [control, *any_tokenizer.encode("a dog"), control]
    assert any_tokenizer.decode(ids) == "a dog"
    shown = any_tokenizer.decode(ids, skip_special_tokens=False)
    assert shown == "<|IMAGE_START|>a dog<|IMAGE_START|>"


def test_ids_outside_the_vocabulary_have_no_text(any_tokenizer):
    ids = any_tokenizer.encode("dog")
    assert any_tokenizer.decode([*ids, any_tokenizer.vocab_size, 10**6]) == "dog"


def test_tokens_added_beside_the_model(original):
    tokenizer = Tokenizer.load(original)
    assert tokenizer.vocab_size == 462
    assert tokenizer.token_id("<think>") == 460
    assert 460 not in tokenizer.encode("<think>")
    assert tokenizer.encode("a~new~b") == [*tokenizer.encode("a"), 461, *tokenizer.encode("b")]
    assert tokenizer.decode([460, 461]) == "~new~"


def test_prefix_space_is_left_to_the_prompts_first_token(converted, tmp_path):
    described = json.loads((converted / "tokenizer.json").read_text())
    described["pre_tokenizer"]["prepend_scheme"] = "first"
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    judge = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    ids = judge.encode("</s>What is it?", add_special_tokens=False)
    tokenizer = Tokenizer.load(tmp_path)
    assert [tokenizer.token_id("</s>"), *tokenizer.encode("What is it?")] == ids


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(NotFound):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\xff\x00 nonsense")
    with pytest.raises(InvalidArgument, match=r"tokenizer\.model"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidArgument, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def _stream(tokenizer: Tokenizer, ids: list[int], draw: random.Random, most: int) -> list[str]:
    decoder, parts, rest = IncrementalDecoder(tokenizer), [], list(ids)
    while rest:
        size = draw.randint(0, most)
        parts.append(decoder.push(rest[:size]))
        rest = rest[size:]
    return [*parts, decoder.flush()]


@pytest.mark.parametrize("most", [1, 3, 40])
def test_streamed_text_adds_up(most, any_tokenizer):
    draw = random.Random(most)
    for text in [*BENIGN, SPELLED, "\U0001f98a" * 30, " é" * 20]:
        ids = any_tokenizer.encode(text)
        parts = _stream(any_tokenizer, ids, draw, most)
        assert "".join(parts) == text
        assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)


@pytest.mark.parametrize("seed", range(60))
def test_streamed_nonsense_adds_up(seed, streamed_and_judge):
    """Random ids are mostly no UTF-8, and special ones are among them."""
    tokenizer, judge = streamed_and_judge
    draw = random.Random(seed)
    ids = [draw.randrange(tokenizer.vocab_size + 3) for _ in range(300)]
    parts = _stream(tokenizer, ids, draw, 1 + seed % 4)
    assert "".join(parts) == judge.decode(tokenizer.visible(ids), skip_special_tokens=False)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_streamed_halves_of_characters_add_up(size, tokenizer, checkpoint):
    """Endless invalid bytes: nothing that was given out may change."""
    bytes_of = {
        i: PreTrainedTokenizerFast.from_pretrained(checkpoint).convert_ids_to_tokens(i)
        for i in range(14, 14 + 256)
    }
    lone = [i for i, token in bytes_of.items() if ord(token[0]) > 0x7F][: size * 7]
    draw = random.Random(size)
    ids = [draw.choice(lone) for _ in range(400)]
    decoder = IncrementalDecoder(tokenizer)
    given = [decoder.push([token_id]) for token_id in ids]
    assert sum(map(bool, given)) >= 100
    assert "".join(given) + decoder.flush() == tokenizer.decode(ids)


def test_text_comes_as_soon_as_it_is_whole(any_tokenizer):
    decoder = IncrementalDecoder(any_tokenizer)
    ids = any_tokenizer.encode("What is in the picture?")
    given = [decoder.push([token_id]) for token_id in ids]
    assert all(given)
    assert decoder.flush() == ""
    assert IncrementalDecoder(any_tokenizer).flush() == ""


@pytest.mark.parametrize("text", ["\n" * 500, "\U0001f98a" * 60, "é\n" * 100, " é" * 100])
def test_no_more_than_a_character_is_held_back(text, streamed_and_judge):
    """Many of these tokens are bytes, and some end one character and begin the next."""
    tokenizer, judge = streamed_and_judge
    decoder, ids, given = IncrementalDecoder(tokenizer), tokenizer.encode(text), ""
    for num_tokens, token_id in enumerate(ids, start=1):
        given += decoder.push([token_id])
        assert given == judge.decode(ids[:num_tokens]).rstrip("\N{REPLACEMENT CHARACTER}")
    assert given == text
    assert decoder.flush() == ""


def test_a_token_spelled_like_a_byte_is_text_where_there_are_no_bytes(checkpoint, tmp_path):
    described = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    described.add_tokens(["<0x0A>"])
    described.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert IncrementalDecoder(tokenizer).push(tokenizer.encode("<0x0A>")) == "<0x0A>"
