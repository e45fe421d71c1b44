"""The synthetic checkpoint: reproducible, complete, and lively enough to test against."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.converters import reference_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from chiasm.errors import InvalidArgument
from chiasm.model.checkpoint import Checkpoint
from chiasm.model.config import ModelConfig
from chiasm.model.shapes import tensor_shapes
from chiasm.model.synth import PRESETS, synthesize

NUM_PATCHES = (4, 6)


def digests(directory: Path) -> dict[str, str]:
    files = sorted(directory.iterdir())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Any:  # transformers' own annotations are not strict
    return AutoTokenizer.from_pretrained(tiny_checkpoint)


def test_same_seed_same_bytes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from chiasm.model.synth import synthesize; "
        "synthesize(Path(sys.argv[1]))"
    )
    another = tmp_path / "another"
    subprocess.run([sys.executable, "-c", code, str(another)], timeout=60, check=True)
    assert digests(another) == digests(tiny_checkpoint)


def test_another_seed_changes_every_tensor(tiny_checkpoint: Path, tmp_path: Path) -> None:
    synthesize(tmp_path / "seed1", seed=1)
    config = ModelConfig.load(tiny_checkpoint)
    with (
        Checkpoint(tiny_checkpoint, config) as one,
        Checkpoint(tmp_path / "seed1", config) as other,
    ):
        for name in tensor_shapes(config):
            assert not torch.equal(one.get(name), other.get(name)), name


def test_dtypes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Routers and their biases are float32 as published; float32 storage holds the same values."""
    synthesize(tmp_path / "float32", dtype="float32")
    narrow, wide = ModelConfig.load(tiny_checkpoint), ModelConfig.load(tmp_path / "float32")
    assert (narrow.dtype, wide.dtype) == ("bfloat16", "float32")
    with (
        Checkpoint(tiny_checkpoint, narrow) as one,
        Checkpoint(tmp_path / "float32", wide) as other,
    ):
        for name in tensor_shapes(narrow):
            routes = "mlp.gate.weight" in name or name.endswith("correction_bias")
            assert one.get(name).dtype == (torch.float32 if routes else torch.bfloat16), name
            assert other.get(name).dtype == torch.float32
            assert torch.equal(one.get(name).float(), other.get(name)), name


@pytest.mark.parametrize("arguments", [{"preset": "huge"}, {"dtype": "float16"}])
def test_refused_arguments(tmp_path: Path, arguments: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        synthesize(tmp_path / "out", **arguments)  # type: ignore[arg-type]  # wrong on purpose
    assert refusal.value.field in arguments
    assert not (tmp_path / "out").exists()


def test_dimensions_that_no_model_has_leave_nothing(tmp_path: Path) -> None:
    deep = replace(PRESETS["tiny"], num_layers=300)
    with pytest.raises(InvalidArgument):
        synthesize(tmp_path / "out", preset=deep)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("precision", [("stored", "stored"), ("tcq2", "int8")])
def test_the_index_tells_the_size_of_all_tensors(
    precision: tuple[str, str], tmp_path: Path
) -> None:
    experts, dense = precision
    synthesize(tmp_path, experts=experts, dense=dense)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    stored = {k: t for f in tmp_path.glob("*.safetensors") for k, t in load_file(f).items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    assert index["weight_map"].keys() == stored.keys()


def test_writes_into_an_empty_directory_only(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InvalidArgument, match="not an empty directory"):
        synthesize(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "text",
    [
        "A red car, and  two dogs.\n",
        "图片里有什么。",
        "naïve 🦊 日本",
        "<think>\n\n</think>\n\nyes",
    ],
)
def test_tokenizer_round_trip(tiny_checkpoint: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_checkpoint / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    assert max(ids) < ModelConfig.load(tiny_checkpoint).text.vocab_size
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_digits_and_special_tokens(tiny_checkpoint: Path, tokenizer: Any) -> None:
    assert tokenizer.tokenize("2024") == ["2", "0", "2", "4"]
    assert tokenizer.decode(tokenizer.encode("2024"), skip_special_tokens=True) == "2024"
    tokens = ModelConfig.load(tiny_checkpoint).tokens
    named = ["<|IMAGE_PLACEHOLDER|>", "<|IMAGE_START|>", "<|IMAGE_END|>", "<|VIDEO_START|>"]
    ids = [tokens.image, tokens.image_start, tokens.image_end, tokens.video_start]
    assert tokenizer.convert_tokens_to_ids(named) == ids
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (tokens.bos, tokens.pad)
    assert tokens.eos == tuple(tokenizer.convert_tokens_to_ids(["</s>", "<|end_of_sentence|>"]))


def test_chat_template(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "What?"}, {"type": "video"}],
        },
        {"role": "assistant", "content": "A dog."},
        {"role": "user", "content": [{"type": "image"}]},
    ]
    history = (
        "<|begin_of_sentence|>Be brief.\n"
        "User: Picture 1:<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>What?"
        "Video 1:<|VIDEO_START|><|VIDEO_PLACEHOLDER|><|VIDEO_END|>"
        "\nAssistant: A dog.<|end_of_sentence|>"
        "User: Picture 2:<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
    )

    def render(**options: bool) -> object:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    assert render(add_generation_prompt=False) == history
    prompt = history + "\nAssistant: "
    assert render(add_generation_prompt=True) == prompt + "<think>\n\n</think>\n\n"
    assert render(add_generation_prompt=True, enable_thinking=True) == prompt + "<think>"


