"""What the `chiasm` command promises to scripts: output, exit status, and nothing left behind."""

from __future__ import annotations

import filecmp
import json
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from control.processes import is_running
from e2e.cases import film, picture, png
from e2e.cli import CHIASM, Completed, chiasm, in_process, up
from e2e.cluster import wait_until
from e2e.conftest import Served

from chiasm.client import Client, Sampling

GREEDY = ("--max-tokens", "24", "--temperature", "0", "--seed", "0", "--ignore-eos", "--json")

Generate = Callable[..., Completed]


@pytest.fixture
def generate(served: Served) -> Generate:
    def run(*arguments: str | Path, stdin: str = "") -> Completed:
        return chiasm("generate", "--endpoint", served.endpoint, *arguments, stdin=stdin)

    return run


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(png(picture(84, 112, 1)))
    return path


def answer(done: Completed) -> dict[str, Any]:
    """The one JSON object of an answer."""
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_an_answer_is_one_json_object(generate: Generate, photo: Path, tmp_path: Path) -> None:
    clip = tmp_path / "clip.avi"
    clip.write_bytes(film(np.stack([picture(64, 80, t) for t in range(4)])))
    found = answer(generate("--image", photo, "--video", clip, "--prompt", "图 what?", *GREEDY))
    assert set(found) >= {"text", "token_ids", "prompt_token_ids", "finish_reason", "usage"}
    usage = found["usage"]
    assert len(found["token_ids"]) == usage["completion_tokens"] == 24
    assert len(found["prompt_token_ids"]) == usage["prompt_tokens"]
    assert usage["prompt_image_tokens"] == 12
    assert usage["prompt_video_tokens"] > 0
    assert found["finish_reason"] == "length"
    assert isinstance(found["text"], str)


def test_the_same_prompt_in_every_form(generate: Generate, photo: Path, tmp_path: Path) -> None:
    """A prompt, a conversation, and the token ids of an earlier answer."""
    first = answer(generate("--image", photo, "--prompt", "What is this?", *GREEDY))
    conversation, tokens = tmp_path / "chat.json", tmp_path / "ids.json"
    parts = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    conversation.write_text(json.dumps([{"role": "user", "content": parts}]))
    tokens.write_text(json.dumps(first["prompt_token_ids"]))
    for form in (("--messages-json", conversation), ("--prompt-token-ids", tokens)):
        again = answer(generate(*form, "--image", photo, *GREEDY))
        assert again["prompt_token_ids"] == first["prompt_token_ids"]
        assert again["token_ids"] == first["token_ids"]
        assert again["text"] == first["text"]


def test_seeds(generate: Generate) -> None:
    flags = ("--prompt", "Tell me.", "--max-tokens", "24", "--ignore-eos", "--json")
    with ThreadPoolExecutor(2) as pool:
        drawn = [
            pool.submit(generate, *flags, "--temperature", "1", "--seed", seed)
            for seed in ("1", "1", "2", "18446744073709551615")
        ]
        one, same, other, largest = (answer(d.result())["token_ids"] for d in drawn)
    assert one == same
    assert len({tuple(ids) for ids in (one, other, largest)}) == 3


def test_stop_token_ids(generate: Generate, served: Served) -> None:
    """The stop token is the last token id, counts, and is no text."""
    full = answer(generate("--prompt", "Tell me.", *GREEDY))["token_ids"]
    last = next(i for i, token in enumerate(full) if i > 3 and token not in full[:i])
    sampling = Sampling(max_tokens=24, temperature=0, ignore_eos=True, stop_token_ids=[full[last]])
    with Client(served.endpoint, timeout_s=60) as client:
        found = client.complete("Tell me.", sampling=sampling)
    assert list(found.token_ids) == full[: last + 1]
    assert found.finish_reason == "stop"
    assert found.usage.completion_tokens == last + 1


