"""The simulated system: four pools with queues between them, in steps of time.

Encoders take one image each at a time; expert servers and decoders share their work evenly. What is
left out: the network, batching effects of the experts, and shards (every server holds all of them).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.elasticity.rates import Rates
from benchmarks.elasticity.traces import Request
from chiasm.orchestrator.demand import PATCHES_PER_TOKEN
from chiasm.orchestrator.types import Pool

KV_TOKENS = 16_384
MAX_RUNNING = 32
LAYERS = 27
"""Dispatches of a step."""

DRAIN_S = 2.0
"""How long a replica that goes still costs something."""


@dataclass(slots=True)
class Ended:
    """Answers that have ended, the time they were decoded for, and their text tokens."""

    answers: float = 0.0
    held_s: float = 0.0
    tokens: float = 0.0


@dataclass(slots=True)
class Replica:
    """busy_s: time it worked. done: patches, tokens or steps. todo: what is left of its image, in
    patches. admitted: patches that came to it. seen, read: vision and text tokens of its requests.
    queue_s: time for which dispatches waited. plain, media: its answers that have ended."""

    name: str
    ready_at: float
    leaves_at: float | None = None
    busy_s: float = 0.0
    done: float = 0.0
    todo: float = 0.0
    admitted: float = 0.0
    seen: float = 0.0
    read: float = 0.0
    plain: Ended = field(default_factory=Ended)
    media: Ended = field(default_factory=Ended)
    queue_s: float = 0.0
    job: Job | None = None

    def is_ready(self, now: float) -> bool:
        return self.ready_at <= now and self.leaves_at is None


@dataclass(slots=True, eq=False)
class Job:
    """A request on its way. Times are seconds; None while it has not come so far."""

    request: Request
    images: int = 0
    vision_tokens: float = 0.0
    decoded: float = 0.0
    admitted_at: float = 0.0
    first_token_at: float | None = None
    finished_at: float | None = None


@dataclass(frozen=True, slots=True)
class _Image:
    """One that waits. is_admitted: an encoder has it in its queue; else it waits in the gateway."""

    job: Job
    patches: int
    since: float
    is_admitted: bool


@dataclass(slots=True)
class Fleet:
    """The replicas of a pool."""

    pool: Pool
    boot_s: float
    replicas: list[Replica] = field(default_factory=list)
    replica_s: float = 0.0
    numbers: itertools.count[int] = field(default_factory=itertools.count)

    def begin(self, count: int) -> None:
        """Replicas that are there from the start."""
        self._add(count, ready_at=0.0)

    def scale(self, count: int, now: float) -> None:
        """The youngest go first; whoever goes finishes what it has."""
        staying = [r for r in self.replicas if r.leaves_at is None]
        self._add(count - len(staying), ready_at=now + self.boot_s)
        for replica in staying[count:]:
            replica.leaves_at = now + DRAIN_S

    def ready(self, now: float) -> list[Replica]:
        return [r for r in self.replicas if r.is_ready(now)]

    @property
    def wanted(self) -> int:
        return sum(r.leaves_at is None for r in self.replicas)

    def pass_time(self, now: float, seconds: float) -> None:
        """Books the cost, and lets those go whose time is over."""
        self.replica_s += len(self.replicas) * seconds
        self.replicas = [
            r for r in self.replicas if r.leaves_at is None or r.leaves_at > now or r.job
        ]

    def share(self, now: float, *, busy_s: float = 0.0, done: float = 0.0, **others: float) -> bool:
        """Books what the ready ones share evenly; False when there are none."""
        ready = self.ready(now)
        for replica in ready:
            for name, amount in {"busy_s": busy_s, "done": done, **others}.items():
                setattr(replica, name, getattr(replica, name) + amount / len(ready))
        return bool(ready)

    def _add(self, count: int, *, ready_at: float) -> None:
        for _ in range(count):
            self.replicas.append(
                Replica(name=f"{self.pool}-{next(self.numbers)}", ready_at=ready_at)
            )


class System:
    """The pools, their queues, and the requests in them.

    prefilled, answered: tokens so far, of prompts and of answers. num_plain, num_media: requests so
    far, without and with images.
    """

    def __init__(self, rates: Rates, begin: Mapping[Pool, int]) -> None:
        self.rates = rates
        self.fleets = {pool: Fleet(pool, rates.boot_s[pool]) for pool in Pool}
        for pool, count in begin.items():
            self.fleets[pool].begin(count)
        self.images: deque[_Image] = deque()
        self.vision: deque[Job] = deque()
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.jobs: list[Job] = []
        self.prefilled = self.answered = 0.0
        self.num_plain = self.num_media = 0
        self.now = 0.0
        self._seen: set[int] = set()

    def step(self, arrivals: Sequence[Request], seconds: float) -> None:
        """Lets so much time pass."""
        for request in arrivals:
            self._arrive(request)
        self._encode(seconds)
        self._see(seconds)
        self._decode(seconds)
        self.now += seconds
        for fleet in self.fleets.values():
            fleet.pass_time(self.now, seconds)

    def queued_patches(self) -> float:
        """Patches waiting or running."""
        running = sum(r.todo for r in self.fleets[Pool.ENCODER].replicas)
        return running + sum(image.patches for image in self.images)

    def kv_used(self) -> int:
        return sum(_kv(job) for job in self.running)

    def _arrive(self, request: Request) -> None:
        job = Job(request, vision_tokens=sum(request.images) / PATCHES_PER_TOKEN)
        self.jobs.append(job)
        self.num_media += bool(request.images)
        self.num_plain += not request.images
        is_known = request.digest in self._seen
        if request.digest:
            self._seen.add(request.digest)
        if not request.images:
            self.waiting.append(job)
        elif is_known:
            self.vision.append(job)
        else:
            job.images = len(request.images)
            encoders = self.fleets[Pool.ENCODER]
            for patches in request.images:
                is_admitted = encoders.share(self.now, admitted=patches)
                self.images.append(_Image(job, patches, self.now, is_admitted))

    def _encode(self, seconds: float) -> None:
        for replica in self.fleets[Pool.ENCODER].replicas:
            left_s = seconds if replica.ready_at <= self.now else 0.0
            while left_s > 1e-9:
                if replica.job is None:
                    if not self.images or not replica.is_ready(self.now):
                        break
                    image = self.images.popleft()
                    replica.job, replica.todo = image.job, image.patches
                    replica.admitted += 0 if image.is_admitted else image.patches
                worked_s = min(left_s, replica.todo * self.rates.patch_s)
                left_s -= worked_s
                replica.busy_s += worked_s
                replica.done += worked_s / self.rates.patch_s
                replica.todo -= worked_s / self.rates.patch_s
                if replica.todo <= 1e-6:
                    replica.job.images -= 1
                    if not replica.job.images:
                        self.vision.append(replica.job)
                    replica.job, replica.todo = None, 0.0

    def _see(self, seconds: float) -> None:
        """The vision tokens of prompts, first come, first served."""
        fleet = self.fleets[Pool.VISION_EXPERTS]
        room_s = len(fleet.ready(self.now)) * seconds
        used_s = 0.0
        while self.vision and used_s < room_s:
            job = self.vision[0]
            worked_s = min(room_s - used_s, job.vision_tokens * self.rates.vision_token_s)
            used_s += worked_s
            job.vision_tokens -= worked_s / self.rates.vision_token_s
            if job.vision_tokens <= 1e-6:
                self.waiting.append(self.vision.popleft())
        tokens = used_s / self.rates.vision_token_s
        fleet.share(self.now, busy_s=used_s, done=tokens)
        self.fleets[Pool.DECODER].share(self.now, seen=tokens)

    def _decode(self, seconds: float) -> None:
        """Steps of all decoders; slowed down where the text experts do not keep up."""
        decoders = len(self.fleets[Pool.DECODER].ready(self.now))
        text = self.fleets[Pool.TEXT_EXPERTS]
        experts = len(text.ready(self.now))
        if not decoders or not experts:
            return
        self._admit(decoders)
        if not self.running:
            return
        step_s = self.step_s(decoders, experts, seconds)
        prefill_s = self.rates.prefill_token_s * step_s / self._base_s(decoders)
        tokens = sum(self._advance(job, seconds, prefill_s, step_s) for job in self.running)
        worked_s = tokens * self.rates.text_token_s
        self._book_ended()
        steps = decoders * seconds / step_s
        self.fleets[Pool.DECODER].share(
            self.now, busy_s=decoders * seconds, done=steps, read=tokens
        )
        text.share(
            self.now,
            busy_s=min(worked_s, experts * seconds),
            done=steps * LAYERS,
            queue_s=steps * (step_s - self._base_s(decoders)),
        )

    def _book_ended(self) -> None:
        """Takes answers that are over out of the batch; its decoders share them evenly."""
        ready = self.fleets[Pool.DECODER].ready(self.now)
        for job in self.running:
            if job.finished_at is None:
                continue
            for replica in ready:
                ended = replica.media if job.request.images else replica.plain
                ended.answers += 1 / len(ready)
                ended.held_s += (job.finished_at - job.admitted_at) / len(ready)
                ended.tokens += job.decoded / len(ready)
        self.running = [job for job in self.running if job.finished_at is None]

    def _advance(self, job: Job, seconds: float, prefill_s: float, step_s: float) -> float:
        """Lets a request compute its prompt, then its answer; returns the tokens."""
        before, size = job.decoded, job.request.prompt_tokens + job.request.answer_tokens
        prefilled = min(max(0.0, job.request.prompt_tokens - before), seconds / prefill_s)
        left_s = seconds - prefilled * prefill_s
        answered = min(size - before - prefilled, left_s / step_s)
        job.decoded += prefilled + answered
        self.prefilled += prefilled
        self.answered += answered
        if job.first_token_at is None and job.decoded >= job.request.prompt_tokens + 1:
            job.first_token_at = self.now + seconds
        if job.decoded >= size - 1e-6:
            job.finished_at = self.now + seconds
        return prefilled + answered

    def _admit(self, decoders: int) -> None:
        used = self.kv_used()
        while self.waiting and len(self.running) < decoders * MAX_RUNNING:
            used += _kv(self.waiting[0])
            if used > decoders * KV_TOKENS and self.running:
                return
            self.running.append(self.waiting.popleft())
            self.running[-1].admitted_at = self.now

    def step_s(self, decoders: int, experts: int, seconds: float) -> float:
        """A step's time: a decoder's own, or longer while its tokens wait for the experts."""
        base_s, prefill_s = self._base_s(decoders), self.rates.prefill_token_s
        tokens = 0.0
        for job in self.running:
            left = max(0.0, job.request.prompt_tokens - job.decoded)
            share = min(1.0, left * prefill_s / seconds)
            tokens += share * base_s / prefill_s + (1 - share)
        return base_s * max(1.0, tokens * self.rates.text_token_s / base_s / experts)

    def _base_s(self, decoders: int) -> float:
        return self.rates.step_s + self.rates.step_request_s * len(self.running) / decoders


def _kv(job: Job) -> int:
    images = sum(job.request.images) // PATCHES_PER_TOKEN
    return job.request.prompt_tokens + job.request.answer_tokens + images
