"""Other libraries' models, and the kernels that only these have."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vitfast.kernels import relative_attention_ref, window_attention_ref
from vitfast.proof.libraries import image_shape, library
from vitfast.proof.parity import first_tensor
from vitfast.proof.subjects import build_model

from .base import DTYPES, Workload, count_flops, draws
from .kernels import Inputs, kernel_workload

BEIT = "timm:beit_base_patch16_224"

SWIN = "timm:swin_base_patch4_window7_224"

LIBRARY_MODELS = (
    "timm:vit_base_patch16_224",
    "torchvision:vit_b_16",
    "transformers:vit",
    "transformers:clip_vision_model",
    "open_clip:ViT-B-16",
    "transformers:dinov2",
    BEIT,
    SWIN,
    "torchvision:swin_b",
    "transformers:swin",
)
"""Models as their libraries make them, which stand for what people run: B/16 or its like of each, and windows. Each is
measured plain and accelerated; what it returns first is what counts."""


class First(nn.Module):
    """A model of which the first tensor that it returns counts."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return first_tensor(self.model(pixels))


@functools.cache
def library_model(name: str) -> First:
    """A library's model with seeded weights; in eval mode, fp32, on CPU."""
    return First(build_model(name)).eval()


def missing_libraries(names: Iterable[str]) -> dict[str, str]:
    """The names whose library cannot be imported here, and why."""
    missing = {}
    for name in names:
        try:
            library(name.partition(":")[0])
        except ImportError as error:
            missing[name] = str(error)
    return missing


def library_kernels(model: str, batch: int, dtype: str) -> Iterator[Workload]:
    """Attention that only other libraries' models have: BEiT-B's, and Swin-B's in the shifted blocks of each stage."""

    def make(name: str, shape: dict[str, int], inputs: Inputs, reference: Callable[..., Tensor]) -> Workload:
        rows, width = shape["tokens"], shape["dim"]
        flops = 4.0 * batch * rows * shape["keys"] * width
        elements = 4 * batch * rows * width + shape["table"] * shape["heads"]
        return kernel_workload(model, batch, dtype, name, shape, flops, elements, inputs, reference)

    if model == BEIT:
        side, heads, d = 14, 12, 64
        n, table = side * side + 1, (2 * side - 1) ** 2 + 3
        yield make(
            "relative_attention",
            {"tokens": n, "keys": n, "dim": heads * d, "heads": heads, "table": table},
            lambda draw: {
                "qkv": draw(batch, n, 3, heads, d),
                # by columns, as the adapters hand it over
                "table": draw(heads, table).t(),
                "grid": (side, side),
            },
            _relative_attention_ref,
        )
    if model == SWIN:
        window = 7
        for stage, (side, heads) in enumerate(((56, 4), (28, 8), (14, 16), (7, 32)), start=1):
            # the last stage's map is one window: there is nothing to shift
            shift = 0 if side == window else window // 2
            table = (2 * window - 1) ** 2
            yield make(
                f"window_attention.{stage}",
                {"tokens": side * side, "keys": window * window, "dim": 32 * heads, "heads": heads, "table": table},
                functools.partial(_window_inputs, batch, side, heads, window, shift, table),
                lambda qkv, heads, window, shift, table: window_attention_ref(
                    qkv, heads, list(window), list(shift), table, None, 32**-0.5, False
                ),
            )


def _relative_attention_ref(qkv: Tensor, table: Tensor, grid: tuple[int, int]) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return relative_attention_ref(q, k, v, table, *grid, q.shape[-1] ** -0.5, False).flatten(2)


def _window_inputs(
    batch: int, side: int, heads: int, window: int, shift: int, table: int, draw: Callable[..., Tensor]
) -> dict[str, Any]:
    return {
        "qkv": draw(batch, side, side, 3 * 32 * heads),
        "heads": heads,
        "window": (window, window),
        "shift": (shift, shift),
        "table": draw(heads, table).t(),
    }


def library_workload(model: str, batch: int, dtype: str) -> Workload:
    reference = library_model(model)
    channels, height, width = image_shape(reference.model)
    e = DTYPES[dtype].itemsize
    pixels = batch * channels * height * width
    weights = sum(parameter.numel() for parameter in reference.parameters())

    def draw(device: torch.device, index: int) -> dict[str, Any]:
        return {"pixels": draws(device, DTYPES[dtype], index)(batch, channels, height, width)}

    flops = batch * count_flops(reference, 1, channels, height, width)
    shape = {"batch": batch, "height": height, "width": width}
    return Workload("model", model, "library", model, shape, dtype, flops, (weights + pixels) * e, draw, reference)
