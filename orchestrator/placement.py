"""Which server holds which shards: pure, deterministic, and shy of moves.

A shard's load is shared evenly by its holders. Coverage comes first; then every server gets
something to do; then, while one server carries more than `TOLERANCE` above the mean, it gives up a
shard that others hold too, or the step that relieves it most is taken: a shard moves, or gets one
more holder. At last holders go that are not needed: without them nobody carries more than half of
`TOLERANCE` above the mean. What is placed well stays where it is, so a placement made again from
the same loads is the same placement.

Bound: where every server may hold every shard, the busiest one carries at most the larger of
(1 + TOLERANCE) x mean and mean + (1 + MIN_GAIN) x the largest share of a shard. For some server is
not above the mean and lacks one of its shards, as a holder of all of them carries as much; and if
the busiest one carried more than that, moving this shard there would be worth it. The steps come to
an end, for each one leaves fewer servers at the top, or a lower top, and what goes at last lifts
nobody to where steps begin.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

TOLERANCE = 0.25
"""Load above the mean that is not worth a move."""

MIN_GAIN = 0.05
"""Least relief of the busiest server for which a shard is loaded, in parts of its share."""

LOAD_FLOOR = 0.1
"""What a shard counts at least, in parts of the mean: idle shards too should be spread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """An expert server as placement sees it.

    capacity: most shards it may hold; 0: what it holds is fixed.
    held: shards it holds or has been told to hold. barred: shards that it could not load.
    """

    server_id: str
    capacity: int
    held: frozenset[int] = frozenset()
    barred: frozenset[int] = frozenset()

    @property
    def is_fixed(self) -> bool:
        return self.capacity == 0


Placement = Mapping[str, tuple[int, ...]]
"""Shards of each server that is not fixed, ascending."""


def place(
    loads: Sequence[float],
    servers: Iterable[Server],
    *,
    min_holders: int = 1,
    tolerance: float = TOLERANCE,
) -> Placement:
    """Shards of each server, from the load of each shard, in any unit.

    min_holders: holders every shard should have, as far as the capacities allow.
    Shards are left out only where the capacities together are too small, the least busy ones first.
    """
    board = _Board(_weights(loads), servers, min_holders=min_holders)
    board.cover()
    board.repeat()
    board.employ()
    board.balance(tolerance)
    while board.repeat():  # a busy shard's new holder may make room for one that has too few
        board.balance(tolerance)
    while board.thin(tolerance / 2):  # what goes may make room for a step
        board.balance(tolerance)
    return board.placement()


def uncovered(num_shards: int, placement: Placement, servers: Iterable[Server]) -> tuple[int, ...]:
    """Shards without a holder, those of fixed servers counted."""
    held = {shard for shards in placement.values() for shard in shards}
    held |= {shard for server in servers if server.is_fixed for shard in server.held}
    return tuple(shard for shard in range(num_shards) if shard not in held)


def _weights(loads: Sequence[float]) -> list[float]:
    total = sum(loads)
    if total <= 0:
        return [1.0] * len(loads)
    floor = LOAD_FLOOR * total / len(loads)
    return [max(load, floor) for load in loads]


