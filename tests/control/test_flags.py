"""Flags made from settings classes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from chiasm import errors
from chiasm.config import ServiceSettings
from chiasm.flags import parse_settings, settings_command


class Settings(ServiceSettings):
    """A service for the test."""

    model: Path = Field(description="Where the model is.")
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    colocate: bool = False
    num_shards: int = Field(2, ge=1)
    limit: int | None = None


def parse(*argv: str) -> Settings:
    return parse_settings(Settings, argv, prog="chiasm test")


def test_flags_of_every_kind() -> None:
    settings = parse(
        "--model", "/m", "--dtype", "float32", "--colocate", "--num-shards", "3", "--limit", "5"
    )
    assert settings.model == Path("/m")
    assert (settings.dtype, settings.colocate) == ("float32", True)
    assert (settings.num_shards, settings.limit) == (3, 5)


def test_flag_beats_environment_beats_yaml_beats_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tmp_path / "chiasm.yaml"
    config.write_text("model: /yaml\nnum_shards: 5\nlimit: 6\n")
    monkeypatch.setenv("CHIASM_CONFIG", str(config))
    monkeypatch.setenv("CHIASM_NUM_SHARDS", "7")
    monkeypatch.setenv("CHIASM_COLOCATE", "true")
    settings = parse("--no-colocate")
    assert (settings.model, settings.num_shards, settings.limit) == (Path("/yaml"), 7, 6)
    assert (settings.colocate, settings.dtype) == (False, "bfloat16")


@pytest.mark.parametrize("content", [None, "model: [", "- a\n- list\n"])
def test_a_settings_file_that_cannot_be_read_is_not_passed_over(
    content: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tmp_path / "chiasm.yaml"
    if content is not None:
        config.write_text(content)
    monkeypatch.setenv("CHIASM_CONFIG", str(config))
    with pytest.raises(SystemExit) as stopped:
        parse("--model", "/m")
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "CHIASM_CONFIG" in line
    assert str(config) in line


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "--model"),
        (["--model", "/m", "--dtype", "int3"], "--dtype"),
        (["--model", "/m", "--num-shards", "0"], "--num-shards"),
        (["--model", "/m", "--metrics-port", "x"], "--metrics-port"),
        (["--model", "/m", "--nonsense"], "--nonsense"),
        (["--model"], "--model"),
        (["--model", "/m", "stray"], "stray"),
    ],
)
def test_wrong_flags_are_one_line_and_exit_code_2(
    argv: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(*argv)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("chiasm test: ")
    assert named in line


def test_help_has_flags_and_descriptions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "--model" in text
    assert "Where the model is." in text


def test_program_exits_with_the_code_of_its_service(capsys: pytest.CaptureFixture[str]) -> None:
    def serve(settings: Settings) -> int:
        if settings.num_shards == 4:
            raise errors.NotFound("no config.json in /m")
        return settings.num_shards

    main = settings_command(Settings, serve, prog="chiasm test")
    for num_shards, code in ((3, 3), (4, 1)):
        with pytest.raises(SystemExit) as stopped:
            main(["--model", "/m", "--num-shards", str(num_shards)])
        assert stopped.value.code == code
    assert capsys.readouterr().err == "chiasm test: no config.json in /m\n"
