"""What is measured: workloads, each with its sizes, its work, its inputs and its reference.

A workload says nothing of who runs it. Peers build a candidate for it from `inputs` (fresh random tensors) and, for
models, from `state_dict`, so that all candidates compute the same function on the same numbers.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from vitfast import ImageSpec, create_model
from vitfast.images.resize import ResizeCrop
from vitfast.kernels import (
    add_layer_norm_ref,
    attention_ref,
    layer_norm_ref,
    linear_ref,
    patch_embed_ref,
    relative_attention_ref,
    window_attention_ref,
)
from vitfast.libraries import image_shape, library
from vitfast.parity import build_model, first_tensor

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

MODELS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "vit_small_patch16_224": {},
    "vit_base_patch16_224": {},
    "vit_base_patch32_224": {},
    "vit_large_patch16_224": {},
    "vit_huge_patch14_224": {},
    "vit_base_patch16_384": {},
    "vit_base_patch14_dinov2": {"num_classes": 1000},
}
"""The suite's models, with what is overridden (a headless model gets a head, so that every model gives logits)."""

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

BATCHES = (1, 8, 32, 128, 256)

BATCHED = ("pixels", "x", "residual", "qkv", "files")
"""Inputs whose first dimension is the batch."""

KERNELS = (
    "patch_embed",
    "layer_norm",
    "add_layer_norm",
    "attention",
    "linear.qkv",
    "linear.proj",
    "linear.fc1",
    "linear.fc2",
)

PHOTOS = 32
PHOTO_SIZES = ((500, 375), (375, 500), (640, 480), (500, 333))
"""How many photographs, and their widths and heights: ImageNet's usual ones."""

MEAN = STD = 0.5
"""Of every channel, for pixels between 0 and 1: timm's for its ViTs."""


@dataclass(frozen=True)
class Workload:
    """One thing to measure, for one batch and dtype.

    Attributes:
        layer: one of `results.LAYERS`.
        name: of the workload, the same in every run.
        op: what a peer must offer: one of `KERNELS`' first parts, or "block", "model", "train", "end_to_end", or
            "library", a model of another library, which `reference` holds.
        model: the architecture it comes from.
        shape: sizes by name.
        dtype: a key of `DTYPES`.
        flops: of one call.
        bytes: fewest bytes of one call, weights included.
        inputs: makes one set of inputs on a device; called several times for rotation, seeded by the index.
        reference: the same function in plain torch on one set of inputs, or a module that takes its tensor (for
            "end_to_end" the decoded pixels); run in float64 it is the truth, in `dtype` the baseline of the parity
            rule.
    """

    layer: str
    name: str
    op: str
    model: str
    shape: dict[str, int]
    dtype: str
    flops: float
    bytes: float
    inputs: Callable[[torch.device, int], dict[str, Any]]
    reference: Callable[..., Tensor]

    def __str__(self) -> str:
        layer = "" if self.layer in ("kernel", "model") else f"{self.layer} "
        return f"{layer}{self.name} b{self.shape['batch']} {self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype of weights and activations."""
        return DTYPES[self.dtype]


@functools.cache
def reference_model(name: str) -> Any:
    """The plain model with seeded random parameters, all of them non-trivial; in eval mode, fp32, on CPU."""
    generator = torch.Generator().manual_seed(0)
    model = create_model(name, **MODELS.get(name, {})).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # gains near one, everything else small enough for activations of order one through all blocks
            noise = torch.randn(parameter.shape, generator=generator) * 0.02
            is_gain = parameter.dim() == 1 and parameter_name.endswith(("norm.weight", "norm1.weight", "norm2.weight"))
            parameter.copy_(noise + 1.0 if is_gain else noise)
    return model


def dimensions(name: str) -> dict[str, int]:
    """Sizes of an architecture: image, patch, tokens, width, heads, hidden, depth, classes."""
    model = reference_model(name)
    height, width = model.patch_embed.img_size
    block = model.blocks[0]
    return {
        "height": height,
        "width": width,
        "patch": model.patch_embed.patch_size[0],
        "tokens": model.num_prefix_tokens + model.patch_embed.num_patches,
        "dim": model.embed_dim,
        "heads": block.attn.num_heads,
        "hidden": block.mlp.fc1.out_features,
        "depth": len(model.blocks),
        "classes": model.num_classes,
    }


def _flops(module: nn.Module, *shape: int) -> float:
    """FLOPs of a module on an input, counted by torch on the meta device."""
    tensors = {name: t.to("meta") for name, t in (*module.named_parameters(), *module.named_buffers())}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        functional_call(module, tensors, (torch.empty(shape, device="meta"),))
    return float(counter.get_total_flops())


@functools.cache
def model_flops(name: str) -> float:
    """FLOPs of one image through the model."""
    model = reference_model(name)
    return _flops(model, 1, 3, *model.patch_embed.img_size)


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