def test_text_comes_as_it_is_made(served: Served, generate: Generate) -> None:
    """Over seconds, so that a busy machine cannot read all of it at once."""
    flags = ("--prompt", "Tell me.", "--max-tokens", "200", "--temperature", "0", "--ignore-eos")
    expected = answer(generate(*flags, "--json"))["text"]
    process = subprocess.Popen(
        [*CHIASM, "generate", "--endpoint", served.endpoint, *flags],
        stdout=subprocess.PIPE,
        bufsize=0,
    )
    assert process.stdout is not None
    pieces = list(iter(lambda: process.stdout.read(1 << 16), b""))  # type: ignore[union-attr]
    assert process.wait(60) == 0
    assert b"".join(pieces).decode() == expected + "\n"
    # What is held back comes in one piece, or with the end of its line in two.
    assert len(pieces) > 2


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "role": (("--messages-json", '[{"role": "tool", "content": "x"}]'), "messages[0].role"),
    "empty chat": (("--messages-json", "[]"), "messages"),
    "empty message": (("--messages-json", '[{"role": "user", "content": []}]'), "parts"),
    "http": (
        (
            "--messages-json",
            '[{"role": "user", "content": [{"type": "image", "image": "http://localhost/a"}]}]',
        ),
        "messages[0].content[0].image",
    ),
    "no JSON": (("--messages-json", "{"), "--messages-json"),
    "missing file": (("--prompt", "x", "--image", "/no/such.png"), "--image"),
    "noise as an image": (("--prompt", "x", "--image", "{noise}"), "image"),
    "empty image": (("--prompt", "x", "--image", "{empty}"), "image"),
    "image cut short": (("--prompt", "x", "--image", "{cut}"), "image"),
    "noise as a video": (("--prompt", "x", "--video", "{noise}"), "video"),
    "empty prompt": (("--prompt", ""), "parts"),
    "no prompt": ((), "--prompt"),
    "two prompts": (("--prompt", "x", "--messages-json", "[]"), "--prompt"),
    "context": (("--prompt", "x", "--max-tokens", "4095"), "max_tokens"),
    "negative tokens": (("--prompt", "x", "--max-tokens", "-1"), "max_tokens"),
    "temperature": (("--prompt", "x", "--temperature", "-1"), "temperature"),
    "NaN": (("--prompt", "x", "--temperature", "nan"), "temperature"),
    "top_p": (("--prompt", "x", "--top-p", "2"), "top_p"),
    "token id": (("--prompt-token-ids", "[5, 576]"), "token_ids[1]"),
    "placeholders": (("--prompt-token-ids", "[5, 6]", "--image", "{photo}"), "token_ids"),
    "seed": (("--prompt", "x", "--seed", "-1"), "seed"),
}


AS_A_PROCESS = ("missing file", "image cut short", "temperature")
"""Refused by the command itself, by an encoder, and by the gateway."""


def test_refused_requests_say_so_in_one_line(served: Served, photo: Path, tmp_path: Path) -> None:
    """Exit status 2, the field named, nothing on stdout."""
    files = {"photo": photo}
    for name, data in {
        "noise": bytes(range(256)) * 4,
        "empty": b"",
        "cut": photo.read_bytes()[:3000],
    }.items():
        files[name] = tmp_path / name
        files[name].write_bytes(data)

    def run(name: str, flags: tuple[str, ...]) -> Completed:
        words, stdin = [], ""
        for flag, value in zip(("", *flags), (*flags, ""), strict=True):
            if flag in ("--messages-json", "--prompt-token-ids"):
                words.append("-")
                stdin = value
            elif value.startswith("{") and value.endswith("}"):
                words.append(str(files[value[1:-1]]))
            elif value or flag == "--prompt":
                words.append(value)
        command = chiasm if name in AS_A_PROCESS else in_process
        return command("generate", "--endpoint", served.endpoint, *words, "--json", stdin=stdin)

    for name, (flags, field) in REFUSED.items():
        done = run(name, flags)
        assert (done.returncode, done.stdout) == (2, ""), (name, done.stderr)
        assert done.stderr.count("\n") == 1, (name, done.stderr)
        assert done.stderr.startswith("error: "), (name, done.stderr)
        assert field in done.stderr, (name, done.stderr)


