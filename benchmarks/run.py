"""The runner: build the candidates of a workload, hold them to the parity rule, time them together, keep the rows."""

from __future__ import annotations

import copy
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from vitfast import preprocess
from vitfast.clock import machine, timing
from vitfast.clock.ceilings import Ceilings, measure_ceilings
from vitfast.parity import compare

from .peers import Peer, peers, train_step
from .registry import BATCHED, Workload, photo_spec
from .results import Row, Run, load, same_run

PARITY_IMAGES = 2
"""Images that the truth is computed for: the first and the last of the batch."""

Function = Callable[[dict[str, Any]], Tensor]


@dataclass(frozen=True)
class Step:
    """How far a run is. `str()` is a line of progress.

    Attributes:
        workload, candidate: what is built or timed now.
        position, total: of the workload, counted from 1, among those that are measured in this call.
        share: of the run that is done.
        elapsed_s, left_s: seconds since the start, and until the end if it goes on like this; None at the start.
    """

    workload: Workload
    candidate: str
    position: int
    total: int
    share: float
    elapsed_s: float
    left_s: float | None

    def __str__(self) -> str:
        left = "" if self.left_s is None else f", {_clock(self.left_s)} left"
        return f"{self.position}/{self.total}  {_clock(self.elapsed_s)}{left}  {self.workload}: {self.candidate}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"


class Bar:
    """A run's progress for a reader: on a terminal one line that is drawn over, elsewhere a line for each step."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live = stream.isatty()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self._draw("")

    def step(self, step: Step) -> None:
        """Show where the run is."""
        if not self._live:
            self.say(str(step))
            return
        done = round(20 * step.share)
        line = f"[{'#' * done}{'.' * (20 - done)}] {step}"
        # a line that wraps cannot be drawn over
        self._draw(line[: shutil.get_terminal_size().columns - 1])

    def say(self, line: str) -> None:
        """Write a line that stays."""
        self._draw("")
        print(line, file=self._stream, flush=True)

    def _draw(self, line: str) -> None:
        if self._live:
            self._stream.write(f"\r{line}\x1b[K")
            self._stream.flush()


def select_peers(names: tuple[str, ...] | None) -> tuple[Peer, ...]:
    """The peers whose name starts with one of `names`; all for None.

    Raises:
        ValueError: a name that fits no peer; lists the peers.
    """
    every = peers()
    if names is None:
        return every
    for name in names:
        if not any(peer.name.startswith(name) for peer in every):
            raise ValueError(f"peer {name!r}; expected the start of one of: {', '.join(p.name for p in every)}")
    return tuple(peer for peer in every if peer.name.startswith(names))


def _ends(inputs: dict[str, Any], batch: int) -> dict[str, Any]:
    """The first and the last image of a set of inputs."""
    picked = _picked(batch)
    return {
        name: value
        if name not in BATCHED or value is None
        else value[picked]
        if isinstance(value, Tensor)
        else [value[i] for i in picked]
        for name, value in inputs.items()
    }


def _picked(batch: int) -> list[int]:
    return [0] if batch == 1 else [0, batch - 1]


def _cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def _reference(workload: Workload, dtype: torch.dtype, device: torch.device) -> Function:
    """The workload's reference in a dtype, its weights rounded to the workload's dtype first."""
    call = workload.reference
    if isinstance(call, nn.Module):
        module = copy.deepcopy(call).to(device, workload.torch_dtype).to(dtype)
        if workload.op == "train":
            module.train()
            return lambda inputs: train_step(module, module, inputs["pixels"])

        def call(**inputs: Any) -> Tensor:
            (value,) = inputs.values()
            return module(preprocess(value, photo_spec(workload.model), device=device) if "files" in inputs else value)

    def run(inputs: dict[str, Any]) -> Tensor:
        with torch.inference_mode():
            return call(**inputs)

    return run


class Parity:
    """Truth and baseline of one workload, computed once for all its candidates."""

    def __init__(self, workload: Workload, device: torch.device, inputs: dict[str, Any]) -> None:
        self.workload = workload
        self.inputs = inputs
        self.few = _ends(inputs, workload.shape["batch"])
        self.truth = _reference(workload, torch.float64, device)(_cast(self.few, torch.float64))
        self.baseline = _reference(workload, workload.torch_dtype, device)(self.few)

    def check(self, function: Function) -> tuple[float, float, bool]:
        """`(largest error, its limit, whether the rule holds)` of a candidate."""
        if self.workload.op == "train":
            # a gradient sums over the batch, so it is compared on the few images alone
            actual = function(self.few)
        else:
            actual = function(self.inputs)[_picked(self.workload.shape["batch"])]
        result = compare(actual, self.truth, self.baseline)
        return result.worst, result.worst_limit, result.ok


@contextmanager
def tf32(workload: Workload) -> Iterator[None]:
    """torch's own switch, for the rows that are named after it."""
    switch = torch.backends.cuda.matmul
    before, before_conv = switch.allow_tf32, torch.backends.cudnn.allow_tf32
    switch.allow_tf32 = torch.backends.cudnn.allow_tf32 = workload.dtype == "tf32"
    try:
        yield
    finally:
        switch.allow_tf32, torch.backends.cudnn.allow_tf32 = before, before_conv


