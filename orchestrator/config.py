"""Settings of the orchestrator."""

from __future__ import annotations

from pydantic import Field

from chiasm.orchestrator.leadership import LeadershipSettings
from chiasm.orchestrator.scaling import ScalingSettings


class OrchestratorSettings(LeadershipSettings, ScalingSettings):
    """The orchestrator process."""

    lease_ms: int = Field(
        6000, ge=200, le=600_000, description="A member silent for this long is removed."
    )
    max_members: int = Field(1024, ge=1, description="Most members; one more is refused.")
    max_watchers: int = Field(1024, ge=1, description="Most watchers; one more is refused.")

    @property
    def lease_s(self) -> float:
        return self.lease_ms / 1000
