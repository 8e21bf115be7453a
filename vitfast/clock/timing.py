"""The clock: interleaved candidates, rotated inputs, medians and percentiles.

A candidate is a function of an index, the number of the call: it picks its inputs by it, so that no call finds the last
one's inputs in cache.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Candidate = Callable[[int], Any]


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
