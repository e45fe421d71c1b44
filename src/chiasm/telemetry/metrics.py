"""Every Prometheus metric of every service, declared once; a process exports its service's.

docs/observability.md lists them.
"""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.metrics import MetricWrapperBase

# A time series per label set that says when it was made would double what is scraped.
disable_created_metrics()  # type: ignore[no-untyped-call]  # no annotations there

LATENCY_BUCKETS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.1, 0.25, 0.5,
    0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip

TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160, 640, 2560,
)  # fmt: skip
E2E_BUCKETS = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip

RPC_SECONDS = Histogram(
    "chiasm_rpc_duration_seconds",
    "Server-side duration of calls.",
    ["method", "outcome"],
    buckets=LATENCY_BUCKETS,
)

DISPATCH_QUEUE_SECONDS = Histogram(
    "chiasm_dispatch_queue_seconds",
    "Time dispatches waited in an expert server.",
    ["modality"],
    buckets=LATENCY_BUCKETS,
)
DISPATCH_COMPUTE_SECONDS = Histogram(
    "chiasm_dispatch_compute_seconds",
    "Time dispatches spent in the experts.",
    ["modality"],
    buckets=LATENCY_BUCKETS,
)
DISPATCH_TOKENS = Counter(
    "chiasm_dispatch_tokens_total", "Tokens received by an expert server.", ["modality"]
)
EXPERT_TOKENS = Counter(
    "chiasm_expert_tokens_total", "Tokens computed by each expert.", ["modality", "expert"]
)
EXPERT_COMPUTE_SECONDS = Counter(
    "chiasm_expert_compute_seconds_total",
    "Time spent on each expert's products; on CPUs alone, as a GPU multiplies all experts at once.",
    ["modality", "expert"],
)
SHARD_TOKENS = Counter(
    "chiasm_shard_tokens_total",
    "Tokens with an expert in a shard, all layers together.",
    ["modality", "shard"],
)
SHARD_COMPUTE_SECONDS = Counter(
    "chiasm_shard_compute_seconds_total", "Time spent computing a shard.", ["modality", "shard"]
)
DISPATCH_FAILURES = Counter(
    "chiasm_dispatch_failures_total", "Dispatches answered with an error.", ["modality", "reason"]
)
QUEUED_DISPATCHES = Gauge(
    "chiasm_queued_dispatches", "Dispatches queued or running in an expert server.", ["modality"]
)


REQUESTS_ACCEPTED = Counter(
    "chiasm_requests_accepted_total",
    "Generate calls taken up; equals finished + failed + in flight at any time.",
)
REQUESTS_FINISHED = Counter(
    "chiasm_requests_finished_total", "Generate calls that ended well.", ["reason"]
)
REQUESTS_FAILED = Counter(
    "chiasm_requests_failed_total", "Generate calls that ended with a typed error.", ["reason"]
)
RESUMES = Counter(
    "chiasm_request_resumes_total", "Answers that went on with another decoder after a loss."
)
REQUESTS_IN_FLIGHT = Gauge("chiasm_requests_in_flight", "Generate calls being worked on.")
PROMPT_TOKENS = Counter(
    "chiasm_prompt_tokens_total", "Prompt tokens of requests sent to a decoder.", ["modality"]
)
CACHED_PROMPT_TOKENS = Counter(
    "chiasm_cached_prompt_tokens_total",
    "Prompt tokens of answered requests that a decoder's prefix cache had.",
)
COMPLETION_TOKENS = Counter("chiasm_completion_tokens_total", "Tokens streamed to clients.")
TIME_TO_FIRST_TOKEN_SECONDS = Histogram(
    "chiasm_time_to_first_token_seconds",
    "From receipt of a request to its first token.",
    buckets=TTFT_BUCKETS,
)
INTER_TOKEN_SECONDS = Histogram(
    "chiasm_inter_token_seconds",
    "Time between successive tokens of a stream.",
    buckets=LATENCY_BUCKETS,
)
E2E_REQUEST_SECONDS = Histogram(
    "chiasm_e2e_request_seconds",
    "From receipt of a request to its end, for those that ended well.",
    buckets=E2E_BUCKETS,
)
ENCODE_WAIT_SECONDS = Histogram(
    "chiasm_encode_wait_seconds",
    "Time requests with media waited for the vision encoder, all media together.",
    buckets=LATENCY_BUCKETS,
)

