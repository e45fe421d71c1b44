"""A checkpoint directory without weights, saved by transformers, and its processor as the judge."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer
from transformers import (
    Ernie4_5_VLMoeConfig,
    Ernie4_5_VLMoeImageProcessor,
    Ernie4_5_VLMoeProcessor,
    Ernie4_5_VLMoeVideoProcessor,
    PreTrainedTokenizerFast,
)

from chiasm.model.config import ModelConfig
from chiasm.model.processing import ProcessingConfig
from chiasm.model.tokenizer import Tokenizer

SPECIAL = (
    *("<unk>", "<s>", "</s>", "<|begin_of_sentence|>", "<|end_of_sentence|>", "<mask:1>"),
    *("<|IMAGE_PLACEHOLDER|>", "<|IMAGE_START|>", "<|IMAGE_END|>"),
    *("<|VIDEO_PLACEHOLDER|>", "<|VIDEO_START|>", "<|VIDEO_END|>", "<think>", "</think>"),
)
NAMED = {
    f"{kind.lower()}{part.lower()}_token": f"<|{kind}{spelling}|>"
    for kind in ("IMAGE", "VIDEO")
    for part, spelling in (("", "_PLACEHOLDER"), ("_start", "_START"), ("_end", "_END"))
}
CORPUS = [
    "User: What is in the picture?\nAssistant: The picture shows a lynx, not a dog.",
    "Picture : Video : Assistant: \nAssistant: User: Describe the pictures and the video.\n\n",
    "你好, 世界! 这张图片里有什么? naïve café über Ångström 12 345 6789",
] * 4


def save_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    fast = FastTokenizer(models.BPE(unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(CORPUS, trainer)
    fast.add_tokens([AddedToken(str(digit), normalized=False) for digit in range(10)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        unk_token="<unk>",
        pad_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<|begin_of_sentence|>",
        sep_token="<|end_of_sentence|>",
        mask_token="<mask:1>",
        extra_special_tokens=NAMED,
    )
    tokenizer.save_pretrained(directory)
    return tokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    ids = {token: i for i, token in enumerate(SPECIAL)}
    Ernie4_5_VLMoeConfig(
        text_config={
            "vocab_size": 600,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "moe_intermediate_size": [48, 16],
            "moe_k": 2,
            "moe_num_experts": 8,
            "mlp_layer_types": ["dense", "sparse"],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 500000.0,
                "mrope_section": [6, 6, 4],
            },
        },
        vision_config={"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64},
        **{f"{name}_id": ids[spelling] for name, spelling in NAMED.items()},
    ).save_pretrained(directory)
    Ernie4_5_VLMoeProcessor(
        image_processor=Ernie4_5_VLMoeImageProcessor(),
        tokenizer=save_tokenizer(directory),
        video_processor=Ernie4_5_VLMoeVideoProcessor(
            draw_on_frames=False, size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16}
        ),
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def reference(checkpoint: Path) -> Any:
    return Ernie4_5_VLMoeProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def config(checkpoint: Path) -> ModelConfig:
    return ModelConfig.load(checkpoint)


@pytest.fixture(scope="session")
def processing(checkpoint: Path, config: ModelConfig) -> ProcessingConfig:
    return ProcessingConfig.load(checkpoint, config)


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(checkpoint)


@pytest.fixture(scope="session")
def png() -> Callable[[np.ndarray], bytes]:
    def encode(pixels: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    return encode


@pytest.fixture(scope="session")
def film() -> Callable[..., bytes]:
    """Writes frames [T, H, W, 3], lossless unless another codec is asked for.

    rotation: degrees counter-clockwise by which players are told to turn them.
    """

    def encode(
        frames: Sequence[np.ndarray],
        *,
        container: str = "avi",
        codec: str = "png",
        pix_fmt: str = "rgb24",
        fps: Fraction | int = 10,
        rotation: int = 0,
    ) -> bytes:
        file = io.BytesIO()
        with av.open(file, "w", format=container) as output:
            stream = output.add_stream(codec, rate=fps)
            stream.height, stream.width = frames[0].shape[:2]
            stream.pix_fmt = pix_fmt
            stream.set_display_rotation(rotation)
            for frame in frames:
                output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            output.mux(stream.encode(None))
        return file.getvalue()

    return encode
