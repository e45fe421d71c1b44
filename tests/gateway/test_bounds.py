"""Fields that repeat are bounded before anybody walks them: a message has room for millions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from chiasm import errors
from chiasm.services.gateway import grammars, sampling, utf8
from chiasm.v1 import inference_pb2 as pb

MANY = 100_000


class Unwalked(list[str]):
    """Has a length, and nobody may ask for more."""

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("it was walked")


def refusal(**values: object) -> errors.InvalidArgument:
    with pytest.raises(errors.InvalidArgument) as caught:
        sampling.sampling(
            pb.SamplingParams(**values),  # type: ignore[arg-type]  # fields by name
            vocab_size=100,
            max_context_tokens=100,
        )
    return caught.value


@pytest.mark.parametrize("penalty", [0.01, 100.0])
def test_the_ends_of_what_a_repetition_penalty_may_be(penalty: float) -> None:
    """On the wire it is a float32, and 0.01 rounds down."""
    wire = pb.SamplingParams(repetition_penalty=penalty)
    valid = sampling.sampling(wire, vocab_size=100, max_context_tokens=100)
    assert valid.repetition_penalty == wire.repetition_penalty


def test_stop_tokens() -> None:
    """Each of them is wrong too, which would take a look at them."""
    error = refusal(stop_token_ids=[1000] * MANY)
    assert (error.field, error.description) == (
        "sampling.stop_token_ids",
        f"{MANY} ids, limit {sampling.MAX_STOP_TOKEN_IDS}",
    )


def test_stop_strings() -> None:
    with pytest.raises(errors.InvalidArgument, match="17 strings"):
        sampling._stop(Unwalked(["a"] * 17))


def test_choices() -> None:
    """One of them is empty, which would take a look at them."""
    wire = pb.ResponseFormat(choice=pb.Choices(texts=["a"] * MANY + [""]))
    with pytest.raises(errors.InvalidArgument, match=f"limit {grammars.MAX_SOURCE_BYTES}"):
        grammars.grammar(wire, "form")


def spoiled(request: pb.GenerateRequest) -> bytes:
    """The request with its text XX made invalid."""
    return request.SerializeToString().replace(b"XX", b"\xff\xfe")


def test_the_search_for_a_string_that_is_not_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utf8, "MAX_SEARCHED", 10)
    request = pb.GenerateRequest(
        tokens=pb.TokenPrompt(token_ids=[5] * MANY), sampling=pb.SamplingParams(stop=["a", "XX"])
    )
    error = utf8.explain(pb.GenerateRequest, spoiled(request))
    assert error.field == "sampling.stop[1]", "numbers are nothing to search"
    for before in ([pb.Message(role="user")] * 5, [pb.Message()] * 10):
        chat = pb.Chat(messages=[*before, pb.Message(role="XX")])
        error = utf8.explain(pb.GenerateRequest, spoiled(pb.GenerateRequest(chat=chat)))
        assert error.field == ""
        assert "UTF-8" in error.description
