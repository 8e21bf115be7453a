"""`benchmarks/gpu.sh`: it runs through, goes on where it was ended, and what dies takes nothing else with it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vitfast.benchmarks import gpu_tests, registry, run, stages
from vitfast.benchmarks.runner.results import Row, Run, load
from vitfast.clock import machine

ROOT = Path(__file__).resolve().parents[2]

FILES = {"results.json", "stages/stages.json", "stages/tuned.json", "stages/stages.log", "stages/tests.log"}


def _command(*words: str) -> list[str]:
    return ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--python", sys.executable, *words]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    # one commit and one number of threads, whatever happens to the tree meanwhile
    return {**os.environ, "GIT_DIR": "/nonexistent", "OMP_NUM_THREADS": "1"}


def _start(environment: dict[str, str], *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        _command(*words), env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def _entries(out: Path) -> dict[str, Any]:
    return json.loads((out / "stages" / "stages.json").read_text())["stages"]


def _until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60.0
    while time.monotonic() < end:
        try:
            if condition():
                return
        except (FileNotFoundError, KeyError):
            pass
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    process.kill()
    pytest.fail("it did not come so far in a minute")


def _is_begun(out: Path, stage: str) -> bool:
    return any(item["status"] == "begun" for item in _entries(out)[stage]["items"].values())


def _child_of(process: subprocess.Popen[str]) -> int:
    """The process of the stage that runs."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return int(children.read_text().split()[0])


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


linux = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's list of child processes")


@linux
@pytest.mark.slow
def test_dry_run_killed_resumed_and_done(tmp_path: Path, environment: dict[str, str]) -> None:
    out = tmp_path / "out"
    killed = _start(environment, "--dry-run", "--out", str(out))
    _until(killed, lambda: _is_begun(out, "parity"))
    child = _child_of(killed)
    killed.kill()
    killed.wait()
    before = _entries(out)
    assert {name: entry["status"] for name, entry in before.items()} == {"tests": "done", "parity": "stopped"}
    end = time.monotonic() + 10.0
    while _is_running(child) and time.monotonic() < end:
        time.sleep(0.1)
    assert not _is_running(child), "what a killed run started goes on without it"

    resumed = subprocess.run(
        _command("--dry-run", "--out", str(out)), env=environment, capture_output=True, text=True, check=False
    )
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "==> tests" not in resumed.stderr and "==> parity" in resumed.stderr
    after = _entries(out)
    assert list(after) == list(stages.STAGES)
    assert after["tests"] == before["tests"]
    for name, entry in after.items():
        assert (name, entry["status"], entry["note"], entry["complete"]) == (name, "done", "", True)
        assert len(entry["items"]) == entry["total"] > 0
        assert all(item["status"] == "done" and not item.get("bad") for item in entry["items"].values())
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == FILES
    rows = load(out / "results.json").rows
    assert {row.layer for row in rows} == {"kernel", "block", "model", "train", "end_to_end"}
    assert all(row.status in ("ok", "missing") for row in rows)
    ours = [row for row in rows if row.status == "ok" and row.candidate.startswith("vitfast")]
    assert len({(row.layer, row.workload, row.shape["batch"]) for row in ours}) == len(registry.KERNELS) + 2 + 3
    counts = sum((Counter(item["tests"]) for item in after["tests"]["items"].values()), Counter())
    assert counts["passed"] > 0 and counts.keys() <= {"passed", "skipped"}
    tuned = after["tune"]["items"]["vit_tiny_patch16_224 b2"]["lines"][0]
    for words in (f"{counts['passed']} passed", "vitfast +", "parity of vit_tiny", "gap ms", tuned):
        assert words in resumed.stdout

    # nothing is left to do, and the table is there all the same
    again = subprocess.run(
        _command("--dry-run", "--out", str(out)), env=environment, capture_output=True, text=True, check=False
    )
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout == resumed.stdout
    assert _entries(out) == after


