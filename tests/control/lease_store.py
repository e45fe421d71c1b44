"""A lease in memory, with the semantics of the API server: versions, conflicts, failures."""

from __future__ import annotations

from dataclasses import dataclass, replace

from chiasm import errors
from chiasm.orchestrator.election import Lease


@dataclass
class MemoryLease:
    """One lease that several candidates share; `is_down`: it answers nobody."""

    stored: Lease | None = None
    is_down: bool = False
    writes: int = 0

    async def read(self) -> Lease | None:
        if self.is_down:
            raise errors.Unavailable("down")
        return self.stored

    async def write(self, lease: Lease) -> Lease:
        if self.is_down:
            raise errors.Unavailable("down")
        if lease.version != ("" if self.stored is None else self.stored.version):
            raise errors.AlreadyExists("another version is stored")
        self.writes += 1
        self.stored = replace(lease, version=str(self.writes))
        return self.stored