def image_inputs(directory: Path, tokenizer: Any) -> dict[str, torch.Tensor]:
    """A prompt of text around one image of noise."""
    height, width = NUM_PATCHES
    placeholders = "<|IMAGE_PLACEHOLDER|>" * (height * width // 4)
    text = f"User: Picture 1:<|IMAGE_START|>{placeholders}<|IMAGE_END|>What is in the 图片?"
    ids = torch.tensor([tokenizer.encode(text)])
    tokens = ModelConfig.load(directory).tokens
    is_placeholder = ids == tokens.image
    is_delimiter = (ids == tokens.image_start) | (ids == tokens.image_end)
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": ids,
        "mm_token_type_ids": is_placeholder.long(),
        "moe_mm_token_type_ids": (is_placeholder | is_delimiter).long(),
        "pixel_values": torch.randn(height * width, 588, generator=generator),
        "image_grid_thw": torch.tensor([[1, height, width]]),
    }


def test_every_tensor_matters(tiny_checkpoint: Path, tokenizer: Any) -> None:
    """Every parameter of transformers' model has a part in the logits."""
    model = reference_model(tiny_checkpoint)
    inputs = image_inputs(tiny_checkpoint, tokenizer)
    logits = model(**inputs).logits
    logits.square().sum().backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # The correction bias only selects, so it has no gradient: its part shows when it is gone.
    assert all(name.endswith("e_score_correction_bias") for name in still)
    assert len(still) == 2 * len(ModelConfig.load(tiny_checkpoint).text.moe_layers)
    for name in still:
        parameter = model.get_parameter(name)
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.zero_()
            assert not torch.equal(model(**inputs).logits, logits), name
            parameter.copy_(kept)


@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_answers_are_lively(tmp_path: Path, tokenizer: Any, seed: int) -> None:
    synthesize(tmp_path / "model", seed=seed)
    model = reference_model(tmp_path / "model")
    prompt = "<|begin_of_sentence|>User: Please describe 图片\nAssistant: <think>\n\n</think>\n\n"
    ids = torch.tensor([tokenizer.encode(prompt)])
    out = model.generate(
        input_ids=ids, max_new_tokens=48, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    answer = out[0, ids.shape[1] :]
    with torch.no_grad():
        logits = model(input_ids=out).logits[0, ids.shape[1] - 1 : -1]
    best = logits.topk(2).values
    assert len(answer.unique()) >= 10
    assert (best[:, 0] - best[:, 1]).median() > 0.2
    assert not set(answer.tolist()) & set(tokenizer.all_special_ids)
    assert "\ufffd" not in tokenizer.decode(answer)


def test_config_names_what_the_hub_names(tiny_checkpoint: Path) -> None:
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    assert config["model_type"] == "ernie4_5_moe_vl"
    assert config["im_patch_id"] == ModelConfig.load(tiny_checkpoint).tokens.image
    assert config["vocab_size"] % 64 == 0
    loaded = ModelConfig.load(tiny_checkpoint)
    assert not loaded.text.sparse_layers[0]
    assert len(loaded.text.moe_layers) >= 3
    assert loaded.text.text_intermediate != loaded.text.vision_intermediate
    assert loaded.text.num_kv_heads < loaded.text.num_heads