class _Board:
    """A placement being made. Ties are broken by the names of servers and numbers of shards."""

    def __init__(
        self, weights: list[float], servers: Iterable[Server], *, min_holders: int
    ) -> None:
        self._weights, self._min_holders = weights, min_holders
        ordered = sorted(servers, key=lambda server: server.server_id)
        self._capacity = {s.server_id: s.capacity for s in ordered if not s.is_fixed}
        self._held = {s.server_id: set(s.held) & set(range(len(weights))) for s in ordered}
        self._barred = {s.server_id: s.barred for s in ordered}
        self._holders: list[set[str]] = [set() for _ in weights]
        for server, shards in self._held.items():
            for shard in shards:
                self._holders[shard].add(server)
        self._load: dict[str, float] = {}
        self._weigh(self._held)
        for server in self._capacity:
            self._trim(server)

    def placement(self) -> Placement:
        return {server: tuple(sorted(self._held[server])) for server in self._capacity}

    def cover(self) -> None:
        """Gives every shard a holder, the busiest shards first, to the least busy servers."""
        for shard in self._busiest(s for s, holders in enumerate(self._holders) if not holders):
            server = self._with_room(shard) or self._with_spare(shard)
            if server is not None:
                self._add(server, shard)

    def repeat(self) -> bool:
        """Gives every shard its least number of holders, where there is room or can be made.

        Whether that changed anything. No other step takes a holder from a shard that has no more
        than it needs, so this comes to an end however often it is asked for.
        """
        has_changed = False
        for count in range(2, self._min_holders + 1):
            few = [s for s, holders in enumerate(self._holders) if 0 < len(holders) < count]
            for shard in self._busiest(few):
                server = self._with_room(shard) or self._with_spare(shard, keep=self._min_holders)
                if server is not None:
                    self._add(server, shard)
                    has_changed = True
        return has_changed

    def employ(self) -> None:
        """Gives every server at least one shard, one that relieves the busiest server."""
        for server in [s for s in self._capacity if not self._held[s]]:
            for source in sorted(self._held, key=lambda s: (-self._load[s], s)):
                is_only = len(self._held[source]) == 1
                steps = [s for s in self._steps(source, server) if not (s.move and is_only)]
                if steps:
                    self._take(min(steps, key=self._rank))
                    break

    def balance(self, tolerance: float) -> None:
        """Relieves the busiest server while that is worth a load."""
        while self._capacity:
            busiest = max(self._load, key=lambda s: (self._load[s], s))
            load = self._load[busiest]
            if load <= (1 + tolerance) * self._mean():
                return
            if drops := [d for d in self._drops(busiest) if self._is_worth(d, load)]:
                self._remove(busiest, min(drops).shard)
                continue
            steps = [
                step
                for target in self._capacity
                for step in self._steps(busiest, target)
                if self._is_worth(step, load)
            ]
            if not steps:
                return
            self._take(min(steps, key=self._rank))

    def thin(self, tolerance: float) -> bool:
        """Takes holders away that are not needed, from busy servers first; whether there were
        any."""
        has_changed = False
        while (drop := self._least_missed((1 + tolerance) * self._mean())) is not None:
            self._remove(drop.server, drop.shard)
            has_changed = True
        return has_changed

    def _least_missed(self, bound: float) -> _Drop | None:
        """What the busiest server that may give up something gives up, lifting nobody above
        `bound`."""
        for server in sorted(self._capacity, key=lambda s: (-round(self._load[s], 9), s)):
            if drops := [drop for drop in self._drops(server) if drop.top <= bound]:
                return min(drops)
        return None

    def _mean(self) -> float:
        return sum(self._weights) / max(1, len(self._held))

    def _is_worth(self, change: _Step | _Drop, load: float) -> bool:
        return change.top < load - MIN_GAIN * self._share(change.shard)

    def _drops(self, server: str) -> Iterable[_Drop]:
        """What a server may give up: not its only shard, and none that has too few holders."""
        if server not in self._capacity or len(self._held[server]) == 1:
            return
        for shard in self._held[server]:
            others = self._holders[shard] - {server}
            if len(others) >= max(1, self._min_holders):
                more = self._weights[shard] / len(others) - self._share(shard)
                top = max(self._load[other] + more for other in others)
                yield _Drop(round(top, 9), shard, server)

    def _steps(self, source: str, target: str) -> Iterable[_Step]:
        """What would relieve a server with the help of another."""
        evicted = None
        if len(self._held[target]) >= self._capacity[target]:
            evicted = self._spare(target, keep=self._min_holders)
            if evicted is None:
                return
        for shard in sorted(self._held[source] - self._held[target] - self._barred[target]):
            for move in (True, False):
                if move and source not in self._capacity:
                    continue  # fixed servers keep what they have
                yield self._step(source, target, shard, evicted, move=move)

    def _step(
        self, source: str, target: str, shard: int, evicted: int | None, *, move: bool
    ) -> _Step:
        """A step with the highest load among all that it touches."""
        count = len(self._holders[shard])
        old = self._weights[shard] / count
        new = old if move else self._weights[shard] / (count + 1)
        change = {source: -old} if move else dict.fromkeys(self._holders[shard], new - old)
        change[target] = new
        if evicted is not None:
            holders = self._holders[evicted]
            share, more = self._share(evicted), self._weights[evicted] / (len(holders) - 1)
            for holder in holders - {target}:
                change[holder] = change.get(holder, 0.0) + more - share
            change[target] -= share
        top = max(self._load[server] + delta for server, delta in change.items())
        return _Step(source=source, target=target, shard=shard, evicted=evicted, move=move, top=top)

    def _rank(self, step: _Step) -> tuple[float, bool, int, str, str]:
        return round(step.top, 9), not step.move, step.shard, step.target, step.source

    def _take(self, step: _Step) -> None:
        if step.evicted is not None:
            self._remove(step.target, step.evicted)
        self._add(step.target, step.shard)
        if step.move:
            self._remove(step.source, step.shard)

    def _with_room(self, shard: int) -> str | None:
        """The least busy server that can take a shard."""
        able = [
            server
            for server, capacity in self._capacity.items()
            if len(self._held[server]) < capacity and self._may_take(server, shard)
        ]
        return min(able, key=lambda s: (self._load[s], len(self._held[s]), s), default=None)

    def _may_take(self, server: str, shard: int) -> bool:
        return shard not in self._held[server] and shard not in self._barred[server]

    def _with_spare(self, shard: int, *, keep: int = 1) -> str | None:
        """A full server that can take a shard, made room on by giving up one that has more than
        `keep` holders."""
        spares = [
            (spare, server)
            for server in self._capacity
            if self._may_take(server, shard)
            and (spare := self._spare(server, keep=keep)) is not None
        ]
        if not spares:
            return None
        given_up, server = min(spares, key=lambda found: (self._share(found[0]), found))
        self._remove(server, given_up)
        return server

    def _spare(self, server: str, *, keep: int = 1) -> int | None:
        """The shard of a server that is missed least, of those with more than `keep` holders."""
        spare = [s for s in self._held[server] if len(self._holders[s]) > keep]
        return min(spare, key=lambda s: (self._share(s), s), default=None)

    def _trim(self, server: str) -> None:
        while len(self._held[server]) > self._capacity[server]:
            spare = self._spare(server)
            self._remove(server, max(self._held[server]) if spare is None else spare)

    def _busiest(self, shards: Iterable[int]) -> list[int]:
        return sorted(shards, key=lambda shard: (-self._weights[shard], shard))

    def _share(self, shard: int) -> float:
        return self._weights[shard] / len(self._holders[shard])

    def _add(self, server: str, shard: int) -> None:
        self._held[server].add(shard)
        self._holders[shard].add(server)
        self._weigh(self._holders[shard])

    def _remove(self, server: str, shard: int) -> None:
        self._held[server].discard(shard)
        self._holders[shard].discard(server)
        self._weigh(self._holders[shard] | {server})

    def _weigh(self, servers: Iterable[str]) -> None:
        """Adds up from scratch, in one order: the same placement always weighs the same."""
        for server in servers:
            self._load[server] = sum(map(self._share, sorted(self._held[server])))


