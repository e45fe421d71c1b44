"""What `transformers` answers: the judge of the parity tests."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import font_roboto
import numpy as np
import torch
from checkpoint.converters import reference_model
from e2e.cases import Case
from transformers import (
    AutoTokenizer,
    Ernie4_5_VLMoeImageProcessor,
    Ernie4_5_VLMoeProcessor,
    Ernie4_5_VLMoeVideoProcessor,
)

from chiasm.client import Result

LOGITS_TOLERANCE = 1e-4
FONT = str(font_roboto.font_files["Roboto"])
"""That of the times on video frames."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Prompt ids, float32 logits [T, V] of the prompt and the greedy continuation."""

    prompt_token_ids: list[int]
    logits: np.ndarray
    token_ids: list[int]


class Reference:
    """The reference model of a checkpoint with the processor its files describe.

    `min_gate_gap` tells whether any two correct implementations must agree: where two experts are
    tied to within rounding, they need not, and everything after that token may differ.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.min_gate_gap = float("inf")
        for module in model.modules():
            if hasattr(module, "moe_statics"):
                module.register_forward_hook(self._watch_gate)

    def _watch_gate(self, gate: Any, inputs: tuple[torch.Tensor], _: object) -> None:
        """Notes how near the last chosen expert and the first not chosen came to each other."""
        probs = torch.softmax(inputs[0].float() @ gate.weight.float().t(), dim=-1)
        ordered = (probs + gate.moe_statics.e_score_correction_bias).sort(descending=True).values
        if ordered.numel():
            gap = ordered[:, gate.top_k - 1] - ordered[:, gate.top_k]
            self.min_gate_gap = min(self.min_gate_gap, float(gap.min()))

    @classmethod
    def of(cls, directory: Path, dtype: torch.dtype = torch.float32) -> Reference:
        return cls(reference_model(directory, dtype), processor(directory))

    def inputs(self, case: Case) -> dict[str, torch.Tensor]:
        metadata = [
            {"total_num_frames": len(v), "fps": 10.0, "frames_indices": list(range(len(v)))}
            for v in case.videos
        ]
        media: dict[str, Any] = {"images": list(case.images) or None}
        if case.videos:
            media |= {"videos": list(case.videos), "video_metadata": metadata}
        return dict(self.processor(text=[case.text], return_tensors="pt", **media))

    @torch.no_grad()
    def logits(self, case: Case) -> np.ndarray:
        """Logits of the prompt, float32 [T, V]."""
        logits = self.model(**self.inputs(case)).logits[0].float().numpy()
        self.model.model.rope_deltas = None  # the call leaves it for a next step that never comes
        return np.asarray(logits)

    @torch.no_grad()
    def answer(self, case: Case, num_tokens: int) -> Answer:
        inputs = self.inputs(case)
        length = inputs["input_ids"].shape[1]
        logits = self.logits(case)
        generated = self.model.generate(
            **inputs, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        return Answer(
            prompt_token_ids=inputs["input_ids"][0].tolist(),
            logits=logits,
            token_ids=generated[0, length:].tolist(),
        )


def processor(directory: Path) -> Any:
    """The checkpoint's own processor, or for the hub's flat files one with their limits."""
    if (directory / "processor_config.json").is_file():
        return Ernie4_5_VLMoeProcessor.from_pretrained(directory)
    flat = json.loads((directory / "preprocessor_config.json").read_text())
    size = flat["size"]
    video = json.loads((directory / "video_preprocessor_config.json").read_text())
    return Ernie4_5_VLMoeProcessor(
        image_processor=Ernie4_5_VLMoeImageProcessor(size=size),
        tokenizer=AutoTokenizer.from_pretrained(directory),
        video_processor=Ernie4_5_VLMoeVideoProcessor(**{"font": FONT} | video),
    )


def assert_same(found: Result, expected: Answer) -> None:
    """Prompt, its logits, and as many greedy tokens as the reference went on for."""
    assert list(found.prompt_token_ids) == expected.prompt_token_ids
    assert found.prompt_logits is not None
    assert found.prompt_logits.shape == expected.logits.shape
    assert np.abs(found.prompt_logits - expected.logits).max() <= LOGITS_TOLERANCE
    assert list(found.token_ids) == expected.token_ids
    assert found.finish_reason == "length"
    assert found.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert found.usage.completion_tokens == len(expected.token_ids)
