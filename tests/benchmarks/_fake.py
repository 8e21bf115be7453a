"""A run that nobody measured, with everything in it that a report must cope with.

Its device is named as a fake and its times come from a formula, so that no number can pass for a measurement.
"""

from __future__ import annotations

import random
from typing import Any

from vitfast.benchmarks.runner.results import Row, Run
from vitfast.clock.ceilings import Ceilings
from vitfast.clock.timing import summarize

FAKE_GPU = "FAKE H100 (not a device)"
FAKE_CPU = "FAKE CPU <script>alert('&')</script>, 2 threads"

COPY_GB_S = 1000.0
GEMM_TFLOP_S = {"bf16": 100.0, "fp32": 10.0}

# name: GFLOP an image, parameters in millions, tokens, width, depth, image size
MODELS = {
    "vit_tiny_patch16_224": (2.5, 5.7, 197, 192, 12, 224),
    "vit_base_patch16_224": (35.0, 86.6, 197, 768, 12, 224),
    "vit_large_patch16_224": (123.0, 304.3, 197, 1024, 24, 224),
}

# name: share of the floor it reaches
CANDIDATES = {
    "ONNX Runtime": None,
    "torch eager": 0.40,
    "torch compiled": 0.50,
    "torch compiled +graph": 0.51,
    "torch max-autotune": 0.53,
    "torch max-autotune +graph": 0.55,
    "timm eager": 0.38,
    "timm compiled": 0.49,
    "torchvision eager": None,
    "Transformers eager": 0.35,
    "Transformers compiled": 0.48,
    "vitfast +patch_embed": 0.41,
    "vitfast +layer_norm": 0.46,
    "vitfast +attention": 0.50,
    "vitfast +mlp": 0.62,
    "vitfast +block": 0.64,
    "vitfast +fold": 0.65,
    "vitfast +tail": 0.655,
    "vitfast +compile": 0.66,
    "vitfast +graph": 0.68,
    "vitfast +compile +graph": 0.70,
}

KERNEL_CANDIDATES = {
    "attention": {"SDPA flash": 0.3, "SDPA math": 0.1, "SDPA cuDNN": 0.35, "FlexAttention": None, "vitfast": 0.4},
    "layer_norm": {"torch eager": 0.4, "torch compiled": 0.8, "vitfast": 0.85},
    "linear.fc1": {"addmm": 0.6, "_addmm_activation": 0.65, "torch eager": 0.45, "QuACK": None, "vitfast": 0.7},
}


def environment(device: str = FAKE_GPU, kind: str = "cuda", **changes: Any) -> dict[str, Any]:
    """What `machine.environment` returns, of no machine."""
    cuda = kind == "cuda"
    return {
        "device": device,
        "kind": kind,
        "driver": "0.0" if cuda else None,
        "cuda": "13.0" if cuda else None,
        "capability": [9, 0] if cuda else None,
        "multiprocessors": 1 if cuda else None,
        "threads": 2,
        "cpu_capability": "AVX2",
        "versions": {"python": "3.0.0", "torch": "2.11.0+cu130", "triton": "3.6.0", "timm": None},
        "commit": "0" * 40 + "+",
        "platform": "linux",
        **changes,
    }


def timed(blank: Row, ms: float, *, spread: float, samples: int, draw: random.Random, **fields: Any) -> Row:
    """A row with medians of samples around `ms`; `spread` is their relative standard deviation."""
    timing = summarize([draw.gauss(ms, spread * ms) for _ in range(samples)], 1)
    return Row(
        **{
            **blank.__dict__,
            "ms": timing.median,
            "ms_p20": timing.p20,
            "ms_p80": timing.p80,
            "samples": timing.samples,
            "calls": 1,
            **fields,
        }
    )


