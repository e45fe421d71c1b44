"""What a request changes in its logits before a token is chosen, and the books it keeps for that.

Everything follows from the sequence's token ids, which are only ever appended to: a sequence that
was preempted, retried or resumed elsewhere gets the same logits as one that was not.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from chiasm.services.decoder.grammars import Matcher
from chiasm.services.decoder.sequence import Sampling, Sequence

_MINUS_INF = float("-inf")


def needs_processors(sequence: Sequence) -> bool:
    """Whether the sequence's logits are anything but the model's."""
    sampling = sequence.sampling
    return (
        sequence.matcher is not None
        or bool(sampling.logit_bias)
        or sampling.min_tokens > 0
        or Penalties.wanted(sampling)
        or Thought.has_bound(sampling)
    )


class Processors:
    """The processors of one sequence, in vLLM's order: grammar, min_tokens, bias, penalties."""

    def __init__(self, sequence: Sequence, vocab_size: int, device: torch.device) -> None:
        sampling = sequence.sampling
        self._sampling = sampling
        self._matcher: Matcher | None = sequence.matcher.fresh() if sequence.matcher else None
        self._thought = Thought(sampling)
        self._stop_ids = torch.tensor(sorted(sampling.stop_token_ids), device=device).long()
        # A thought may be ended, though what follows it may not.
        ending = sorted(sampling.stop_token_ids - {*sampling.think_end_ids})
        self._answer_stop_ids = torch.tensor(ending, device=device).long()
        self._bias_ids = torch.tensor([i for i, _ in sampling.logit_bias], device=device).long()
        self._bias = torch.tensor([bias for _, bias in sampling.logit_bias], device=device)
        self._penalties = (
            Penalties(sampling, sequence.token_ids[: sequence.num_prompt], vocab_size, device)
            if Penalties.wanted(sampling)
            else None
        )
        self._num_seen = 0

    def catch_up(self, sequence: Sequence) -> None:
        """Takes note of the tokens that were generated since the last call.

        Raises InvalidArgument when they overtax the grammar's bounds.
        """
        new = sequence.token_ids[sequence.num_prompt + self._num_seen :]
        self._num_seen += len(new)
        for token_id in new:
            was_open = self._thought.is_open
            self._thought.push(token_id)
            if self._matcher and not was_open:
                self._matcher.push(token_id)
        if self._penalties and new:
            self._penalties.push(new)

    def apply(self, row: torch.Tensor) -> None:
        """Changes the row, float32 [V], in place. Raises InvalidArgument as `catch_up`."""
        forced = self._thought.forced()
        if forced is not None:
            row.fill_(_MINUS_INF)
            row[forced] = 0.0
            return
        is_waiting = self._matcher is not None and self._thought.is_open
        if self._matcher and not is_waiting:
            row.masked_fill_(~self._matcher.allowed().to(row.device), _MINUS_INF)
        # An answer that must have a form cannot end before it has begun.
        if self._num_seen < self._sampling.min_tokens:
            row[self._stop_ids] = _MINUS_INF
        elif is_waiting:
            row[self._answer_stop_ids] = _MINUS_INF
        if self._sampling.logit_bias:
            row[self._bias_ids] += self._bias
        if self._penalties:
            self._penalties.apply(row)


class Penalties:
    """Repetition, frequency and presence penalty, as vLLM defines them.

    The first looks at prompt and answer (CTRL, arXiv:1909.05858), the others at the answer alone.
    """

    def __init__(
        self, sampling: Sampling, prompt_ids: Seq[int], vocab_size: int, device: torch.device
    ) -> None:
        self._sampling, self._device = sampling, device
        self._is_seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self._is_seen[torch.tensor(prompt_ids, device=device)] = True
        self._counts = torch.zeros(vocab_size, device=device)

    @staticmethod
    def wanted(sampling: Sampling) -> bool:
        return (
            sampling.repetition_penalty != 1
            or sampling.frequency_penalty != 0
            or sampling.presence_penalty != 0
        )

    def push(self, token_ids: Seq[int]) -> None:
        """Counts tokens of the answer."""
        ids = torch.tensor(token_ids, device=self._device)
        self._is_seen[ids] = True
        self._counts.index_add_(0, ids, torch.ones(len(ids), device=self._device))

    def apply(self, row: torch.Tensor) -> None:
        """Changes the row, float32 [V], in place."""
        penalty = self._sampling.repetition_penalty
        if penalty != 1:
            repeated = torch.where(row > 0, row / penalty, row * penalty)
            torch.where(self._is_seen, repeated, row, out=row)
        row -= self._sampling.frequency_penalty * self._counts
        row -= self._sampling.presence_penalty * (self._counts > 0)


class Thought:
    """Follows a thought that the prompt has opened; its last end token closes it."""

    def __init__(self, sampling: Sampling) -> None:
        self._end_ids, self._budget = sampling.think_end_ids, sampling.thinking_budget
        self._num_tokens = 0
        self.is_open = bool(sampling.think_end_ids)

    @staticmethod
    def has_bound(sampling: Sampling) -> bool:
        return bool(sampling.think_end_ids) and sampling.thinking_budget is not None

    def push(self, token_id: int) -> None:
        """Counts a token of the answer."""
        if self.is_open:
            self._num_tokens += 1
            self.is_open = token_id != self._end_ids[-1]

    def forced(self) -> int | None:
        """The token that must come next because the budget is used up, if so."""
        if not self.is_open or self._budget is None or self._num_tokens < self._budget:
            return None
        # A thought that another decoder let grow past its budget is ended at once.
        return self._end_ids[min(self._num_tokens - self._budget, len(self._end_ids) - 1)]
