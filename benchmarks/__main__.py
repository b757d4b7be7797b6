"""`python -m benchmarks NAME`: run one comparison and write its tables as Markdown and JSON."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import shlex
import sys
from pathlib import Path

import benchmarks
from benchmarks import harness

# every module of this folder with a `run(command, threads, quick, only) -> harness.Report`
NAMES = sorted({m.name for m in pkgutil.iter_modules(benchmarks.__path__)} - {"__main__", "harness"})


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__, allow_abbrev=False)
    parser.add_argument("name", choices=[*NAMES, "all"])
    parser.add_argument("--threads", type=int, default=1, help="threads of every runtime (1)")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds: does it run at all?")
    parser.add_argument("--only", default="", help="comma-separated networks (all)")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder of the tables")
    options = parser.parse_args(arguments)
    harness.set_threads(options.threads)
    for name in NAMES if options.name == "all" else [options.name]:
        run = importlib.import_module(f"benchmarks.{name}").run
        command = shlex.join(["python", "-m", "benchmarks", *(name if a == "all" else a for a in arguments)])
        report = run(command, threads=options.threads, quick=options.quick, only=options.only)
        print(harness.save(report, options.out))
        print(f"written to {options.out / report.name}.md and .json", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
