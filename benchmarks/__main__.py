"""`python -m benchmarks`: runs the measurements and writes benchmarks/results/*.json."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from benchmarks import attention, micro_batches, seam, serve
from chiasm.bench import machine
from chiasm.model.synth import synthesize

CASES = {
    "seam": seam.run,
    "attention": attention.run,
    "micro_batches": micro_batches.run,
    "serve": serve.run,
}
RESULTS = Path(__file__).parent / "results"


def report(line: str) -> None:
    """One line for the reader."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Runs the cases named on the command line, or all, on a model made for the run."""
    names = sys.argv[1:] or list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        sys.exit(f"unknown: {', '.join(unknown)}; there are {', '.join(CASES)}")
    RESULTS.mkdir(exist_ok=True)
    report(json.dumps(machine.describe()))
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "tiny"
        synthesize(model, preset="tiny", seed=0)
        for name in names:
            report(
                f"== {name}: {(sys.modules[CASES[name].__module__].__doc__ or '').splitlines()[0]}"
            )
            result = {"machine": machine.describe(), "result": CASES[name](model, report)}
            (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