def fake_run(
    *,
    layers: tuple[str, ...] = ("model", "train", "kernel"),
    models: tuple[str, ...] = tuple(MODELS),
    batches: tuple[int, ...] = (1, 8, 32, 128, 256),
    dtype: str = "bf16",
    cpu: bool = False,
    seed: int = 0,
    spread: float = 0.01,
    samples: int = 30,
    faster: dict[str, float] | None = None,
) -> Run:
    """A run with failures, peers that are missing, a batch that does not fit, and kernels.

    Args:
        layers: of the rows.
        models: keys of `MODELS`.
        batches: images a call.
        dtype: of all rows.
        cpu: whether the device is one without peak memory and telemetry.
        seed: of the samples.
        spread: relative standard deviation of the samples.
        samples: a row.
        faster: factor of speed by candidate.
    """
    draw = random.Random(seed)
    ceilings = Ceilings(COPY_GB_S, dict(GEMM_TFLOP_S))
    telemetry = {} if cpu else {"clocks.sm": "1000", "power.draw": "100.5", "temperature.gpu": "[N/A]"}
    run = Run(environment(FAKE_CPU, "cpu", cuda=None) if cpu else environment(), ceilings)

    def row(blank: Row, share: float | None) -> Row:
        failed: dict[str, Any] = {}
        if share is None:
            failed = {"status": "missing", "note": f"{blank.candidate} is not installed <b>| here</b>"}
        elif blank.candidate == "timm eager" and blank.shape["batch"] == 256 and "large" in blank.workload:
            failed = {"status": "out of memory", "note": "tried to allocate 1.00 GiB"}
        elif blank.candidate == "SDPA math" and blank.shape["batch"] == 1:
            failed = {"status": "failed parity", "note": "error 1.0e+00 is above the rule's 1.0e-02"}
            failed |= {"error": 1.0, "error_limit": 1e-2}
        elif blank.candidate == "Transformers compiled" and blank.shape["batch"] == 8:
            failed = {"status": "error", "note": "RuntimeError: a made-up failure"}
        if failed:
            return Row(**{**blank.__dict__, **failed})
        assert share is not None
        floor = ceilings.floor_ms(blank.flops, blank.bytes, dtype)
        # what a launch costs: small batches are slower than their floor
        overhead = 0.02 if "graph" in blank.candidate else 0.5
        ms = (floor / share + overhead) / (faster or {}).get(blank.candidate, 1.0)
        error = 1e-3 * (1 + share)
        return timed(
            blank,
            ms,
            spread=spread,
            samples=samples,
            draw=draw,
            floor_ms=floor,
            cold_ms=ms * (9000 if "compiled" in blank.candidate else 10),
            peak_mb=None if cpu else blank.bytes / 1e6 * (2 - share),
            error=error,
            error_limit=2e-3,
            telemetry=telemetry,
        )

    for model in models:
        gflop, million, tokens, dim, depth, size = MODELS[model]
        for batch in batches:
            shape = {"batch": batch, "height": size, "width": size, "tokens": tokens, "dim": dim, "depth": depth}
            for layer in layers:
                if layer == "kernel":
                    n = batch * tokens
                    work = {
                        "attention": (4.0 * n * tokens * dim, 8.0 * n * dim, {"heads": dim // 64, "tokens": tokens}),
                        "layer_norm": (8.0 * n * dim, 4.0 * n * dim, {"rows": n, "dim": dim}),
                        "linear.fc1": (8.0 * n * dim * dim, 2.0 * (5 * n * dim + 4 * dim * dim), {"m": n, "k": dim}),
                    }
                    for kernel, candidates in KERNEL_CANDIDATES.items():
                        flops, moved, sizes = work[kernel]
                        blank = Row("kernel", f"{kernel}/{model}", {"batch": batch, **sizes}, dtype, "", "ok")
                        for name, share in candidates.items():
                            fields = {**blank.__dict__, "candidate": name, "flops": flops, "bytes": moved}
                            run.rows.append(row(Row(**fields), share))
                    continue
                factor = 3.0 if layer == "train" else 1.0
                for name, share in CANDIDATES.items():
                    if layer == "train" and "graph" in name:
                        continue
                    flops, moved = factor * batch * gflop * 1e9, factor * (million * 2e6 + batch * size * size * 6)
                    blank = Row(layer, model, shape, dtype, name, "ok", flops=flops, bytes=moved)
                    run.rows.append(row(blank, share))
    return run
