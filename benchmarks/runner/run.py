"""The runner: build the candidates of a workload, hold them to the parity rule, time them together, keep the rows."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitfast.clock import machine, timing
from vitfast.clock.ceilings import Ceilings, measure_ceilings
from vitfast.kernels import fp32_products

from ..peers import Peer, peers
from ..workloads.base import Workload
from .check import Parity, rotation
from .progress import Progress
from .results import Row, Run, load, same_run


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
    progress: Progress,
) -> list[Row]:
    """Every candidate's row for one workload; a candidate that fails is a row that says how.

    Args:
        workload: what is measured.
        candidates: peers that offer its op.
        device: where.
        ceilings: of this run.
        budget_s: seconds of timing for all candidates together; building, compiling and checking come on top.
        progress: shows each candidate as it begins.
    """
    rows: dict[str, Row] = {}
    ready: dict[str, timing.Candidate] = {}
    with fp32_products(device, workload.dtype == "tf32"):
        try:
            sets = rotation(workload, device)
            parity = Parity(workload, device, sets[0])
        except torch.OutOfMemoryError:
            progress.step(f"{workload}: does not fit", rows=len(candidates))
            blank = Row(workload.layer, workload.name, workload.shape, workload.dtype, "", "out of memory")
            blank = replace(blank, note="inputs and reference do not fit", flops=workload.flops, bytes=workload.bytes)
            return [replace(blank, candidate=peer.name) for peer in candidates]
        for peer in candidates:
            progress.step(f"{workload}: {peer.name}", rows=1)
            rows[peer.name], call = build(workload, peer, device, sets, parity)
            if call is not None:
                ready[peer.name] = call
        progress.step(f"{workload}: timing {len(ready)} candidates")
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
    progress: Progress | None = None,
) -> Run:
    """Measure workloads into a results file, going on where a killed run of the same code stopped.

    Args:
        todo: from `workloads`, most precious first.
        path: of the results file; kept up to date after every workload.
        device: where.
        peer_names: starts of peers' names; None for all.
        budget_s: seconds for the whole run, shared out evenly over the workloads that are left; None for 10 a workload.
        quick: smaller ceilings' measurement, for a first look.
        progress: shows how far the run is; None for one on standard error.

    Raises:
        ValueError: an unknown peer, or a results file of another schema or of another device, version or commit.
    """
    progress = progress or Progress(sys.stderr)
    chosen = select_peers(peer_names)
    environment = machine.environment(device)
    result = load(path) if path.exists() else Run(environment)
    if not same_run(result.environment, environment):
        raise ValueError(f"{path} holds another run (device, versions or commit differ); give another --out")
    dtypes = {w.dtype: w.torch_dtype for w in todo}
    if result.ceilings is None or not dtypes.keys() <= result.ceilings.gemm_tflop_s.keys():
        progress.say("ceilings: copy bandwidth and GEMM rate")
        measured = measure_ceilings(device, dtypes, quick=quick)
        # a precision that an earlier call measured keeps the rate that its rows were judged by
        known = {} if result.ceilings is None else dict(result.ceilings.gemm_tflop_s)
        result.ceilings = replace(measured, gemm_tflop_s={**measured.gemm_tflop_s, **known})
        result.save(path)
    begin = time.monotonic()
    wanted = []
    for workload in todo:
        offered = tuple(peer for peer in chosen if workload.op in peer.ops)
        if any(result.find(_key(workload, peer)) is None for peer in offered):
            wanted.append((workload, offered))
    progress.start(sum(len(offered) for _, offered in wanted))
    for position, (workload, offered) in enumerate(wanted):
        spent = time.monotonic() - begin
        if budget_s is not None and spent > budget_s:
            left = len(wanted) - position
            progress.say(f"budget of {budget_s:g} s is spent: {left} workloads are left for the next run")
            break
        share = 10.0 if budget_s is None else max(0.1, (budget_s - spent) / (len(wanted) - position))
        result.add(run_workload(workload, offered, device, result.ceilings, budget_s=share, progress=progress))
        result.save(path)
    return result


def _key(workload: Workload, peer: Peer) -> tuple[Any, ...]:
    return Row(workload.layer, workload.name, workload.shape, workload.dtype, peer.name, "ok").key
