"""The clock: interleaved candidates, rotated inputs, medians, and ceilings measured in the same run.

Everything here is about time and the machine; nothing knows what it measures. A candidate is a function of an index,
the number of the call: it picks its inputs by it, so that no call finds the last one's inputs in cache.
"""

from __future__ import annotations

import gc
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Candidate = Callable[[int], Any]

CEILING_S = 1.0
"""Seconds for each ceiling."""


@dataclass(frozen=True)
class Timing:
    """Time of one call in milliseconds.

    Attributes:
        median, p20, p80: over the samples.
        samples: how many; each is the mean of `calls` calls in a row.
        calls: calls in a sample.
    """

    median: float
    p20: float
    p80: float
    samples: int
    calls: int


@dataclass(frozen=True)
class Ceilings:
    """What this device reached in this run, with nothing of ours involved.

    Attributes:
        copy_gb_s: large copy, bytes read plus bytes written, in GB/s (1e9).
        gemm_tflop_s: large square GEMM of torch by dtype name, in TFLOP/s (1e12).
    """

    copy_gb_s: float
    gemm_tflop_s: Mapping[str, float]

    def floor_ms(self, flops: float, bytes_moved: float, dtype: str) -> float:
        """Least time for that work: `max(flops / rate, bytes / bandwidth)`, in milliseconds."""
        return max(flops / (self.gemm_tflop_s[dtype] * 1e9), bytes_moved / (self.copy_gb_s * 1e6))


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing to wait for on CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sample_ms(candidate: Candidate, first: int, calls: int, device: torch.device) -> float:
    """Mean milliseconds of `calls` calls in a row: device events on CUDA, the wall clock on CPU."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for i in range(first, first + calls):
            candidate(i)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls
    begin = time.perf_counter()
    for i in range(first, first + calls):
        candidate(i)
    return (time.perf_counter() - begin) * 1e3 / calls


def time_interleaved(
    candidates: Mapping[str, Candidate],
    device: torch.device,
    *,
    budget_s: float,
    min_samples: int = 5,
    max_samples: int = 200,
    sample_target_ms: float = 5.0,
    seed: int = 0,
) -> dict[str, Timing]:
    """Time candidates against each other: every round runs each of them once, in a fresh random order.

    Drift of clocks and temperature then falls on all alike. Candidates are warmed up first (twice, and until a tenth of
    their share of the budget is spent), which also tells how many calls make a sample.

    Args:
        candidates: name to function; they must have been called before (a compile belongs to `cold_ms`).
        device: where they run.
        budget_s: seconds for all of them together; `min_samples` rounds are run whatever it says.
        min_samples: least number of rounds.
        max_samples: most rounds.
        sample_target_ms: shortest sample; calls that are shorter are timed several in a row.
        seed: of the order.
    """
    order = random.Random(seed)
    share_s = budget_s / max(1, len(candidates))
    calls: dict[str, int] = {}
    counter = 0
    for name, candidate in candidates.items():
        warm: list[float] = []
        begin = time.perf_counter()
        while len(warm) < 2 or time.perf_counter() - begin < share_s / 10:
            warm.append(sample_ms(candidate, counter, 1, device))
            counter += 1
            if len(warm) >= 100:
                break
        calls[name] = max(1, min(1000, round(sample_target_ms / max(min(warm), 1e-4))))
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    begin, rounds = time.perf_counter(), 0
    collecting = gc.isenabled()
    gc.disable()
    try:
        while rounds < min_samples or (rounds < max_samples and time.perf_counter() - begin < 0.9 * budget_s):
            for name in order.sample(list(candidates), len(candidates)):
                taken[name].append(sample_ms(candidates[name], counter, calls[name], device))
                counter += calls[name]
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return {name: summarize(samples, calls[name]) for name, samples in taken.items()}


def summarize(samples: list[float], calls: int) -> Timing:
    """Median, 20th and 80th percentile of samples in milliseconds."""
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], 1, calls)
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Timing(statistics.median(samples), fifths[0], fifths[3], len(samples), calls)


def cold_ms(candidate: Candidate, device: torch.device) -> float:
    """Milliseconds of a first call, compilation and library set-up included."""
    synchronize(device)
    begin = time.perf_counter()
    candidate(0)
    synchronize(device)
    return (time.perf_counter() - begin) * 1e3


def peak_memory_mb(candidate: Candidate, device: torch.device) -> float | None:
    """Most device memory (MB, 1e6) that one call holds beyond what was held before it; None on CPU."""
    if device.type != "cuda":
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    candidate(0)
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def measure_ceilings(device: torch.device, dtypes: Mapping[str, torch.dtype], *, quick: bool = False) -> Ceilings:
    """Copy bandwidth and GEMM rate of this device, now: of samples of 20 ms the fastest, since what else runs here can
    only slow them down, and a ceiling is not what a busy moment left of it.

    On CUDA a 1 GiB copy and an 8192-cubed GEMM; on CPU a 256 MiB copy and a 2048-cubed GEMM (quick: a quarter of the
    copy, half the edge), in each dtype. `"tf32"` is fp32 with torch's tf32 switch on for the measurement.
    """
    cuda = device.type == "cuda"
    n = (1 << 30 if cuda else 1 << 28) // 4 // (4 if quick else 1)
    source = torch.randn(n, device=device)
    target = torch.empty_like(source)
    copy_ms = _fastest_ms(lambda i: target.copy_(source), device)
    edge = (8192 if cuda else 2048) // (2 if quick else 1)
    rates = {}
    for name, dtype in dtypes.items():
        a, b = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
        switch = torch.backends.cuda.matmul
        before = switch.allow_tf32
        switch.allow_tf32 = name == "tf32"
        try:
            rates[name] = 2 * edge**3 / (min(_fastest_ms(gemm, device) for gemm in _gemms(a, b)) * 1e9)
        finally:
            switch.allow_tf32 = before
    return Ceilings(2 * source.nbytes / (copy_ms * 1e6), rates)


def _fastest_ms(candidate: Candidate, device: torch.device) -> float:
    """Milliseconds of a call in the fastest sample."""
    once = min(sample_ms(candidate, 0, 1, device) for _ in range(2))
    calls = max(1, min(1000, round(20.0 / max(once, 1e-4))))
    begin, fastest = time.perf_counter(), once
    while time.perf_counter() - begin < CEILING_S:
        fastest = min(fastest, sample_ms(candidate, 0, calls, device))
    return fastest


def _gemms(a: Tensor, b: Tensor) -> list[Candidate]:
    """The GEMMs that torch has for these matrices."""
    found: list[Candidate] = [lambda i: torch.mm(a, b)]
    if a.device.type == "cpu" and a.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # oneDNN's, which inductor calls; torch.mm calls MKL, which is half as fast as oneDNN on AMD
        packed = torch.ops.mkldnn._reorder_linear_weight(b.t().contiguous())

        @torch.inference_mode()
        def onednn(i: int) -> Tensor:
            return torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], "")

        found.append(onednn)
    return found


def versions() -> dict[str, str | None]:
    """Versions of what decides speed; None where it is not installed."""
    names = ("torch", "triton", "timm", "transformers", "torchvision", "xformers", "flash-attn", "flash-attn-4")
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in (*names, "quack-kernels", "onnxruntime", "openvino"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def environment(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, threads and commit of this run."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "kind": device.type,
        "driver": _nvidia_smi("driver_version") if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "capability": list(torch.cuda.get_device_capability(device)) if cuda else None,
        "multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count if cuda else None,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": versions(),
        "commit": commit(),
        "platform": sys.platform,
    }


def telemetry(device: torch.device) -> dict[str, str | None]:
    """Clocks (MHz), power (W) and temperature (degrees C) right now, as `nvidia-smi` prints them; empty on CPU."""
    if device.type != "cuda":
        return {}
    fields = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
    return {field: _nvidia_smi(field, device) for field in fields}


def _nvidia_smi(field: str, device: torch.device | None = None) -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    index = [] if device is None else ["-i", str(device.index or 0)]
    command = ["nvidia-smi", *index, f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def cpu_name() -> str:
    """The processor's model name and how many threads torch uses of it."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} threads"


def commit() -> str | None:
    """The repository's commit, with `+` behind it if the tree differs from it; None outside a repository."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run(
        ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() + ("+" if dirty.stdout.strip() else "") if done.returncode == 0 else None