def rotation(workload: Workload, device: torch.device) -> list[dict[str, Any]]:
    """As many sets of inputs as it takes to be past the last-level cache twice over, three at least, 32 at most."""
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    else:
        cache = 1 << 25
    first = workload.inputs(device, 0)
    size = sum(value.nbytes for value in first.values() if isinstance(value, Tensor))
    count = min(32, max(3, math.ceil(2 * cache / max(1, size))))
    return [first, *(workload.inputs(device, i) for i in range(1, count))]


def build(
    workload: Workload, peer: Peer, device: torch.device, sets: list[dict[str, Any]], parity: Parity
) -> tuple[Row, timing.Candidate | None]:
    """Build a candidate and hold it to the parity rule.

    Args:
        workload: what it computes.
        peer: the candidate.
        device: where.
        sets: from `rotation`.
        parity: of the workload on the first of them.

    Returns:
        Its row, all but the times, and its function of a call's number, or None where that is not to be timed.
    """
    row = Row(workload.layer, workload.name, workload.shape, workload.dtype, peer.name, "ok")
    row = replace(row, flops=workload.flops, bytes=workload.bytes)
    try:
        if (reason := peer.missing(workload, device)) is not None:
            return replace(row, status="missing", note=reason), None
        function = peer.build(workload, device)

        def call(index: int) -> Tensor:
            return function(sets[index % len(sets)])

        row = replace(row, cold_ms=timing.cold_ms(call, device))
        worst, limit, ok = parity.check(function)
        row = replace(row, error=worst if math.isfinite(worst) else None, error_limit=limit)
        if not ok:
            note = f"breaks the parity rule: largest error {worst:.3e} of {limit:.3e}, or its rms"
            return replace(row, status="failed parity", note=note), None
        return replace(row, peak_mb=timing.peak_memory_mb(call, device)), call
    except torch.OutOfMemoryError as error:
        return replace(row, status="out of memory", note=str(error).splitlines()[0]), None
    except Exception as error:
        note = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return replace(row, status="error", note=note), None
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def run_workload(
    workload: Workload,
    candidates: tuple[Peer, ...],
    device: torch.device,
    ceilings: Ceilings,
    *,
    budget_s: float,
    step: Callable[[str, float], None],
) -> list[Row]:
    """Every candidate's row for one workload; a candidate that fails is a row that says how.

    Args:
        workload: what is measured.
        candidates: peers that offer its op.
        device: where.
        ceilings: of this run.
        budget_s: seconds of timing for all candidates together; building, compiling and checking come on top.
        step: takes the name of the candidate that is next, and the share of the workload that is done.
    """
    rows: dict[str, Row] = {}
    ready: dict[str, timing.Candidate] = {}
    with tf32(workload):
        try:
            sets = rotation(workload, device)
            parity = Parity(workload, device, sets[0])
        except torch.OutOfMemoryError:
            blank = Row(workload.layer, workload.name, workload.shape, workload.dtype, "", "out of memory")
            blank = replace(blank, note="inputs and reference do not fit", flops=workload.flops, bytes=workload.bytes)
            return [replace(blank, candidate=peer.name) for peer in candidates]
        for i, peer in enumerate(candidates):
            step(peer.name, i / (len(candidates) + 1))
            rows[peer.name], call = build(workload, peer, device, sets, parity)
            if call is not None:
                ready[peer.name] = call
        step(f"timing {len(ready)} candidates", len(candidates) / (len(candidates) + 1))
        try:
            timings = timing.time_interleaved(ready, device, budget_s=budget_s)
        except torch.OutOfMemoryError as error:
            for name in ready:
                rows[name] = replace(rows[name], status="out of memory", note=str(error).splitlines()[0])
            return list(rows.values())
    floor = ceilings.floor_ms(workload.flops, workload.bytes, workload.dtype)
    telemetry = machine.telemetry(device)
    for name, taken in timings.items():
        rows[name] = replace(
            rows[name],
            ms=taken.median,
            ms_p20=taken.p20,
            ms_p80=taken.p80,
            samples=taken.samples,
            calls=taken.calls,
            floor_ms=floor,
            telemetry=telemetry,
        )
    return list(rows.values())