@linux
def test_an_item_that_takes_its_process_with_it(tmp_path: Path, environment: dict[str, str]) -> None:
    words = ("--dry-run", "--stages", "parity", "--out", str(tmp_path))
    running = _start(environment, *words)
    _until(running, lambda: _is_begun(tmp_path, "parity"))
    os.kill(_child_of(running), signal.SIGSEGV)
    said, _ = running.communicate(timeout=60)
    assert running.returncode == 1, said
    entry = _entries(tmp_path)["parity"]
    assert (entry["status"], entry["complete"]) == ("failed", False)
    assert [item["status"] for item in entry["items"].values()] == ["failed", "done"]
    assert "1 of 2 items" in said and "fp32 b2: its process ended by SIGSEGV" in said

    # the next call tries that one again, and no other
    retried = _start(environment, *words)
    said, _ = retried.communicate(timeout=60)
    assert retried.returncode == 0, said
    again = _entries(tmp_path)["parity"]
    assert (again["status"], again["complete"]) == ("done", True)
    first, second = again["items"].values()
    assert first["status"] == "done" and second == list(entry["items"].values())[1]


@linux
def test_an_item_that_hangs_ends_with_its_stage(tmp_path: Path, environment: dict[str, str]) -> None:
    running = _start(environment, "--dry-run", "--stages", "profile", "--minutes", "0.15", "--out", str(tmp_path))
    _until(running, lambda: _is_begun(tmp_path, "profile"))
    child = _child_of(running)
    os.kill(child, signal.SIGSTOP)
    said, _ = running.communicate(timeout=60)
    assert running.returncode == 0, said
    assert not _is_running(child)
    entry = _entries(tmp_path)["profile"]
    assert (entry["status"], entry["note"], entry["complete"]) == ("partial", "over its 9 s", False)


def test_a_stage_that_fails_leaves_the_next_alone(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "tuned.json").write_text("{}")
    done = _start(environment, "--dry-run", "--stages", "profile,tune", "--out", str(tmp_path))
    said, _ = done.communicate(timeout=60)
    assert done.returncode == 1, said
    entries = _entries(tmp_path)
    assert {name: entry["status"] for name, entry in entries.items()} == {"tune": "failed", "profile": "done"}
    assert "tuning report of schema None" in entries["tune"]["note"] and entries["tune"]["note"] in said
    assert len(entries["profile"]["items"]) == 3
    for item in entries["profile"]["items"].values():
        assert item["profile"]["floor_ms"] < item["profile"]["busy_ms"]


