"""`chiasm convert`: what it writes, how it goes on after a kill, and that all of it loads."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint import untrained
from checkpoint.banks import bank, matrices, wide
from safetensors.torch import load_file, save_file

from chiasm.alone import alone
from chiasm.convert import calibrate, plan, quality, report, stream
from chiasm.convert.model import WholeModel
from chiasm.convert.plan import Options
from chiasm.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound
from chiasm.kernels.quant.formats import Int4Matrices, Int8Matrices, Tcq2Matrices
from chiasm.kernels.quant.hadamard import RotatedMatrices
from chiasm.model import manifest
from chiasm.model.checkpoint import Checkpoint
from chiasm.model.config import ModelConfig
from chiasm.model.expert_weights import DOWN, GATE_UP
from chiasm.model.experts import ExpertBank
from chiasm.model.linear import Matrix
from chiasm.model.load import load_module
from chiasm.model.manifest import Manifest
from chiasm.model.quantization import ExpertFormat
from chiasm.model.synth import synthesize
from chiasm.model.text import LanguageModel
from chiasm.types import Modality

TEXT, VISION = Modality.TEXT, Modality.VISION
MIXED = Options(text_experts="int4", vision_experts="tcq2", first_layers=1)
# Norm of the error by norm of the weights; the short groups of the tiny model cost something.
RELATIVE_ERRORS = {"int8": 0.012, "int4": 0.11, "tcq2": 0.32}
LAST = 3
TIMEOUT_S = 60.0


def convert(source: Path, out: Path, options: Options = MIXED) -> Manifest:
    return stream.run(plan.make(source, options), out)


@pytest.fixture(scope="module")
def mixed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "mixed"
    convert(tiny_checkpoint, out)
    return out


def relative_errors(directory: Path, original: Path, layer: int, modality: Modality) -> list[float]:
    pairs = zip(
        matrices(bank(directory, modality), layer),
        matrices(bank(original, modality), layer),
        strict=True,
    )
    errors = []
    for converted, given in pairs:
        for expert in (0, given.num_experts - 1):
            weight = given.dequantize(expert, torch.float32)
            found = converted.dequantize(expert, torch.float32)
            errors.append(float((found - weight).norm() / weight.norm()))
    return errors


def test_every_bank_is_in_its_precision_and_near_the_original(
    mixed: Path, tiny_checkpoint: Path
) -> None:
    config = ModelConfig.load(mixed)
    expected = {1: ("int8", "int8"), 2: ("int4", "tcq2"), 3: ("int4", "tcq2")}
    for layer in config.text.moe_layers:
        for modality, precision in zip(Modality, expected[layer], strict=True):
            assert config.quantization.of(layer, modality) == ExpertFormat(precision)
            for error in relative_errors(mixed, tiny_checkpoint, layer, modality):
                assert RELATIVE_ERRORS[precision] / 4 < error < RELATIVE_ERRORS[precision]
    assert bank(mixed, TEXT).precision == "int8+int4"
    assert bank(mixed, VISION).precision == "int8+tcq2"
    kinds = {type(m) for m in matrices(bank(mixed, TEXT), 2) + matrices(bank(mixed, VISION), LAST)}
    assert kinds == {Int4Matrices, Tcq2Matrices}


def test_all_else_is_copied_as_it_is(mixed: Path, tiny_checkpoint: Path) -> None:
    def tensors(directory: Path) -> dict[str, torch.Tensor]:
        return {k: t for f in directory.glob("*.safetensors") for k, t in load_file(f).items()}

    before, after = tensors(tiny_checkpoint), tensors(mixed)
    kept = [name for name in before if ".mlp.experts." not in name]
    assert kept
    for name in kept:
        assert torch.equal(before[name], after[name])
    assert not any(name.endswith("_proj.weight") and ".mlp.experts." in name for name in after)
    for file in tiny_checkpoint.glob("*token*"):
        assert (mixed / file.name).read_bytes() == file.read_bytes()
    index = json.loads((mixed / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys()
    assert all((mixed / file).stat().st_mode & 0o444 == 0o444 for file in os.listdir(mixed))


def test_every_layout_can_be_converted(converted: Path, tmp_path: Path, hub: Path) -> None:
    """Layouts differ in where the experts lie; what becomes of them does not."""
    options = Options(text_experts="int8", vision_experts="int4")
    for name, source in (("hub", hub), ("other", converted)):
        convert(source, tmp_path / name, options)
    for modality in Modality:
        for mine, theirs in zip(
            matrices(bank(tmp_path / "other", modality), LAST),
            matrices(bank(tmp_path / "hub", modality), LAST),
            strict=True,
        ):
            for field in type(mine).__slots__:
                assert torch.equal(getattr(mine, field), getattr(theirs, field))
    with Checkpoint(tmp_path / "other", ModelConfig.load(tmp_path / "other")) as checkpoint:
        assert not checkpoint.has("model.layers.1.mlp.experts.0.gate_proj.weight")
        assert checkpoint.has("model.layers.1.mlp.shared_experts.gate_proj.weight")


def test_matrices_that_every_token_goes_through(converted: Path, hub: Path, tmp_path: Path) -> None:
    """In every layout, those of attention, shared experts, the dense layer and the vocabulary."""
    for name, source in (("hub", hub), ("other", converted)):
        convert(source, tmp_path / name, Options(dense="int8"))
    given, *models = (language_model(d) for d in (hub, tmp_path / "hub", tmp_path / "other"))
    found = [[m for m in model.modules() if isinstance(m, Matrix)] for model in (given, *models)]
    text = ModelConfig.load(hub).text
    assert len(found[0]) == 1 + 7 * text.num_layers
    for original, mine, theirs in zip(*found, strict=True):
        assert mine.coded is not None
        assert theirs.coded is not None
        for field in ("codes", "scale"):
            assert torch.equal(getattr(mine.coded, field), getattr(theirs.coded, field))
        weight = mine.coded.dequantize(0, torch.float32)
        assert float((weight - original.weight).norm() / original.weight.norm()) < 0.012
        for num_rows in (1, 3, 70):
            x = torch.randn(num_rows, weight.shape[1])
            torch.testing.assert_close(mine.multiply(x), x @ weight.t(), rtol=1e-4, atol=1e-4)
    ids = torch.tensor([5, 0, text.vocab_size - 1, 5])
    rows = models[0].embed(ids)
    assert rows.dtype is torch.float32
    weight = models[0].model.embed_tokens.coded.dequantize(0, torch.float32)
    assert torch.equal(rows, weight[ids])
    assert bank(tmp_path / "other", TEXT).precision == "float32"


def test_a_head_of_its_own_and_both_halves_of_a_model(tmp_path: Path) -> None:
    synthesize(tmp_path / "model", preset=replace(wide(), shard_bytes=1 << 30))
    untie(tmp_path / "model")
    options = Options(text_experts="int4", vision_experts="int4", dense="int8")
    convert(tmp_path / "model", tmp_path / "out", options)
    config = ModelConfig.load(tmp_path / "out")
    assert config.quantization == plan.make(tmp_path / "model", options).quantization
    model = language_model(tmp_path / "out")
    assert model.lm_head is not None
    assert model.lm_head.coded is not None
    x = torch.randn(2, config.text.hidden_size)
    expected = x @ model.lm_head.coded.dequantize(0, torch.float32).t()
    torch.testing.assert_close(model.logits(x), expected, rtol=1e-4, atol=1e-4)
    rows = report.rows(plan.make(tmp_path / "model", options), Manifest.load(tmp_path / "out"))
    assert {(r.layer, r.part) for r in rows} == {
        *((layer, report.DENSE) for layer in (None, 0, 1)),
        *((1, modality) for modality in Modality),
    }
    with pytest.raises(InvalidArgument, match="in low precision already"):
        convert(tmp_path / "out", tmp_path / "twice")
    with pytest.raises(InvalidArgument, match="dense: 'int4' is none of stored, int8"):
        Options(dense="int4")


def untie(directory: Path) -> None:
    """Gives a checkpoint of one file a head that is not its embedding."""
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": False}))
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def language_model(directory: Path) -> LanguageModel:
    config = ModelConfig.load(directory)
    with torch.device("meta"):
        model = LanguageModel(config.text)
    with Checkpoint(directory, config) as checkpoint:
        load_module(model, checkpoint, "", torch.float32)
    return model


def test_one_bank_may_stay_as_it_is(tiny_checkpoint: Path, tmp_path: Path) -> None:
    convert(tiny_checkpoint, tmp_path / "out", Options(vision_experts="int8", first_layers=2))
    assert bank(tmp_path / "out", TEXT).precision == "float32"
    assert bank(tmp_path / "out", VISION).precision == "int8"
    assert relative_errors(tmp_path / "out", tiny_checkpoint, 1, TEXT) == [0, 0, 0, 0]
    assert isinstance(matrices(bank(tmp_path / "out", VISION), 1)[0], Int8Matrices)


def test_rotated(tmp_path: Path, tiny_checkpoint: Path) -> None:
    synthesize(tmp_path / "wide", preset=wide())
    options = Options(text_experts="tcq2", first_layers=0, is_rotated=True)
    convert(tmp_path / "wide", tmp_path / "out", options)
    assert isinstance(matrices(bank(tmp_path / "out", TEXT), 1)[0], RotatedMatrices)
    for error in relative_errors(tmp_path / "out", tmp_path / "wide", 1, TEXT):
        assert 0.2 < error < RELATIVE_ERRORS["tcq2"]
    with pytest.raises(
        InvalidArgument, match="down_proj: rotated tcq2 takes a multiple of 128 inputs"
    ):
        plan.make(tiny_checkpoint, Options(text_experts="tcq2", is_rotated=True))


def test_a_server_reads_its_own_shard_alone(mixed: Path) -> None:
    config = ModelConfig.load(mixed)
    whole, part = bank(mixed, VISION), bank(mixed, VISION, num_shards=8, shard=2)
    table = 256 * 2 * 2  # of both matrices of each tcq2 layer
    assert part.weight_bytes - table == (whole.weight_bytes - table) // 8
    with Checkpoint(mixed, config) as checkpoint:
        bank_again = ExpertBank(
            config,
            modality=VISION,
            num_shards=8,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        bank_again.load(checkpoint, 2)
        assert checkpoint.bytes_read == part.weight_bytes


# A small file is written in no time, so the kill waits for the manifest to name the second one.
def test_goes_on_after_a_kill(tmp_path: Path) -> None:
    source, out, whole = tmp_path / "model", tmp_path / "out", tmp_path / "whole"
    synthesize(source, preset=wide(num_layers=6))
    options = Options(text_experts="tcq2", vision_experts="tcq2")
    flags = ["--text-experts", "tcq2", "--vision-experts", "tcq2"]
    command = [sys.executable, "-m", "chiasm", "convert", "--model", str(source)]
    command += ["--out", str(out), *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + TIMEOUT_S
        while not (out / "experts-001-text.safetensors").is_file():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait(TIMEOUT_S)
    assert not (out / "config.json").exists()
    with pytest.raises(NotFound):
        ModelConfig.load(out)
    first = out / "model-00001.safetensors"
    written_at = first.stat().st_mtime_ns
    convert(source, out, options)
    convert(source, whole, options)
    assert first.stat().st_mtime_ns == written_at
    for file in whole.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    assert {file.name for file in out.iterdir()} == {file.name for file in whole.iterdir()}


def test_a_second_run_changes_nothing(mixed: Path, tiny_checkpoint: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in mixed.glob("*.safetensors")}
    heard: list[int] = []
    made = plan.make(tiny_checkpoint, MIXED)
    stream.run(made, mixed, on_bytes=heard.append)
    assert sum(heard) == made.num_bytes
    after = {file.name: file.stat().st_mtime_ns for file in mixed.glob("*.safetensors")}
    assert before == after


def test_what_is_in_the_way_is_refused(tiny_checkpoint: Path, mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="other options"):
        convert(tiny_checkpoint, mixed, Options(text_experts="int8"))
    with pytest.raises(InvalidArgument, match="own folder"):
        convert(tiny_checkpoint, tiny_checkpoint)
    with pytest.raises(InvalidArgument, match="in low precision already"):
        convert(mixed, tmp_path / "twice")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(InvalidArgument, match="is not empty"):
        convert(tiny_checkpoint, tmp_path / "full")
    with pytest.raises(InvalidArgument, match="text_experts: 'int3' is none of"):
        Options(text_experts="int3")
    with (
        alone(tmp_path, "converting to"),
        pytest.raises(FailedPrecondition, match="another process is converting"),
        alone(tmp_path, "converting to"),
    ):
        pass


def test_checksums_are_compared_on_request(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(tiny_checkpoint, out)
    config = ModelConfig.load(out)
    file = out / "experts-002-text.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    key = "model.layers.2.mlp.experts.3.down_proj.codes"
    target = torch.empty(128, 32, dtype=torch.uint8)
    Checkpoint(out, config).read_into(key, target)
    with Checkpoint(out, config, verified=set()) as checkpoint:
        checkpoint.get("model.norm.weight")
        with pytest.raises(DataLoss, match=r"experts-002-text.*does not match its checksum"):
            checkpoint.read_into(key, target)
    with pytest.raises(NotFound, match=manifest.NAME):
        Checkpoint(tiny_checkpoint, ModelConfig.load(tiny_checkpoint), verified=set())


def test_another_table_is_noticed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(tiny_checkpoint, out)
    values = json.loads((out / "config.json").read_text())
    values["chiasm_quantization"]["tcq2_table_sha256"] = "0" * 64
    (out / "config.json").write_text(json.dumps(values))
    with pytest.raises(DataLoss, match="tcq2_table does not match"):
        bank(out, VISION)


def test_report(mixed: Path, tiny_checkpoint: Path) -> None:
    made = plan.make(tiny_checkpoint, MIXED)
    rows = report.rows(made, Manifest.load(mixed))
    assert [(r.layer, r.part, r.precision) for r in rows][:4] == [
        (1, TEXT, "int8"),
        (1, VISION, "int8"),
        (2, TEXT, "int4"),
        (2, VISION, "tcq2"),
    ]
    for row in rows:
        error = RELATIVE_ERRORS[row.precision]
        assert error / 4 < row.cost.relative_error < error
        assert row.gap_db > 0  # random weights cannot be coded better than the bound
        size = (mixed / f"experts-{row.layer:03d}-{row.part}.safetensors").stat().st_size
        assert row.file_bits == 8 * size
        # Scales, of short rows many, and in the file names and shapes.
        assert row.cost.bits_per_weight < row.file_bits / row.cost.num_weights
    found = report.document(rows)
    assert found["by_precision"]["tcq2"]["bits_per_weight"] == pytest.approx(2.6, abs=0.1)
    assert report.table(rows).row_count == len(rows)


def test_quality_of_a_conversion_and_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a model with the bundled one's tokenizer, untrained: numbers, not their size, count."""
    untrained.write(tmp_path)
    models: list[weakref.ref[WholeModel]] = []

    def load(*args: Any) -> WholeModel:
        model = WholeModel(*args)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(calibrate, "WholeModel", load)
    squares = calibrate.collect(tmp_path / "model", 6)
    gc.collect()
    assert [model() for model in models] == [None], "what is not needed any more has its memory"
    made = plan.make(tmp_path / "model", Options(text_experts="int8", vision_experts="int4"))
    layer = made.config.text.moe_layers[0]
    widths = {GATE_UP: made.config.text.hidden_size, DOWN: made.config.text.text_intermediate}
    for projection, width in widths.items():
        heed = squares.importance(layer, TEXT, 0, projection)
        assert heed is not None
        assert heed.shape == (width,)
        assert (heed > 0).all()
    stream.run(made, tmp_path / "out", calibrated=lambda: squares.importance)
    same = quality.compare(tmp_path / "model", tmp_path / "model", 2, tasks=["copy"])["copy"]
    assert (same.agreement, same.mean_divergence) == (1, 0)
    found = quality.compare(tmp_path / "model", tmp_path / "out", 2, tasks=["copy", "digits"])
    assert found.keys() == {"copy", "digits"}
    for one in found.values():
        assert one.num_questions == 2
        assert 0 < one.mean_divergence < 1
        assert 0 < one.agreement <= 1
    assert quality.document(found)["all"]["num_questions"] == 4
    assert quality.table(found).row_count == 3


def test_the_whole_model_in_low_precision_is_near_the_original(
    mixed: Path, tiny_checkpoint: Path
) -> None:
    """The layers' errors do not pile up beyond what each of them brings."""
    from train_models import random_batch

    batch = random_batch(ModelConfig.load(mixed), [(20, []), (9, [])])
    logits = [WholeModel(d, torch.float32).logits(batch) for d in (tiny_checkpoint, mixed)]
    assert 0.005 < (logits[1] - logits[0]).norm() / logits[0].norm() < 0.5
