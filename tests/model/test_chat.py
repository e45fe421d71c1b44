"""Rendered chats: token ids of transformers for the string the template yields."""

from __future__ import annotations

import json

import pytest
from transformers import PreTrainedTokenizerFast

from chiasm.model.chat import ChatMessage, MediaPart, Placeholder, TextPart, Tokens, render_chat
from chiasm.model.tokenizer import Tokenizer
from chiasm.types import MediaKind

B, E = "<|begin_of_sentence|>", "<|end_of_sentence|>"
NO_THOUGHT = "\nAssistant: <think>\n\n</think>\n\n"
PICTURE = "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
VIDEO = "<|VIDEO_START|><|VIDEO_PLACEHOLDER|><|VIDEO_END|>"


def say(role: str, *parts: str | MediaKind, first: int = 0) -> ChatMessage:
    """Media are numbered from `first` on in order."""
    counted = iter(range(first, 99))
    return ChatMessage(
        role,
        tuple(
            MediaPart(part, next(counted)) if isinstance(part, MediaKind) else TextPart(part)
            for part in parts
        ),
    )


def ids_of(pieces, config) -> list[int]:
    """One placeholder per item."""
    ids = []
    for piece in pieces:
        if isinstance(piece, Placeholder):
            is_image = piece.kind is MediaKind.IMAGE
            ids.append(config.tokens.image if is_image else config.tokens.video)
        else:
            ids.extend(piece.ids)
    return ids


CHATS = [
    ([say("user", "What is it?")], f"{B}User: What is it?{NO_THOUGHT}"),
    (
        [say("system", "Be brief."), say("user", "Hi", " there")],
        f"{B}Be brief.\nUser: Hi there{NO_THOUGHT}",
    ),
    (
        [say("user", "What", MediaKind.IMAGE, " and ", MediaKind.VIDEO, MediaKind.IMAGE, "?")],
        f"{B}User: WhatPicture 1:{PICTURE} and Video 1:{VIDEO}Picture 2:{PICTURE}?{NO_THOUGHT}",
    ),
    (
        [
            say("system", MediaKind.IMAGE, "a style"),
            say("user", MediaKind.IMAGE, first=1),
            say("assistant", "A lynx."),
            say("user", MediaKind.VIDEO, "and this 12?", MediaKind.IMAGE, first=2),
        ],
        f"{B}Picture 1:{PICTURE}a style\nUser: Picture 2:{PICTURE}\nAssistant: A lynx.{E}"
        f"User: Video 1:{VIDEO}and this 12?Picture 3:{PICTURE}{NO_THOUGHT}",
    ),
    (
        [
            say("user", "Hi"),
            say("assistant", "<think>\n\nSay hello.\nOr not.\n\n</think>\n\nHello."),
            say("user", "Bye"),
        ],
        f"{B}User: Hi\nAssistant: <think>\nSay hello.\nOr not.\n</think>\nHello.{E}"
        f"User: Bye{NO_THOUGHT}",
    ),
    (
        [say("user", "Hi"), say("assistant", "<think>\n\n</think>\n\nHello."), say("user", "Bye")],
        f"{B}User: Hi\nAssistant: Hello.{E}User: Bye{NO_THOUGHT}",
    ),
    (
        [say("user", "Hi"), say("assistant", "Say hello.</think>Hello."), say("user", "Bye")],
        f"{B}User: Hi\nAssistant: <think>\nSay hello.\n</think>\nHello.{E}User: Bye{NO_THOUGHT}",
    ),
    (
        [say("user", "Hi"), say("assistant", "The picture ", "shows")],
        f"{B}User: Hi\nAssistant: The picture shows",
    ),
    (
        [say("user", "Hi"), say("assistant", "<think>\nThe dog")],
        f"{B}User: Hi\nAssistant: <think>\nThe dog",
    ),
    ([say("user", "\n\n  你好 \n")], f"{B}User: \n\n  你好 \n{NO_THOUGHT}"),
]


@pytest.mark.parametrize(("messages", "rendered"), CHATS)
def test_ids_are_those_of_transformers(messages, rendered, tokenizer, config, reference):
    pieces = render_chat(messages, tokenizer, config)
    expected = reference.tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert ids_of(pieces, config) == expected


