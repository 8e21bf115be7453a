"""What `benchmarks/gpu.sh` runs: the suite in stages, most precious first, within a budget of minutes.

    tests     every test of the gpu lane
    parity    whole models, and every replaced module in them, against float64
    headline  ViT-B/16 and L/16 in bf16 at batches 256 and 1, against all peers
    kernels   each kernel against its peers
    tune      configs for these models and this device
    rest      other models, batches and dtypes; training steps, single blocks, photographs to logits
    profile   a block's kernels beside their floors

Each stage is a list of items in a process of its own, with a share of the time that is left. What an item finds is
saved when it ends. One that takes the process with it is noted, and a fresh process goes on behind it; one that hangs
ends with its stage. A call with the same `--out` does what is missing, and what failed once more after that.

    <out>/results.json                  rows of headline, kernels and rest, for `vitfast bench` and the docs
    <out>/stages/stages.json            what became of each item; parity's errors and the profiles among it
    <out>/stages/tuned.json             configs, for `python -m vitfast.benchmarks.tune unpack`
    <out>/stages/{stages,tests}.log     what was printed, and the end of each test's failure
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

import vitfast
from vitfast.clock import machine
from vitfast.kernels._config import user_folder

from . import gpu_tests, registry
from .registry import Workload, workloads
from .results import Row, Run, load, same_run, write_json
from .targets import fastest, is_compiled_peer, is_ours, standings

SCHEMA = 1

B, L = "vit_base_patch16_224", "vit_large_patch16_224"
TINY = "vit_tiny_patch16_224"

TINY_OPTIONS = {"img_size": 32, "depth": 1, "embed_dim": 32, "num_heads": 2, "num_classes": 7}
"""What a dry run makes of its model: every layer is there, none takes time."""

QUICK_PEERS = ("torch eager", "torch compiled", "timm compiled", "vitfast")
"""Whom a model is measured against first: compiling all the others takes minutes."""

DRY_PEERS = ("torch eager", "timm eager", "Transformers eager", "vitfast +patch_embed", "vitfast +tail")
DRY_KERNEL_PEERS = ("torch eager", "addmm", "SDPA", "vitfast")

TESTS_IN_A_GROUP = 24

# how a stage's process ends, beside 0
FAILED, OUT_OF_TIME, DEVICE_LOST = 1, 3, 4


@dataclass(frozen=True)
class Plan:
    """What a stage is given.

    Attributes:
        root: of the repository.
        out: folder of the results.
        device: where.
        dry: tiny shapes.
        seconds: for this stage.
    """

    root: Path
    out: Path
    device: torch.device
    dry: bool
    seconds: float

    @property
    def results(self) -> Path:
        """The results file."""
        return self.out / "results.json"

    @property
    def folder(self) -> Path:
        """Where everything else goes."""
        return self.out / "stages"

    @property
    def file(self) -> Path:
        """What became of each item."""
        return self.folder / "stages.json"

    @property
    def dtype(self) -> str:
        """The headline's precision."""
        return "bf16" if self.device.type == "cuda" else "fp32"

    @property
    def models(self) -> tuple[str, ...]:
        """The headline's models."""
        return (TINY,) if self.dry else (B, L)

    @property
    def batch(self) -> int:
        """The headline's large batch."""
        return 2 if self.dry else 256


@dataclass(frozen=True)
class Item:
    """A piece of a stage that is run whole or not at all.

    Attributes:
        name: the same in every call.
        run: takes its seconds, which it may exceed, and returns what JSON can hold: "bad" is a list of what is wrong,
            "lines" a list for the end of the output, the rest is kept.
        weight: of its share of the stage's time.
    """

    name: str
    run: Callable[[float], dict[str, Any]]
    weight: float = 1.0


@dataclass(frozen=True)
class Stage:
    """A function that lists a stage's items, most precious first.

    Attributes:
        items: lists them.
        share: of the time.
        jobs: items at a time.
    """

    items: Callable[[Plan], list[Item]]
    share: float
    jobs: int = 1


