"""A stream that broke off with its gateway, asked for again from where it is.

No gateway keeps anything of an answer, and none needs it: the tokens so far and the seed tell how
it goes on (docs/adr/0020-clients-resume-their-streams.md).
"""

from __future__ import annotations

import time

import grpc

from chiasm import errors
from chiasm.client.events import (
    ChoiceFinished,
    Delta,
    Event,
    Finished,
    PromptLogits,
    PromptLogprobs,
    Started,
)
from chiasm.transport import status
from chiasm.v1 import inference_pb2

PAUSE_S = 0.1
"""Before every further try."""

MAX_FRUITLESS = 3
"""Gateways in a row that are lost before they have added a token: the request may be to blame."""

_LOST = frozenset({"UNAVAILABLE", "CANCELLED"})
"""Names of statuses that grpc gives calls which a server takes with it."""

_NOT_BACK_YET = _LOST | {"DRAINING", "REQUEST_IN_FLIGHT", "GATEWAY_FULL"}
"""Reasons of a gateway that has just been asked again."""


class Resumption:
    """What the caller has of the answers; `request` asks for what is missing."""

    def __init__(self, request: inference_pb2.GenerateRequest, timeout_s: float) -> None:
        """timeout_s: how long to look for a gateway again."""
        self.request, self._timeout_s = request, timeout_s
        self.is_finished = False
        self._can_resume = self._has_rows = False
        self._ended: set[tuple[type, int]] = set()
        self._lost_since: float | None = None
        self._num_fruitless = 0

    def is_new(self, event: Event) -> bool:
        """Takes note of an event; False for one that the caller has from an earlier stream.

        Raises Unavailable when who was asked for the rest does not know how to give it.
        """
        self._lost_since = None
        match event:
            case Started():
                return self._start(event)
            case Finished():
                self.is_finished = True
            case PromptLogits() | PromptLogprobs():
                self._has_rows = True
            case Delta() if event.token_ids:
                self._num_fruitless = 0
                self._add(event)
            case Delta() | ChoiceFinished():
                end = type(event), event.index
                was_ended = end in self._ended
                self._ended.add(end)
                return not was_ended
        return True

    def is_worth(self, failure: grpc.RpcError) -> bool:
        """Whether to ask again after a call that ended so.

        Only what broke off is gone on with: a gateway that says why it fails knows better. Rows of
        the prompt's logits would come twice.
        """
        has_tokens = any(each.token_ids for each in self.request.received)
        if not self._can_resume or (self._has_rows and not has_tokens):
            return False
        now, was_lost = time.monotonic(), self._lost_since is not None
        if not was_lost:
            self._lost_since = now
            self._num_fruitless += 1
            self._hold(1)  # what says that this is no new request
        assert self._lost_since is not None
        if self._num_fruitless > MAX_FRUITLESS or now - self._lost_since >= self._timeout_s:
            return False
        if not was_lost and status.has_details(failure):
            return False
        return status.from_rpc_error(failure).reason in (_NOT_BACK_YET if was_lost else _LOST)

    def _start(self, started: Started) -> bool:
        is_first = not self._can_resume
        self._can_resume = started.seed is not None
        if started.seed is not None:
            self.request.sampling.seed = started.seed
        elif not is_first:
            raise errors.Unavailable("the gateway that was asked for the rest is an older one")
        return is_first

    def _hold(self, num_answers: int) -> None:
        while len(self.request.received) < num_answers:
            self.request.received.add()

    def _add(self, delta: Delta) -> None:
        self._hold(delta.index + 1)
        self.request.received[delta.index].token_ids.extend(delta.token_ids)