def test_nobody_listens(tmp_path: Path) -> None:
    done = chiasm("generate", "--endpoint", "127.0.0.1:1", "--prompt", "x", "--json")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)


def test_up_colocated(generate: Generate, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """No expert servers; an end-of-sequence token of the checkpoint ends answers, unless ignored.

    One line, exit 0, every process gone.
    """
    full = answer(generate("--prompt", "Tell me.", *GREEDY))["token_ids"]
    last = next(i for i, token in enumerate(full) if i > 3 and token not in full[:i])
    model = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, model)
    settings = json.loads((model / "generation_config.json").read_text())
    settings["eos_token_id"] = [2, full[last]]
    (model / "generation_config.json").write_text(json.dumps(settings))
    flags = ("--colocate", "--text-shards", "4", "--vision-shards", "2", "--dtype", "float32")
    with up(model, *flags) as stack:
        assert stack.line.startswith("ready 127.0.0.1:"), stack.stderr
        pids = stack.pids()
        assert len(pids) == 4
        ask = ("generate", "--endpoint", stack.endpoint, "--prompt", "Tell me.")
        ignoring = answer(chiasm(*ask, *GREEDY))
        stopped = answer(chiasm(*ask, *(flag for flag in GREEDY if flag != "--ignore-eos")))
        assert (ignoring["token_ids"], ignoring["finish_reason"]) == (full, "length")
        assert (stopped["token_ids"], stopped["finish_reason"]) == (full[: last + 1], "stop")
        assert stack.end() == 0
        assert stack.process.stdout is not None
        assert stack.process.stdout.read() == ""
        assert not any(map(is_running, pids))


def test_up_is_killed(tiny_checkpoint: Path) -> None:
    """Its processes end by themselves."""
    with up(tiny_checkpoint, "--text-servers", "2") as stack:
        assert stack.line.startswith("ready "), stack.stderr
        pids = stack.pids()
        assert len(pids) == 7
        stack.process.send_signal(signal.SIGKILL)
        stack.process.wait()
        wait_until(lambda: not any(map(is_running, pids)), "no process is left")


def test_up_on_a_port_in_use(tiny_checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with up(tiny_checkpoint, port=port) as stack:
            assert stack.line == ""
            pids = stack.pids() if stack.process.poll() is None else set()
            assert stack.process.wait(60) == 1
            assert f"127.0.0.1:{port}" in stack.stderr
            assert stack.stderr.startswith("error: ")
            assert not any(map(is_running, pids))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--model", "/no/such/model"), "--model"),
        (("--text-servers", "3"), "--text-servers"),
        (("--port", "65536"), "--port"),
    ],
)
def test_up_refuses_in_one_line(tiny_checkpoint: Path, flags: tuple[str, str], named: str) -> None:
    done = chiasm("up", "--model", tiny_checkpoint, *flags)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"error: {named}: ")


def test_synth_writes_the_same_bytes_twice(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Here, and in another process."""
    again = tmp_path / "again"
    done = chiasm("synth", "--preset", "tiny", "--seed", "0", again)
    assert (done.returncode, done.stderr) == (0, "")
    names = sorted(path.name for path in tiny_checkpoint.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    same, _, _ = filecmp.cmpfiles(tiny_checkpoint, again, names, shallow=False)
    assert same == names


def test_synth_leaves_other_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    done = chiasm("synth", "--preset", "tiny", "--seed", "0", tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
    unknown = chiasm("synth", "--preset", "huge", tmp_path / "new")
    assert (unknown.returncode, unknown.stderr.count("\n")) == (2, 1)
    assert not (tmp_path / "new").exists()
