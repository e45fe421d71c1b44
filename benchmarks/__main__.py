"""`python -m benchmarks`: runs the measurements and writes benchmarks/results/*.json."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import traceback
from pathlib import Path

from benchmarks import (
    attention,
    codecs,
    decode_cost,
    documents,
    elasticity,
    experts,
    long_context,
    micro_batches,
    prefix,
    recovery,
    seam,
    serve,
    speculation,
    start,
)
from chiasm.bench import machine
from chiasm.model.synth import synthesize

CASES = {
    "seam": seam.run,
    "recovery": recovery.run,
    "start": start.run,
    "attention": attention.run,
    "micro_batches": micro_batches.run,
    "serve": serve.run,
    "speculation": speculation.run,
    "prefix": prefix.run,
    "decode_cost": decode_cost.run,
    "long_context": long_context.run,
    "codecs": codecs.run,
    "experts": experts.run,
    "elasticity": elasticity.run,
}


def report(line: str) -> None:
    """One line for the reader."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Runs the cases named on the command line, or all, on --model or one made for the run.

    Exit status: 1 when one fails; the others are run all the same.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--model", type=Path, help="checkpoint; default: a tiny one, made now")
    options = parser.parse_args()
    names = options.names or list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        sys.exit(f"unknown: {', '.join(unknown)}; there are {', '.join(CASES)}")
    report(json.dumps(machine.describe()))
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or Path(scratch) / "tiny"
        if options.model is None:
            synthesize(model, preset="tiny", seed=0)
        failed = [name for name in names if not _run(name, model)]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _run(name: str, model: Path) -> bool:
    """Whether the case came to its end. One that fails leaves its older result, and the others."""
    case = CASES[name]
    report(f"== {name}: {(sys.modules[case.__module__].__doc__ or '').splitlines()[0]}")
    try:
        with documents.measuring(name) as found:
            found["model"] = model.name
            found["result"] = case(model, report)
    except Exception:
        report(traceback.format_exc())
        return False
    return True


if __name__ == "__main__":
    main()
