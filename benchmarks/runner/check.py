"""The parity rule of a workload: truth in float64 and baseline, computed once for all its candidates."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vitfast import preprocess
from vitfast.rule import compare

from ..peers import train_step
from ..workloads.base import BATCHED, Workload
from ..workloads.photos import photo_spec

PARITY_IMAGES = 2
"""Images that the truth is computed for: the first and the last of the batch."""

Function = Callable[[dict[str, Any]], Tensor]


def _ends(inputs: dict[str, Any], batch: int) -> dict[str, Any]:
    """The first and the last image of a set of inputs."""
    picked = _picked(batch)
    return {
        name: value
        if name not in BATCHED or value is None
        else value[picked]
        if isinstance(value, Tensor)
        else [value[i] for i in picked]
        for name, value in inputs.items()
    }


def _picked(batch: int) -> list[int]:
    return [0] if batch == 1 else [0, batch - 1]


def _cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def _reference(workload: Workload, dtype: torch.dtype, device: torch.device) -> Function:
    """The workload's reference in a dtype, its weights rounded to the workload's dtype first."""
    call = workload.reference
    if isinstance(call, nn.Module):
        module = copy.deepcopy(call).to(device, workload.torch_dtype).to(dtype)
        if workload.op == "train":
            module.train()
            return lambda inputs: train_step(module, module, inputs["pixels"])

        def call(**inputs: Any) -> Tensor:
            (value,) = inputs.values()
            return module(preprocess(value, photo_spec(workload.model), device=device) if "files" in inputs else value)

    def run(inputs: dict[str, Any]) -> Tensor:
        with torch.inference_mode():
            return call(**inputs)

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
        if self.workload.op == "train":
            # a gradient sums over the batch, so it is compared on the few images alone
            actual = function(self.few)
        else:
            actual = function(self.inputs)[_picked(self.workload.shape["batch"])]
        result = compare(actual, self.truth, self.baseline)
        return result.worst, result.worst_limit, result.ok


def rotation(workload: Workload, device: torch.device) -> list[dict[str, Any]]:
    """As many sets of inputs as it takes to be past the last-level cache twice over, three at least, 32 at most."""
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    else:
        cache = 1 << 25
    first = workload.inputs(device, 0)
    size = sum(value.nbytes for value in first.values() if isinstance(value, Tensor))
    count = min(32, max(3, math.ceil(2 * cache / max(1, size))))
    return [first, *(workload.inputs(device, i) for i in range(1, count))]
