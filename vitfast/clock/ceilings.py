"""What a device reaches in this run, measured with nothing of ours: copy bandwidth and GEMM rate."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import fp32_products
from .timing import Candidate, sample_ms

CEILING_S = 1.0
"""Seconds for each ceiling."""


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
        with fp32_products(device, name == "tf32"):
            rates[name] = 2 * edge**3 / (min(_fastest_ms(gemm, device) for gemm in _gemms(a, b)) * 1e9)
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