class _Drop(NamedTuple):
    """A server gives up a shard; `top`: the highest load among those who take over."""

    top: float
    shard: int
    server: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """A shard moves or gets one more holder; `evicted` makes room for it."""

    source: str
    target: str
    shard: int
    evicted: int | None
    move: bool
    top: float


def next_assignment(
    target: Placement,
    loaded: Mapping[str, frozenset[int]],
    ready: frozenset[str],
    capacity: Mapping[str, int],
) -> Placement:
    """What each server shall hold now, on the way from what is loaded to the target.

    A server first gets the new shards on top of the old ones. It drops an old one only when every
    holder that the target names is ready and has it loaded, and there is one; so no shard is ever
    without a holder, and a move takes two assignments. Where the two together are more than it may
    hold, it drops what one ready holder of the target has, and the rest of the new ones wait.

    loaded: what servers report to have loaded, fixed ones and those on their way out included.
    ready: servers that take work. Servers missing in `target` are given nothing new.
    """

    def holders(shard: int) -> list[str]:
        return [server for server, shards in target.items() if shard in shards]

    def is_held(shard: int) -> bool:
        # Servers outside the target are fixed.
        return any(has(s, shard) for s in (*holders(shard), *(loaded.keys() - target.keys())))

    def can_drop(shard: int) -> bool:
        return is_held(shard) and all(has(server, shard) for server in holders(shard))

    def has(server: str, shard: int) -> bool:
        return server in ready and shard in loaded.get(server, frozenset())

    assignment = {}
    for server, shards in target.items():
        has_loaded = loaded.get(server, frozenset())
        kept = {shard for shard in has_loaded - set(shards) if not can_drop(shard)}
        if len(kept.union(shards)) > capacity.get(server, 0):
            kept = {shard for shard in kept if not is_held(shard)}
        there = kept | (has_loaded & set(shards))
        new = [shard for shard in shards if shard not in there]
        room = max(0, capacity.get(server, 0) - len(there))
        assignment[server] = tuple(sorted(there.union(new[:room])))
    return assignment
