"""The vision tower and the resampler against transformers' implementation, on random weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.ernie4_5_vl_moe import configuration_ernie4_5_vl_moe as hf_config
from transformers.models.ernie4_5_vl_moe import modeling_ernie4_5_vl_moe as hf

from chiasm.model.config import TextConfig, VisionConfig
from chiasm.model.geometry import num_tokens
from chiasm.model.resampler import Resampler
from chiasm.model.vision import VisionTower
from chiasm.types import Grid

MAX_ERROR_FP32 = 1e-5
"""Largest absolute difference in float32, at outputs of order one."""

MAX_MEAN_ERROR_BF16 = 0.01
MAX_ERROR_BF16 = 0.1
"""In bfloat16, whose step is 2^-8 of outputs of order one."""

VISION = VisionConfig(
    depth=3,
    hidden_size=48,
    num_heads=3,
    intermediate_size=112,
    patch_size=14,
    in_channels=3,
    spatial_merge_size=2,
    temporal_merge_size=2,
    layer_norm_eps=1e-6,
    rope_theta=10000.0,
)
TEXT = TextConfig(
    vocab_size=32,
    hidden_size=40,
    intermediate_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    mrope_section=(3, 3, 2),
    max_position_embeddings=64,
    tie_word_embeddings=True,
    sparse_layers=(False,),
    moe_k=1,
    num_experts=2,
    text_intermediate=16,
    vision_intermediate=8,
    shared_intermediate=16,
    norm_min=1e-12,
)

GRIDS = [
    [Grid(1, 2, 2)],
    [Grid(1, 6, 10), Grid(1, 10, 6), Grid(1, 2, 14)],
    [Grid(6, 4, 6)],
    [Grid(1, 4, 6), Grid(2, 6, 4), Grid(4, 4, 4), Grid(1, 8, 2)],
]


def randomise(module: nn.Module, seed: int) -> None:
    """Makes every tensor matter: biases and norms too."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.data.add_(noise * 0.1)
        else:
            parameter.data.copy_(noise * parameter.shape[-1] ** -0.5)


def reference_config() -> hf_config.Ernie4_5_VLMoeConfig:
    vision = {
        "depth": VISION.depth,
        "hidden_size": VISION.hidden_size,
        "num_heads": VISION.num_heads,
        "intermediate_size": VISION.intermediate_size,
        "hidden_act": "quick_gelu",
        "rms_norm_eps": VISION.layer_norm_eps,
    }
    text = {"hidden_size": TEXT.hidden_size, "rms_norm_eps": TEXT.rms_norm_eps}
    return hf_config.Ernie4_5_VLMoeConfig(vision_config=vision, text_config=text)


def copy_weights(ours: nn.Module, reference: nn.Module) -> None:
    """Copies by the hub's names; transformers renames the resampler's two MLPs."""
    renamed = {".fc1.": ".0.", ".fc2.": ".2.", ".ln.": ".3."}
    state = {}
    for name, tensor in reference.state_dict().items():
        if name.startswith(("spatial_linear", "temporal_linear")):
            for old, new in renamed.items():
                name = name.replace(old, new)  # noqa: PLW2901
        state[name] = tensor
    ours.load_state_dict(state, strict=True)


def build(seed: int) -> tuple[VisionTower, Resampler, nn.Module, nn.Module]:
    """Both sides with the same float32 weights."""
    config = reference_config()
    config.vision_config._attn_implementation = "eager"
    tower = hf.Ernie4_5_VLMoeVisionTransformerPretrainedModel(config.vision_config).eval()
    resampler = hf.Ernie4_5_VLMoeVariableResolutionResamplerModel(config).eval()
    randomise(tower, seed)
    randomise(resampler, seed + 1)
    ours = VisionTower(VISION), Resampler(VISION, TEXT)
    copy_weights(ours[0], tower)
    copy_weights(ours[1], resampler)
    return *ours, tower, resampler


def pixels_of(grids: list[Grid], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(g.num_patches for g in grids), 588, generator=generator)


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("grids", GRIDS)
@torch.inference_mode()
def test_float32_matches_reference(grids: list[Grid], seed: int) -> None:
    tower, resampler, hf_tower, hf_resampler = build(seed)
    pixels, thw = pixels_of(grids, seed), torch.tensor(grids)

    expected_features = hf_tower(pixels, thw).last_hidden_state
    expected = hf_resampler(expected_features, thw)
    features = tower(pixels, grids)
    embeddings = resampler(features, grids)

    assert embeddings.shape == (sum(num_tokens(grid, VISION) for grid in grids), TEXT.hidden_size)
    assert expected.std() > 0.3
    torch.testing.assert_close(features, expected_features, rtol=0, atol=MAX_ERROR_FP32)
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=MAX_ERROR_FP32)


@pytest.mark.parametrize("grids", GRIDS[1:])
@torch.inference_mode()
def test_bfloat16_stays_near_reference(grids: list[Grid]) -> None:
    """Both sides in bfloat16; the attention kernels round differently."""
    tower, resampler, hf_tower, hf_resampler = (m.to(torch.bfloat16) for m in build(3))
    pixels, thw = pixels_of(grids, 3), torch.tensor(grids)

    expected = hf_resampler(hf_tower(pixels, thw).last_hidden_state, thw)
    embeddings = resampler(tower(pixels, grids), grids)

    assert embeddings.dtype == torch.bfloat16
    error = (embeddings.float() - expected.float()).abs()
    assert error.mean() < MAX_MEAN_ERROR_BF16
    assert error.max() < MAX_ERROR_BF16


@torch.inference_mode()
def test_items_do_not_see_each_other() -> None:
    """An item's embeddings are the same alone and beside others, and frames of a video apart."""
    tower, resampler, *_ = build(5)
    grids = [Grid(1, 4, 6), Grid(4, 6, 4), Grid(1, 6, 4)]
    pixels = pixels_of(grids, 5)
    together = resampler(tower(pixels, grids), grids)

    sizes = [grid.num_patches for grid in grids]
    pairs = [*pixels.split(sizes)[1].split(2 * 24)]
    halves = [resampler(tower(pair, [Grid(2, 6, 4)]), [Grid(2, 6, 4)]) for pair in pairs]
    video = together.split([num_tokens(grid, VISION) for grid in grids])[1]
    torch.testing.assert_close(torch.cat(halves), video, rtol=0, atol=MAX_ERROR_FP32)


def test_wrong_grids_are_refused() -> None:
    tower, resampler, *_ = build(0)
    with pytest.raises(ValueError, match="do not hold 5 patches"):
        tower(torch.zeros(5, 588), [Grid(1, 2, 2)])
    with pytest.raises(ValueError, match="multiples"):
        tower(torch.zeros(6, 588), [Grid(1, 2, 3)])
    with pytest.raises(ValueError, match="cannot be merged"):
        resampler(torch.zeros(12, VISION.hidden_size), [Grid(3, 2, 2)])