def test_every_item_of_a_gpu_s_stages_has_its_own_name(tmp_path: Path) -> None:
    plan = stages.Plan(ROOT, tmp_path, torch.device("cuda"), False, 60.0)
    for stage in ("parity", "tune", "profile"):
        names = [item.name for item in stages.STAGES[stage].items(plan)]
        assert len(set(names)) == len(names)
        assert stages.B in names[0]
    assert sum(stage.share for stage in stages.STAGES.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out"], "--out needs a value"),
        (["--wheels", "/nonexistent"], "--wheels /nonexistent: no wheels are there"),
        (["--python", "/nonexistent"], "/nonexistent cannot import torch"),
        (["--minutes", "5"], "torch sees no CUDA device; --dry-run walks through"),
    ],
)
def test_what_the_script_cannot_do_is_one_line(words: list[str], said: str, environment: dict[str, str]) -> None:
    hidden = {**environment, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(_command(*words), env=hidden, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert said in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--stages", "tests,all"], "stage 'all'; expected some of tests,parity,"),
        (["--minutes", "-1"], "--minutes -1; expected a positive number"),
        (["--minutes", "many"], "argument --minutes: invalid float value: 'many'"),
    ],
)
def test_wrong_options_are_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        stages.main(["--root", str(ROOT), *words])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert said in error


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("stages/stages.json", "{", "not JSON"),
        ("stages/stages.json", '{"schema": 0}', "expected an object of schema 1"),
        ("stages/stages.json", '{"schema": 1, "dry_run": true, "environment": {}}', "holds another run"),
        ("results.json", '{"schema": 1, "environment": {}, "ceilings": null, "rows": []}', "holds another run"),
    ],
)
def test_files_of_another_run_are_refused(
    file: str, text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "environment", lambda device: {"device": "fake processor"})
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert stages.main(["--root", str(ROOT), "--dry-run", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error and file in error and error.count("\n") == 1
    assert path.read_text() == text


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> stages.Plan:
    """Of a dry run whose file is there, for stages in this process."""
    monkeypatch.setattr(machine, "environment", lambda device: {"device": "fake processor"})
    monkeypatch.setattr(stages, "_end_with_parent", lambda: None)
    monkeypatch.setitem(registry.MODELS, stages.TINY, registry.MODELS[stages.TINY])
    found = stages.Plan(ROOT, tmp_path, torch.device("cpu"), True, 60.0)
    stages._start(found)
    return found


def _stage(monkeypatch: pytest.MonkeyPatch, plan: stages.Plan, jobs: int, **runs: Callable[[float], Any]) -> int:
    items = [stages.Item(name, run) for name, run in runs.items()]
    monkeypatch.setitem(stages.STAGES, "rest", stages.Stage(lambda plan: items, 1.0, jobs))
    return stages._child(plan, "rest")


def _statuses(plan: stages.Plan) -> dict[str, str]:
    return {name: item["status"] for name, item in _entries(plan.out)["rest"]["items"].items()}


def test_items_side_by_side(plan: stages.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    meet = threading.Barrier(3, timeout=30.0)

    def run(seconds: float) -> dict[str, Any]:
        assert seconds <= 60.0
        meet.wait()
        return {"tests": {"passed": 2, "failed": 1}, "bad": ["failed: one"]}

    def wrong(seconds: float) -> dict[str, Any]:
        meet.wait()
        raise KeyError("what is wrong")

    # three at a time, or the barrier breaks
    assert _stage(monkeypatch, plan, 3, a=run, b=wrong, c=run, d=run, e=run, f=run) == 0
    assert _statuses(plan) == dict.fromkeys("acdef", "done") | {"b": "failed"}
    head, *bad = stages._stage_lines("rest", _entries(plan.out)["rest"])
    assert "5 of 6 items, 10 passed, 5 failed" in head
    assert sorted(bad) == ["    b: KeyError: 'what is wrong'", *["    failed: one"] * 5]


def test_time_is_shared_by_weight_and_what_was_begun_comes_last(
    plan: stages.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, float]] = []

    def run(name: str) -> stages.Item:
        return stages.Item(name, lambda seconds: asked.append((name, seconds)) or {}, 3.0 if name == "b" else 1.0)

    with stages.record(plan, "rest") as entry:
        entry["items"] = {"a": {"status": "again"}, "c": {"status": "done"}}
    items = [run(name) for name in "abcd"]
    monkeypatch.setitem(stages.STAGES, "rest", stages.Stage(lambda plan: items, 1.0))
    assert stages._child(plan, "rest") == 0
    assert [name for name, _ in asked] == ["b", "d", "a"]
    for (_, seconds), share in zip(asked, (3 / 5, 1 / 2, 1.0), strict=True):
        assert seconds == pytest.approx(0.95 * 60.0 * share, rel=0.02)


def test_items_that_the_time_does_not_reach(plan: stages.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    short = dataclasses.replace(plan, seconds=1.3)
    runs = {"a": lambda seconds: time.sleep(0.5) or {}, "b": lambda seconds: {}}
    assert _stage(monkeypatch, short, 1, **runs) == stages.OUT_OF_TIME
    assert _statuses(plan) == {"a": "done"}
    assert "1 of 2 items" in stages._stage_lines("rest", _entries(plan.out)["rest"])[0]


def test_an_item_that_loses_the_device_is_the_last_of_its_process(
    plan: stages.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(gpu_tests, "is_cuda_lost", lambda: True)
    monkeypatch.setattr(os, "_exit", leave)

    def faulty(seconds: float) -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(SystemExit) as ended:
        _stage(monkeypatch, plan, 1, a=faulty, b=lambda seconds: {})
    assert ended.value.code == stages.DEVICE_LOST
    assert _entries(plan.out)["rest"]["items"]["a"]["bad"] == [
        "a: RuntimeError: CUDA error: an illegal memory access was encountered"
    ]
    assert _statuses(plan) == {"a": "failed"}


def test_broken_parity_is_told_and_kept(plan: stages.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    # the package's own `parity` is the function
    module = importlib.import_module("vitfast.parity")
    build = module.build_model

    def spoilt(*args: Any, **options: Any) -> torch.nn.Module:
        model = build(*args, **options)
        with torch.no_grad():
            model.blocks[3].mlp.fc1.bias.fill_(math.nan)
        return model

    monkeypatch.setattr(module, "build_model", spoilt)
    facts = stages._parity(plan)[0].run(1.0)
    assert len(facts["bad"]) == 1 and "the rule is broken" in facts["bad"][0]
    assert facts["share"] is None and facts["output"]["rms"] is None
    json.dumps(facts, allow_nan=False)


def test_our_own_rows_that_fail_are_told(plan: stages.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.reference_model.cache_clear()
    monkeypatch.setitem(registry.MODELS, stages.TINY, stages.TINY_OPTIONS)
    (workload,) = registry.workloads(("block",), (stages.TINY,), (2,), ("fp32",))
    registry.reference_model.cache_clear()
    blank = Row(workload.layer, workload.name, workload.shape, workload.dtype, "", "error", note="no reason")
    other = dataclasses.replace(blank, dtype="bf16", candidate="vitfast")
    names = ("timm eager", "vitfast +block", "vitfast +mlp")
    rows = [dataclasses.replace(blank, candidate=name) for name in names]
    rows[2] = dataclasses.replace(rows[2], status="missing")
    monkeypatch.setattr(run, "run", lambda *args, **options: Run({}, None, [other, *rows]))
    (item,) = stages._rows(plan, [workload], None)
    assert item.name == f"{workload}, all peers"
    assert item.run(1.0) == {"bad": [f"{workload}: vitfast +block: error: no reason"]}


TESTS = """
import os, time
import pytest

def test_right():
    pass

def test_wrong():
    assert 1 + 1 == 3, "sums differ"

def test_hangs():
    time.sleep(60)

@pytest.mark.skip(reason="not here")
def test_skipped():
    pass

def test_aborts():
    os.abort()

@pytest.fixture
def broken():
    yield
    raise RuntimeError("in its end")

def test_of_a_broken_fixture(broken):
    pass

def test_last():
    pass
"""


def test_a_test_that_hangs_or_dies_ends_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_unimportable.py").write_text("import no_such_module_of_anyone\n")
    log = tmp_path / "tests.log"
    tests, broken = gpu_tests.collect(["."], log)
    assert broken == ["test_unimportable.py"]
    assert [test.removeprefix("test_some.py::test_") for test in tests] == [
        "right", "wrong", "hangs", "skipped", "aborts", "of_a_broken_fixture", "last"
    ]  # fmt: skip
    found = dict(gpu_tests.outcomes(tests, log, seconds=2.0))
    assert list(found.values()) == ["passed", "failed", "died", "skipped", "died", "failed", "passed"]
    assert list(found) == tests
    said = log.read_text()
    for words in ("No module named 'no_such_module_of_anyone'", "sums differ", "in its end", "Fatal Python error"):
        assert words in said
    # where it hung
    assert "Timeout (0:00:02)!" in said and "in test_hangs" in said
    assert "DIED test_some.py::test_hangs" in said and "DIED test_some.py::test_aborts" in said
    assert len(said.splitlines()) < 150


def test_no_tests_and_no_begin_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match=r"no tests .status 5."):
        gpu_tests.collect(["."], tmp_path / "log")
    with pytest.raises(RuntimeError, match=r"(?s)before any test: .*not found"):
        list(gpu_tests.outcomes(["test_nowhere.py::test_it"], tmp_path / "log"))


def test_last_lines() -> None:
    assert gpu_tests.last_lines("a\n\nb\n  \nc\n", 2) == "b\nc"
    assert gpu_tests.last_lines("", 2) == ""