ENCODED_PATCHES = Counter("chiasm_encoder_patches_total", "Patches encoded by the ViT.", ["kind"])
ENCODER_QUEUE_SECONDS = Histogram(
    "chiasm_encoder_queue_seconds",
    "Time media items waited in a vision encoder, all stages together.",
    ["kind"],
    buckets=LATENCY_BUCKETS,
)
ENCODER_PREPROCESS_SECONDS = Histogram(
    "chiasm_encoder_preprocess_seconds",
    "Decoding, resizing and patching of a media item.",
    ["kind"],
    buckets=LATENCY_BUCKETS,
)
ENCODER_COMPUTE_SECONDS = Histogram(
    "chiasm_encoder_compute_seconds",
    "ViT and resampler of a media item.",
    ["kind"],
    buckets=LATENCY_BUCKETS,
)
EMBEDDING_CACHE_HITS = Counter(
    "chiasm_encoder_cache_hits_total", "Encodes answered without computing, or by another's work."
)
EMBEDDING_CACHE_MISSES = Counter("chiasm_encoder_cache_misses_total", "Encodes that computed.")
EMBEDDING_CACHE_BYTES = Gauge("chiasm_encoder_cache_bytes", "Embeddings held by the cache.")
QUEUED_PATCHES = Gauge("chiasm_encoder_queued_patches", "Patches waiting or running.")

EXPERT_WAIT_SECONDS = Histogram(
    "chiasm_decoder_expert_wait_seconds",
    "Time the engine stood waiting for one layer's answer of an expert pool.",
    ["modality"],
    buckets=LATENCY_BUCKETS,
)
DISPATCHES_SENT = Counter(
    "chiasm_decoder_dispatches_total",
    "Dispatches sent to expert servers, repeated and hedged ones included, by lane or stream.",
    ["modality", "way"],
)
DISPATCH_ATTEMPTS_FAILED = Counter(
    "chiasm_decoder_dispatch_failures_total",
    "Dispatches that a server did not answer, or with an error.",
    ["modality", "reason"],
)
HEDGES = Counter(
    "chiasm_decoder_hedges_total",
    "Dispatches sent to a replica too, those whose answer came first, and those denied by budget.",
    ["modality", "outcome"],
)
LANES = Counter(
    "chiasm_decoder_lanes_total",
    "Connections to expert servers: with a lane, or why without.",
    ["modality", "outcome"],
)
STEP_SECONDS = Histogram(
    "chiasm_decoder_step_seconds", "Duration of engine steps.", buckets=LATENCY_BUCKETS
)
SPLIT_STEPS = Counter(
    "chiasm_decoder_forward_passes_total",
    "Forward passes, by whether they ran as two micro-batches.",
    ["split"],
)
STEP_TOKENS = Counter(
    "chiasm_decoder_tokens_total", "Tokens computed by the engine.", ["phase", "modality"]
)
DECODER_QUEUE_SECONDS = Histogram(
    "chiasm_decoder_queue_seconds",
    "Time requests waited for admission.",
    buckets=LATENCY_BUCKETS,
)
PREEMPTIONS = Counter(
    "chiasm_decoder_preemptions_total", "Requests that gave their KV cache up and wait again."
)
PREFIX_CACHE_QUERIES = Counter(
    "chiasm_prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache."
)
PREFIX_CACHE_HITS = Counter(
    "chiasm_prefix_cache_hits_total", "Prompt tokens that the prefix cache had."
)
EMBEDDINGS_HITS = Counter(
    "chiasm_decoder_embedding_cache_hits_total",
    "Media items of requests whose embeddings were held, or on their way for another request.",
)
EMBEDDINGS_MISSES = Counter(
    "chiasm_decoder_embedding_cache_misses_total",
    "Media items of requests whose embeddings were fetched from an encoder.",
)
EMBEDDINGS_BYTES = Gauge(
    "chiasm_decoder_embedding_cache_bytes", "Embeddings held by the decoder's cache."
)
DRAFTED_TOKENS = Counter(
    "chiasm_decoder_drafted_tokens_total", "Tokens guessed ahead by speculation."
)
ACCEPTED_TOKENS = Counter(
    "chiasm_decoder_accepted_tokens_total", "Guessed tokens that the model chose, too."
)
RUNNING_REQUESTS = Gauge("chiasm_decoder_running_requests", "Requests in the running batch.")
WAITING_REQUESTS = Gauge("chiasm_decoder_waiting_requests", "Requests waiting for admission.")
KV_TOKENS_USED = Gauge("chiasm_decoder_kv_used_tokens", "Tokens with KV cache reserved.")
KV_TOKENS_TOTAL = Gauge("chiasm_decoder_kv_capacity_tokens", "Tokens the KV cache can hold.")


