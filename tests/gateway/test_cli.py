"""`chiasm generate` and `chiasm chat`, here and as processes, against a gateway in a thread."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from gateway.harness import FakeDecoder, FakeEncoder, Stack, in_thread, png, tokens_event
from typer.testing import CliRunner

from chiasm import errors
from chiasm.cli import app
from chiasm.cli.generate import build_prompt
from chiasm.cli.messages import load_messages
from chiasm.client import Client, Media, Message, Text, Tokens, image, user
from chiasm.types import MediaKind
from chiasm.v1 import decoder_pb2

ANSWER = "The answer is yes."

Live = tuple[Stack, FakeDecoder, FakeEncoder]
Completed = subprocess.CompletedProcess[bytes]


@pytest.fixture(autouse=True)
def _silence() -> None:
    """What a command prints is its own: the gateway beside it logs nothing."""
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())


@pytest.fixture(scope="module")
def live(tiny_checkpoint: Path) -> Iterator[Live]:
    with in_thread(tiny_checkpoint, park_timeout_s=0.2) as parts:
        parts[1].token_ids = parts[0].tokenizer.encode(ANSWER)
        yield parts


def chiasm(live: Live, *arguments: str, stdin: bytes = b"", endpoint: str = "") -> Completed:
    """A command in this process."""
    words = [*arguments, "--endpoint", endpoint or live[0].address, "--timeout", "20"]
    done = CliRunner().invoke(app, words, input=stdin, catch_exceptions=False)
    return Completed(words, done.exit_code, done.stdout_bytes, done.stderr_bytes)


def chiasm_process(live: Live, *arguments: str | bytes, stdin: bytes = b"") -> Completed:
    """A command in one of its own: its real streams, and bytes that are no text."""
    return subprocess.run(
        [sys.executable, "-m", "chiasm", *arguments, "--endpoint", live[0].address],
        input=stdin,
        capture_output=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "picture.png"
    path.write_bytes(png())
    return str(path)


def test_json_answer(live: Any, picture: str) -> None:
    flags = ["--temperature", "0", "--seed", "0", "--max-tokens", "3", "--json"]
    done = chiasm(live, "generate", "--prompt", "Was ist das? 図", "--image", picture, *flags)
    assert (done.returncode, done.stderr) == (0, b"")
    answer = json.loads(done.stdout)
    assert answer["finish_reason"] == "length"
    assert answer["token_ids"] == live[1].token_ids[:3]
    assert answer["text"] == live[0].tokenizer.decode(answer["token_ids"])
    assert answer["prompt_token_ids"] == list(live[1].requests[-1].token_ids)
    assert answer["usage"]["prompt_image_tokens"] == 6
    assert answer["usage"]["prompt_tokens"] == len(answer["prompt_token_ids"])
    assert answer["timings"]["total_ns"] > 0


def test_sampling_flags(live: Any, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    flags = ["--min-p", "0.25", "--repetition-penalty", "1.5", "--presence-penalty", "0.5"]
    flags += ["--frequency-penalty", "-0.5", "--stop", "no", "--stop", "yes", "--min-tokens", "1"]
    done = chiasm(live, "generate", "--prompt", "x", *flags, "--thinking-budget", "7")
    assert (done.returncode, done.stdout) == (0, b"The answer is \n")
    sent = live[1].requests[-1].sampling
    assert (sent.min_p, sent.repetition_penalty, sent.presence_penalty) == (0.25, 1.5, 0.5)
    assert (sent.frequency_penalty, sent.min_tokens, sent.thinking_budget) == (-0.5, 1, 7)
    for form in (str(schema), "regex:a+"):
        assert chiasm(live, "generate", "--prompt", "x", "--response-format", form).returncode == 0
        assert live[1].requests[-1].grammar
    done = chiasm(live, "generate", "--prompt", "x", "--response-format", "regex:(")
    assert done.returncode == 2
    assert b"sampling.response_format.regex" in done.stderr


def test_several_answers_as_json(live: Any) -> None:
    flags = ["--n", "2", "--logprobs", "0", "--json"]
    done = chiasm(live, "generate", "--prompt", "x", *flags)
    assert (done.returncode, done.stderr) == (0, b"")
    answer = json.loads(done.stdout)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert [choice["text"] for choice in answer["choices"]] == [ANSWER] * 2
    assert answer["text"] == ANSWER
    refused = chiasm(live, "generate", "--prompt", "x", "--n", "2")
    assert refused.returncode == 2
    assert b"--json" in refused.stderr


def test_a_thought_goes_to_stderr(live: Any) -> None:
    tokenizer = live[0].tokenizer
    thought = [*tokenizer.encode("hm"), tokenizer.token_id("</think>")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live[1], "token_ids", thought + live[1].token_ids)
        done = chiasm(live, "generate", "--prompt", "x", "--enable-thinking")
    assert (done.stdout.decode(), done.stderr) == (ANSWER + "\n", b"hm")


def test_streamed_text_of_a_prompt_on_stdin(live: Any) -> None:
    done = chiasm_process(live, "generate", "--prompt", "-", stdin="Grüße".encode())
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == ANSWER + "\n"


def test_token_ids_of_a_file(live: Any, tmp_path: Path) -> None:
    path = tmp_path / "ids.json"
    path.write_text(json.dumps({"prompt_token_ids": [5, 6, 7]}))
    done = chiasm(live, "generate", "--prompt-token-ids", str(path), "--ignore-eos", "--json")
    assert json.loads(done.stdout)["prompt_token_ids"] == [5, 6, 7]
    assert live[1].requests[-1].sampling.ignore_eos


@pytest.mark.parametrize(
    ("arguments", "stdin", "words"),
    [
        (["--prompt", "x", "--temperature", "-1"], b"", "sampling.temperature"),
        (["--prompt", "x", "--max-tokens", "-1"], b"", "sampling.max_tokens"),
        (["--prompt", "x", "--image", "/no/such/file"], b"", "/no/such/file"),
        (["--messages-json", "-"], b'[{"role": "user"', "not JSON"),
        ([], b"", "--prompt"),
    ],
)
def test_refused_request(live: Any, arguments: list[str], stdin: bytes, words: str) -> None:
    assert_refused(chiasm(live, "generate", *arguments, "--json", stdin=stdin), words)


def test_refused_bytes(live: Any) -> None:
    assert_refused(chiasm_process(live, "generate", "--prompt", b"caf\xe9"), "UTF-8")


def assert_refused(done: Completed, words: str) -> None:
    """In one line."""
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.endswith(b"\n")
    assert done.stderr.count(b"\n") == 1
    assert words in done.stderr.decode()


def test_no_gateway(live: Any) -> None:
    done = chiasm(live, "generate", "--prompt", "x", endpoint="127.0.0.1:1")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.count(b"\n") == 1


def test_failure_of_the_system(live: Any) -> None:
    async def script(_: decoder_pb2.DecodeRequest) -> AsyncIterator[decoder_pb2.DecodeEvent]:
        yield tokens_event(5)
        raise errors.Internal("gone")

    live[1].scripts.append(script)
    done = chiasm(live, "generate", "--prompt", "x", "--json")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.count(b"\n") == 1


def test_chat_keeps_its_history(live: Any, picture: str) -> None:
    first = len(live[1].requests)
    lines = [f"/image {picture}", "one", "/image /no/such/file", "two", "/reset", "three", "/quit"]
    done = chiasm_process(live, "chat", "--temperature", "0", stdin="\n".join(lines).encode())
    assert done.returncode == 0, done.stderr
    sent = live[1].requests[first:]
    decode = live[0].tokenizer.decode
    prompts = [decode(list(r.token_ids), skip_special_tokens=False) for r in sent]
    assert [prompt.count("User: ") for prompt in prompts] == [1, 2, 1]
    assert [len(request.media) for request in sent] == [1, 1, 0]
    assert ANSWER in prompts[1]
    assert prompts[1].index("one") < prompts[1].index(ANSWER) < prompts[1].index("two")
    output = done.stdout.decode()
    assert output.count(ANSWER) == 3
    assert "/no/such/file" in output


def test_chat_forgets_files_that_are_refused(live: Any, picture: str, tmp_path: Path) -> None:
    first, broken = len(live[1].requests), tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    lines = [f"/image {broken}", "one", "two", f"/image {picture}", "/image no", "three", "/quit"]
    done = chiasm_process(live, "chat", "--temperature", "0", stdin="\n".join(lines).encode())
    assert done.returncode == 0, done.stderr
    assert [len(request.media) for request in live[1].requests[first:]] == [0, 1]
    assert "the files wait no longer" in done.stdout.decode()


def test_blocking_client(live: Any) -> None:
    with Client(live[0].address, timeout_s=20) as client:
        client.wait_ready(5)
        assert client.get_model().name == "tiny"
        assert client.count_tokens([user(image(png()), "x")]).prompt_image_tokens == 6
        result = client.complete("x")
        assert (result.text, result.prompt_logits) == (ANSWER, None)
        with pytest.raises(errors.InvalidArgument) as caught:
            client.complete("x", model="other")
        assert caught.value.field == "model"


def test_blocking_client_cancels(live: Any) -> None:
    async def script(_: decoder_pb2.DecodeRequest) -> AsyncIterator[decoder_pb2.DecodeEvent]:
        yield tokens_event(5)
        await asyncio.sleep(60)

    live[1].scripts.append(script)
    with Client(live[0].address, timeout_s=20) as client:
        events = client.generate("x")
        next(events)
        next(events)
        events.close()  # type: ignore[attr-defined]
        for _ in range(500):
            if live[1].cancelled.is_set():
                return
            time.sleep(0.01)
    pytest.fail("the decoder was not told")


def test_wait_ready_gives_up() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(errors.Unavailable):
        client.wait_ready(0.3)


def messages(value: object, tmp_path: Path, *, images: int = 0, videos: int = 0) -> list[Message]:
    path = tmp_path / "messages.json"
    path.write_text(json.dumps(value))
    return load_messages(
        str(path),
        images=[Media(kind=MediaKind.IMAGE, data=b"i%d" % i) for i in range(images)],
        videos=[Media(kind=MediaKind.VIDEO, data=b"v%d" % i) for i in range(videos)],
        name="--messages-json",
    )


def test_messages_of_every_spelling(tmp_path: Path, picture: str) -> None:
    data = Path(picture).read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    value = [
        {"role": "system", "content": "be brief"},
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "text", "text": "a"},
                {"type": "image", "image": picture},
                {"type": "image", "url": picture},
                {"type": "image_url", "image_url": {"url": uri}},
                {"type": "image_url", "image_url": f"file://{picture}"},
                {"type": "video", "video": picture},
                {"type": "video"},
            ],
        },
    ]
    system, turn = messages(value, tmp_path, images=2, videos=1)
    assert system == Message(role="system", parts=(Text("be brief"),))
    parts: list[Any] = list(turn.parts)
    assert parts[0].data == b"i1"  # left over, hence in front
    assert parts[1].data == b"i0"
    assert parts[2] == Text("a")
    assert [part.data for part in parts[3:5]] == [data, data]
    assert parts[5].uri == uri
    assert parts[6].data == data
    assert (parts[7].kind, parts[7].data) == (MediaKind.VIDEO, data)
    assert (parts[8].kind, parts[8].data) == (MediaKind.VIDEO, b"v0")


PART = "messages[0].content[0]"


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({}, "--messages-json"),
        ([1], "messages[0]"),
        ([{"content": "x"}], "messages[0]"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": [7]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": ["x"]}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "messages[0].content[0]"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "http://h/a"}]}],
            "messages[0].content[0].image_url",
        ),
        *(
            ([{"role": "user", "content": [{"type": "image", "image": url}]}], f"{PART}.image")
            for url in ("http://[::1/a", "file://[x/a")
        ),
        (
            [{"role": "user", "content": [{"type": "image", "image": "/no/such"}]}],
            "messages[0].content[0].image",
        ),
        (
            [{"role": "user", "content": [{"type": "image", "image": {"x": 1}}]}],
            "messages[0].content[0].image",
        ),
    ],
)
def test_messages_that_cannot_be_read(value: object, field: str, tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        messages(value, tmp_path)
    assert caught.value.field == field


def test_left_over_media_need_a_user_message(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidArgument):
        messages([{"role": "assistant", "content": "x"}], tmp_path, images=1)


@pytest.mark.parametrize("value", [b"{}", b'"text"', b"[", b"7", b"", b"[\xff]", b"[" * 100_000])
def test_token_ids_that_cannot_be_read(value: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ids.json"
    path.write_bytes(value)
    with pytest.raises(errors.InvalidArgument):
        build_prompt(None, None, str(path), (), ())


@pytest.mark.parametrize("token_id", [-1, 2**32, True, 1.5, "a", None])
def test_ids_that_no_message_can_carry(token_id: Any) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(errors.InvalidArgument) as caught:
        client.complete(Tokens(token_ids=[3, token_id]))
    assert caught.value.field == "tokens.token_ids[1]"


def test_one_prompt_at_a_time(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidArgument):
        build_prompt("x", "-", None, (), ())