class Normalized(nn.Module):
    """A model behind what pipelines do with decoded pixels, `[B, 3, H, W]` uint8: normalise in fp32, then cast."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        wide = pixels.to(torch.promote_types(dtype, torch.float32))
        return self.model(((wide / 255 - MEAN) / STD).to(dtype))


def photo_spec(model: str) -> ImageSpec:
    """How photographs become a model's pixels: resized and cropped as timm does for its ViTs."""
    size = reference_model(model).patch_embed.img_size
    return ImageSpec(size, (MEAN,) * 3, (STD,) * 3, ResizeCrop(size))


@functools.cache
def _photos() -> tuple[Any, list[str]]:
    """A temporary folder of JPEG files, and their paths: seeded noise of all scales, which compresses as photographs
    do (2 to 4 bits a pixel)."""
    folder = tempfile.TemporaryDirectory(prefix="vitfast-photos-")
    generator = torch.Generator().manual_seed(0)
    paths = []
    for i in range(PHOTOS):
        width, height = PHOTO_SIZES[i % len(PHOTO_SIZES)]
        image = torch.full((1, 3, height, width), 127.0)
        for scale in (1, 2, 4, 8, 16, 32, 64, 128):
            noise = torch.randn(1, 3, height // scale + 2, width // scale + 2, generator=generator)
            image += 4.0 * scale**0.6 * F.interpolate(noise, (height, width), mode="bicubic")
        pixels = image[0].clamp(0, 255).permute(1, 2, 0).to(torch.uint8).numpy()
        paths.append(str(Path(folder.name) / f"{i:02}.jpg"))
        Image.fromarray(pixels).save(paths[-1], quality=90)
    return folder, paths


def _random(device: torch.device, dtype: torch.dtype, index: int) -> Callable[..., Tensor]:
    generator = torch.Generator(device=device).manual_seed(1000 + index)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    return draw


_Inputs = Callable[[Callable[..., Tensor]], dict[str, Any]]


def _kernel_workload(
    model: str,
    batch: int,
    dtype: str,
    name: str,
    shape: dict[str, int],
    flops: float,
    elements: float,
    inputs: _Inputs,
    reference: Callable[..., Tensor],
) -> Workload:
    return Workload(
        "kernel",
        f"{name}/{model}",
        name.partition(".")[0],
        model,
        {"batch": batch, **shape},
        dtype,
        flops,
        elements * DTYPES[dtype].itemsize,
        lambda device, index: inputs(_random(device, DTYPES[dtype], index)),
        reference,
    )


def _kernel_workloads(model: str, batch: int, dtype: str) -> Iterator[Workload]:
    size = dimensions(model)
    n, d, h, hidden = size["tokens"], size["dim"], size["heads"], size["hidden"]
    rows = batch * n
    patches = (size["height"] // size["patch"]) * (size["width"] // size["patch"])

    make = functools.partial(_kernel_workload, model, batch, dtype)
    yield make(
        "patch_embed",
        {"patches": patches, "dim": d, "k": 3 * size["patch"] ** 2},
        2.0 * batch * patches * d * 3 * size["patch"] ** 2,
        batch * 3 * size["height"] * size["width"] + d * 3 * size["patch"] ** 2 + rows * d + n * d,
        lambda draw: {
            "pixels": draw(batch, 3, size["height"], size["width"]),
            "weight": draw(d, 3, size["patch"], size["patch"], scale=0.02),
            "bias": draw(d),
            "prefix": draw(n - patches, d) if n > patches else None,
            "pos_embed": draw(n, d),
        },
        lambda pixels, weight, bias, prefix, pos_embed: patch_embed_ref(
            pixels, weight, bias, prefix, pos_embed, None, None, False
        ),
    )
    norm = {"rows": rows, "dim": d}
    yield make(
        "layer_norm",
        norm,
        8.0 * rows * d,
        2 * rows * d,
        lambda draw: {"x": draw(batch, n, d), "weight": draw(d), "bias": draw(d), "eps": 1e-6},
        lambda x, weight, bias, eps: layer_norm_ref(x, weight, bias, eps)[0],
    )
    yield make(
        "add_layer_norm",
        norm,
        9.0 * rows * d,
        4 * rows * d,
        lambda draw: {
            "x": draw(batch, n, d),
            "residual": draw(batch, n, d),
            "weight": draw(d),
            "bias": draw(d),
            "eps": 1e-6,
        },
        # both results side by side, so that the first dimension of an output is the batch here too
        lambda x, residual, weight, bias, eps: torch.cat(
            add_layer_norm_ref(x, residual, weight, bias, eps, None)[:2], dim=-1
        ),
    )
    yield make(
        "attention",
        {"heads": h, "tokens": n, "head_dim": d // h},
        4.0 * batch * n * n * d,
        4 * rows * d,
        lambda draw: {"qkv": draw(batch, n, 3 * d), "heads": h},
        _attention_qkv_ref,
    )
    for name, out_features, in_features, activation, residual in (
        ("linear.qkv", 3 * d, d, "none", False),
        ("linear.proj", d, d, "none", True),
        ("linear.fc1", hidden, d, "gelu", False),
        ("linear.fc2", d, hidden, "none", True),
    ):
        yield make(
            name,
            {"m": rows, "n": out_features, "k": in_features},
            2.0 * rows * out_features * in_features,
            rows * in_features + out_features * in_features + (2 if residual else 1) * rows * out_features,
            functools.partial(
                _linear_inputs, (batch, n), out_features, in_features, activation, residual
            ),
            lambda x, weight, bias, activation, residual: linear_ref(
                x, weight, bias, activation, residual, None, False
            ),
        )


def _linear_inputs(
    leading: tuple[int, int], n: int, k: int, activation: str, residual: bool, draw: Callable[..., Tensor]
) -> dict[str, Any]:
    return {
        "x": draw(*leading, k),
        "weight": draw(n, k, scale=k**-0.5),
        "bias": draw(n),
        "activation": activation,
        "residual": draw(*leading, n) if residual else None,
    }


def _attention_qkv_ref(qkv: Tensor, heads: int) -> Tensor:
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return attention_ref(q, k, v, None, q.shape[-1] ** -0.5, False).flatten(2)


def _model_workloads(model: str, batch: int, dtype: str) -> Iterator[Workload]:
    size = dimensions(model)
    e = DTYPES[dtype].itemsize
    reference = reference_model(model)
    weights = sum(parameter.numel() for parameter in reference.parameters())
    pixels = batch * 3 * size["height"] * size["width"]
    logits = batch * size["classes"]
    shape = {"batch": batch, **{k: size[k] for k in ("height", "width", "tokens", "dim", "depth")}}
    flops = batch * model_flops(model)

    def draw_pixels(device: torch.device, index: int) -> dict[str, Any]:
        return {"pixels": _random(device, DTYPES[dtype], index)(batch, 3, size["height"], size["width"])}

    def draw_tokens(device: torch.device, index: int) -> dict[str, Any]:
        return {"x": _random(device, DTYPES[dtype], index)(batch, size["tokens"], size["dim"])}

    def take_files(device: torch.device, index: int) -> dict[str, Any]:
        paths = _photos()[1]
        return {"files": [paths[(index * batch + i) % len(paths)] for i in range(batch)]}

    block = reference.blocks[0]
    block_weights = sum(parameter.numel() for parameter in block.parameters())
    tokens = batch * size["tokens"] * size["dim"]
    yield Workload(
        "block",
        model,
        "block",
        model,
        {"batch": batch, **{k: size[k] for k in ("tokens", "dim", "heads", "hidden")}},
        dtype,
        batch * _flops(block, 1, size["tokens"], size["dim"]),
        (block_weights + 2 * tokens) * e,
        draw_tokens,
        block,
    )
    inference = (weights + pixels + logits) * e
    yield Workload("model", model, "model", model, shape, dtype, flops, inference, draw_pixels, reference)
    # AdamW reads weights and two moments and writes them; the gradients are written too
    trained = (7 * weights + pixels) * e
    yield Workload("train", model, "train", model, shape, dtype, 3 * flops, trained, draw_pixels, reference)
    # the device gets uint8 pixels
    decoded = (weights + logits) * e + pixels
    whole = Normalized(reference)
    yield Workload("end_to_end", model, "end_to_end", model, shape, dtype, flops, decoded, take_files, whole)


def _library_kernels(model: str, batch: int, dtype: str) -> Iterator[Workload]:
    """Attention that only other libraries' models have: BEiT-B's, and Swin-B's in the shifted blocks of each stage."""

    def make(name: str, shape: dict[str, int], inputs: _Inputs, reference: Callable[..., Tensor]) -> Workload:
        rows, width = shape["tokens"], shape["dim"]
        flops = 4.0 * batch * rows * shape["keys"] * width
        elements = 4 * batch * rows * width + shape["table"] * shape["heads"]
        return _kernel_workload(model, batch, dtype, name, shape, flops, elements, inputs, reference)

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


def _library_workload(model: str, batch: int, dtype: str) -> Workload:
    reference = library_model(model)
    channels, height, width = image_shape(reference.model)
    e = DTYPES[dtype].itemsize
    pixels = batch * channels * height * width
    weights = sum(parameter.numel() for parameter in reference.parameters())

    def draw(device: torch.device, index: int) -> dict[str, Any]:
        return {"pixels": _random(device, DTYPES[dtype], index)(batch, channels, height, width)}

    flops = batch * _flops(reference, 1, channels, height, width)
    shape = {"batch": batch, "height": height, "width": width}
    return Workload("model", model, "library", model, shape, dtype, flops, (weights + pixels) * e, draw, reference)


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
                    found += _library_kernels(model, batch, dtype) if "kernel" in layers else []
                    found += [_library_workload(model, batch, dtype)] if "model" in layers else []
                    continue
                every = [*_kernel_workloads(model, batch, dtype), *_model_workloads(model, batch, dtype)]
                found += [workload for workload in every if workload.layer in layers]
    return found
