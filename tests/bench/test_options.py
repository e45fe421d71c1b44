"""How `chiasm bench serve` reaches a gateway that asks for TLS and a key."""

from __future__ import annotations

from pathlib import Path

import pytest
from control.certificates import Authority

from chiasm import errors
from chiasm.bench.options import BenchOptions
from chiasm.flags import parse_settings
from chiasm.types import TlsFiles


@pytest.fixture
def files(tmp_path: Path) -> TlsFiles:
    return Authority.new(tmp_path / "pki").issue("127.0.0.1")


def options(*flags: str) -> BenchOptions:
    return parse_settings(BenchOptions, flags, prog="chiasm bench serve")


def test_flags_win_over_the_variables_that_all_commands_read(
    files: TlsFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Authority.new(tmp_path / "other").issue("127.0.0.1")
    monkeypatch.setenv("CHIASM_TLS_CA", str(other.ca))
    monkeypatch.setenv("CHIASM_TLS_NAME", "inside")
    monkeypatch.setenv("CHIASM_API_KEY", "from the variable")
    monkeypatch.setenv("CHIASM_MODEL", "of a service")
    found = options("--tls-cert", str(files.cert), "--tls-key", str(files.key))
    assert found.gateway_tls == TlsFiles(ca=other.ca, cert=files.cert, key=files.key, name="inside")
    assert found.gateway_key == "from the variable"
    assert found.model == "", "it is another thing for a service"
    again = options("--tls-ca", str(files.ca), "--api-key", "given")
    assert again.gateway_tls == TlsFiles(ca=files.ca, name="inside")
    assert again.gateway_key == "given"


def test_a_gateways_key_is_not_sent_to_other_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHIASM_API_KEY", "ours")
    assert options().api_key.get_secret_value() == ""
    assert "ours" not in options().model_dump_json()


def test_without_options_it_is_plain_text(files: TlsFiles) -> None:
    assert options().gateway_tls is None
    assert options("--tls").gateway_tls == TlsFiles()
    with pytest.raises(errors.InvalidArgument):
        _ = options("--tls-cert", str(files.cert)).gateway_tls


def test_the_file_for_the_result_has_a_variable_like_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("JSON", "1")
    assert parse_settings(BenchOptions, [], prog="bench").json_file is None
    monkeypatch.setenv("CHIASM_BENCH_JSON", "r.json")
    assert parse_settings(BenchOptions, [], prog="bench").json_file == Path("r.json")
    assert parse_settings(BenchOptions, ["--json", "s.json"], prog="bench").json_file == Path(
        "s.json"
    )