_writing = threading.Lock()


@contextlib.contextmanager
def record(plan: Plan, stage: str) -> Iterator[dict[str, Any]]:
    """A stage's entry in `stages.json`, saved when it closes."""
    with _writing:
        content = json.loads(plan.file.read_text(encoding="utf-8"))
        yield content["stages"].setdefault(stage, {"items": {}})
        write_json(plan.file, content)


def _stages(plan: Plan) -> dict[str, Any]:
    stages: dict[str, Any] = json.loads(plan.file.read_text(encoding="utf-8"))["stages"]
    return stages


def _start(plan: Plan) -> None:
    """Make `stages.json`, or go on with it.

    Raises:
        ValueError: it or the results file is another run's, or damaged.
    """
    environment = machine.environment(plan.device)
    if plan.results.exists() and not same_run(load(plan.results).environment, environment):
        raise ValueError(f"{plan.results} holds another run (device, versions or commit differ); give another --out")
    if not plan.file.exists():
        fresh = {"schema": SCHEMA, "environment": environment, "dry_run": plan.dry, "stages": {}}
        write_json(plan.file, fresh)
    try:
        content = json.loads(plan.file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{plan.file}: not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ValueError(f"{plan.file}: expected an object of schema {SCHEMA}")
    if content["dry_run"] != plan.dry or not same_run(content["environment"], environment):
        raise ValueError(
            f"{plan.file} holds another run (device, versions, commit or --dry-run differ); give another --out"
        )


def _say(line: str) -> None:
    print(line, flush=True)


# what the stages are made of


def _tests(plan: Plan) -> list[Item]:
    log = plan.folder / "tests.log"
    tests, broken = gpu_tests.collect(["tests/kernels/test_mlp.py"] if plan.dry else ["-m", "gpu", "tests"], log)
    files: dict[str, list[str]] = {}
    for test in tests:
        files.setdefault(test.partition("::")[0], []).append(test)
    groups = [
        (start, file, group[start : start + TESTS_IN_A_GROUP])
        for file, group in files.items()
        for start in range(0, len(group), TESTS_IN_A_GROUP)
    ]
    # some of every op first
    groups.sort(key=lambda group: group[0])

    def run(group: list[str], seconds: float) -> dict[str, Any]:
        found = dict(gpu_tests.outcomes(group, log))
        bad = [f"{outcome}: {test}" for test, outcome in found.items() if outcome not in ("passed", "skipped")]
        return {"tests": Counter(found.values()), "bad": bad}

    items = [
        Item(f"{file}[{start}:{start + len(group)}]", functools.partial(run, group)) for start, file, group in groups
    ]
    if broken:
        items.insert(0, Item("collection", lambda seconds: {"bad": [f"not imported: {file}" for file in broken]}))
    return items


def _parity(plan: Plan) -> list[Item]:
    from vitfast.libraries import image_shape
    from vitfast.parity import build_model, parity

    def run(model: str, precision: str, batch: int, seconds: float) -> dict[str, Any]:
        built: Any = build_model(model, img_size=32 if plan.dry else None).to(plan.device)
        generator = torch.Generator().manual_seed(2)
        pixels = torch.randn((batch, *image_shape(built)), generator=generator).to(plan.device)
        found = parity(built, pixels, precision)
        name = f"parity of {model} {precision} b{batch}"
        share = max((found.output.share, *(module.comparison.share for module in found.modules)), key=_nan_last)
        return {
            "bad": [] if found.ok else [f"{name}: {found.verdict}"],
            "lines": [f"{name}: {100 * share:.0f} % of what the rule allows, {len(found.modules)} modules"],
            "share": _number(share),
            "output": {name: _number(value) for name, value in asdict(found.output).items()},
            "broken": [module.module for module in found.broken],
            "top1": None if found.top1 is None else asdict(found.top1),
        }

    if plan.dry:
        cases = [(TINY, precision, 2) for precision in ("fp32", "bf16")]
    else:
        cases = [(model, "bf16", 8) for model in (B, L)]
        cases += [(B, precision, 8) for precision in ("fp16", "fp32", "tf32")]
        cases += [(model, "bf16", 8) for model in registry.MODELS if model not in (B, L)]
        cases += [(model, "bf16", 8) for model in _library_models()]
        cases += [(L, "fp16", 8), (B, "bf16", 1), (B, "bf16", 128)]
    return [
        Item(f"{model} {precision} b{batch}", functools.partial(run, model, precision, batch))
        for model, precision, batch in cases
    ]


def _library_models() -> tuple[str, ...]:
    """Other libraries' models of the suite, where their library is there; which are not is said."""
    missing = registry.missing_libraries(registry.LIBRARY_MODELS)
    for name, why in missing.items():
        _say(f"{name} is left out: {why}")
    return tuple(name for name in registry.LIBRARY_MODELS if name not in missing)


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _number(value: float) -> float | None:
    """What JSON has no number for becomes null."""
    return value if math.isfinite(value) else None


def _rows(plan: Plan, todo: Sequence[Workload], peers: tuple[str, ...] | None, weight: float = 1.0) -> list[Item]:
    """An item for each workload: rows of these peers in the results file."""
    from .run import run

    def rows(workload: Workload, seconds: float) -> dict[str, Any]:
        budget = 0.2 if plan.dry else seconds
        result = run([workload], plan.results, plan.device, peer_names=peers, budget_s=budget, quick=plan.dry, say=_say)
        return {
            "bad": [
                f"{workload}: {row.candidate}: {row.status}: {row.note[:200]}"
                for row in _of(result, workload)
                if is_ours(row.candidate) and row.status in ("failed parity", "error")
            ]
        }

    whom = "all peers" if peers is None else "the first peers"
    return [Item(f"{workload}, {whom}", functools.partial(rows, workload), weight) for workload in todo]


def _of(result: Run, workload: Workload) -> list[Row]:
    key = Row(workload.layer, workload.name, workload.shape, workload.dtype, "", "ok").key[:-1]
    return [row for row in result.rows if row.key[:-1] == key]


def headline_workloads(plan: Plan) -> list[Workload]:
    """Both batches of both models."""
    return workloads(("model",), plan.models, (plan.batch, 1), (plan.dtype,))


def _headline(plan: Plan) -> list[Item]:
    todo = headline_workloads(plan)
    if plan.dry:
        return _rows(plan, todo, DRY_PEERS)
    return _rows(plan, todo, QUICK_PEERS) + _rows(plan, todo, None, weight=2.0)


def _kernels(plan: Plan) -> list[Item]:
    if plan.dry:
        return _rows(plan, workloads(("kernel",), (TINY,), (2,), (plan.dtype,)), DRY_KERNEL_PEERS)
    todo = workloads(("kernel",), plan.models, (plan.batch,), (plan.dtype,))
    todo += workloads(("kernel",), (B,), (1,), (plan.dtype,))
    others = ("vit_huge_patch14_224", "vit_base_patch16_384", "vit_base_patch14_dinov2")
    todo += workloads(("kernel",), others, (64,), (plan.dtype,))
    todo += workloads(("kernel",), (registry.BEIT, registry.SWIN), (plan.batch, 1), (plan.dtype,))
    return _rows(plan, todo, None)


def _rest(plan: Plan) -> list[Item]:
    if plan.dry:
        todo = workloads(("block", "train", "end_to_end"), (TINY,), (2,), (plan.dtype,))
        return _rows(plan, todo, ("torch eager", "vitfast +block"))
    others = tuple(name for name in registry.MODELS if name not in plan.models)
    todo = workloads(("model",), others, (plan.batch, 1), (plan.dtype,))
    todo += workloads(("model",), _library_models(), (plan.batch, 1), (plan.dtype,))
    todo += workloads(("train",), (B, L), (128,), (plan.dtype,))
    todo += workloads(("block",), (B, L), (plan.batch,), (plan.dtype,))
    todo += workloads(("end_to_end",), (B,), (plan.batch,), (plan.dtype,))
    todo += workloads(("model",), (B, L), (32, 8, 128), (plan.dtype,))
    todo += workloads(("model",), (B,), (plan.batch, 1), ("fp16", "tf32"))
    todo += workloads(("model",), others, (32, 8, 128), (plan.dtype,))
    return _rows(plan, todo, QUICK_PEERS) + _rows(plan, todo, None)


def _tune(plan: Plan) -> list[Item]:
    from .tune import tune, unpack

    report = plan.folder / "tuned.json"
    if report.is_file():
        # what an earlier call found is where this one starts
        unpack(report, user_folder())
    small: dict[str, Any] = {"max_candidates": 1, "workers": 1} if plan.dry else {}

    def run(model: str, batch: int, ops: tuple[str, ...] | None, fold: bool, seconds: float) -> dict[str, Any]:
        found = tune(
            model,
            batch=batch,
            dtype=plan.dtype,
            device=plan.device,
            budget_s=2.0 if plan.dry else seconds,
            ops=ops,
            fold=fold,
            report=report,
            say=_say,
            **small,
        )
        _say(str(found))
        lines = str(found).splitlines()
        # what it chose for each launch stands in its report
        return {"lines": [lines[0], *(line for line in lines if "all together" in line)]}

    # attention's entries are for any batch, and the large one decides
    one = ("linear", "row_stats", "patch_embed")
    apart = ("linear", "layer_norm")
    cases: list[tuple[str, int, tuple[str, ...] | None, bool, float]] = [(TINY, 2, None, True, 1.0)]
    if not plan.dry:
        cases = [(B, 256, None, True, 3.0), (B, 1, one, True, 1.0), (L, 256, None, True, 3.0), (L, 1, one, True, 1.0)]
        # what training, compiled graphs and torch's own GEMM run
        cases += [(B, 256, apart, False, 2.0), (L, 256, apart, False, 2.0)]
    return [
        Item(f"{model} b{batch}{'' if fold else ' unfolded'}", functools.partial(run, model, batch, ops, fold), weight)
        for model, batch, ops, fold, weight in cases
    ]


def _profile(plan: Plan) -> list[Item]:
    from .profile import profile

    ceilings = load(plan.results).ceilings if plan.results.exists() else None

    def run(model: str, batch: int, scope: str, seconds: float) -> dict[str, Any]:
        nonlocal ceilings
        found = profile(
            model,
            batch=batch,
            dtype=plan.dtype,
            device=plan.device,
            scope=scope,
            ceilings=ceilings,
            calls=2 if plan.dry else 10,
            quick=plan.dry,
        )
        ceilings = found.ceilings
        _say(str(found))
        is_first = (model, batch, scope) == cases[0]
        lines = str(found).splitlines()[:8] if is_first else []
        return {"lines": lines, "profile": {**asdict(found), "floor_ms": found.floor_ms}}

    cases = [(model, batch, "block") for batch in (plan.batch, 1) for model in plan.models]
    cases.append((plan.models[0], plan.batch, "model"))
    return [
        Item(f"{scope} of {model} b{batch}", functools.partial(run, model, batch, scope))
        for model, batch, scope in cases
    ]


STAGES = {
    # compiling a kernel takes a core for seconds, running it next to nothing
    "tests": Stage(_tests, 0.15, jobs=max(1, min(4, (os.cpu_count() or 1) // 4))),
    "parity": Stage(_parity, 0.07),
    "headline": Stage(_headline, 0.28),
    "kernels": Stage(_kernels, 0.13),
    "tune": Stage(_tune, 0.17),
    "rest": Stage(_rest, 0.15),
    "profile": Stage(_profile, 0.05),
}
"""Most precious first. The time that a stage leaves over goes to those behind it."""


# one stage, in a process of its own


def _child(plan: Plan, name: str) -> int:
    """Run a stage's items; 0 if all were reached, else one of the statuses above."""
    begin, stage = time.monotonic(), STAGES[name]
    _end_with_parent()
    if plan.dry:
        registry.MODELS[TINY] = TINY_OPTIONS
    try:
        items = stage.items(plan)
        with record(plan, name) as entry:
            known = {item: facts["status"] for item, facts in entry["items"].items()}
            entry["total"] = len(items)
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        with record(plan, name) as entry:
            entry["note"] = _one_line(error)
        return FAILED
    # what an earlier call did not finish comes after all that it did not reach
    queue = [item for item in items if item.name not in known]
    queue += [item for item in items if known.get(item.name) == "again"]
    waiting = dict.fromkeys(queue)

    def work(item: Item) -> None:
        used = time.monotonic() - begin
        left = 0.95 * plan.seconds - used
        share = left * min(1.0, stage.jobs * item.weight / sum(other.weight for other in list(waiting)))
        if left < 1.0:
            return
        del waiting[item]
        _say(f"{name}: {item.name}, {share:.0f} s")
        with record(plan, name) as entry:
            entry["items"][item.name] = {"status": "begun"}
        try:
            facts = {"status": "done", **item.run(share)}
        except Exception as error:
            traceback.print_exc(file=sys.stdout)
            facts = {"status": "failed", "bad": [f"{item.name}: {_one_line(error)}"]}
        with record(plan, name) as entry:
            entry["items"][item.name] = {**facts, "seconds": time.monotonic() - begin - used}
        if gpu_tests.is_cuda_lost():
            sys.stdout.flush()
            os._exit(DEVICE_LOST)
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()

    if stage.jobs == 1:
        for item in queue:
            work(item)
    else:
        with ThreadPoolExecutor(stage.jobs) as pool:
            list(pool.map(work, queue))
    return OUT_OF_TIME if waiting else 0


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def _end_with_parent() -> None:
    """End this process and all that it started once its parent is gone, however that was ended."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _run_stage(plan: Plan, name: str) -> None:
    """Run a stage in processes, a fresh one after each that dies, until it is through or its time is."""
    begin = time.monotonic()
    with record(plan, name) as entry:
        spent = entry.get("seconds", 0.0)
        # what stays if this process is ended too
        entry.update(status="stopped", note="")
        for item in entry["items"].values():
            if item["status"] != "done":
                item["status"] = "again"
    # the user's own configs are neither read nor written
    with tempfile.TemporaryDirectory() as configs:
        environment = {**os.environ, "VITFAST_CONFIG_DIR": configs}
        if name == "tune" and plan.device.type != "cuda":
            # without a GPU there is nothing to launch but the interpreter's kernels
            environment["TRITON_INTERPRET"] = "1"
        status = None
        while (left := plan.seconds - (time.monotonic() - begin)) > 1.0:
            status = _run_process(plan, name, left, environment)
            if not (_blame(plan, name, status) or status == DEVICE_LOST):
                break
    with record(plan, name) as entry:
        items = entry["items"].values()
        died = status not in (None, 0, FAILED, OUT_OF_TIME)
        if status is None:
            entry["note"] = f"over its {plan.seconds:.0f} s"
        elif died and not entry["note"]:
            entry["note"] = f"its process ended by {_how(status)}; last line: {_last_line(plan)}"
        if status == FAILED or died or any(item.get("bad") for item in items):
            entry["status"] = "failed"
        else:
            entry["status"] = "done" if status == 0 else "partial"
        # only what is through to its end is not looked at again
        entry["complete"] = status == 0 and all(item["status"] == "done" for item in items)
        entry["seconds"] = spent + time.monotonic() - begin


def _run_process(plan: Plan, name: str, seconds: float, environment: dict[str, str]) -> int | None:
    """A stage's process: its status, or None if it had to be ended."""
    command = [sys.executable, "-m", "vitfast.benchmarks.stages", "--root", str(plan.root), "--out", str(plan.out)]
    command += ["--child", name, "--seconds", f"{seconds:g}", *(["--dry-run"] if plan.dry else [])]
    with (plan.folder / "stages.log").open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)


def _blame(plan: Plan, name: str, status: int | None) -> bool:
    """Whether a process died by itself in an item, which is then noted as failed."""
    if status in (None, 0, FAILED, OUT_OF_TIME):
        return False
    with record(plan, name) as entry:
        culprits = [item for item, facts in entry["items"].items() if facts["status"] == "begun"]
        for item in culprits:
            bad = f"{item}: its process ended by {_how(status)}; last line: {_last_line(plan)}"
            entry["items"][item] = {"status": "failed", "bad": [bad]}
    return bool(culprits)


def _how(status: int | None) -> str:
    return f"status {status}" if status is None or status >= 0 else signal.Signals(-status).name


def _last_line(plan: Plan) -> str:
    text = (plan.folder / "stages.log").read_text(encoding="utf-8", errors="replace")
    return gpu_tests.last_lines(text, 1)[:200]


def _end(process: subprocess.Popen[Any]) -> None:
    """End a process and all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    # one that waits in a driver may outlive even that
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5.0)


# the end of the output


def _stage_lines(name: str, entry: dict[str, Any]) -> list[str]:
    """What became of a stage, and what is wrong."""
    items = entry["items"].values()
    counts = sum((Counter(item.get("tests")) for item in items), Counter())
    done = sum(item["status"] == "done" for item in items)
    parts = [f"{done} of {entry['total']} items"] if "total" in entry else []
    parts += [f"{number} {outcome}" for outcome, number in counts.items()]
    parts += [entry["note"]] if entry.get("note") else []
    line = f"  {name:<9} {entry.get('status', '?'):<8} {entry.get('seconds', 0.0):5.0f} s  {', '.join(parts)}"
    bad = [bad for item in items for bad in item.get("bad", ())]
    more = [f"    and {len(bad) - 12} more, see stages.json"] if len(bad) > 12 else []
    return [line.rstrip(), *(f"    {wrong}" for wrong in bad[:12]), *more]


def summary(plan: Plan) -> str:
    """A short table of all that the folder holds."""
    stages = _stages(plan)
    lines = ["", f"{_device_name(plan.device)}, torch {torch.__version__}, {machine.commit() or 'no commit'}"]
    known = [(name, stages[name]) for name in STAGES if name in stages]
    for name, entry in known:
        lines += _stage_lines(name, entry)
    if plan.results.exists():
        lines += _speed(plan, load(plan.results))
    lines += [line for _, entry in known for item in entry["items"].values() for line in item.get("lines", ())]
    return "\n".join(lines)


def _speed(plan: Plan, result: Run) -> list[str]:
    lines = []
    if result.ceilings is not None:
        rates = ", ".join(f"{name} {rate:.1f}" for name, rate in result.ceilings.gemm_tflop_s.items())
        lines.append(f"ceilings: {result.ceilings.copy_gb_s:.0f} GB/s; TFLOP/s: {rates}")
    for workload in headline_workloads(plan):
        rows = _of(result, workload)
        ours = fastest(row for row in rows if is_ours(row.candidate))
        peer = fastest(row for row in rows if is_compiled_peer(row.candidate)) or fastest(
            row for row in rows if not is_ours(row.candidate)
        )
        if ours is None or ours.ms is None:
            continue
        against = f"; {peer.candidate} {peer.ms:.3f} ms, {peer.ms / ours.ms:.2f}x" if peer and peer.ms else ""
        lines.append(
            f"{workload}: {ours.candidate} {ours.ms:.3f} ms,"
            f" {ours.images_per_s:.0f} img/s, {100 * (ours.floor_share or 0):.0f} % of the floor's speed{against}"
        )
    for standing in standings(result):
        target = standing.target
        measured = "not measured" if standing.measured is None else f"{standing.measured:.5g}"
        met = {True: "met", False: "MISSED", None: "-"}[standing.met]
        lines.append(f"  target {target.model} b{target.batch}: {target.value:g} {target.kind}, {measured}: {met}")
    statuses = Counter(row.status for row in result.rows)
    lines.append(f"rows: {', '.join(f'{number} {status}' for status, number in statuses.items())}")
    return lines


# the command


def slug(device_name: str) -> str:
    """A device's folder in `benchmarks/results`."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else machine.cpu_name()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="benchmarks/gpu.sh", description="The suite in stages, most precious first.")
    parser.add_argument("--out", type=Path, help="folder (default benchmarks/results/<device>; dry: build/gpu-dry-run)")
    parser.add_argument("--minutes", type=float, default=25.0, help="for all stages together (default %(default)g)")
    parser.add_argument("--stages", help=f"some of {','.join(STAGES)} (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on any machine")
    parser.add_argument("--root", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=list(STAGES), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    names = list(STAGES) if options.stages is None else options.stages.split(",")
    if unknown := [name for name in names if name not in STAGES]:
        parser.error(f"stage {unknown[0]!r}; expected some of {','.join(STAGES)}")
    if not 0 < options.minutes < math.inf:
        parser.error(f"--minutes {options.minutes:g}; expected a positive number")
    # in order of preciousness, whatever the order given
    options.stages = [name for name in STAGES if name in names]
    return options


def _say_what_does_not_import() -> None:
    for name in ("vitfast.parity", "vitfast.benchmarks.run", "vitfast.benchmarks.tune", "vitfast.benchmarks.profile"):
        try:
            importlib.import_module(name)
        except Exception as error:
            print(f"warning: {name} does not import: {_one_line(error)}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; 0 if nothing is wrong, 1 if a stage failed or found a fault, 2 if nothing could be run."""
    options = _options(argv)
    begin = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not options.dry_run:
        print("error: torch sees no CUDA device; --dry-run walks through the stages on any machine", file=sys.stderr)
        return 2
    root = options.root.resolve()
    if Path(vitfast.__file__).resolve().parent != root / "vitfast":
        print(f"error: {vitfast.__file__} is imported, not that of {root}: uninstall it", file=sys.stderr)
        return 2
    results = root / "benchmarks" / "results" / slug(_device_name(device))
    out = (options.out or (root / "build" / "gpu-dry-run" if options.dry_run else results)).resolve()
    if options.child:
        return _child(Plan(root, out, device, options.dry_run, options.seconds), options.child)

    plan = Plan(root, out, device, options.dry_run, 60.0 * options.minutes)
    try:
        _start(plan)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if plan.dry:
        # the summary asks for the headline's shapes
        registry.MODELS[TINY] = TINY_OPTIONS
    _say_what_does_not_import()
    stages = _stages(plan)
    todo = [stage for stage in options.stages if not stages.get(stage, {}).get("complete")]
    # whoever ends this process still gets the table
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    try:
        for position, name in enumerate(todo):
            left = plan.seconds - (time.monotonic() - begin)
            share = STAGES[name].share / sum(STAGES[other].share for other in todo[position:])
            # a dry run is for what breaks, not for the time
            seconds = left if plan.dry else left * share
            if seconds < 5.0:
                with record(plan, name) as entry:
                    entry.setdefault("status", "not reached")
                continue
            print(f"==> {name}: {seconds:.0f} s at most", file=sys.stderr, flush=True)
            _run_stage(Plan(root, out, device, plan.dry, seconds), name)
            print("\n".join(_stage_lines(name, _stages(plan)[name])), file=sys.stderr, flush=True)
    finally:
        print(summary(plan), flush=True)
    stages = _stages(plan)
    return int(any(stages.get(name, {}).get("status") == "failed" for name in options.stages))


if __name__ == "__main__":
    sys.exit(main())
