"""How fast the simulated replicas are: measured on this machine, or read from a file."""

from __future__ import annotations

import io
import json
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from chiasm.client import Client, Prompt, Sampling, Tokens, image, user
from chiasm.local import LocalStack, StackConfig
from chiasm.membership import Role
from chiasm.orchestrator.types import Pool

IMAGES, STEPS = 12, 192
IMAGE_SIZE = (336, 448)
BATCHES = (1, 8)
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Of one replica, in seconds.

    patch_s: an encoder's time per patch. vision_token_s, text_token_s: an expert server's per token
    of a prompt or an answer, all layers. step_s, step_request_s: a decoder's step and what each
    request adds to it. prefill_token_s: a decoder's per prompt token. boot_s: from the decision to
    a ready replica.
    """

    patch_s: float
    vision_token_s: float
    text_token_s: float
    step_s: float
    step_request_s: float
    prefill_token_s: float
    boot_s: Mapping[Pool, float]

    def write(self, path: Path, note: str) -> None:
        """As JSON."""
        path.write_text(json.dumps({"note": note, **asdict(self)}, indent=1) + "\n")


def read(path: Path) -> Rates:
    """Rates from a file that `write` has made."""
    values = json.loads(path.read_text())
    values.pop("note")
    values["boot_s"] = {Pool(name): s for name, s in values["boot_s"].items()}
    return Rates(**values)


def measure(model: Path) -> Rates:
    """Rates of a small stack on this machine, one replica each; `boot_s` is left at 0."""
    stack = LocalStack(StackConfig(model=model))
    try:
        endpoint = stack.start()
        with Client(endpoint, timeout_s=TIMEOUT_S) as client:
            pixels = np.random.default_rng(0)
            _complete(client, [user(image(_png(pixels)), "What is it?")], 8)  # warm-up
            before = _scrape(stack)
            for _ in range(IMAGES):
                _complete(client, [user(image(_png(pixels)), "What is it?")], 1)
            seen = _since(stack, before)
            before = _scrape(stack)
            start = time.monotonic()
            prompt = pixels.integers(10, 400, 1024).tolist()
            _complete(client, Tokens(token_ids=prompt), 1)
            prefill_s = time.monotonic() - start
            step_s = {batch: _step_s(client, pixels, batch) for batch in BATCHES}
            decoded = _since(stack, before)
    finally:
        stack.stop()
    text_tokens = decoded["prefill text"] + decoded["decode text"]
    per_request = (step_s[BATCHES[1]] - step_s[BATCHES[0]]) / (BATCHES[1] - BATCHES[0])
    return Rates(
        patch_s=seen["encoder s"] / seen["patches"],
        vision_token_s=seen["vision s"] / seen["prefill vision"],
        text_token_s=decoded["text s"] / text_tokens,
        step_s=step_s[1] - per_request,
        step_request_s=per_request,
        prefill_token_s=prefill_s / 1024,
        boot_s=dict.fromkeys(Pool, 0.0),
    )


def _complete(client: Client, prompt: Prompt, new_tokens: int) -> None:
    sampling = Sampling(max_tokens=new_tokens, temperature=0, ignore_eos=True)
    client.complete(prompt, sampling=sampling)


def _step_s(client: Client, random: np.random.Generator, batch: int) -> float:
    """Seconds of a step that decodes for so many requests: answers to one prompt share them."""
    prompt = Tokens(token_ids=random.integers(10, 400, 16).tolist())
    sampling = Sampling(max_tokens=STEPS, temperature=1, seed=0, ignore_eos=True, n=batch)
    start = time.monotonic()
    client.complete(prompt, sampling=sampling)
    return (time.monotonic() - start) / STEPS


def _png(random: np.random.Generator) -> bytes:
    encoded = io.BytesIO()
    pixels = random.integers(0, 256, (*IMAGE_SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(encoded, format="PNG")
    return encoded.getvalue()


_SAMPLES = {
    "patches": (Role.VISION_ENCODER, 'chiasm_encoder_patches_total{kind="image"}'),
    "encoder s": (Role.VISION_ENCODER, 'chiasm_encoder_compute_seconds_sum{kind="image"}'),
    "vision s": (Role.EXPERT_POOL, 'chiasm_dispatch_compute_seconds_sum{modality="vision"}'),
    "text s": (Role.EXPERT_POOL, 'chiasm_dispatch_compute_seconds_sum{modality="text"}'),
    "prefill text": (
        Role.DECODER,
        'chiasm_decoder_tokens_total{modality="text",phase="prefill"}',
    ),
    "prefill vision": (
        Role.DECODER,
        'chiasm_decoder_tokens_total{modality="vision",phase="prefill"}',
    ),
    "decode text": (Role.DECODER, 'chiasm_decoder_tokens_total{modality="text",phase="decode"}'),
}


def _scrape(stack: LocalStack) -> dict[str, float]:
    """Sums over all members."""
    found = dict.fromkeys(_SAMPLES, 0.0)
    for member in stack.topology().members:
        with urllib.request.urlopen(f"http://{member.metrics_address}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        for name, (role, sample) in _SAMPLES.items():
            if member.role is role:
                found[name] += float(values.get(sample, 0.0))
    return found


def _since(stack: LocalStack, before: Mapping[str, float]) -> dict[str, float]:
    return {name: value - before[name] for name, value in _scrape(stack).items()}