ORCHESTRATOR_LEADS = Gauge(
    "chiasm_orchestrator_leads", "1 while this orchestrator is the leader, 0 while it follows."
)
MEMBERS = Gauge("chiasm_members", "Members in the topology.", ["role", "state"])
TOPOLOGY_VERSION = Gauge("chiasm_topology_version", "Version of the topology.")
POOL_SHARDS = Gauge("chiasm_pool_shards", "Shards an expert pool is cut into.", ["modality"])
POOL_SHARDS_MISSING = Gauge(
    "chiasm_pool_shards_missing", "Shards of an expert pool without a ready server.", ["modality"]
)
REPLICAS_WANTED = Gauge(
    "chiasm_pool_wanted_replicas", "Replicas that were decided for a pool.", ["pool"]
)
REPLICAS_DEMANDED = Gauge(
    "chiasm_pool_demand_replicas",
    "Fully used replicas that would do for what a pool has to do; absent while it is not known.",
    ["pool"],
)
PLACEMENT_EPOCH = Gauge(
    "chiasm_placement_epoch", "Epoch of the last assignment of shards to expert servers."
)


OF_SERVICE: dict[str, tuple[MetricWrapperBase, ...]] = {
    "gateway": (
        REQUESTS_ACCEPTED,
        REQUESTS_FINISHED,
        REQUESTS_FAILED,
        RESUMES,
        REQUESTS_IN_FLIGHT,
        PROMPT_TOKENS,
        CACHED_PROMPT_TOKENS,
        COMPLETION_TOKENS,
        TIME_TO_FIRST_TOKEN_SECONDS,
        INTER_TOKEN_SECONDS,
        E2E_REQUEST_SECONDS,
        ENCODE_WAIT_SECONDS,
    ),
    "vision-encoder": (
        ENCODED_PATCHES,
        ENCODER_QUEUE_SECONDS,
        ENCODER_PREPROCESS_SECONDS,
        ENCODER_COMPUTE_SECONDS,
        EMBEDDING_CACHE_HITS,
        EMBEDDING_CACHE_MISSES,
        EMBEDDING_CACHE_BYTES,
        QUEUED_PATCHES,
    ),
    "decoder": (
        EXPERT_WAIT_SECONDS,
        DISPATCHES_SENT,
        DISPATCH_ATTEMPTS_FAILED,
        HEDGES,
        LANES,
        STEP_SECONDS,
        SPLIT_STEPS,
        STEP_TOKENS,
        DECODER_QUEUE_SECONDS,
        PREEMPTIONS,
        PREFIX_CACHE_QUERIES,
        PREFIX_CACHE_HITS,
        EMBEDDINGS_HITS,
        EMBEDDINGS_MISSES,
        EMBEDDINGS_BYTES,
        DRAFTED_TOKENS,
        ACCEPTED_TOKENS,
        EXPERT_TOKENS,  # with --colocate
        RUNNING_REQUESTS,
        WAITING_REQUESTS,
        KV_TOKENS_USED,
        KV_TOKENS_TOTAL,
    ),
    "expert-pool": (
        DISPATCH_QUEUE_SECONDS,
        DISPATCH_COMPUTE_SECONDS,
        DISPATCH_TOKENS,
        EXPERT_TOKENS,
        EXPERT_COMPUTE_SECONDS,
        SHARD_TOKENS,
        SHARD_COMPUTE_SECONDS,
        DISPATCH_FAILURES,
        QUEUED_DISPATCHES,
    ),
    "orchestrator": (
        ORCHESTRATOR_LEADS,
        MEMBERS,
        TOPOLOGY_VERSION,
        POOL_SHARDS,
        POOL_SHARDS_MISSING,
        REPLICAS_WANTED,
        REPLICAS_DEMANDED,
        PLACEMENT_EPOCH,
    ),
}
"""What each service exports, beside RPC_SECONDS and the process's own figures."""


def registry(service: str) -> CollectorRegistry:
    """The metrics of one service."""
    found = CollectorRegistry()
    ProcessCollector(registry=found)
    PlatformCollector(registry=found)
    GCCollector(registry=found)
    for metric in (RPC_SECONDS, *OF_SERVICE[service]):
        found.register(metric)
    return found


def serve(host: str, port: int, service: str) -> int:
    """Starts the /metrics endpoint of a service (port 0: any free one); returns its port."""
    server, _ = start_http_server(port, addr=host, registry=registry(service))
    return int(server.server_port)
