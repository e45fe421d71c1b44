"""Traces, metrics and logs of a running stack: one `chiasm up` for all tests."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from e2e.collector import Trace
from e2e.metrics_scrape import Families, scrape, total
from e2e.observed import WAIT_S, Observed, wait_until

from chiasm import errors
from chiasm.client import Sampling, image, user

GREEDY = Sampling(max_tokens=8, temperature=0, ignore_eos=True)
NUM_TOKENS = 64
CLOCK_SLACK_NS = 2_000_000
MAX_PAIRS = 10
PHASES = {"decoder: prefill", "decoder: decode_tokens"}
"""What links to the steps of others."""

EDGES = {
    ("cli: chat", "gateway: chat tiny"),
    ("gateway: chat tiny", "gateway: layout"),
    ("gateway: chat tiny", "gateway: encode image"),
    ("gateway: encode image", "vision-encoder: encode image"),
    ("vision-encoder: encode image", "vision-encoder: preprocess"),
    ("vision-encoder: encode image", "vision-encoder: vit"),
    ("gateway: chat tiny", "gateway: decode"),
    ("gateway: decode", "decoder: decode"),
    ("decoder: decode", "decoder: fetch embeddings"),
    ("decoder: fetch embeddings", "vision-encoder: fetch embeddings"),
    ("decoder: decode", "decoder: prefill"),
    ("decoder: decode", "decoder: decode_tokens"),
    ("decoder: prefill", "decoder: engine_step"),
    ("decoder: decode_tokens", "decoder: engine_step"),
    ("decoder: engine_step", "decoder: dispatch text"),
    ("decoder: engine_step", "decoder: dispatch vision"),
    ("decoder: dispatch text", "text-experts: experts text"),
    ("decoder: dispatch vision", "vision-experts: experts vision"),
}
"""The whole tree of a request with an image, as docs/observability.md describes it."""


def assert_whole(trace: Trace) -> None:
    """One root, nobody's parent missing, no child outside its parent's time."""
    assert len(trace.roots) == 1
    assert not trace.orphans
    for parent, child in trace.pairs():
        assert child.start_ns >= parent.start_ns - CLOCK_SLACK_NS, (parent, child)
        assert child.end_ns <= parent.end_ns + CLOCK_SLACK_NS, (parent, child)
        assert child.start_ns <= child.end_ns


# Traces


def test_a_request_is_one_tree_over_all_processes(observed: Observed) -> None:
    done = observed.generate(
        "--image", str(observed.picture(1)), "--prompt", "What?", "--max-tokens", str(NUM_TOKENS)
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    expected = bounded(len(observed.model.text.moe_layers))
    trace = observed.collector.trace_of(answer["request_id"], lambda t: labels(t) == expected)
    assert_whole(trace)
    assert trace.edges == EDGES
    assert not [span for span in trace.spans if span.is_error]
    instances = {(span.service, span.instance) for span in trace.spans}
    assert len({instance for _, instance in instances}) == len(instances) == 6
    assert labels(trace) == expected
    assert_described(trace, answer)


def labels(trace: Trace) -> dict[str, int]:
    """How many spans there are of each kind."""
    return dict(Counter(span.label for span in trace.spans))


def bounded(num_layers: int) -> dict[str, int]:
    """Two steps are traced in detail, however many tokens follow."""
    return dict.fromkeys({label for edge in EDGES for label in edge}, 1) | {
        "decoder: engine_step": 2,
        "decoder: dispatch text": 2 * num_layers,
        "text-experts: experts text": 2 * num_layers,
        "decoder: dispatch vision": num_layers,
        "vision-experts: experts vision": num_layers,
    }


def assert_described(trace: Trace, answer: dict[str, Any]) -> None:
    """What the spans say is what the client heard."""
    usage = answer["usage"]
    chat = trace.one("gateway: chat tiny")
    assert chat.kind == "SERVER"
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "chiasm",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": NUM_TOKENS,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.request.stream": True,
        "gen_ai.response.model": "tiny",
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.text.input_tokens": usage["prompt_text_tokens"],
        "gen_ai.usage.image.input_tokens": usage["prompt_image_tokens"],
        "gen_ai.usage.video.input_tokens": 0,
        "gen_ai.usage.output_tokens": NUM_TOKENS,
        "gen_ai.usage.cache_read.input_tokens": usage["cached_tokens"],
    }
    assert {key: chat.attributes.get(key) for key in expected} == expected
    assert 0 < chat.attributes["gen_ai.response.time_to_first_chunk"] < 60
    client = trace.one("cli: chat")
    assert client.kind == "CLIENT"
    for key in ("provider.name", "response.id", "usage.input_tokens"):
        assert client.attributes[f"gen_ai.{key}"] == chat.attributes[f"gen_ai.{key}"]
    cached = "gen_ai.usage.cache_read.input_tokens"
    assert client.attributes[cached] == trace.one("decoder: prefill").attributes[cached]
    encode = trace.one("vision-encoder: encode image").attributes
    assert encode["chiasm.media.tokens"] == usage["prompt_image_tokens"]
    assert encode["chiasm.media.cached"] is False
    for dispatch in trace.named("decoder: dispatch text"):
        assert isinstance(dispatch.attributes["server.port"], int)
    for experts in trace.named("text-experts: experts text"):
        assert experts.attributes["chiasm.compute_s"] > 0


def test_requests_at_once_are_trees_of_their_own(observed: Observed) -> None:
    """Their prompts are prefilled in common steps: each lies in one tree, the other links to it."""
    # One may be through its prompt before the other arrives: then they have no step in common.
    assert any(linked_in_a_pair(observed, attempt) for attempt in range(MAX_PAIRS))


def linked_in_a_pair(observed: Observed, attempt: int) -> bool:
    """Asks for two answers at once and checks their trees; whether there are links."""
    start = threading.Barrier(2)

    def ask(words: str) -> str:
        start.wait(WAIT_S)
        prompt = f"{attempt} {words * 400}"  # a new one, so that no part of it is cached
        return observed.client.complete([user(prompt)], sampling=GREEDY).request_id

    with ThreadPoolExecutor(2) as pool:
        ids = list(pool.map(ask, ("red green blue ", "one two three ")))
    traces = [observed.collector.trace_of(request_id, has_phases) for request_id in ids]
    steps = {}
    for trace in traces:
        assert_whole(trace)
        assert trace.roots[0].label == "gateway: chat tiny"
        assert has_phases(trace)
        steps |= {(s.trace_id, s.span_id): s for s in trace.named("decoder: engine_step")}
    assert traces[0].roots[0].trace_id != traces[1].roots[0].trace_id
    linked = [(span, link) for trace in traces for span in trace.spans for link in span.links]
    for span, link in linked:
        assert span.label in PHASES
        assert steps[link].trace_id != span.trace_id
        assert steps[link].attributes["chiasm.requests"] == 2
    return bool(linked)


def has_phases(trace: Trace) -> bool:
    """Whether all of its phases have come; the steps in them end, and come, before them."""
    return labels(trace).keys() >= PHASES


def test_a_failed_request_says_why(observed: Observed) -> None:
    """A picture that ends too soon: its header is fine, so only the encoder finds out."""
    path = observed.folder / "broken.png"
    path.write_bytes(observed.picture(2).read_bytes()[:2000])
    before, began_ns = observed.scrape()["gateway"], time.time_ns()
    done = observed.generate("--image", str(path), "--prompt", "What?")
    assert done.returncode == 2
    expected = {
        "cli: chat",
        "gateway: chat tiny",
        "gateway: encode image",
        "vision-encoder: encode image",
    }
    trace = observed.collector.trace(
        lambda span: span.service == "chiasm-cli" and span.is_error and span.start_ns >= began_ns,
        lambda t: failed(t) >= expected,
    )
    assert_whole(trace)
    assert failed(trace) >= expected
    assert {s.attributes["error.type"] for s in trace.spans if s.is_error} == {"INVALID_ARGUMENT"}
    assert not trace.named("decoder: decode")
    after = observed.scrape()["gateway"]
    name, reason = "chiasm_requests_failed_total", "INVALID_ARGUMENT"
    assert total(after, name, reason=reason) - total(before, name, reason=reason) == 1


def failed(trace: Trace) -> set[str]:
    """What went wrong, by its own account."""
    return {span.label for span in trace.spans if span.is_error}


def test_what_the_caller_does_not_sample_is_not_traced(observed: Observed) -> None:
    trace_id = "0123456789abcdef0123456789abcdef"
    metadata = (("traceparent", f"00-{trace_id}-0123456789abcdef-00"),)
    observed.send(metadata=metadata)
    request_id = observed.client.complete("Hello", sampling=GREEDY).request_id
    observed.collector.trace_of(request_id)  # what comes after it has come
    assert not [s for s in observed.collector.spans() if s.trace_id == trace_id]


def test_a_trace_starts_with_a_request_only(observed: Observed) -> None:
    """Dispatches of steps without detail carry no context, and make no traces of their own."""
    request_id = observed.client.complete("Hello there", sampling=GREEDY).request_id
    observed.collector.trace_of(request_id)
    roots = {span.label for span in observed.collector.spans() if not span.parent_id}
    assert roots <= {"cli: chat", "gateway: chat tiny"}


# Metrics


def test_metrics_count_what_was_done(observed: Observed) -> None:
    before = observed.scrape()
    sampling = Sampling(max_tokens=5, temperature=0, ignore_eos=True)
    asked = [
        observed.client.complete("How are you?", sampling=sampling),
        observed.client.complete(
            [user(image(observed.picture(3).read_bytes()), "What?")], sampling=sampling
        ),
    ]
    with pytest.raises(errors.InvalidArgument):
        observed.client.complete("x", sampling=Sampling(top_p=2.0))
    after = observed.scrape()

    def grown(service: str, sample: str, **labels: str) -> float:
        return total(after[service], sample, **labels) - total(before[service], sample, **labels)

    assert grown("gateway", "chiasm_requests_accepted_total") == 3
    assert grown("gateway", "chiasm_requests_finished_total", reason="length") == 2
    assert grown("gateway", "chiasm_requests_failed_total") == 1
    usages = [answer.usage for answer in asked]
    for modality in ("text", "image", "video"):
        expected = sum(getattr(usage, f"prompt_{modality}_tokens") for usage in usages)
        assert grown("gateway", "chiasm_prompt_tokens_total", modality=modality) == expected
    assert grown("gateway", "chiasm_completion_tokens_total") == 10
    assert grown("gateway", "chiasm_time_to_first_token_seconds_count") == 2

    num_vision = usages[1].prompt_image_tokens + 2  # the delimiters are routed as vision
    num_prompt = sum(usage.prompt_tokens for usage in usages)
    cached = grown("decoder", "chiasm_prefix_cache_hits_total")
    tokens = "chiasm_decoder_tokens_total"
    assert grown("decoder", tokens, phase="prefill", modality="vision") == num_vision
    assert grown("decoder", tokens, phase="prefill") == num_prompt - cached
    assert grown("decoder", tokens, phase="decode") == 2 * (5 - 1)
    assert grown("decoder", "chiasm_decoder_queue_seconds_count") == 2
    for method, service in (("Generate", "gateway"), ("Decode", "decoder")):
        name = next(n for n in methods(after[service]) if n.endswith(f"/{method}"))
        assert grown(service, "chiasm_rpc_duration_seconds_count", method=name, outcome="OK") == 2

    text = observed.model.text
    per_token = text.moe_k * len(text.moe_layers)
    experts = "chiasm_expert_tokens_total"
    num_text = num_prompt - cached - num_vision + 2 * (5 - 1)
    assert grown("vision-pool", experts, modality="vision") == num_vision * per_token
    assert grown("text-pool", experts, modality="text") == num_text * per_token
    for pool in ("text", "vision"):
        num = grown(f"{pool}-pool", "chiasm_dispatch_compute_seconds_count")
        assert num == grown("decoder", "chiasm_decoder_expert_wait_seconds_count", modality=pool)
        assert num == grown(f"{pool}-pool", "chiasm_dispatch_queue_seconds_count")
        of_experts = grown(f"{pool}-pool", "chiasm_expert_compute_seconds_total", modality=pool)
        of_shards = grown(f"{pool}-pool", "chiasm_shard_compute_seconds_total", modality=pool)
        assert 0 < of_experts < of_shards

    encoded = {"kind": "image"}
    assert grown("vision-encoder", "chiasm_encoder_cache_misses_total") == 1
    assert grown("vision-encoder", "chiasm_encoder_patches_total", **encoded) == 6 * 8
    assert grown("vision-encoder", "chiasm_encoder_compute_seconds_count", **encoded) == 1


def methods(families: Families) -> set[str]:
    return {s.labels["method"] for s in families["chiasm_rpc_duration_seconds"].samples}


def test_the_ledger_balances_and_nothing_is_left_over(observed: Observed) -> None:
    found = observed.scrape()
    gateway, decoder = found["gateway"], found["decoder"]
    accepted = total(gateway, "chiasm_requests_accepted_total")
    ended = total(gateway, "chiasm_requests_finished_total")
    ended += total(gateway, "chiasm_requests_failed_total")
    assert accepted == ended > 0
    for gauge in ("running_requests", "waiting_requests", "kv_used_tokens"):
        assert total(decoder, f"chiasm_decoder_{gauge}") == 0
    assert total(decoder, "chiasm_decoder_kv_capacity_tokens") > 0
    assert total(found["vision-encoder"], "chiasm_encoder_queued_patches") == 0
    assert total(found["vision-encoder"], "chiasm_encoder_cache_bytes") > 0
    for pool in ("text-pool", "vision-pool"):
        assert total(found[pool], "chiasm_queued_dispatches") == 0
    orchestrator = found["orchestrator"]
    for role, count in {"gateway": 1, "decoder": 1, "vision-encoder": 1, "expert-pool": 2}.items():
        assert total(orchestrator, "chiasm_members", role=role, state="ready") == count
    assert total(orchestrator, "chiasm_pool_shards", modality="text") == 2
    assert total(orchestrator, "chiasm_pool_shards_missing") == 0


def test_gauges_fall_when_the_client_goes_away(observed: Observed) -> None:
    """No step follows that could set them."""

    def gauge(name: str) -> float:
        return total(scrape(observed.metrics["decoder"]), f"chiasm_decoder_{name}")

    events = observed.client.generate(
        "Tell me more", sampling=Sampling(max_tokens=3000, temperature=0, ignore_eos=True)
    )
    for _ in range(4):
        next(events)
    assert gauge("running_requests") == 1
    assert gauge("kv_used_tokens") > 0
    events.close()  # type: ignore[attr-defined]  # it is a generator
    wait_until(lambda: gauge("running_requests") == gauge("kv_used_tokens") == 0)


def test_metrics_are_well_formed(observed: Observed) -> None:
    units = ("_seconds", "_bytes", "_tokens", "_patches", "_requests", "_dispatches", "_shards")
    units += ("_replicas",)
    plain = {"chiasm_members", "chiasm_topology_version", "chiasm_pool_shards_missing"}
    plain |= {"chiasm_requests_in_flight", "chiasm_orchestrator_leads", "chiasm_placement_epoch"}
    labels = {"method", "outcome", "modality", "expert", "reason", "kind", "phase", "split", "le"}
    labels |= {"shard", "way", "pool"}
    for service, families in observed.scrape().items():
        own = [family for family in families.values() if family.name.startswith("chiasm_")]
        assert len(own) > 1, service
        for family in own:
            assert family.documentation.endswith("."), family.name
            if family.type == "histogram":
                assert family.name.endswith("_seconds")
            elif family.type == "gauge":
                assert family.name.endswith(units) or family.name in plain
            else:
                assert family.type == "counter"
            names = {label for sample in family.samples for label in sample.labels}
            assert names <= labels | {"role", "state"}
            series = Counter(sample.name for sample in family.samples)
            assert all(count <= 500 for count in series.values())


# Logs


def test_a_request_can_be_followed_through_the_logs(observed: Observed) -> None:
    request_id = "order-66/a_b.c"
    path = observed.picture(4)
    sampling = GREEDY
    prompt = [user(image(path.read_bytes()), "What?")]
    observed.client.complete(prompt, sampling=sampling, request_id=request_id)
    observed.scrape()
    events = {"gateway": "request_finished", "vision-encoder": "encoded", "decoder": "decoded"}
    trace = observed.collector.trace_of(request_id, lambda t: t.named("decoder: decode"))
    for service, event in events.items():
        lines = [ln for ln in observed.lines(service) if ln.get("request_id") == request_id]
        (line,) = [line for line in lines if line["event"] == event]
        assert line["trace_id"] == trace.roots[0].trace_id
    assert trace.one("decoder: decode").attributes["gen_ai.request.id"] == request_id


@pytest.mark.parametrize("field", ["", "from-the-field"])
def test_an_id_in_the_metadata_counts(observed: Observed, field: str) -> None:
    header = f"from-the-header-{field}"
    expected = field or header
    assert observed.send(metadata=(("x-request-id", header),), request_id=field) == expected
    observed.scrape()
    for service, event in (("gateway", "request_finished"), ("decoder", "decoded")):
        ids = [ln.get("request_id") for ln in observed.lines(service) if ln["event"] == event]
        assert expected in ids


def test_every_line_is_structured(observed: Observed) -> None:
    """The last test here: whatever went before must not have left a defect in a log either."""
    paths = sorted(observed.log_dir.glob("*.log"))
    assert len(paths) == 6
    for path in paths:
        lines = observed.lines(path.stem)
        assert lines
        for line in lines:
            assert {"event", "level", "timestamp", "service"} <= line.keys()
            assert line["level"] in ("info", "warning"), line
        for line in lines:
            if line["event"] in ("rpc_refused", "request_failed", "encoded", "decoded"):
                assert line["request_id"]
