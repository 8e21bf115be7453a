"""`python -m vitfast.benchmarks.tune unpack REPORT FOLDER`; tuning itself is `vitfast tune`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .ahead import compile_plan
from .files import unpack


def main(argv: Sequence[str] | None = None) -> int:
    """Lay a report's entries out as files, or compile candidates for a process that tunes."""
    parser = argparse.ArgumentParser(prog="python -m vitfast.benchmarks.tune", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    unpacking = commands.add_parser("unpack", help="lay a report's entries out as files of configs")
    unpacking.add_argument("report", type=Path)
    unpacking.add_argument("folder", type=Path, help="such as kernels/configs of a checkout")
    compiling = commands.add_parser("compile", help="what `tune` starts to compile candidates ahead")
    compiling.add_argument("plan", type=Path)
    options = parser.parse_args(argv)
    if options.command == "compile":
        compile_plan(options.plan)
    else:
        for path in unpack(options.report, options.folder):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
