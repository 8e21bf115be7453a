"""`pytest benchmarks/` as its users start it: what it records, what it refuses, and what it stops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark comes with the extra vitfast[dev]")

ROOT = Path(__file__).resolve().parents[2]


def gate(folder: Path, *options: str) -> tuple[int, str, dict[str, dict[str, Any]]]:
    """Exit status, output and benchmarks by candidate of a run on one LayerNorm."""
    report = folder / "run.json"
    # the worker that runs this test is no worker to the process it starts
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--benchmark-json={report}"]
    command += [f"--benchmark-storage={folder}", "--vitfast-peer=torch eager", "--vitfast-peer=vitfast", *options]
    what = ["benchmarks/test_kernels.py", "-k", "test_kernel and [layer_norm"]
    done = subprocess.run([*command, *what], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    found = json.loads(report.read_text()) if report.exists() else {"benchmarks": []}
    return done.returncode, done.stdout + done.stderr, {b["extra_info"]["candidate"]: b for b in found["benchmarks"]}


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of the present code."""
    folder = tmp_path_factory.mktemp("baseline")
    status, output, _ = gate(folder)
    assert status == 0, output
    return folder / "run.json"


def test_what_is_recorded(baseline: Path) -> None:
    content = json.loads(baseline.read_text())
    machine = content["machine_info"]["vitfast"]
    assert machine["kind"] == "cpu"
    assert machine["versions"]["torch"]
    rows = content["benchmarks"]
    assert {row["group"] for row in rows} == {"layer_norm/vit_tiny_patch16_224 b2 fp32"}
    assert [row["extra_info"]["candidate"] for row in rows] == ["torch eager", "vitfast"]
    for row in rows:
        told, stats = row["extra_info"], row["stats"]
        assert told["shape"] == {"batch": 2, "rows": 2 * 5, "dim": 32}
        assert (told["layer"], told["dtype"], told["flops"]) == ("kernel", "fp32", 8.0 * 10 * 32)
        assert told["error"] <= told["error_limit"]
        assert told["floor_share"] == pytest.approx(told["floor_ms"] / (1e3 * stats["median"]))
        assert stats["rounds"] == 5
        # enough calls for 5 ms, however long that is on a busy machine
        assert row["stats"]["iterations"] > 1


def test_a_wrong_kernel_fails_and_has_no_time(tmp_path: Path) -> None:
    (tmp_path / "wrong_kernel.py").write_text(
        "from vitfast import kernels\n"
        "right = kernels.layer_norm\n"
        "kernels.layer_norm = lambda *args, **options: right(*args, **options) + 0.01\n"
    )
    status, output, recorded = gate(tmp_path, "-p", "wrong_kernel")
    assert status == 1, output
    assert "vitfast is not timed: failed parity: breaks the parity rule: largest error" in output
    assert list(recorded) == ["torch eager"]


@pytest.mark.parametrize(("factor", "status"), [(0.1, 1), (10.0, 0)], ids=["ten times slower", "ten times faster"])
def test_the_gate_stops_what_became_slower(factor: float, status: int, baseline: Path, tmp_path: Path) -> None:
    content = json.loads(baseline.read_text())
    for row in content["benchmarks"]:
        for name in ("min", "max", "mean", "median"):
            row["stats"][name] *= factor
    before = tmp_path / "before.json"
    before.write_text(json.dumps(content))
    found, output, recorded = gate(tmp_path, f"--benchmark-compare={before}", "--benchmark-compare-fail=median:100%")
    assert found == status, output
    assert ("Performance has regressed" in output) == bool(status)
    assert list(recorded) == ["torch eager", "vitfast"]
