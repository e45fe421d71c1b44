"""What the engine has done and has in hand: for metrics, and for the orchestrator."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from chiasm.load import DecoderLoad
from chiasm.services.decoder.scheduler import Chunk
from chiasm.services.decoder.sequence import Sequence
from chiasm.telemetry import metrics
from chiasm.types import TOKEN_TEXT, Modality


@dataclass(slots=True)
class _Ended:
    """Answers that are over, and what they have taken."""

    answers: int = 0
    held_ns: int = 0
    tokens: int = 0

    def add(self, sequence: Sequence) -> None:
        self.answers += 1
        self.held_ns += sequence.held_ns
        self.tokens += sequence.num_text


class Workload:
    """Written by the engine's thread, read by any."""

    def __init__(self) -> None:
        self._steps = self._step_ns = self._vision_tokens = self._text_tokens = 0
        self._plain, self._media = _Ended(), _Ended()

    def add_step(self, chunks: Iterable[Chunk], step_ns: int) -> None:
        """Books a step."""
        self._steps += 1
        self._step_ns += step_ns
        metrics.STEP_SECONDS.observe(step_ns / 1e9)
        for chunk in chunks:
            prompt_stop = min(chunk.stop, chunk.sequence.num_prompt)
            types = chunk.sequence.prompt_types[chunk.start : prompt_stop]
            num_text = types.count(TOKEN_TEXT)
            num_decoded = chunk.num_tokens - len(types)
            self._vision_tokens += len(types) - num_text
            self._text_tokens += num_text + num_decoded
            chunk.sequence.held_ns += step_ns
            chunk.sequence.num_text += num_text + num_decoded
            metrics.STEP_TOKENS.labels("prefill", "text").inc(num_text)
            metrics.STEP_TOKENS.labels("prefill", "vision").inc(len(types) - num_text)
            metrics.STEP_TOKENS.labels("decode", "text").inc(num_decoded)

    def add_end(self, sequence: Sequence) -> None:
        """Books an answer that is over, however it ended."""
        (self._media if sequence.media else self._plain).add(sequence)

    def report(
        self,
        sequences: Iterable[Sequence],
        covered: frozenset[Modality],
        *,
        running: int,
        max_running: int,
        waiting: int,
        kv_tokens_used: int,
        kv_tokens_capacity: int,
    ) -> DecoderLoad:
        """All of it, with the work in hand; `covered` are the pools that can answer now."""
        in_hand = list(sequences)
        parked = [s for s in in_hand if s.parked_since is not None]

        def waiting_for(modality: Modality) -> int:
            if modality in covered:
                return 0
            return sum(modality in s.modalities(s.num_computed, len(s.token_ids)) for s in parked)

        return DecoderLoad(
            running_requests=running,
            max_running_requests=max_running,
            waiting_requests=waiting,
            kv_tokens_used=kv_tokens_used,
            kv_tokens_capacity=kv_tokens_capacity,
            queued_vision_tokens=sum(_num_vision(s) for s in in_hand),
            vision_tokens_total=self._vision_tokens,
            waiting_text_pool=waiting_for(Modality.TEXT),
            waiting_vision_pool=waiting_for(Modality.VISION),
            steps_total=self._steps,
            step_s_total=self._step_ns / 1e9,
            text_tokens_total=self._text_tokens,
            plain_answers_total=self._plain.answers,
            plain_held_s_total=self._plain.held_ns / 1e9,
            plain_tokens_total=self._plain.tokens,
            media_answers_total=self._media.answers,
            media_held_s_total=self._media.held_ns / 1e9,
            media_tokens_total=self._media.tokens,
        )


def _num_vision(sequence: Sequence) -> int:
    """Vision tokens of a prompt that are not computed yet."""
    pending = sequence.prompt_types[sequence.num_computed :]
    return len(pending) - pending.count(TOKEN_TEXT)
