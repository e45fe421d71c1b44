"""What no service can serve is refused with the field named, and nobody else notices.

All requests are raw messages through the whole system, beside a good one that streams.
"""

from __future__ import annotations

import io
import math
import struct
import threading
import zlib
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from e2e.cases import film, picture, png
from e2e.conftest import Served
from google.rpc import error_details_pb2, status_pb2
from PIL import Image

from chiasm.client import Client, Result, Sampling, image, user
from chiasm.model.config import ModelConfig
from chiasm.v1 import inference_pb2 as pb
from chiasm.v1 import inference_pb2_grpc

TIMEOUT_S = 60.0
CONTEXT, VOCABULARY, MAX_MEDIA = 4096, 576, 64

FIRST = "chat.messages[0].parts[0]"


def chat(*messages: pb.Message, **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(chat=pb.Chat(messages=messages), **fields)


def said(*parts: pb.Part, role: str = "user") -> pb.Message:
    return pb.Message(role=role, parts=parts)


def text(value: str = "Hello") -> pb.Part:
    return pb.Part(text=value)


def shown(data: bytes = b"", uri: str = "") -> pb.Part:
    return pb.Part(image=pb.Media(uri=uri) if uri else pb.Media(data=data))


def filmed(data: bytes) -> pb.Part:
    return pb.Part(video=pb.Media(data=data))


def sampled(**fields: Any) -> pb.GenerateRequest:
    return chat(said(text()), sampling=pb.SamplingParams(**fields))


def ids(*token_ids: int, images: int = 0) -> pb.GenerateRequest:
    media = [pb.Media(data=PICTURE)] * images
    return pb.GenerateRequest(tokens=pb.TokenPrompt(token_ids=token_ids, images=media))


def not_utf8(request: pb.GenerateRequest) -> bytes:
    """The request with the bytes of its text `XX` made invalid."""
    data = request.SerializeToString()
    assert data.count(b"XX") == 1
    return data.replace(b"XX", b"\xff\xfe")


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that declares a large picture."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    data = b"IDAT" + zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk
        + struct.pack(">I", len(data) - 4)
        + data
        + struct.pack(">I", zlib.crc32(data))
    )


def tiff() -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(40, 40, 1)).save(file, "TIFF")
    return file.getvalue()


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(300, 300, 1)).save(file, "JPEG")
    return file.getvalue()


NOISE = np.random.default_rng(0).bytes(5000)
PICTURE = png(picture(84, 112, 1))
FILM = film(np.stack([picture(64, 80, t) for t in range(4)]))

