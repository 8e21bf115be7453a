"""Run the tests of a library with other releases of it than the pinned one: `make versions`.

Each line of releases.txt is installed once, without dependencies, into a folder of build/versions/ that stands in front
of the environment's packages when that library's tests run, in a process of their own. What is installed stays.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from packaging.markers import Marker

ROOT = Path(__file__).parents[2]
RELEASES = Path(__file__).with_name("releases.txt")
INSTALLED = ROOT / "build" / "versions"

_LIBRARIES = "tests/versions/test_libraries.py::test_"
_KERNELS = "tests/kernels/_one_of_each.py"
# what is run for a package: environment variables and pytest's arguments
RUNS: dict[str, tuple[tuple[dict[str, str], list[str]], ...]] = {
    "timm": (({}, [f"{_LIBRARIES}timm"]),),
    "transformers": (({}, [f"{_LIBRARIES}transformers"]),),
    "torchvision": (({}, [f"{_LIBRARIES}torchvision"]),),
    "open_clip_torch": (({}, [f"{_LIBRARIES}open_clip"]),),
    "triton": (
        ({"TRITON_INTERPRET": "1"}, ["-m", "interpret", _KERNELS]),
        ({}, ["-m", "compile_only", _KERNELS]),
        # one prepared launch of each op, and all else about them
        ({}, ["-m", "compile_only", "-k", "not bfloat16", "tests/kernels/test_launch.py"]),
    ),
}


def releases() -> list[list[str]]:
    """The requirements of each line that this Python can install."""
    lines = (line.strip() for line in RELEASES.read_text(encoding="utf-8").splitlines())
    parts = [line.partition(";") for line in lines if line and not line.startswith("#")]
    return [text.split() for text, _, marker in parts if not marker or Marker(marker.strip()).evaluate()]


def install(requirements: list[str]) -> Path:
    """The folder that holds these packages, made where it does not yet."""
    folder = INSTALLED / requirements[0].replace("==", "-")
    done = folder / "requirements.txt"
    wanted = "\n".join(requirements)
    if not done.exists() or done.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, *requirements]
        subprocess.run(command, check=True)
        # last, so that an interrupted one is made again
        done.write_text(wanted, encoding="utf-8")
    return folder


def run(requirements: list[str]) -> bool:
    """Install, test and say how it went; whether all passed."""
    folder = install(requirements)
    started = time.monotonic()
    passed, said = True, []
    for variables, arguments in RUNS[requirements[0].partition("==")[0]]:
        command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "--tb=short", *arguments]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder), **variables}
        result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        passed = passed and result.returncode == 0
        summary = result.stdout.strip().rpartition("\n")[2] or result.stderr.strip()
        said.append(summary if result.returncode == 0 else f"FAILED\n{result.stdout}{result.stderr}")
    print(f"{' '.join(requirements[:1])}: {'; '.join(said)} ({time.monotonic() - started:.0f} s)", flush=True)
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description="Test old and new releases of the libraries.")
    parser.add_argument("only", nargs="*", help="packages or releases, such as timm or timm==1.0.9; default all")
    parser.add_argument("-j", "--jobs", type=int, default=2, help="how many at once (default 2)")
    options = parser.parse_args()
    chosen = releases()
    for name in options.only:
        if not any(name in (r[0], r[0].partition("==")[0]) for r in chosen):
            parser.error(f"{name!r} is not in {RELEASES.name}; there are {', '.join(r[0] for r in chosen)}")
    if options.only:
        chosen = [r for r in chosen if r[0] in options.only or r[0].partition("==")[0] in options.only]
    with ThreadPoolExecutor(options.jobs) as pool:
        # the longest ones first: lists end with them
        return 0 if all(list(pool.map(run, reversed(chosen)))) else 1


if __name__ == "__main__":
    sys.exit(main())
