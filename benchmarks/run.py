"""The runner: build the candidates of a workload, hold them to the parity rule, time them together, keep the rows."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitfast.parity import compare

from . import measure
from .peers import Peer, peers, train_step
from .registry import BATCHED, Workload
from .results import Row, Run, load, same_run

PARITY_IMAGES = 2
"""Images that the truth is computed for: the first and the last of the batch."""

Function = Callable[[dict[str, Any]], Tensor]


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
    picked = [0] if batch == 1 else [0, batch - 1]
    return {
        name: value[picked] if name in BATCHED and isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


def _cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def _reference(workload: Workload, dtype: torch.dtype, device: torch.device) -> Function:
    """The workload's reference in a dtype, its weights rounded to the workload's dtype first."""
    reference = workload.reference
    if isinstance(reference, nn.Module):
        model = copy.deepcopy(reference).to(device, workload.torch_dtype).to(dtype)
        if workload.op == "train":
            model.train()
            return lambda inputs: train_step(model, model, inputs["pixels"])
        reference = lambda pixels, model=model: model(pixels)  # noqa: E731

    def run(inputs: dict[str, Any]) -> Tensor:
        with torch.inference_mode():
            return reference(**inputs)

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
        batch = self.workload.shape["batch"]
        if self.workload.op == "train":
            # a gradient sums over the batch, so it is compared on the few images alone
            actual = function(self.few)
        else:
            actual = function(self.inputs)
            actual = actual[[0] if batch == 1 else [0, batch - 1]]
        result = compare(actual, self.truth, self.baseline)
        return result.worst, result.worst_limit, result.ok


@contextmanager
def _tf32(workload: Workload) -> Iterator[None]:
    """torch's own switch, for the rows that are named after it."""
    switch = torch.backends.cuda.matmul
    before, before_conv = switch.allow_tf32, torch.backends.cudnn.allow_tf32
    switch.allow_tf32 = torch.backends.cudnn.allow_tf32 = workload.dtype == "tf32"
    try:
        yield
    finally:
        switch.allow_tf32, torch.backends.cudnn.allow_tf32 = before, before_conv


def _rotation(workload: Workload, device: torch.device) -> list[dict[str, Any]]:
    """As many sets of inputs as it takes to be past the last-level cache twice over, three at least, 32 at most."""
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    else:
        cache = 1 << 25
    first = workload.inputs(device, 0)
    size = sum(value.nbytes for value in first.values() if isinstance(value, Tensor))
    count = min(32, max(3, math.ceil(2 * cache / max(1, size))))
    return [first, *(workload.inputs(device, i) for i in range(1, count))]


def _rotated(function: Function, sets: list[dict[str, Any]]) -> measure.Candidate:
    return lambda i: function(sets[i % len(sets)])