REFUSED: dict[str, tuple[pb.GenerateRequest | bytes, str]] = {
    "no input": (pb.GenerateRequest(), "input"),
    "empty chat": (chat(), "chat.messages"),
    "unknown role": (chat(said(text(), role="tool")), "chat.messages[0].role"),
    "late system message": (
        chat(said(text()), said(text(), role="system"), said(text())),
        "chat.messages[1].role",
    ),
    "message without parts": (chat(said(text()), said()), "chat.messages[1].parts"),
    "message of empty text": (chat(said(text(""))), "chat.messages[0].parts"),
    "part of no kind": (chat(said(text(), pb.Part())), "chat.messages[0].parts[1]"),
    "picture of an assistant": (
        chat(said(text()), said(shown(PICTURE), role="assistant")),
        "chat.messages[1].parts[0].image",
    ),
    "unknown model": (chat(said(text()), model="gpt"), "model"),
    "request id with a space": (chat(said(text()), request_id="a b"), "request_id"),
    "prompt over the context": (chat(said(text("words and " * CONTEXT))), "chat.messages"),
    "tokens over the context": (ids(*[5] * CONTEXT), "tokens.token_ids"),
    "max_tokens over the context": (sampled(max_tokens=CONTEXT), "sampling.max_tokens"),
    "prompt and max_tokens over it": (sampled(max_tokens=CONTEXT - 3), "sampling.max_tokens"),
    "temperature below zero": (sampled(temperature=-0.1), "sampling.temperature"),
    "temperature not a number": (sampled(temperature=math.nan), "sampling.temperature"),
    "temperature infinite": (sampled(temperature=math.inf), "sampling.temperature"),
    "top_p 0": (sampled(top_p=0.0), "sampling.top_p"),
    "top_p 2": (sampled(top_p=2.0), "sampling.top_p"),
    "top_p not a number": (sampled(top_p=math.nan), "sampling.top_p"),
    "stop id outside": (sampled(stop_token_ids=[2, 10**6]), "sampling.stop_token_ids[1]"),
    "no tokens": (ids(), "tokens.token_ids"),
    "token id outside": (ids(5, VOCABULARY), "tokens.token_ids[1]"),
    "picture without placeholder": (ids(5, 6, images=1), "tokens.token_ids"),
    "no bytes": (chat(said(shown())), f"{FIRST}.image"),
    "no source": (chat(said(pb.Part(image=pb.Media()))), f"{FIRST}.image"),
    "noise as a picture": (chat(said(text(), shown(NOISE))), "chat.messages[0].parts[1].image"),
    "noise behind a signature": (chat(said(shown(PICTURE[:16] + NOISE))), f"{FIRST}.image"),
    "PNG cut short": (chat(said(shown(PICTURE[: len(PICTURE) // 2]))), f"{FIRST}.image"),
    "JPEG cut short": (chat(said(shown(jpeg()[:2000]))), f"{FIRST}.image"),
    "picture that would be huge": (chat(said(shown(bomb(60_000, 60_000)))), f"{FIRST}.image"),
    "picture that lies": (chat(said(shown(bomb(3_000, 3_000)))), f"{FIRST}.image"),
    "TIFF": (chat(said(shown(tiff()))), f"{FIRST}.image"),
    "SVG": (chat(said(shown(b"<svg xmlns='http://www.w3.org/2000/svg'/>"))), f"{FIRST}.image"),
    "video as a picture": (chat(said(shown(FILM))), f"{FIRST}.image"),
    "too many pictures": (
        chat(said(*[shown(PICTURE)] * (MAX_MEDIA + 1))),
        f"chat.messages[0].parts[{MAX_MEDIA}].image",
    ),
    "second of two pictures": (
        chat(said(shown(PICTURE), shown(PICTURE[:-200]))),
        "chat.messages[0].parts[1].image",
    ),
    "noise as a video": (chat(said(filmed(NOISE))), f"{FIRST}.video"),
    "video cut in its header": (chat(said(filmed(FILM[:100]))), f"{FIRST}.video"),
    "video with damaged frames": (
        chat(said(filmed(FILM[:6000] + bytes(len(FILM) - 6000)))),
        f"{FIRST}.video",
    ),
    "web address": (chat(said(shown(uri="http://localhost/a.png"))), f"{FIRST}.image.uri"),
    "file address": (chat(said(shown(uri="file:///etc/passwd"))), f"{FIRST}.image.uri"),
    "data address without data": (
        chat(said(shown(uri="data:image/png;base64"))),
        f"{FIRST}.image.uri",
    ),
    "text that is not UTF-8": (not_utf8(chat(said(text("XX")))), f"{FIRST}.text"),
    "role that is not UTF-8": (
        not_utf8(chat(said(text(), role="XX"))),
        "chat.messages[0].role",
    ),
    "model that is not UTF-8": (not_utf8(chat(said(text()), model="XX")), "model"),
    "no message at all": (b"\x0a\xff\xff", ""),
}


@pytest.fixture(scope="module")
def channel(served: Served) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(served.endpoint) as opened:
        yield opened


@pytest.fixture(scope="module", autouse=True)
def others(served: Served) -> Iterator[None]:
    """A good request that streams all the time; its answer is always the same."""
    prompt = [user(image(PICTURE), "What is in the picture?")]
    sampling = Sampling(max_tokens=60, temperature=0, ignore_eos=True)
    answers: list[Result] = []
    stopping = threading.Event()

    def repeat(client: Client) -> None:
        while not stopping.is_set():
            answers.append(client.complete(prompt, sampling=sampling))

    with Client(served.endpoint, timeout_s=TIMEOUT_S) as client:
        expected = client.complete(prompt, sampling=sampling)
        thread = threading.Thread(target=repeat, args=(client,))
        thread.start()
        yield
        stopping.set()
        thread.join(TIMEOUT_S)
    assert not thread.is_alive()
    assert answers
    for answer in answers:
        assert answer.prompt_token_ids == expected.prompt_token_ids
        assert answer.token_ids == expected.token_ids


@pytest.mark.parametrize(("request_", "field"), REFUSED.values(), ids=REFUSED)
def test_refused_with_its_field(
    channel: grpc.Channel, request_: pb.GenerateRequest | bytes, field: str
) -> None:
    data = request_ if isinstance(request_, bytes) else request_.SerializeToString()
    raw: Any = channel  # bytes in, bytes out
    generate = raw.unary_stream("/chiasm.v1.Inference/Generate")
    with pytest.raises(grpc.RpcError) as caught:
        list(generate(data, timeout=TIMEOUT_S))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert violations(caught.value) == [field]


@pytest.mark.parametrize(("num_placeholders", "num_images"), [(3, 1), (13, 1), (1, 2), (24, 1)])
def test_placeholders_that_do_not_match_the_pictures(
    served: Served, channel: grpc.Channel, num_placeholders: int, num_images: int
) -> None:
    """The picture has 12 tokens: its placeholders are one, or those."""
    placeholder = ModelConfig.load(served.model).tokens.image
    request = ids(5, *[placeholder] * num_placeholders, 6, images=num_images)
    test_refused_with_its_field(channel, request, "tokens.token_ids")


def violations(error: grpc.RpcError) -> list[str]:
    """Fields of the error's BadRequest."""
    trailing: Any = error.trailing_metadata()
    details = dict(trailing)["grpc-status-details-bin"]
    found = []
    for detail in status_pb2.Status.FromString(details).details:
        bad_request = error_details_pb2.BadRequest()
        if detail.Unpack(bad_request):
            found += [violation.field for violation in bad_request.field_violations]
            assert all(violation.description for violation in bad_request.field_violations)
    return found


def test_limits_are_those_of_the_model(channel: grpc.Channel) -> None:
    model = inference_pb2_grpc.InferenceStub(channel).GetModel(
        pb.GetModelRequest(), timeout=TIMEOUT_S
    )
    assert model.max_context_tokens == CONTEXT
    assert model.vocab_size == VOCABULARY
    assert model.max_media_items == MAX_MEDIA
