"""A stream that broke off with its gateway, asked for again from where it is.

No gateway keeps anything of an answer, and none needs it: the tokens so far and the seed tell how
it goes on (docs/adr/0020-clients-resume-their-streams.md).
"""

from __future__ import annotations

import time

import grpc

from chiasm.client.events import (
    ChoiceFinished,
    Delta,
    Event,
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

_NOT_BACK_YET = frozenset({"UNAVAILABLE", "DRAINING", "REQUEST_IN_FLIGHT"})
"""Reasons of a gateway that has just been asked again."""


class Resumption:
    """What the caller has of the answers; `request` asks for what is missing."""

    def __init__(self, request: inference_pb2.GenerateRequest, timeout_s: float) -> None:
        """timeout_s: how long to look for a gateway again."""
        self.request, self._timeout_s = request, timeout_s
        self._is_started = self._has_rows = False
        self._ended: set[tuple[type, int]] = set()
        self._lost_since: float | None = None
        self._num_fruitless = 0

    def is_new(self, event: Event) -> bool:
        """Takes note of an event; False for one that the caller has from an earlier stream."""
        self._lost_since = None
        match event:
            case Started():
                was_started, self._is_started = self._is_started, True
                self.request.sampling.seed = event.seed
                return not was_started
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
        if not self._is_started or (self._has_rows and not self.request.received):
            return False
        now, was_lost = time.monotonic(), self._lost_since is not None
        if not was_lost:
            self._lost_since = now
            self._num_fruitless += 1
        assert self._lost_since is not None
        if self._num_fruitless > MAX_FRUITLESS or now - self._lost_since >= self._timeout_s:
            return False
        if not was_lost and status.has_details(failure):
            return False
        return status.from_rpc_error(failure).reason in _NOT_BACK_YET

    def _add(self, delta: Delta) -> None:
        received = self.request.received
        while len(received) <= delta.index:
            received.add()
        received[delta.index].token_ids.extend(delta.token_ids)