def run_workload(
    workload: Workload,
    candidates: tuple[Peer, ...],
    device: torch.device,
    ceilings: measure.Ceilings,
    *,
    budget_s: float,
    say: Callable[[str], None],
) -> list[Row]:
    """Every candidate's row for one workload; a candidate that fails is a row that says how.

    Args:
        workload: what is measured.
        candidates: peers that offer its op.
        device: where.
        ceilings: of this run.
        budget_s: seconds of timing for all candidates together; building, compiling and checking come on top.
        say: takes a line of progress.
    """
    rows: dict[str, Row] = {}
    ready: dict[str, measure.Candidate] = {}
    blank = Row(workload.layer, workload.name, workload.shape, workload.dtype, "", "ok")
    blank = replace(blank, flops=workload.flops, bytes=workload.bytes)

    def fail(peer: Peer, status: str, note: str) -> None:
        rows[peer.name] = replace(blank, candidate=peer.name, status=status, note=note)

    with _tf32(workload):
        try:
            sets = _rotation(workload, device)
            parity = Parity(workload, device, sets[0])
        except torch.OutOfMemoryError:
            for peer in candidates:
                fail(peer, "out of memory", "inputs and reference do not fit")
            return list(rows.values())
        for peer in candidates:
            try:
                reason = peer.missing(workload, device)
                if reason is not None:
                    fail(peer, "missing", reason)
                    continue
                say(f"{workload.name} b{workload.shape['batch']} {workload.dtype}: {peer.name}")
                function = peer.build(workload, device)
                call = _rotated(function, sets)
                cold = measure.cold_ms(call, device)
                worst, limit, ok = parity.check(function)
                note = "" if ok else f"breaks the parity rule: largest error {worst:.3e} of {limit:.3e}, or its rms"
                rows[peer.name] = replace(
                    blank,
                    candidate=peer.name,
                    status="ok" if ok else "failed parity",
                    note=note,
                    cold_ms=cold,
                    error=worst if math.isfinite(worst) else None,
                    error_limit=limit,
                )
                if ok:
                    rows[peer.name] = replace(rows[peer.name], peak_mb=measure.peak_memory_mb(call, device))
                    ready[peer.name] = call
            except torch.OutOfMemoryError as error:
                fail(peer, "out of memory", str(error).splitlines()[0])
            except Exception as error:
                fail(peer, "error", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            if device.type == "cuda":
                torch.cuda.empty_cache()
        try:
            timings = measure.time_interleaved(ready, device, budget_s=budget_s)
        except torch.OutOfMemoryError as error:
            for name in ready:
                rows[name] = replace(rows[name], status="out of memory", note=str(error).splitlines()[0])
            return list(rows.values())
    floor = ceilings.floor_ms(workload.flops, workload.bytes, workload.dtype)
    telemetry = measure.telemetry(device)
    for name, timing in timings.items():
        rows[name] = replace(
            rows[name],
            ms=timing.median,
            ms_p20=timing.p20,
            ms_p80=timing.p80,
            samples=timing.samples,
            calls=timing.calls,
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
) -> Run:
    """Measure workloads into a results file, going on where a killed run of the same code stopped.

    Args:
        todo: from `registry.workloads`, most precious first.
        path: of the results file; kept up to date after every workload.
        device: where.
        peer_names: starts of peers' names; None for all.
        budget_s: seconds for the whole run, shared out evenly over the workloads that are left; None for 10 a workload.
        quick: smaller ceilings' measurement, for a first look.
        say: takes a line of progress.

    Raises:
        ValueError: an unknown peer, or a results file of another schema or of another device, version or commit.
    """
    chosen = select_peers(peer_names)
    environment = measure.environment(device)
    result = load(path) if path.exists() else Run(environment)
    if not same_run(result.environment, environment):
        raise ValueError(f"{path} holds another run (device, versions or commit differ); give another --out")
    dtypes = {w.dtype: w.torch_dtype for w in todo}
    if result.ceilings is None or not dtypes.keys() <= result.ceilings.gemm_tflop_s.keys():
        say("ceilings: copy bandwidth and GEMM rate")
        measured = measure.measure_ceilings(device, dtypes, quick=quick)
        # a precision that an earlier call measured keeps the rate that its rows were judged by
        known = {} if result.ceilings is None else dict(result.ceilings.gemm_tflop_s)
        result.ceilings = replace(measured, gemm_tflop_s={**measured.gemm_tflop_s, **known})
        result.save(path)
    begin = time.monotonic()
    for position, workload in enumerate(todo):
        offered = tuple(peer for peer in chosen if workload.op in peer.ops)
        wanted = [peer for peer in offered if result.find(_key(workload, peer)) is None]
        if not wanted:
            continue
        left = len(todo) - position
        share = 10.0 if budget_s is None else max(0.1, (budget_s - (time.monotonic() - begin)) / left)
        if budget_s is not None and time.monotonic() - begin > budget_s:
            say(f"budget of {budget_s:g} s is spent: {left} workloads are left for the next run")
            break
        result.add(run_workload(workload, offered, device, result.ceilings, budget_s=share, say=say))
        result.save(path)
    return result


def _key(workload: Workload, peer: Peer) -> tuple[Any, ...]:
    return Row(workload.layer, workload.name, workload.shape, workload.dtype, peer.name, "ok").key