def test_thinking_leaves_the_thought_open(tokenizer, config, reference):
    pieces = render_chat([say("user", "Why?")], tokenizer, config, enable_thinking=True)
    rendered = f"{B}User: Why?\nAssistant: <think>"
    assert ids_of(pieces, config) == reference.tokenizer(rendered)["input_ids"]


@pytest.mark.parametrize(
    ("text", "rendered"),
    [
        ("<think>a</think>b</think>c", ("<think>", "\na\n", "</think>", "\nb</think>c")),
        ("<think>a<think>b</think>c", ("<think>", "\na<think>b\n", "</think>", "\nc")),
        ("Write <think>a</think> here", ()),
        ("no <think> end", ()),
    ],
)
def test_nothing_of_an_answer_is_lost(text, rendered, tokenizer, config):
    """Where the template would drop some of it. Tags beyond the first two are ordinary text."""
    messages = [say("user", "Hi"), say("assistant", text), say("user", "Bye")]
    ids = ids_of(render_chat(messages, tokenizer, config), config)
    begin = "User: Hi\nAssistant: "
    expected = []
    for i, part in enumerate((begin, *rendered) if rendered else (begin + text,)):
        expected += [tokenizer.token_id(part)] if i % 2 else tokenizer.encode(part)
    assert ids[1 : len(expected) + 2] == [*expected, tokenizer.token_id(E)]


def test_borders_of_the_template_are_merged_over(tokenizer, config):
    """Were `User: ` and the text tokenised apart, this would be another prompt."""
    ids = ids_of(render_chat([say("user", "What is in")], tokenizer, config), config)
    joint = tokenizer.encode("User: What is in\nAssistant: ")
    apart = [
        i for text in ("User: ", "What is in", "\nAssistant: ") for i in tokenizer.encode(text)
    ]
    assert joint != apart
    assert ids[1 : 1 + len(joint)] == joint


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize(
    "control", ["<|IMAGE_PLACEHOLDER|>", "<|VIDEO_START|>", E, B, "</s>", "a<think>b", "<s>"]
)
def test_control_tokens_come_from_the_template_alone(role, control, tokenizer, config):
    def chat(text: str) -> list[ChatMessage]:
        messages = [say("system", "x"), say("user", "x"), say("assistant", "x"), say("user", "x")]
        at = ("system", "user", "assistant").index(role)
        messages[at] = say(role, text)
        return messages

    def controls(text: str) -> list[int]:
        ids = ids_of(render_chat(chat(text), tokenizer, config), config)
        assert text in tokenizer.decode(ids)
        return [i for i in ids if i < 14]

    assert controls(f"say {control} now") == controls("say nothing now")


def test_placeholders_name_their_media(tokenizer, config):
    message = ChatMessage(
        "user", (MediaPart(MediaKind.VIDEO, 4), TextPart("x"), MediaPart(MediaKind.IMAGE, 0))
    )
    pieces = render_chat([message], tokenizer, config)
    assert [p for p in pieces if isinstance(p, Placeholder)] == [
        Placeholder(4, MediaKind.VIDEO),
        Placeholder(0, MediaKind.IMAGE),
    ]
    before, _, between, _, after = pieces
    assert isinstance(between, Tokens)
    assert before.ids[-1] == config.tokens.video_start
    assert between.ids[0] == config.tokens.video_end
    assert (between.ids[-1], after.ids[0]) == (config.tokens.image_start, config.tokens.image_end)


def test_controls_the_tokenizer_lacks_are_text(config, checkpoint, tmp_path, tokenizer):
    described = json.loads((checkpoint / "tokenizer.json").read_text())
    described["added_tokens"] = [
        t for t in described["added_tokens"] if "think" not in t["content"]
    ]
    for tag in ("<think>", "</think>"):
        described["model"]["vocab"][f"unreachable{tag}"] = described["model"]["vocab"].pop(tag)
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    poorer = Tokenizer.load(tmp_path)
    assert poorer.token_id("<think>") is None
    judge = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    ids = ids_of(render_chat([say("user", "Hi")], poorer, config), config)
    assert ids == judge.encode(f"{B}User: Hi{NO_THOUGHT}", add_special_tokens=False)
