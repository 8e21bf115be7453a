"""The profile: its lines are all the time there is, and a floor is that of the work which the registry knows."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as record

from vitfast.benchmarks import kernel_profile as profiles
from vitfast.benchmarks.kernel_profile import Line, Profile, profile, work_of
from vitfast.benchmarks.workloads import base
from vitfast.benchmarks.workloads.table import workloads
from vitfast.clock.ceilings import Ceilings

CPU = torch.device("cpu")
MODEL = "vit_tiny_patch16_224"
CEILINGS = Ceilings(10.0, {"fp32": 0.1})


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(
        base.MODELS, MODEL, {"depth": 2, "img_size": 32, "embed_dim": 32, "num_heads": 2, "num_classes": 7}
    )
    base.reference_model.cache_clear()
    base.model_flops.cache_clear()
    yield
    base.reference_model.cache_clear()
    base.model_flops.cache_clear()


def _workloads() -> dict[str, base.Workload]:
    return {w.name: w for w in workloads(("kernel",), (MODEL,), (3,), ("fp32",))}


def _profile(scope: str) -> Profile:
    return profile(MODEL, batch=3, dtype="fp32", device=CPU, scope=scope, ceilings=CEILINGS, calls=4, quick=True)


def _check(found: Profile) -> dict[str, Line]:
    """Hold what is true of every profile; its lines by workload."""
    assert sum(line.ms for line in found.lines) == pytest.approx(found.busy_ms)
    assert sum(line.share for line in found.lines) == pytest.approx(1.0)
    assert sum(line.gap_ms for line in found.lines) == pytest.approx(found.busy_ms - found.floor_ms)
    gaps = [line.gap_ms for line in found.lines]
    assert gaps == sorted(gaps, reverse=True)
    assert 0 < found.floor_ms < found.busy_ms and found.wall_ms > 0
    for line in found.lines:
        assert line.ms > 0 and line.launches > 0
        assert (line.floor_ms is None) == (line.workload == "")
    return {line.workload: line for line in found.lines if line.workload}


def test_a_block_s_work_is_the_registry_s() -> None:
    lines = _check(_profile("block"))
    work = _workloads()
    once = {f"{name}/{MODEL}" for name in ("attention", "linear.qkv", "linear.proj", "linear.fc1", "linear.fc2")}
    assert lines.keys() == once | {f"layer_norm/{MODEL}"}
    for name, line in lines.items():
        times = 1 if name in once else 2
        floor = CEILINGS.floor_ms(work[name].flops, work[name].bytes, "fp32")
        assert line.floor_ms == pytest.approx(times * floor), name
        assert line.launches == times


def test_a_model_s_profile_has_its_patch_embedding() -> None:
    lines = _check(_profile("model"))
    work = _workloads()[f"patch_embed/{MODEL}"]
    assert lines[work.name].floor_ms == pytest.approx(CEILINGS.floor_ms(work.flops, work.bytes, "fp32"))
    # the last block computes the class token alone behind its attention, so only the first one's work is known
    assert lines[f"linear.fc1/{MODEL}"].launches == 1


def test_ceilings_are_measured_where_none_of_that_dtype_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def measured(device: torch.device, dtypes: dict[str, torch.dtype], *, quick: bool) -> Ceilings:
        asked.append((dtypes, quick))
        return CEILINGS

    monkeypatch.setattr(profiles, "measure_ceilings", measured)
    for given in (None, Ceilings(1.0, {"bf16": 1.0}), CEILINGS):
        found = profile(MODEL, batch=1, dtype="fp32", device=CPU, ceilings=given, calls=1, quick=True)
        assert found.ceilings is CEILINGS
    assert asked == [({"fp32": torch.float32}, True)] * 2


def test_what_is_unknown_is_refused() -> None:
    with pytest.raises(ValueError, match="scope 'layer'; expected one of block, model"):
        profile(MODEL, batch=1, dtype="fp32", device=CPU, scope="layer")
    with pytest.raises(ValueError, match="precision 'fp7'"):
        profile(MODEL, batch=1, dtype="fp7", device=CPU)


def test_every_fused_operator_is_found_by_the_shapes_that_torch_records() -> None:
    ops = torch.ops.vitfast
    x, weight = torch.randn(2, 5, 8), torch.randn(12, 8)
    q = torch.randn(2, 3, 5, 4)
    with torch.inference_mode(), record(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        ops.linear(x, weight, None, "gelu", None, None, False)
        ops.linear_stats(x, weight, None, "none", None, None, False)
        ops.norm_linear(x, ops.row_stats(x), torch.randn(8), None, 1e-6, weight, None, "none", False)
        ops.layer_norm(x, None, None, 1e-6)
        ops.add_layer_norm(x, x, None, None, 1e-6, None)
        ops.attention(q, q, q, None, 0.5, False)
        ops.patch_embed(torch.randn(2, 3, 8, 12), torch.randn(6, 3, 4, 4), None, None, None, None, None, False)
    found = {event.name: work_of(event.name, event.input_shapes) for event in recorded.events()}
    assert {name.partition("::")[2]: work for name, work in found.items() if name.startswith("vitfast::")} == {
        "linear": ("linear", 10, 12, 8),
        "linear_stats": ("linear", 10, 12, 8),
        "norm_linear": ("linear", 10, 12, 8),
        "row_stats": None,
        "layer_norm": ("layer_norm", 10, 8),
        "add_layer_norm": ("add_layer_norm", 10, 8),
        "attention": ("attention", 2, 3, 5, 4),
        "patch_embed": ("patch_embed", 12, 6, 48),
    }


@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        ("aten::gelu", [[2, 5, 8]]),
        ("aten::linear", []),
        ("aten::linear", [[2, 5, 8]]),
        ("aten::addmm", [[12], [10, 8]]),
        ("vitfast::attention", [[2, 3, 1, 4], [2, 3, 5, 4]]),
        ("aten::conv2d", [[3, 8, 8], [6, 3, 4, 4]]),
    ],
)
def test_other_arguments_are_other_work(op: str, shapes: list[list[int]]) -> None:
    assert work_of(op, shapes) is None


def _event(name: str, number: int, shapes: list[list[int]], parent: Any = None, *kernels: tuple[str, float]) -> Any:
    launched = [SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels]
    return SimpleNamespace(
        name=name,
        id=number,
        input_shapes=shapes,
        cpu_parent=parent,
        cpu_children=[],
        kernels=launched,
        device_type=DeviceType.CPU,
        time_range=SimpleNamespace(elapsed_us=lambda: 0.0),
        cpu_time_total=0.0,
    )


def test_a_gpu_s_kernels_belong_to_the_op_that_launched_them() -> None:
    """Events as torch records them beside a GPU: kernels hang on the innermost call, work is known further out."""
    workload = _workloads()[f"linear.fc1/{MODEL}"]
    m, n, k = (workload.shape[name] for name in "mnk")
    op = _event("vitfast::linear", 1, [[m, k], [n, k]])
    launch = _event("cuLaunchKernelEx", 2, [], op, ("_linear_fwd_kernel", 30.0))
    again = _event("vitfast::linear", 3, [[m, k], [n, k]], None, ("split", 20.0), ("sum", 5.0))
    gelu = _event("aten::gelu", 4, [[m, n]], None, ("elementwise", 7.0))
    on_device = [
        SimpleNamespace(device_type=DeviceType.CUDA, time_range=SimpleNamespace(elapsed_us=lambda value=value: value))
        for value in (30.0, 20.0, 5.0, 7.0, 11.0)
    ]
    totals = profiles._collect([op, launch, again, gelu, *on_device], {("linear", m, n, k): workload})
    assert totals == {
        ("_linear_fwd_kernel", "vitfast::linear", workload.name): [1, 30.0, {1: 30.0}],
        ("split", "vitfast::linear", workload.name): [1, 20.0, {3: 20.0}],
        ("sum", "vitfast::linear", workload.name): [1, 5.0, {3: 5.0}],
        ("elementwise", "aten::gelu", ""): [1, 7.0, {}],
        ("(launched by no op)", "", ""): [1, 11.0, {}],
    }


def test_kernels_that_do_a_work_together_have_its_floor_once(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = _workloads()[f"linear.fc1/{MODEL}"]
    totals = {
        ("gemm", "vitfast::linear", workload.name): [2, 40.0, {1: 30.0, 2: 10.0}],
        ("sum", "vitfast::linear", workload.name): [1, 10.0, {1: 10.0}],
    }
    monkeypatch.setattr(profiles, "_collect", lambda events, known: totals)
    found = profile(MODEL, batch=3, dtype="fp32", device=CPU, ceilings=CEILINGS, calls=2, quick=True)
    floor = CEILINGS.floor_ms(workload.flops, workload.bytes, "fp32")
    assert {line.kernel: line.floor_ms for line in found.lines} == {
        "gemm": pytest.approx(floor * (0.75 + 1.0) / 2),
        "sum": pytest.approx(floor * 0.25 / 2),
    }
    assert found.floor_ms == pytest.approx(floor)


def test_text() -> None:
    lines = (
        Line("aten::gelu", "aten::gelu", "", 1.0, 0.5, 0.25, None, 0.5),
        Line("_linear_fwd_kernel", "vitfast::linear", "linear.fc1/model", 2.0, 1.5, 0.75, 1.25, 0.25),
    )
    found = Profile("model", 3, "fp32", "block", 2.5, 2.0, CEILINGS, lines)
    assert found.floor_ms == 1.25
    assert str(found).splitlines() == [
        "block of model b3 fp32: 2.5000 ms a call, kernels 2.0000 ms, floor 1.2500 ms (0.1 TFLOP/s, 10 GB/s)",
        "gap ms      ms   floor  share  x  work, kernel",
        "0.5000  0.5000       -  25.0%  1  aten::gelu: aten::gelu",
        "0.2500  1.5000  1.2500  75.0%  2  linear.fc1/model: _linear_fwd_kernel",
    ]
