"""The first layers of a bank in two bits stay wider, unless somebody says otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from checkpoint.banks import bank, wide
from checkpoint.test_convert import convert

from chiasm.convert.plan import Options
from chiasm.errors import InvalidArgument
from chiasm.model.config import ModelConfig
from chiasm.model.synth import synthesize
from chiasm.types import Modality

TEXT, VISION = Modality.TEXT, Modality.VISION


def precisions(config: ModelConfig, options: Options, modality: Modality) -> list[str]:
    """Of the layers that have experts."""
    found = options.quantization(config)
    return [found.of(layer, modality).precision for layer in config.text.moe_layers]


def with_moe_layers(directory: Path, number: int) -> ModelConfig:
    config = ModelConfig.load(directory)
    sparse = (False, *[True] * number)
    return replace(config, text=replace(config.text, num_layers=len(sparse), sparse_layers=sparse))


@pytest.mark.parametrize(("layers", "first"), [(1, 1), (3, 1), (8, 1), (9, 2), (27, 4)])
def test_an_eighth_of_the_layers_of_a_tcq2_bank(
    tiny_checkpoint: Path, layers: int, first: int
) -> None:
    config = with_moe_layers(tiny_checkpoint, layers)
    options = Options(text_experts="int4", vision_experts="tcq2")
    expected = ["int8"] * first + ["tcq2"] * (layers - first)
    assert precisions(config, options, VISION) == expected
    assert precisions(config, options, TEXT) == ["int4"] * layers
    both = Options(text_experts="tcq2", vision_experts="tcq2", first_precision="int4")
    for modality in Modality:
        assert precisions(config, both, modality).count("int4") == first


def test_a_number_is_for_every_bank_that_is_converted(tiny_checkpoint: Path) -> None:
    config = with_moe_layers(tiny_checkpoint, 5)
    two = Options(text_experts="int4", vision_experts="tcq2", first_layers=2)
    assert precisions(config, two, TEXT) == ["int8"] * 2 + ["int4"] * 3
    assert precisions(config, two, VISION) == ["int8"] * 2 + ["tcq2"] * 3
    assert precisions(config, replace(two, first_layers=0), VISION) == ["tcq2"] * 5
    one_bank = replace(two, text_experts="stored")
    assert precisions(config, one_bank, TEXT) == ["stored"] * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_experts": "int8", "first_layers": 1, "first_precision": "int4"}, "text .* int8"),
        ({"vision_experts": "int4", "first_layers": 3, "first_precision": "tcq2"}, "vision .* int"),
    ],
)
def test_first_layers_are_not_narrower_than_the_rest(options: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidArgument, match=f"has fewer bits than the {message}") as refusal:
        Options(**options)  # type: ignore[arg-type]  # values of several types
    assert refusal.value.field == "first_precision"


def test_a_first_precision_that_no_layer_takes_is_not_refused(tiny_checkpoint: Path) -> None:
    config = with_moe_layers(tiny_checkpoint, 3)
    options = Options(text_experts="int8", vision_experts="tcq2", first_precision="int4")
    assert precisions(config, options, TEXT) == ["int8"] * 3
    assert precisions(config, options, VISION) == ["int4", "tcq2", "tcq2"]
    assert precisions(config, replace(options, first_layers=0), TEXT) == ["int8"] * 3


def test_what_is_written_says_so_and_a_run_goes_on_with_what_it_began_with(tmp_path: Path) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    synthesize(source, preset=wide(num_layers=4))
    options = Options(vision_experts="tcq2")
    written = convert(source, out, options)
    assert ModelConfig.load(out).quantization == options.quantization(ModelConfig.load(source))
    assert bank(out, VISION).precision == "int8+tcq2"
    assert bank(out, TEXT).precision == "float32"
    assert convert(source, out, replace(options, first_layers=1)) == written
    with pytest.raises(InvalidArgument, match="with other options"):
        convert(source, out, replace(options, first_layers=0))
