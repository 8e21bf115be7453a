"""Where a block's time goes: every kernel's time beside the least that its work could take.

The work of a kernel is that of the op which launched it: the workload's FLOPs and bytes for these sizes. Its floor is
`max(FLOPs / rate, bytes / bandwidth)` by ceilings measured in the same run. What has no floor (a copy, an addition that
a fused kernel would have done) is a gap as a whole. On CPU the rows are torch's own ops.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as record

import vitfast
from vitfast.clock import timing
from vitfast.clock.ceilings import Ceilings, measure_ceilings
from vitfast.kernels import fp32_products
from vitfast.proof.subjects import pick_device, seed_weights
from vitfast.table import text_table

from .workloads.base import DTYPES, MODELS, Workload
from .workloads.table import workloads

SCOPES = ("block", "model")


@dataclass(frozen=True)
class Line:
    """All launches of one kernel for one kind of work.

    Attributes:
        kernel: its name on the device; on CPU the op's.
        op: the op that launched it.
        workload: name of its work, or "" where it has none.
        launches: in one call of the block or model.
        ms: of all of them.
        share: of the sum of all lines.
        floor_ms: of all of them; None where `workload` is "".
        gap_ms: what is above the floor.
    """

    kernel: str
    op: str
    workload: str
    launches: float
    ms: float
    share: float
    floor_ms: float | None
    gap_ms: float


@dataclass(frozen=True)
class Profile:
    """One block or model on one batch. `str()` gives a table, the largest gap first.

    Attributes:
        model, batch, dtype, scope: what ran.
        wall_ms: median of a call that nobody profiled, with what the host needs to launch it.
        busy_ms: sum of all lines.
        ceilings: floors are by these.
        lines: the largest gap first.
    """

    model: str
    batch: int
    dtype: str
    scope: str
    wall_ms: float
    busy_ms: float
    ceilings: Ceilings
    lines: tuple[Line, ...]

    @property
    def floor_ms(self) -> float:
        """Sum of the floors."""
        return sum(line.floor_ms or 0.0 for line in self.lines)

    def __str__(self) -> str:
        rate = self.ceilings.gemm_tflop_s[self.dtype]
        said = (
            f"{self.scope} of {self.model} b{self.batch} {self.dtype}: {self.wall_ms:.4f} ms a call, kernels"
            f" {self.busy_ms:.4f} ms, floor {self.floor_ms:.4f} ms"
            f" ({rate:.1f} TFLOP/s, {self.ceilings.copy_gb_s:.0f} GB/s)"
        )
        rows = [
            [
                f"{line.gap_ms:.4f}",
                f"{line.ms:.4f}",
                "-" if line.floor_ms is None else f"{line.floor_ms:.4f}",
                f"{100 * line.share:.1f}%",
                f"{line.launches:g}",
                f"{line.workload or line.op}: {line.kernel[:60]}",
            ]
            for line in self.lines
        ]
        header = ["gap ms", "ms", "floor", "share", "x", "work, kernel"]
        return f"{said}\n{text_table(header, rows, right=range(5))}"


def work_of(op: str, shapes: Sequence[Sequence[int]]) -> tuple[Any, ...] | None:
    """What identifies an op's work among the workloads, from its name and its arguments' shapes; None for others."""
    name = op.partition("::")[2]
    try:
        if name in ("linear", "linear_stats"):
            return "linear", math.prod(shapes[0][:-1]), *shapes[1]
        if name == "norm_linear":
            # the GEMM alone: what it saves is the LayerNorm's
            return "linear", math.prod(shapes[0][:-1]), *shapes[5]
        if name == "addmm":
            return "linear", shapes[1][0], shapes[2][1], shapes[2][0]
        if name in ("layer_norm", "native_layer_norm", "add_layer_norm"):
            return name.removeprefix("native_"), math.prod(shapes[0][:-1]), shapes[0][-1]
        if name in ("attention", "scaled_dot_product_attention"):
            b, h, n, d = shapes[0]
            return ("attention", b, h, n, d) if list(shapes[1]) == list(shapes[0]) else None
        if name in ("patch_embed", "conv2d"):
            (b, c, height, width), (d, _, p, q) = shapes[0], shapes[1]
            return "patch_embed", b * (height // p) * (width // q), d, c * p * q
    except (IndexError, ValueError, ZeroDivisionError):
        # an op of the same name with other arguments
        return None
    return None


def _key(workload: Workload) -> tuple[Any, ...]:
    batch, s = workload.shape["batch"], workload.shape
    if workload.op == "linear":
        return "linear", s["m"], s["n"], s["k"]
    if workload.op == "attention":
        return "attention", batch, s["heads"], s["tokens"], s["head_dim"]
    if workload.op == "patch_embed":
        return "patch_embed", batch * s["patches"], s["dim"], s["k"]
    return workload.op, s["rows"], s["dim"]


def _ancestry(event: Any) -> list[Any]:
    """An event and what called it, outwards."""
    found = []
    while event is not None:
        found.append(event)
        event = event.cpu_parent
    return found


def _inside(event: Any) -> list[Any]:
    """An event and all that it called."""
    return [event, *(inner for child in event.cpu_children for inner in _inside(child))]


def _collect(events: Sequence[Any], known: Mapping[tuple[Any, ...], Workload]) -> dict[tuple[str, str, str], list[Any]]:
    """`[launches, microseconds, {run of the work: microseconds}]` by kernel, op and workload."""
    totals: dict[tuple[str, str, str], list[Any]] = {}

    def add(kernel: str, among: list[Any], op: str, duration: float) -> None:
        found = [event for event in among if work_of(event.name, event.input_shapes or []) in known]
        workload = ""
        if found:
            op = found[0].name
            workload = known[work_of(op, found[0].input_shapes)].name  # type: ignore[index]
        total = totals.setdefault((kernel, op, workload), [0, 0.0, {}])
        total[0] += 1
        total[1] += duration
        if found:
            total[2][found[0].id] = total[2].get(found[0].id, 0.0) + duration

    on_cpu = [event for event in events if event.device_type == DeviceType.CPU]
    launching = [event for event in on_cpu if event.kernels]
    for event in launching:
        outwards = _ancestry(event)
        for kernel in event.kernels:
            add(kernel.name, outwards, outwards[-1].name, kernel.duration)
    on_device = [event for event in events if event.device_type == DeviceType.CUDA]
    if on_device:
        # what no op claims still took its time
        claimed = sum(kernel.duration for event in launching for kernel in event.kernels)
        rest = sum(event.time_range.elapsed_us() for event in on_device) - claimed
        if rest > 0.5:
            add("(launched by no op)", [], "", rest)
    else:
        for event in on_cpu:
            if event.cpu_parent is None:
                add(event.name, _inside(event), event.name, event.cpu_time_total)
    return totals


def profile(
    model: str,
    *,
    batch: int,
    dtype: str,
    device: torch.device,
    scope: str = "block",
    ceilings: Ceilings | None = None,
    calls: int = 10,
    quick: bool = False,
) -> Profile:
    """Profile the accelerated block or model, eagerly: a CUDA graph's kernels are the same, without their names' ops.

    Args:
        model: name of an architecture.
        batch: images a call.
        dtype: a key of `DTYPES`.
        device: where.
        scope: "block", one block on tokens of the model's shape, or "model", from pixels to logits.
        ceilings: of this run; None to measure them.
        calls: that are profiled.
        quick: smaller ceilings' measurement.

    Raises:
        ValueError: an unknown model, dtype or scope.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope {scope!r}; expected one of {', '.join(SCOPES)}")
    known: dict[tuple[Any, ...], Workload] = {}
    for workload in workloads(("kernel",), (model,), (batch,), (dtype,)):
        known.setdefault(_key(workload), workload)
    if ceilings is None or dtype not in ceilings.gemm_tflop_s:
        ceilings = measure_ceilings(device, {dtype: DTYPES[dtype]}, quick=quick)
    options = {**MODELS.get(model, {}), **({"depth": 1} if scope == "block" else {})}
    whole: Any = seed_weights(vitfast.create_model(model, **options)).eval().to(device)
    vitfast.accelerate(whole, precision=dtype, frozen=True)
    tokens = whole.num_prefix_tokens + whole.patch_embed.num_patches
    shape = (batch, tokens, whole.embed_dim) if scope == "block" else (batch, 3, *whole.patch_embed.img_size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, DTYPES[dtype])
    function = whole.blocks[0] if scope == "block" else whole

    @torch.inference_mode()
    def run(i: int) -> Tensor:
        out: Tensor = function(x)
        return out

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with fp32_products(device, dtype == "tf32"):
        wall = timing.time_interleaved({"call": run}, device, budget_s=0.1 if quick else 2.0)["call"].median
        with record(activities=activities, record_shapes=True) as recorded:
            for i in range(calls):
                run(i)
            timing.synchronize(device)
    totals = _collect(list(recorded.events() or []), known)
    busy = sum(microseconds for _, microseconds, _ in totals.values()) / 1e3 / calls
    by_name = {workload.name: workload for workload in known.values()}
    whole_runs: dict[int, float] = defaultdict(float)
    for _, _, runs in totals.values():
        for run_id, part in runs.items():
            whole_runs[run_id] += part
    lines = []
    for (kernel, op, name), (launches, microseconds, runs) in totals.items():
        ms = microseconds / 1e3 / calls
        floor = None
        if name:
            work = by_name[name]
            # kernels that do a work together share its floor as they do its time
            shares = sum(part / whole_runs[run_id] if part else 0.0 for run_id, part in runs.items())
            floor = ceilings.floor_ms(work.flops, work.bytes, dtype) * shares / calls
        lines.append(
            Line(kernel, op, name, launches / calls, ms, ms / busy if busy else 0.0, floor, ms - (floor or 0.0))
        )
    lines.sort(key=lambda line: -line.gap_ms)
    return Profile(model, batch, dtype, scope, wall, busy, ceilings, tuple(lines))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the profile of a block or of a whole model."""
    parser = argparse.ArgumentParser(
        prog="python -m vitfast.benchmarks.kernel_profile", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", default="vit_base_patch16_224", help="an architecture (default %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="images a call (default %(default)s)")
    parser.add_argument("--precision", choices=list(DTYPES), help="default bf16 on cuda, fp32 on CPU")
    parser.add_argument("--scope", choices=SCOPES, default="block", help="default %(default)s")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: cuda where torch sees one, else cpu)")
    options = parser.parse_args(argv)
    device = pick_device(options.device)
    dtype = options.precision or ("bf16" if device.type == "cuda" else "fp32")
    print(profile(options.model, batch=options.batch, dtype=dtype, device=device, scope=options.scope))
    return 0


if __name__ == "__main__":
    sys.exit(main())
