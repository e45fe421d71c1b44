"""Calls of the orchestrator to expert servers that do not answer as they should."""

from __future__ import annotations

import pytest
from nonsense import NONSENSE, nonsense

from chiasm import errors
from chiasm.orchestrator.expert_servers import ExpertServers


@pytest.mark.parametrize("method", ["Assign", "Drain", "Describe"])
async def test_nonsense_counts_as_no_answer(method: str) -> None:
    async with nonsense("chiasm.v1.ExpertPool", {method: NONSENSE}) as address:
        servers = ExpertServers()
        calls = {
            "Assign": lambda: servers.assign(address, (0, 1), 1),
            "Drain": lambda: servers.drain(address, 1.0),
            "Describe": lambda: servers.describe(address),
        }
        with pytest.raises(errors.Unavailable, match="not a message"):
            await calls[method]()
        await servers.close()
