"""A converted model through all services, against the same weights widened again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from e2e import checkpoints
from e2e.cases import Case, cases
from e2e.cluster import Stream, cluster
from e2e.disturbed import assert_equal
from e2e.reference import Reference
from e2e.stack import up
from safetensors.torch import load_file, save_file

from chiasm.client import Client, Sampling
from chiasm.convert import plan, stream
from chiasm.convert.plan import Options
from chiasm.kernels.quant import table
from chiasm.local import StackConfig
from chiasm.model.checkpoint import Checkpoint
from chiasm.model.config import ModelConfig
from chiasm.model.experts import ExpertBank
from chiasm.model.quantization import KEY, WRITTEN, ExpertFormat, Quantization
from chiasm.model.shapes import expert_prefix
from chiasm.types import Modality

LOGITS_TOLERANCE = 1e-4
NUM_TOKENS = 32
GREEDY = Sampling(max_tokens=NUM_TOKENS, temperature=0, seed=0, ignore_eos=True)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a model is converted, its seed, and how it is served."""

    options: Options
    seed: int
    flags: tuple[str, ...]


SETUPS = {
    "int8": Setup(
        options=Options(text_experts="int8", vision_experts="int8"),
        seed=14,
        flags=("--text-shards", "8", "--text-servers", "2"),
    ),
    "int4 and tcq2, colocated": Setup(
        options=Options(text_experts="int4", vision_experts="tcq2", first_layers=1),
        seed=12,
        flags=("--colocate", "--vision-shards", "4"),
    ),
    "all but vision, tcq2 and int8": Setup(
        options=Options(text_experts="tcq2", first_layers=0, dense="int8"),
        seed=24,
        flags=("--text-shards", "4", "--text-servers", "2"),
    ),
}


def widen(directory: Path, out: Path) -> Path:
    """The converted checkpoint with every matrix in float32 again, in the hub's layout."""
    out.mkdir()
    config = ModelConfig.load(directory)
    tensors = {
        name: tensor
        for file in directory.glob("*.safetensors")
        for name, tensor in load_file(file).items()
        if ".mlp.experts." not in name and not name.startswith("chiasm.")
    }
    for name in [name for name in tensors if name.endswith(".codes")]:
        matrix = name.removesuffix(".codes")
        codes, scale = tensors.pop(name).float(), tensors.pop(f"{matrix}.scale")
        tensors[f"{matrix}.weight"] = codes * scale[:, None]
    with Checkpoint(directory, config) as checkpoint:
        for modality in Modality:
            bank = ExpertBank(
                config,
                modality=modality,
                num_shards=1,
                dtype=torch.float32,
                device=torch.device("cpu"),
            )
            bank.load(checkpoint, 0)
            for layer in config.text.moe_layers:
                weights = bank.weights(layer, 0)
                for expert in range(config.text.num_experts):
                    prefix = expert_prefix(config.text, layer, modality, expert)
                    gate, up = weights.gate_up.dequantize(expert, torch.float32).chunk(2)
                    tensors[f"{prefix}gate_proj.weight"] = gate.contiguous()
                    tensors[f"{prefix}up_proj.weight"] = up.contiguous()
                    down = weights.down.dequantize(expert, torch.float32)
                    tensors[f"{prefix}down_proj.weight"] = down
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for file in directory.glob("*.json"):
        if file.name != "model.safetensors.index.json":
            (out / file.name).write_bytes(file.read_bytes())
    values = json.loads((out / "config.json").read_text())
    del values[KEY]
    (out / "config.json").write_text(json.dumps(values | {"torch_dtype": "float32"}))
    return out


@pytest.fixture(scope="module", params=SETUPS)
def setup(request: pytest.FixtureRequest) -> Setup:
    return SETUPS[str(request.param)]


@pytest.fixture(scope="module")
def directory(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("low-precision")
    source = checkpoints.hub(root / "model", setup.seed)
    stream.run(plan.make(source, setup.options), root / "converted")
    return root / "converted"


@pytest.fixture(scope="module")
def reference(directory: Path) -> Reference:
    return Reference.of(widen(directory, directory.parent / "widened"))


@pytest.fixture(scope="module")
def client(setup: Setup, directory: Path) -> Iterator[Client]:
    with up(directory, "--video-advance", "transformers", *setup.flags) as running:
        yield running


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_answers_are_those_of_the_widened_weights(
    client: Client, reference: Reference, case: Case
) -> None:
    expected = reference.answer(case, NUM_TOKENS)
    found = client.complete(case.messages, sampling=GREEDY, prompt_logits=True)
    assert found.prompt_logits is not None
    assert np.abs(found.prompt_logits - expected.logits).max() <= LOGITS_TOLERANCE
    assert list(found.token_ids) == expected.token_ids


class OneOfEach(Options):
    """Every layer's experts in another precision."""

    def quantization(self, config: ModelConfig) -> Quantization:
        formats = {
            (layer, modality): ExpertFormat(precision)
            for layer, precision in zip(config.text.moe_layers, WRITTEN, strict=True)
            for modality in Modality
        }
        return Quantization(formats=formats, table_sha256=table.checksum(table.load()))


@pytest.mark.parametrize("is_converted", [False, True], ids=["stored", "every precision"])
def test_replicas_in_bfloat16_agree_to_the_bit(tmp_path: Path, is_converted: bool) -> None:
    """A text server dies in mid-stream, another one hangs, then the vision server dies that has
    computed the prompt: not even logits and log-probabilities show it."""
    model = checkpoints.hub(tmp_path / "model", seed=3)
    if is_converted:
        stream.run(plan.make(model, OneOfEach()), tmp_path / "q")
        model = tmp_path / "q"
    prompt = cases()[1].messages
    sampling = replace(GREEDY, max_tokens=200, logprobs=3)
    with cluster(StackConfig(model=model, dtype="bfloat16")) as stack:
        with Client(stack.endpoint) as client:
            expected = client.complete(prompt, sampling=sampling, prompt_logits=True)
        for pool in ("text-pool-0", "vision-pool-0"):
            stack.add(pool)
        # With its logits all of the prompt is computed again, as the first time.
        running = Stream(stack.endpoint, prompt, sampling, prompt_logits=True)
        running.wait_tokens(10)
        stack.kill(stack.in_use("text-pool-0"))
        assert_equal(running.result(), expected)
        stack.add("text-pool-0")
        running = Stream(stack.endpoint, prompt, sampling, prompt_logits=True)
        running.wait_tokens(10)
        with stack.stopped(stack.in_use("text-pool-0")):
            assert_equal(running.result(), expected)
        stack.kill("vision-pool-0")
        running = Stream(stack.endpoint, prompt, sampling, prompt_logits=True)
        assert_equal(running.result(), expected)