def run(
    todo: list[Workload],
    path: Path,
    device: torch.device,
    *,
    peer_names: tuple[str, ...] | None = None,
    budget_s: float | None = None,
    quick: bool = False,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    progress: Callable[[Step], None] | None = None,
) -> Run:
    """Measure workloads into a results file, going on where a killed run of the same code stopped.

    Args:
        todo: from `registry.workloads`, most precious first.
        path: of the results file; kept up to date after every workload.
        device: where.
        peer_names: starts of peers' names; None for all.
        budget_s: seconds for the whole run, shared out evenly over the workloads that are left; None for 10 a workload.
        quick: smaller ceilings' measurement, for a first look.
        say: takes a line for the reader.
        progress: takes each step; None to `say` them.

    Raises:
        ValueError: an unknown peer, or a results file of another schema or of another device, version or commit.
    """
    chosen = select_peers(peer_names)
    environment = machine.environment(device)
    result = load(path) if path.exists() else Run(environment)
    if not same_run(result.environment, environment):
        raise ValueError(f"{path} holds another run (device, versions or commit differ); give another --out")
    dtypes = {w.dtype: w.torch_dtype for w in todo}
    if result.ceilings is None or not dtypes.keys() <= result.ceilings.gemm_tflop_s.keys():
        say("ceilings: copy bandwidth and GEMM rate")
        measured = measure_ceilings(device, dtypes, quick=quick)
        # a precision that an earlier call measured keeps the rate that its rows were judged by
        known = {} if result.ceilings is None else dict(result.ceilings.gemm_tflop_s)
        result.ceilings = replace(measured, gemm_tflop_s={**measured.gemm_tflop_s, **known})
        result.save(path)
    report = progress or (lambda step: say(str(step)))
    begin = time.monotonic()
    wanted = []
    for workload in todo:
        offered = tuple(peer for peer in chosen if workload.op in peer.ops)
        if any(result.find(_key(workload, peer)) is None for peer in offered):
            wanted.append((workload, offered))
    for position, (workload, offered) in enumerate(wanted):
        spent = time.monotonic() - begin
        if budget_s is not None and spent > budget_s:
            say(f"budget of {budget_s:g} s is spent: {len(wanted) - position} workloads are left for the next run")
            break

        def step(candidate: str, share: float, workload: Workload = workload, position: int = position) -> None:
            share, spent = (position + share) / len(wanted), time.monotonic() - begin
            left = spent * (1 / share - 1) if share else None
            report(Step(workload, candidate, position + 1, len(wanted), share, spent, left))

        share = 10.0 if budget_s is None else max(0.1, (budget_s - spent) / (len(wanted) - position))
        result.add(run_workload(workload, offered, device, result.ceilings, budget_s=share, step=step))
        result.save(path)
    return result


def _key(workload: Workload, peer: Peer) -> tuple[Any, ...]:
    return Row(workload.layer, workload.name, workload.shape, workload.dtype, peer.name, "ok").key
