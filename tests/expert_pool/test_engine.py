"""Which shards a server holds, one assignment after another, and when loading one goes wrong."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from waiting import WAIT_S, until

from chiasm import errors
from chiasm.model import experts, manifest
from chiasm.model.checkpoint import Checkpoint
from chiasm.model.config import ModelConfig
from chiasm.model.experts import ExpertBank
from chiasm.model.manifest import FileEntry, Manifest
from chiasm.services.expert_pool.engine import ExpertEngine
from chiasm.types import Modality


class Bank:
    """What it holds, and the most it ever held."""

    modality = "text"

    def __init__(self) -> None:
        self.shards: tuple[int, ...] = ()
        self.most = 0

    def take(self, shard: int) -> None:
        self.shards = tuple(sorted({*self.shards, shard}))
        self.most = max(self.most, len(self.shards))

    def drop(self, shard: int) -> None:
        self.shards = tuple(s for s in self.shards if s != shard)


class Engine(ExpertEngine):
    """One whose shards take no time to read, unless the test holds them back or breaks them."""

    def __init__(self) -> None:
        super().__init__(Bank(), model=Path(), config=None)  # type: ignore[arg-type]  # stand-ins
        self.broken: set[int] = set()
        self.held_back: dict[int, threading.Event] = {}
        self.reading: list[int] = []

    def _read(self, shard: int, on_layer: Callable[[], None]) -> None:
        self.reading.append(shard)
        if shard in self.held_back:
            assert self.held_back[shard].wait(WAIT_S)
        if shard in self.broken:
            raise errors.DataLoss("damaged")
        self.bank.take(shard)  # type: ignore[attr-defined]  # a stand-in


def text_bank(config: ModelConfig) -> ExpertBank:
    """Without a shard."""
    return ExpertBank(
        config,
        modality=Modality.TEXT,
        num_shards=4,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


async def test_an_assignment_counts_from_the_call_on(engine: Engine) -> None:
    """Not once it gets its turn: two that arrive together are judged one after the other."""
    newer = engine.assign([0], epoch=5)
    assert not engine.may_assign([1], 4)
    await newer
    assert (engine.epoch, engine.bank.shards) == (5, (0,))


async def test_files_are_verified_once_for_all_shards(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, model)
    files = {
        file.name: FileEntry(manifest.sha256(file), file.stat().st_size, {})
        for file in model.glob("*.safetensors")
    }
    Manifest(fingerprint="", files=files).save(model)
    read: list[Path] = []
    sha256 = manifest.sha256

    def counted(file: Path) -> str:
        read.append(file)
        return sha256(file)

    monkeypatch.setattr(manifest, "sha256", counted)
    config = ModelConfig.load(model)
    bank = text_bank(config)
    engine = ExpertEngine(bank, model=model, config=config, verify=True)
    engine.worker.start()
    await engine.assign([0, 1], epoch=1)
    await engine.assign([0, 1, 3], epoch=2)
    engine.close()
    assert bank.shards == (0, 1, 3)
    assert sorted(read) == sorted(set(read)) != []


def test_a_shard_is_held_once_its_kernels_are_compiled(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig.load(tiny_checkpoint)
    bank = text_bank(config)
    held: list[tuple[int, ...]] = []
    monkeypatch.setattr(experts, "compile_ahead", lambda *_, **__: held.append(bank.shards))
    with Checkpoint(tiny_checkpoint, config) as checkpoint:
        bank.load(checkpoint, 2)
    assert held == [()], "once, as all layers are of one format"
    assert bank.shards == (2,)


@pytest.fixture
def engine() -> Iterator[Any]:
    made = Engine()
    made.worker.start()
    yield made
    made.close()


async def test_a_full_server_makes_room_before_it_loads(engine: Any) -> None:
    for shards in ([0, 1], [1, 2], [3, 4]):
        await engine.assign(shards, epoch=1)
        assert list(engine.bank.shards) == shards
    assert engine.bank.most == 2


async def test_a_shard_that_cannot_be_loaded_keeps_no_other_out(engine: Any) -> None:
    engine.broken = {1}
    heard: list[tuple[int, ...]] = []
    with pytest.raises(errors.DataLoss):
        await engine.assign([0, 1, 2], epoch=1, on_change=lambda: heard.append(engine.bank.shards))
    assert engine.bank.shards == (0, 2)
    assert engine.loading == ()
    assert heard[-1] == (0, 2)
    engine.broken.clear()
    await engine.assign([0, 1, 2], epoch=1)
    assert engine.bank.shards == (0, 1, 2)
    assert engine.reading == [0, 1, 2, 1]


@pytest.mark.parametrize("epoch", [1, 2])
async def test_the_later_assignment_counts_whatever_its_epoch(engine: Any, epoch: int) -> None:
    engine.held_back[0] = threading.Event()
    first = asyncio.create_task(engine.assign([0, 1], epoch=1))
    await until(lambda: engine.reading == [0])
    second = asyncio.create_task(engine.assign([2], epoch=epoch))
    await asyncio.sleep(0.01)
    engine.held_back[0].set()
    await asyncio.gather(first, second)
    assert engine.bank.shards == (2,)
    assert 1 not in engine.reading


async def test_what_is_not_wanted_any_more_is_never_held_beside_what_is(engine: Any) -> None:
    engine.held_back[0] = threading.Event()
    assigned = [asyncio.create_task(engine.assign([0], epoch=1))]
    await until(lambda: engine.reading == [0])
    for epoch, shard in ((2, 1), (3, 2)):
        assigned.append(asyncio.create_task(engine.assign([shard], epoch=epoch)))
        await asyncio.sleep(0.01)
    engine.held_back[0].set()
    await asyncio.gather(*assigned)
    assert engine.bank.shards == (2,)
    assert engine.bank.most == 1
    assert engine.reading == [0, 2], "a shard is read though nobody wants it"


async def test_what_is_read_for_an_earlier_assignment_is_dropped(engine: Any) -> None:
    await engine.assign([2], epoch=1)
    engine.held_back[0] = threading.Event()
    first = asyncio.create_task(engine.assign([0, 2], epoch=1))
    await until(lambda: engine.reading == [2, 0])
    second = asyncio.create_task(engine.assign([2], epoch=2))  # it has all it wants
    await asyncio.sleep(0.01)
    engine.held_back[0].set()
    await asyncio.gather(first, second)
    assert engine.bank.shards == (2,)


async def test_a_loader_that_does_not_get_on_stalls_the_server(engine: Any) -> None:
    assert engine.stalled_s() == 0
    engine.held_back[0] = threading.Event()
    assigning = asyncio.create_task(engine.assign([0], epoch=1))
    await until(lambda: engine.stalled_s() > 0.05)
    engine.held_back[0].set()
    await assigning
    assert engine.stalled_s() == 0
