"""Every rule a request can break: status INVALID_ARGUMENT and the field named, nothing sent on."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from gateway.harness import FakeDecoder, FakeEncoder, Stack, png

from chiasm import errors
from chiasm.transport import status
from chiasm.v1 import inference_pb2 as pb

TIMEOUT_S = 20.0


def chat(*parts: pb.Part, role: str = "user") -> pb.GenerateRequest:
    return pb.GenerateRequest(
        chat=pb.Chat(messages=[pb.Message(role=role, parts=parts)]),
        sampling=pb.SamplingParams(max_tokens=4),
    )


def text(value: str) -> pb.Part:
    return pb.Part(text=value)


def image(data: bytes = b"", **source: Any) -> pb.Part:
    return pb.Part(image=pb.Media(data=data, **source) if not source else pb.Media(**source))


def video(data: bytes) -> pb.Part:
    return pb.Part(video=pb.Media(data=data))


def tokens(*token_ids: int, images: int = 0) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        tokens=pb.TokenPrompt(token_ids=token_ids, images=[pb.Media(data=png())] * images)
    )


def sampling(**values: Any) -> pb.GenerateRequest:
    request = chat(text("hello"))
    request.sampling.CopyFrom(pb.SamplingParams(**values))
    return request


def form(**values: Any) -> pb.GenerateRequest:
    return sampling(response_format=pb.ResponseFormat(**values))


def named(**values: Any) -> pb.GenerateRequest:
    request = chat(text("hello"))
    for name, value in values.items():
        setattr(request, name, value)
    return request


def conversation(*roles: str) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        chat=pb.Chat(messages=[pb.Message(role=role, parts=[text("hello")]) for role in roles])
    )


def png_that_declares(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises more."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


def with_logits() -> pb.GenerateRequest:
    request = chat(text("hello " * 200))
    request.output.prompt_logits = True
    return request


PART = "chat.messages[0].parts[0]"
CASES: dict[str, tuple[Callable[[], pb.GenerateRequest], str]] = {
    "no input": (pb.GenerateRequest, "input"),
    "no messages": (lambda: pb.GenerateRequest(chat=pb.Chat()), "chat.messages"),
    "unknown role": (lambda: chat(text("x"), role="tool"), "chat.messages[0].role"),
    "no role": (lambda: chat(text("x"), role=""), "chat.messages[0].role"),
    "late system": (lambda: conversation("user", "system", "user"), "chat.messages[1].role"),
    "only system": (lambda: conversation("system"), "chat.messages[0].role"),
    "no parts": (chat, "chat.messages[0].parts"),
    "empty text": (lambda: chat(text("")), "chat.messages[0].parts"),
    "empty part": (lambda: chat(text("x"), pb.Part()), "chat.messages[0].parts[1]"),
    "answer with image": (lambda: chat(image(png()), role="assistant"), f"{PART}.image"),
    "long text": (
        lambda: chat(text("a" * 3000), text("b" * 3000)),
        "chat.messages[0].parts[1].text",
    ),
    "many parts": (lambda: chat(*[text("a")] * 4000, *[pb.Part()] * 62_000), "chat.messages[0]"),
    "unknown model": (lambda: named(model="gpt"), "model"),
    "long id": (lambda: named(request_id="r" * 129), "request_id"),
    "id with control": (lambda: named(request_id="a\nb"), "request_id"),
    "id not ascii": (lambda: named(request_id="ü"), "request_id"),
    "negative temperature": (lambda: sampling(temperature=-0.1), "sampling.temperature"),
    "temperature nan": (lambda: sampling(temperature=float("nan")), "sampling.temperature"),
    "temperature inf": (lambda: sampling(temperature=float("inf")), "sampling.temperature"),
    "top_p zero": (lambda: sampling(top_p=0.0), "sampling.top_p"),
    "top_p large": (lambda: sampling(top_p=1.5), "sampling.top_p"),
    "top_p nan": (lambda: sampling(top_p=float("nan")), "sampling.top_p"),
    "max_tokens": (lambda: sampling(max_tokens=4096), "sampling.max_tokens"),
    "max_tokens with prompt": (lambda: sampling(max_tokens=4095), "sampling.max_tokens"),
    "min_p": (lambda: sampling(min_p=1.1), "sampling.min_p"),
    "min_p nan": (lambda: sampling(min_p=float("nan")), "sampling.min_p"),
    "repetition_penalty": (lambda: sampling(repetition_penalty=0), "sampling.repetition_penalty"),
    "repetition_penalty tiny": (
        lambda: sampling(repetition_penalty=1e-38),
        "sampling.repetition_penalty",
    ),
    "repetition_penalty huge": (
        lambda: sampling(repetition_penalty=1e38),
        "sampling.repetition_penalty",
    ),
    "repetition_penalty inf": (
        lambda: sampling(repetition_penalty=float("inf")),
        "sampling.repetition_penalty",
    ),
    "presence_penalty": (lambda: sampling(presence_penalty=-2.5), "sampling.presence_penalty"),
    "frequency_penalty": (
        lambda: sampling(frequency_penalty=float("nan")),
        "sampling.frequency_penalty",
    ),
    "bias outside": (lambda: sampling(logit_bias={5: 1, 10**6: 1}), "sampling.logit_bias[1000000]"),
    "bias large": (lambda: sampling(logit_bias={5: 101}), "sampling.logit_bias[5]"),
    "bias nan": (lambda: sampling(logit_bias={5: float("nan")}), "sampling.logit_bias[5]"),
    "many biases": (
        lambda: sampling(logit_bias=dict.fromkeys(range(1025), 0.5)),
        "sampling.logit_bias",
    ),
    "many stops": (lambda: sampling(stop=["a"] * 17), "sampling.stop"),
    "empty stop": (lambda: sampling(stop=["a", ""]), "sampling.stop[1]"),
    "long stop": (lambda: sampling(stop=["a" * 1025]), "sampling.stop[0]"),
    "many stop tokens": (lambda: sampling(stop_token_ids=[5] * 1025), "sampling.stop_token_ids"),
    "min_tokens": (lambda: sampling(min_tokens=4096), "sampling.min_tokens"),
    "min over max": (lambda: sampling(min_tokens=6, max_tokens=5), "sampling.min_tokens"),
    "logprobs": (lambda: sampling(logprobs=21), "sampling.logprobs"),
    "prompt_logprobs": (lambda: sampling(prompt_logprobs=21), "sampling.prompt_logprobs"),
    "n": (lambda: sampling(n=17), "sampling.n"),
    "n greedy": (lambda: sampling(n=2, temperature=0), "sampling.n"),
    "thinking_budget": (lambda: sampling(thinking_budget=4096), "sampling.thinking_budget"),
    "no form": (form, "sampling.response_format"),
    "json_object false": (lambda: form(json_object=False), "sampling.response_format.json_object"),
    "schema not json": (lambda: form(json_schema="{"), "sampling.response_format.json_schema"),
    "schema no object": (lambda: form(json_schema="[1]"), "sampling.response_format.json_schema"),
    "schema unknown type": (
        lambda: form(json_schema='{"type": "objekt"}'),
        "sampling.response_format.json_schema",
    ),
    "schema remote": (
        lambda: form(json_schema='{"$ref": "http://example.org/s"}'),
        "sampling.response_format.json_schema",
    ),
    "schema deep": (
        lambda: form(json_schema='{"items":' * 5000 + "{}" + "}" * 5000),
        "sampling.response_format.json_schema",
    ),
    "schema large": (
        lambda: form(json_schema='{"title": "' + "t" * 65_536 + '"}'),
        "sampling.response_format.json_schema",
    ),
    "regex bad": (lambda: form(regex="("), "sampling.response_format.regex"),
    "regex empty": (lambda: form(regex=""), "sampling.response_format.regex"),
    "regex look-around": (lambda: form(regex="a(?=b)"), "sampling.response_format.regex"),
    "regex deep": (
        lambda: form(regex="(" * 20_000 + "a" + ")" * 20_000),
        "sampling.response_format.regex",
    ),
    "regex large": (lambda: form(regex="a" * 65_537), "sampling.response_format.regex"),
    "no choices": (
        lambda: form(choice=pb.Choices()),
        "sampling.response_format.choice.texts",
    ),
    "empty choice": (
        lambda: form(choice=pb.Choices(texts=["a", ""])),
        "sampling.response_format.choice.texts",
    ),
    "form with ignore_eos": (
        lambda: sampling(ignore_eos=True, response_format=pb.ResponseFormat(regex="a")),
        "sampling.ignore_eos",
    ),
    "form with min_tokens": (
        lambda: sampling(min_tokens=1, response_format=pb.ResponseFormat(regex="a")),
        "sampling.min_tokens",
    ),
    "stop token": (lambda: sampling(stop_token_ids=[1, 10**6]), "sampling.stop_token_ids[1]"),
    "no tokens": (lambda: pb.GenerateRequest(tokens=pb.TokenPrompt()), "tokens.token_ids"),
    "token outside": (lambda: tokens(5, 10**6), "tokens.token_ids[1]"),
    "tokens over context": (lambda: tokens(*[5] * 4096), "tokens.token_ids"),
    "image without placeholder": (lambda: tokens(5, 6, images=1), "tokens.token_ids"),
    "too many media": (lambda: chat(*[image(png())] * 4), "chat.messages[0].parts[3].image"),
    "no source": (lambda: chat(pb.Part(image=pb.Media())), f"{PART}.image"),
    "empty image": (lambda: chat(image(b"")), f"{PART}.image"),
    "large image": (lambda: chat(image(b"x" * 100_001)), f"{PART}.image"),
    "large media in all": (
        lambda: chat(image(b"x" * 90_000), image(b"y" * 90_000)),
        "chat.messages[0].parts[1].image",
    ),
    "http": (lambda: chat(image(uri="http://example.org/a.png")), f"{PART}.image.uri"),
    "file": (lambda: chat(image(uri="file:///etc/passwd")), f"{PART}.image.uri"),
    "empty uri": (lambda: chat(image(uri="")), f"{PART}.image.uri"),
    "data without comma": (lambda: chat(image(uri="data:image/png;base64")), f"{PART}.image.uri"),
    "bad base64": (lambda: chat(image(uri="data:;base64,@@@@")), f"{PART}.image.uri"),
    "no image": (lambda: chat(text("x"), image(b"hello")), "chat.messages[0].parts[1].image"),
    "cut header": (lambda: chat(image(png()[:20])), f"{PART}.image"),
    "bomb": (lambda: chat(image(png_that_declares(100_000, 100_000))), f"{PART}.image"),
    "no video": (lambda: chat(video(b"\0" * 64)), f"{PART}.video"),
    "logits": (with_logits, "output.prompt_logits"),
}


async def refusal(call: Any) -> errors.ChiasmError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return status.from_rpc_error(caught.value)


@pytest.mark.parametrize("case", CASES)
async def test_broken_rule_names_its_field(
    case: str, stack: Stack, decoder: FakeDecoder, encoder: FakeEncoder, stub: Any
) -> None:
    make, field = CASES[case]
    error = await refusal(stub.Generate(make(), timeout=TIMEOUT_S))
    assert isinstance(error, errors.InvalidArgument), error
    assert error.field == field
    assert not decoder.requests


async def test_context_error_names_both_numbers(
    stack: Stack, decoder: FakeDecoder, stub: Any
) -> None:
    request = tokens(*range(10, 110))
    request.sampling.max_tokens = 4000
    error = await refusal(stub.Generate(request, timeout=TIMEOUT_S))
    assert error.field == "sampling.max_tokens"
    assert "100 " in error.message
    assert "4000 " in error.message
    assert "4096" in error.message


async def test_a_prompt_that_just_fits_is_sent_on(
    stack: Stack, decoder: FakeDecoder, stub: Any
) -> None:
    async for _ in stub.Generate(tokens(*[5] * 4090), timeout=TIMEOUT_S):
        pass
    assert decoder.requests[0].sampling.max_tokens == 0  # the decoder knows how many fit


@pytest.mark.parametrize("method", ["Generate", "CountTokens"])
@pytest.mark.parametrize("spoiled", [b"XTEXTX", b"XROLEX", b"XURIXX"])
async def test_string_that_is_not_utf8(
    method: str, spoiled: bytes, stack: Stack, channel: grpc.aio.Channel
) -> None:
    fields = {
        b"XTEXTX": "chat.messages[1].parts[1].text",
        b"XROLEX": "chat.messages[1].role",
        b"XURIXX": "chat.messages[1].parts[0].image.uri",
    }
    cls = {"Generate": pb.GenerateRequest, "CountTokens": pb.CountTokensRequest}[method]
    parts = [image(uri="XURIXX"), text("XTEXTX")]
    messages = [pb.Message(role="user", parts=[text("ok")]), pb.Message(role="XROLEX", parts=parts)]
    data = cls(chat=pb.Chat(messages=messages)).SerializeToString()
    error = await raw_refusal(channel, method, data.replace(spoiled, b"\xff\xfe\x80abc"))
    assert isinstance(error, errors.InvalidArgument)
    assert error.field == fields[spoiled]


async def test_stop_string_that_is_not_utf8(stack: Stack, channel: grpc.aio.Channel) -> None:
    request = sampling(logit_bias={5: 1.0, 6: 1.0}, stop=["ok", "XSTOPX"])
    data = request.SerializeToString().replace(b"XSTOPX", b"\xff\xfe\x80abc")
    error = await raw_refusal(channel, "Generate", data)
    assert isinstance(error, errors.InvalidArgument)
    assert error.field == "sampling.stop[1]"


async def test_bytes_that_are_no_message(stack: Stack, channel: grpc.aio.Channel) -> None:
    error = await raw_refusal(channel, "Generate", b"\xff\xff\xff\xff")
    assert isinstance(error, errors.InvalidArgument)
    assert error.field == ""


async def raw_refusal(channel: grpc.aio.Channel, method: str, data: bytes) -> errors.ChiasmError:
    path = f"/chiasm.v1.Inference/{method}"
    if method == "Generate":
        return await refusal(channel.unary_stream(path)(data, timeout=TIMEOUT_S))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(path)(data, timeout=TIMEOUT_S)
    return status.from_rpc_error(caught.value)


async def test_count_tokens_obeys_the_same_rules(stack: Stack, stub: Any) -> None:
    request = pb.CountTokensRequest(chat=pb.Chat(messages=[pb.Message(role="tool")]))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.CountTokens(request, timeout=TIMEOUT_S)
    assert status.from_rpc_error(caught.value).field == "chat.messages[0].role"
