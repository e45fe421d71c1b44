"""Signals in, decisions out: the same for the loop, for replay and for the simulator."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from chiasm.orchestrator import policy
from chiasm.orchestrator.observer import Observation, Observer
from chiasm.orchestrator.types import Decision, Pool, PoolConfig, Signals


class Planner:
    """Remembers as much as the policy looks back. The same signals give the same decisions."""

    def __init__(self, configs: Mapping[Pool, PoolConfig]) -> None:
        self._configs = configs
        self._observer = Observer(configs)
        self._memory_s = policy.memory_s(configs)
        self._history: deque[Observation] = deque()

    @property
    def observation(self) -> Observation | None:
        """What was observed last."""
        return self._history[-1] if self._history else None

    def step(self, signals: Signals) -> Decision:
        """The decision that follows from these signals and all before them."""
        history = self._history
        history.append(self._observer.observe(signals))
        # One older than the memory stays, so that the memory is full.
        while len(history) > 1 and history[1].at < signals.at - self._memory_s:
            history.popleft()
        return policy.decide(history, self._configs)
