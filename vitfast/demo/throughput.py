"""Throughput of two models, measured in turns."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..clock.machine import cpu_name
from ..clock.timing import sample_ms, synchronize


@dataclass(frozen=True)
class Throughput:
    """Throughput of one model.

    Attributes:
        batch: images in a forward.
        seconds: of each timed forward.
    """

    batch: int
    seconds: tuple[float, ...]

    def rate(self, quantile: float = 0.5) -> float:
        """Images per second, that quantile of them (0.5: median)."""
        return self.batch / float(np.quantile(self.seconds, 1.0 - quantile))


def device_name(device: torch.device) -> str:
    """What a device is called by its maker."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def measure(
    plain: nn.Module, fused: nn.Module, pixels: Tensor, seconds: float
) -> tuple[Throughput, Throughput, tuple[float, ...]]:
    """Throughput of two models, measured in turns: warmed up, synchronised, the order changed every round.

    Args:
        plain, fused: the models.
        pixels: what both get.
        seconds: time to measure for. At least 3 rounds and at most 200 are made.

    Returns:
        Throughputs of both, and plain over fused seconds of each round.
    """
    device, models = pixels.device, (plain, fused)
    taken: tuple[list[float], list[float]] = ([], [])

    def once(which: int) -> float:
        return sample_ms(lambda _: models[which](pixels), 0, 1, device) / 1e3

    with torch.inference_mode():
        synchronize(device)
        # compiling, autotuning of cuDNN and growing of memory pools happen here; a GPU's clocks rise too
        for which in (0, 1):
            for _ in range(10 if device.type == "cuda" else 1):
                once(which)
        end = time.perf_counter() + seconds
        while (rounds := len(taken[1])) < 200 and (rounds < 3 or time.perf_counter() < end):
            for which in (0, 1) if rounds % 2 == 0 else (1, 0):
                taken[which].append(once(which))
    ratios = tuple(p / f for p, f in zip(*taken, strict=True))
    return Throughput(len(pixels), tuple(taken[0])), Throughput(len(pixels), tuple(taken[1])), ratios
