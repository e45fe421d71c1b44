"""One answer, from the decoder's tokens to the client's text."""

from __future__ import annotations

import time
from collections.abc import Sequence

from chiasm import errors
from chiasm.model.tokenizer import IncrementalDecoder, Tokenizer
from chiasm.services.gateway.domain import Sampling
from chiasm.services.gateway.stops import Passed, StopStrings
from chiasm.v1 import decoder_pb2, inference_pb2

_STOP = inference_pb2.FINISH_REASON_STOP
_REASONS = (_STOP, inference_pb2.FINISH_REASON_LENGTH)


class Answer:
    """Turns a decoder's events into the client's; owns the text, the thought and the counts.

    thought_end: the token that ends the thought in which the prompt breaks off, if it does.
    `reason` is None until the answer is complete; then the decoder's stream is of no more interest.
    `num_cached`: prompt tokens that the first decoder's prefix cache had.
    """

    def __init__(
        self, *, index: int, sampling: Sampling, tokenizer: Tokenizer, thought_end: int | None
    ) -> None:
        self.index, self._sampling = index, sampling
        self._text, self._thought = IncrementalDecoder(tokenizer), IncrementalDecoder(tokenizer)
        self._thought_end = thought_end
        # The blank lines between thought and answer are neither; a form may ask for its own.
        self._is_before_answer = thought_end is not None and sampling.grammar is None
        self._stops = StopStrings(sampling.stop, include=sampling.include_stop)
        # Stop tokens of the request count and are listed, but are no text, as in vLLM.
        self._silent = frozenset(() if sampling.include_stop else sampling.stop_token_ids)
        self._last_id = -1
        self._first_token_ns = 0
        self.num_tokens = self.num_cached = 0
        self.reason: inference_pb2.FinishReason | None = None
        self.timings = inference_pb2.Timings()

    def responses(self, event: decoder_pb2.DecodeEvent) -> list[inference_pb2.GenerateResponse]:
        """What the client hears of an event."""
        match event.WhichOneof("event"):
            case "tokens":
                return self._tokens(event.tokens)
            case "prompt_logits":
                return [inference_pb2.GenerateResponse(prompt_logits=event.prompt_logits)]
            case "prompt_logprobs":
                return [inference_pb2.GenerateResponse(prompt_logprobs=event.prompt_logprobs)]
            case "finished":
                return self._finished(event.finished)
        return []

    def replay(self, token_ids: Sequence[int]) -> list[inference_pb2.GenerateResponse]:
        """Goes on through tokens that the client has already; the answer's end if they hold it.

        Raises InvalidArgument for tokens behind that end.
        """
        end: list[inference_pb2.GenerateResponse] = []
        for token_id in token_ids:
            if self.reason is not None:
                raise errors.InvalidArgument(
                    f"received[{self.index}].token_ids", "go on behind the answer's stop string"
                )
            stop = self._push(token_id, inference_pb2.Delta())
            if stop is not None:
                end = [self._end(_STOP, stop=stop)]
        return end

    def _tokens(self, tokens: decoder_pb2.DecodedTokens) -> list[inference_pb2.GenerateResponse]:
        if tokens.HasField("timings"):
            self.timings.CopyFrom(tokens.timings)
        if not self.num_tokens:  # a decoder that takes over reports its own cache
            self.num_cached = tokens.cached_tokens
        self._first_token_ns = self._first_token_ns or time.monotonic_ns()
        delta = inference_pb2.Delta(index=self.index)
        stop = None
        for i, token_id in enumerate(tokens.token_ids):
            delta.token_ids.append(token_id)
            if i < len(tokens.logprobs):
                delta.logprobs.append(tokens.logprobs[i])
            stop = self._push(token_id, delta)
            if stop is not None:
                break
        answer = [inference_pb2.GenerateResponse(delta=delta)]
        if stop is not None:
            self.timings.decode_ns = time.monotonic_ns() - self._first_token_ns
            answer.append(self._end(_STOP, stop=stop))
        return answer

    def _push(self, token_id: int, delta: inference_pb2.Delta) -> str | None:
        """Adds a token's text to the delta; the stop string that it completes, if any."""
        self.num_tokens += 1
        self._last_id = token_id
        if self._thought_end is not None:
            if token_id == self._thought_end:
                self._thought_end = None
                delta.reasoning_text += self._thought.flush()
            elif token_id not in self._silent:
                delta.reasoning_text += self._thought.push([token_id])
            return None
        text = "" if token_id in self._silent else self._text.push([token_id])
        passed = self._pass(text)
        delta.text += passed.text
        return passed.stop

    def _pass(self, text: str) -> Passed:
        """What may be shown of the answer's next text."""
        if self._is_before_answer:
            text = text.lstrip("\n")
            self._is_before_answer = not text
        return self._stops.push(text, is_exempt=self.num_tokens <= self._sampling.min_tokens)

    def _finished(
        self, finished: decoder_pb2.DecodeFinished
    ) -> list[inference_pb2.GenerateResponse]:
        if finished.reason not in _REASONS:
            raise errors.Internal(f"the decoder sent finish reason {finished.reason}")
        self.timings.CopyFrom(finished.timings)
        delta = inference_pb2.Delta(index=self.index, reasoning_text=self._thought.flush())
        passed = self._pass(self._text.flush())
        delta.text = passed.text
        if passed.stop is not None:
            last = self._end(_STOP, stop=passed.stop)
        else:
            delta.text += self._stops.flush()
            last = self._end(finished.reason)
        if not delta.text and not delta.reasoning_text:
            return [last]
        return [inference_pb2.GenerateResponse(delta=delta), last]

    def _end(
        self, reason: inference_pb2.FinishReason, *, stop: str | None = None
    ) -> inference_pb2.GenerateResponse:
        self.reason = reason
        is_stop_id = (
            stop is None and reason == _STOP and self._last_id in self._sampling.stop_token_ids
        )
        return inference_pb2.GenerateResponse(
            choice_finished=inference_pb2.ChoiceFinished(
                index=self.index,
                reason=reason,
                stop_str=stop,
                stop_token_id=self._last_id if is_stop_id else None,
                completion_tokens=self.num_tokens,
            )
        )
