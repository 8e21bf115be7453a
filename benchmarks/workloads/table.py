"""Every workload of the given layers, models, batches and dtypes."""

from __future__ import annotations

from .base import DTYPES, Workload
from .kernels import kernel_workloads
from .libraries import library_kernels, library_workload
from .models import model_workloads


def workloads(
    layers: tuple[str, ...], models: tuple[str, ...], batches: tuple[int, ...], dtypes: tuple[str, ...]
) -> list[Workload]:
    """All workloads of the given layers, models, batches and dtypes, kernels before blocks before models.

    Args:
        layers: of `results.LAYERS`.
        models: names of architectures; those outside `MODELS` work too. Names with a library in front, such as
            `LIBRARY_MODELS`, have the layer "model", and "kernel" where attention is their own (`BEIT`, `SWIN`).
        batches: images a call.
        dtypes: keys of `DTYPES`.

    Raises:
        ValueError: an unknown model or dtype; names what is accepted.
    """
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"precision {dtype!r}; expected one of {', '.join(DTYPES)}")
    found: list[Workload] = []
    for dtype in dtypes:
        for model in models:
            for batch in batches:
                if ":" in model:
                    found += library_kernels(model, batch, dtype) if "kernel" in layers else []
                    found += [library_workload(model, batch, dtype)] if "model" in layers else []
                    continue
                found += kernel_workloads(model, batch, dtype) if "kernel" in layers else []
                if set(layers) - {"kernel"}:
                    found += [w for w in model_workloads(model, batch, dtype) if w.layer in layers]
    return found
