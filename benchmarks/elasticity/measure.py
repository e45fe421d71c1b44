"""`python -m benchmarks.elasticity.measure MODEL`: measures the rates of rates.json anew."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.elasticity import RATES
from benchmarks.elasticity.rates import measure
from chiasm.orchestrator.types import Pool

BOOT_S = 20.0
"""Stated, not measured: what loading real weights takes is a matter of their size and the disk."""

if __name__ == "__main__":
    model = Path(sys.argv[1])
    measured = replace(measure(model), boot_s=dict.fromkeys(Pool, BOOT_S))
    measured.write(RATES, f"one replica each on this machine, model {model.name}; boot_s is stated")
