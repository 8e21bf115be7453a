"""`benchmarks/gpu_day.sh` with a stub for python: order, time limits, and what fails takes nothing else with it."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.metadata import distributions, entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "benchmarks/gpu_day.sh"

STUB = """#!/bin/bash
echo "$@" >> "$(dirname "$0")/calls"
case "$*" in
  *"FAILING"*) echo "no luck"; exit 3 ;;
  *"HANGING"*) sleep 60 ;;
esac
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree with nothing but the script in it."""
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(ROOT / SCRIPT, tmp_path / SCRIPT)
    for name in ("vitfast/__init__.py", "kernels/__init__.py", "tests/test_it.py", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def day(tree: Path, *options: str, failing: str = "never", hanging: str = "never") -> tuple[int, str, list[str]]:
    """Exit status, output and the stub's calls."""
    stub = tree / "python"
    stub.write_text(STUB.replace("FAILING", failing).replace("HANGING", hanging))
    stub.chmod(0o755)
    command = ["bash", str(tree / SCRIPT), "--python", str(stub), "--out", str(tree / "out"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    calls = (tree / "calls").read_text().splitlines() if (tree / "calls").exists() else []
    return done.returncode, done.stdout + done.stderr, calls[1:]


def test_it_is_bash() -> None:
    subprocess.run(["bash", "-n", str(ROOT / SCRIPT)], check=True)


def test_steps_run_in_order_within_the_time(tree: Path) -> None:
    status, output, calls = day(tree, "--minutes", "100")
    assert status == 0, output
    steps = re.findall(r"==> ([a-z]+)[\w-]*: at most (\d+) s", output)
    assert list(dict.fromkeys(name for name, _ in steps)) == [
        *("tests", "parity", "headline", "peers", "kernels", "tune", "profile", "rest")
    ]
    assert 0.9 * 6000 <= sum(int(seconds) for _, seconds in steps) <= 6000
    assert len(calls) == len(steps)
    for call, (name, seconds) in zip(calls, steps, strict=True):
        if budget := re.search(r"--budget (\d+)", call):
            assert int(budget[1]) < int(seconds), name
    assert [word for call in calls for word in ("tests/kernels", "--precision tf32", "bench", " tune ") if word in call]


def test_commands_of_benchmarks_are_found_where_nothing_is_installed(tree: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tree)
    day(tree)
    found = distributions(path=[str(tree / "build" / "tree")])
    here = {entry.name: entry.value for each in found for entry in each.entry_points}
    assert here == {entry.name: entry.value for entry in entry_points(group="vitfast.commands")}
    assert here.keys() >= {"bench", "tune"}


def test_what_fails_or_hangs_stops_nothing_and_is_told(tree: Path) -> None:
    status, output, calls = day(
        tree, "--minutes", "1", "--steps", "parity,tune,rest", failing=" tune ", hanging="parity vit_large"
    )
    assert status == 1
    assert len(calls) == 7
    assert "parity-vit_large_patch16_224-bf16: ended at its limit of 1 s" in output
    assert "tune: failed with status 3: no luck" in output
    assert "rest: done in" in output.splitlines()[-1]
    assert (tree / "out" / "tune.log").read_text() == "no luck\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--minutes", "soon"), "--minutes soon; expected a positive integer"),
        (("--steps", "tests,sleep"), "step sleep; expected some of tests,parity"),
        (("--hours", "1"), "--hours; expected --python"),
        (("--minutes",), "--minutes needs a value"),
    ],
)
def test_a_wrong_option_is_named(options: tuple[str, ...], said: str, tree: Path) -> None:
    status, output, calls = day(tree, *options)
    assert (status, calls) == (2, [])
    assert said in output


def test_without_a_gpu_nothing_runs(tree: Path) -> None:
    status, output, _ = day(tree, failing="is_available")
    assert status == 2
    assert "no torch that sees a CUDA device" in output
