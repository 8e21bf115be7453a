"""What every lane runs: one list of cases for each op, and one function that holds a case to the tolerance rule.

A case builds the arguments of an op's public function for any dtype, device and batch: on `meta` for the compile lane,
on CPU for the reference and the interpreter, on CUDA for the gpu lane. `real` cases have the sizes of published ViTs,
the others are small, odd, or laid out to hurt.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import vitfast.kernels as kernels
from tests._close import assert_close
from vitfast.kernels import INTERPRET

Arguments = dict[str, Any]
OPS = (
    "layer_norm",
    "add_layer_norm",
    "row_stats",
    "linear",
    "linear_stats",
    "norm_linear",
    "mlp",
    "attention",
    "attention_lse",
    "attention_qkv",
    "relative_attention",
    "window_attention",
    "patch_embed",
)


def module(name: str) -> ModuleType:
    """A kernel's file; as an attribute of the package the name is the function."""
    return importlib.import_module(f"vitfast.kernels.{name}")


FILES = tuple(map(module, ("gemm", *(op for op in OPS if (Path(kernels.__file__).parent / f"{op}.py").is_file()))))


def file_of(op: str) -> ModuleType:
    """The file whose `Config` and `heuristic` an op's launches use."""
    shared = {"add_layer_norm": "layer_norm", "row_stats": "layer_norm", "attention_lse": "attention"}
    shared |= {"relative_attention": "attention", **dict.fromkeys(("linear", "linear_stats", "norm_linear"), "gemm")}
    return module(shared.get(op, op))


class Data:
    """Seeded random tensors of one dtype on one device, in any layout.

    Layouts: `dense`; `pitch`, rows of a matrix 8 elements wider; `ragged`, rows of a matrix 3 elements wider, so that
    they start at odd addresses; `offset`, one element behind a 16-byte boundary; `transposed`, the last two dimensions
    swapped in memory; `heads`, dimensions 1 and 2 swapped in memory; `broadcast`, stride 0 in the first dimension;
    `channels_last`; `channels_last_cut`, the first channels of channels_last pixels with one more.
    """

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype = dtype
        self.device = device
        self._generator = torch.Generator().manual_seed(0)

    def __call__(
        self,
        *shape: int,
        layout: str = "dense",
        dtype: torch.dtype | None = None,
        scale: float = 1.0,
        shift: float = 0.0,
    ) -> Tensor:
        dtype = dtype or self.dtype
        *lead, width = shape
        if layout == "pitch":
            return self._base([*lead, width + 8], dtype, scale, shift)[..., :width]
        if layout == "ragged":
            return self._base([*lead, width + 3], dtype, scale, shift)[..., :width]
        if layout == "offset":
            count = torch.Size(shape).numel()
            return self._base([count + 1], dtype, scale, shift)[1:].view(shape)
        if layout == "transposed":
            return self._base([*lead[:-1], width, lead[-1]], dtype, scale, shift).mT
        if layout == "heads":
            b, h, n, d = shape
            return self._base([b, n, h, d], dtype, scale, shift).transpose(1, 2)
        if layout == "broadcast":
            return self._base([1, *shape[1:]], dtype, scale, shift).expand(shape)
        if layout == "channels_last":
            b, c, h, w = shape
            return self._base([b, h, w, c], dtype, scale, shift).permute(0, 3, 1, 2)
        if layout == "channels_last_cut":
            b, c, h, w = shape
            return self._base([b, h, w, c + 1], dtype, scale, shift)[..., :c].permute(0, 3, 1, 2)
        assert layout == "dense", layout
        return self._base(list(shape), dtype, scale, shift)

    def _base(self, shape: list[int], dtype: torch.dtype, scale: float, shift: float) -> Tensor:
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        if dtype == torch.uint8:
            x = torch.randint(0, 256, shape, generator=self._generator)
        else:
            x = torch.randn(shape, generator=self._generator) * scale + shift
        return x.to(self.device, dtype)


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        op: the public function's name.
        name: what is special about it.
        make: keyword arguments from `Data` and a batch size.
        wrt: the arguments that get gradients.
        real: sizes of a published ViT.
        interpret: small enough for the interpreter.
        core: in the small set that every target compiles.
    """

    op: str
    name: str
    make: Callable[[Data, int], Arguments]
    wrt: tuple[str, ...]
    real: bool = False
    interpret: bool = True
    core: bool = False

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    def arguments(self, dtype: torch.dtype, device: str, batch: int | None = None) -> Arguments:
        return self.make(Data(dtype, device), batch or (1 if self.real else 2))

    @property
    def dot(self) -> bool:
        """Whether the op multiplies matrices."""
        return self.op not in ("layer_norm", "add_layer_norm", "row_stats")


# layer_norm and add_layer_norm


def _norm(
    name: str,
    n: int,
    d: int,
    *,
    layout: str = "dense",
    weight: bool = True,
    bias: bool = True,
    eps: float = 1e-6,
    wide: bool = False,
    real: bool = False,
    **marks: bool,
) -> Case:
    def make(data: Data, batch: int) -> Arguments:
        parameters = torch.promote_types(data.dtype, torch.float32) if wide else None
        return {
            "x": data(batch, n, d, layout=layout, shift=0.5),
            "weight": data(d, dtype=parameters) if weight else None,
            "bias": data(d, dtype=parameters) if bias else None,
            "eps": eps,
        }

    wrt = ("x", *(["weight"] if weight else []), *(["bias"] if bias else []))
    return Case("layer_norm", name, make, wrt, real, **marks)


def _add_norm(
    name: str,
    n: int,
    d: int,
    *,
    layouts: tuple[str, str] = ("dense", "dense"),
    scale: bool = True,
    affine: bool = True,
    wide: bool = False,
    same: bool = False,
    real: bool = False,
    **marks: bool,
) -> Case:
    def make(data: Data, batch: int) -> Arguments:
        stream = torch.promote_types(data.dtype, torch.float32) if wide else data.dtype
        x = data(batch, n, d, layout=layouts[0])
        return {
            "x": x,
            "residual": x if same else data(batch, n, d, layout=layouts[1], dtype=stream),
            "weight": data(d, dtype=stream) if affine else None,
            "bias": data(d, dtype=stream) if affine else None,
            "scale": data(d, scale=0.1) if scale else None,
        }

    wrt = ("x", "residual", *(["weight", "bias"] if affine else []), *(["scale"] if scale else []))
    return Case("add_layer_norm", name, make, wrt, real, **marks)


def _norm_of_class_tokens(data: Data, batch: int) -> Arguments:
    return {"x": data(batch, 197, 768)[:, 0], "weight": data(768), "bias": data(768)}


LAYER_NORM = [
    _norm("D1", 7, 1),
    _norm("D5", 31, 5),
    _norm("D13-ragged", 7, 13, layout="ragged"),
    _norm("D67-offset", 13, 67, layout="offset"),
    _norm("D192-pitch", 13, 192, layout="pitch"),
    _norm("D64-transposed", 31, 64, layout="transposed"),
    _norm("D96-broadcast", 5, 96, layout="broadcast"),
    _norm("D2049", 1, 2049),
    _norm("no-affine", 7, 67, weight=False, bias=False),
    _norm("no-weight", 7, 67, weight=False),
    _norm("no-bias", 7, 67, bias=False),
    _norm("fp32-parameters", 7, 67, wide=True),
    _norm("eps1e-12", 7, 67, eps=1e-12),
    _norm("ViT-B", 197, 768, real=True, core=True),
    _norm("ViT-L14", 257, 1024, real=True),
    _norm("ViT-Ti", 197, 192, real=True),
    _norm("ViT-S", 201, 384, real=True),
    _norm("ViT-H-384", 577, 1280, real=True),
    _norm("DINOv2-B", 1370, 768, real=True, wide=True),
    Case("layer_norm", "ViT-B-class-tokens", _norm_of_class_tokens, ("x", "weight", "bias"), real=True),
]
ADD_LAYER_NORM = [
    _add_norm("D1", 7, 1),
    _add_norm("D13-ragged", 7, 13, layouts=("ragged", "offset")),
    _add_norm("D67-broadcast-residual", 13, 67, layouts=("dense", "broadcast")),
    _add_norm("D64-transposed", 31, 64, layouts=("transposed", "pitch")),
    _add_norm("no-scale", 7, 67, scale=False),
    _add_norm("no-affine", 7, 67, affine=False),
    _add_norm("fp32-stream", 7, 67, wide=True),
    _add_norm("fp32-stream-no-scale", 7, 67, wide=True, scale=False, affine=False),
    _add_norm("same-tensor", 7, 67, same=True),
    _add_norm("ViT-B", 197, 768, real=True, scale=False, core=True),
    _add_norm("DINOv2-L", 257, 1024, real=True),
    _add_norm("ViT-Ti", 198, 192, real=True, scale=False),
    _add_norm("ViT-H-fp32-stream", 257, 1280, real=True, wide=True),
]

# linear and mlp


def _linear(
    name: str,
    m: int | None,
    k: int,
    n: int,
    activation: str = "none",
    *,
    bias: bool = True,
    residual: str | None = None,
    scale: bool = False,
    layouts: tuple[str, str] = ("dense", "dense"),
    wide: bool = False,
    real: bool = False,
    stats: bool = False,
    **marks: bool,
) -> Case:
    def make(data: Data, batch: int) -> Arguments:
        stream = torch.promote_types(data.dtype, torch.float32) if wide else data.dtype
        # m tokens, or the pooled output of each image
        lead = (batch,) if m is None else (batch, m)
        x = data(*lead, k, layout=layouts[0])
        arguments = {
            "x": x,
            "weight": data(n, k, layout=layouts[1], scale=k**-0.5),
            "bias": data(n) if bias else None,
            "activation": activation,
            "residual": None,
            "scale": data(n, scale=0.1, shift=-0.2) if scale else None,
        }
        if residual == "same":
            arguments["residual"] = x
        elif residual is not None:
            arguments["residual"] = data(*lead, n, layout=residual, dtype=stream)
        return arguments

    wrt = ["x", "weight", *(["bias"] if bias else [])]
    wrt += (["residual"] if residual else []) + (["scale"] if scale else [])
    return Case("linear_stats" if stats else "linear", name, make, tuple(wrt), real, **marks)


LINEAR = [
    _linear("1x1x1", 1, 1, 1),
    _linear("K1", 13, 1, 31, "gelu"),
    _linear("N1", 13, 31, 1, "gelu_tanh"),
    _linear("primes", 13, 67, 31),
    _linear("primes-gelu", 31, 67, 71, "gelu", residual="dense", scale=True),
    _linear("primes-gelu_tanh", 31, 67, 71, "gelu_tanh", scale=True),
    _linear("primes-quick_gelu", 31, 67, 71, "quick_gelu", residual="offset"),
    _linear("no-bias", 13, 64, 64, bias=False),
    _linear("no-bias-gelu-residual", 13, 64, 64, "gelu", bias=False, residual="dense"),
    _linear("x-pitch", 13, 64, 72, layouts=("pitch", "dense")),
    _linear("x-ragged", 13, 64, 72, layouts=("ragged", "offset")),
    _linear("x-offset", 13, 64, 72, layouts=("offset", "ragged")),
    _linear("x-transposed", 31, 64, 72, layouts=("transposed", "dense")),
    _linear("weight-transposed", 31, 64, 72, "gelu", layouts=("dense", "transposed")),
    _linear("x-broadcast", 31, 64, 72, layouts=("broadcast", "pitch")),
    _linear("residual-broadcast", 31, 64, 72, residual="broadcast", scale=True),
    _linear("residual-transposed", 31, 64, 72, residual="transposed"),
    _linear("residual-ragged", 31, 64, 72, residual="ragged"),
    _linear("residual-fp32", 31, 64, 72, residual="dense", scale=True, wide=True),
    _linear("residual-is-x", 31, 64, 64, residual="same", scale=True),
    _linear("many-tiles", 201, 40, 136, "gelu", residual="dense"),
    _linear("ViT-B-qkv", 197, 768, 2304, real=True, interpret=False),
    _linear("ViT-B-proj", 197, 768, 768, residual="dense", scale=True, real=True),
    _linear("ViT-B-fc1", 197, 768, 3072, "gelu", real=True, interpret=False, core=True),
    _linear("ViT-B-fc2", 197, 3072, 768, residual="dense", scale=True, real=True, interpret=False, core=True),
    _linear("ViT-Ti-fc1", 198, 192, 768, "gelu_tanh", real=True),
    _linear(
        "ViT-S-fc2-fp32-stream", 201, 1536, 384, residual="dense", wide=True, real=True, interpret=False, core=True
    ),
    _linear("CLIP-L-fc1", 257, 1024, 4096, "quick_gelu", real=True, interpret=False),
    _linear("ViT-H-fc1", 577, 1280, 5120, "gelu", real=True, interpret=False),
    _linear("ViT-B-head", None, 768, 1000, real=True),
    # 1001 columns of output have no 16-byte rows: the pointer kernel on every target
    _linear("head-1001", 197, 768, 1001, real=True, interpret=False, core=True),
]


LINEAR_STATS = [
    _linear("N1", 13, 31, 1, stats=True),
    _linear("primes-gelu", 31, 67, 71, "gelu", residual="dense", scale=True, stats=True),
    _linear("many-tiles", 201, 40, 200, residual="dense", stats=True),
    _linear("x-pitch", 13, 64, 128, layouts=("pitch", "dense"), residual="ragged", stats=True),
    _linear("residual-fp32", 31, 64, 72, residual="dense", scale=True, wide=True, stats=True),
    _linear("ViT-Ti-proj", 197, 192, 192, residual="dense", stats=True, real=True),
    _linear("ViT-B-proj", 197, 768, 768, residual="dense", scale=True, stats=True, real=True, interpret=False),
    _linear("ViT-B-fc2", 197, 3072, 768, residual="dense", stats=True, real=True, interpret=False, core=True),
    _linear("ViT-H-fc2", 257, 5120, 1280, residual="dense", stats=True, real=True, interpret=False),
    _linear("ViT-S-fc2-fp32", 201, 1536, 384, residual="dense", wide=True, stats=True, real=True, interpret=False),
]


def _norm_linear(
    name: str,
    m: int,
    k: int,
    n: int,
    activation: str = "none",
    *,
    weight: bool = True,
    bias: bool = True,
    wide: bool = False,
    outliers: bool = False,
    layout: str = "dense",
    real: bool = False,
    **marks: bool,
) -> Case:
    def make(data: Data, batch: int) -> Arguments:
        parameters = torch.promote_types(data.dtype, torch.float32) if wide else None
        x = data(batch, m, k, layout=layout, shift=0.5)
        if outliers:
            # what trained ViTs have: a few channels far above all others, in every token
            x[..., 3::41] += 300.0
        return {
            "x": x,
            "stats": kernels.row_stats_ref(x) if data.device == "meta" else kernels.row_stats(x),
            "norm_weight": data(k, dtype=parameters, scale=0.2, shift=1.0) if weight else None,
            "norm_bias": data(k, dtype=parameters) if weight and bias else None,
            "eps": 1e-6,
            "weight": data(n, k, scale=k**-0.5),
            "bias": data(n) if bias else None,
            "activation": activation,
        }

    wrt = ["x", "weight", *(["norm_weight"] if weight else []), *(["bias"] if bias else [])]
    return Case("norm_linear", name, make, tuple(wrt), real, **marks)


NORM_LINEAR = [
    _norm_linear("K1", 7, 1, 31),
    _norm_linear("primes", 31, 67, 71),
    _norm_linear("primes-gelu", 31, 67, 71, "gelu"),
    _norm_linear("no-affine", 13, 67, 31, weight=False),
    _norm_linear("no-bias", 13, 67, 31, "gelu_tanh", bias=False),
    _norm_linear("fp32-parameters", 13, 72, 31, wide=True),
    _norm_linear("outliers", 31, 200, 71, outliers=True),
    _norm_linear("x-pitch", 13, 136, 72, layout="pitch"),
    _norm_linear("x-transposed", 31, 64, 72, layout="transposed"),
    _norm_linear("ViT-Ti-qkv", 197, 192, 576, real=True),
    _norm_linear("ViT-B-qkv", 197, 768, 2304, real=True, interpret=False, core=True),
    _norm_linear("ViT-B-fc1", 197, 768, 3072, "gelu", real=True, interpret=False, core=True),
    _norm_linear("ViT-B-fc1-outliers", 197, 768, 3072, "gelu", outliers=True, real=True, interpret=False),
    _norm_linear("ViT-H-fc1", 257, 1280, 5120, "gelu", real=True, interpret=False),
]


def _row_stats(name: str, n: int, d: int, layout: str = "dense", real: bool = False) -> Case:
    def make(data: Data, batch: int) -> Arguments:
        return {"x": data(batch, n, d, layout=layout, shift=0.5)}

    return Case("row_stats", name, make, (), real)


ROW_STATS = [
    _row_stats("D1", 7, 1),
    _row_stats("D67-offset", 13, 67, "offset"),
    _row_stats("D192-pitch", 13, 192, "pitch"),
    _row_stats("D13-ragged", 7, 13, "ragged"),
    _row_stats("D2049", 1, 2049),
    _row_stats("ViT-B", 197, 768, real=True),
    _row_stats("ViT-H", 257, 1280, real=True),
]


def _mlp(
    name: str,
    n: int,
    d: int,
    hidden: int,
    activation: str = "gelu",
    *,
    residual: bool = True,
    scale: bool = True,
    bias: bool = True,
    **marks: bool,
) -> Case:
    def make(data: Data, batch: int) -> Arguments:
        return {
            "x": data(batch, n, d),
            "fc1_weight": data(hidden, d, scale=d**-0.5),
            "fc1_bias": data(hidden) if bias else None,
            "fc2_weight": data(d, hidden, scale=hidden**-0.5),
            "fc2_bias": data(d) if bias else None,
            "activation": activation,
            "residual": data(batch, n, d) if residual else None,
            "scale": data(d) if scale else None,
        }

    wrt = ["x", "fc1_weight", "fc2_weight", *(["fc1_bias", "fc2_bias"] if bias else [])]
    wrt += (["residual"] if residual else []) + (["scale"] if scale else [])
    return Case("mlp", name, make, tuple(wrt), **marks)


MLP = [
    _mlp("gelu", 13, 31, 67),
    _mlp("gelu_tanh", 7, 16, 64, "gelu_tanh", scale=False),
    _mlp("quick_gelu", 7, 13, 31, "quick_gelu", residual=False, bias=False),
    _mlp("ViT-Ti", 197, 192, 768, real=True),
]

# attention


def _attention(
    name: str,
    h: int,
    n: int,
    d: int,
    s: int | None = None,
    *,
    layouts: tuple[str, str, str] = ("heads", "heads", "heads"),
    bias: tuple[int, ...] | None = None,
    bias_layout: str = "dense",
    scale: float | None = None,
    real: bool = False,
    **marks: bool,
) -> Case:
    keys = s or n

    def make(data: Data, batch: int) -> Arguments:
        q, k, v = (
            data(batch, h, size, d, layout=layout) for size, layout in zip((n, keys, keys), layouts, strict=True)
        )
        return {
            "q": q,
            "k": k,
            "v": v,
            "scale": scale,
            # a leading -1 stands for the batch
            "bias": data(*(batch if size < 0 else size for size in bias), layout=bias_layout) if bias else None,
        }

    return Case("attention", name, make, ("q", "k", "v", *(["bias"] if bias else [])), real, **marks)


def _masked(name: str, n: int, d: int, *, whole_rows: bool) -> Case:
    def make(data: Data, batch: int) -> Arguments:
        q, k, v = (data(batch, 2, n, d) for _ in range(3))
        mask = torch.zeros(n, n, dtype=data.dtype, device=data.device)
        if whole_rows:
            mask[::3] = float("-inf")
        # the first tiles of keys hidden from some rows: the online softmax meets -inf before any number
        mask[1::3, : n - 3] = float("-inf")
        return {"q": q, "k": k, "v": v, "bias": mask}

    return Case("attention", name, make, ("q", "k", "v"))


def _attention_qkv(name: str, h: int, n: int, d: int, *, layout: str = "dense", **marks: bool) -> Case:
    def make(data: Data, batch: int) -> Arguments:
        return {"qkv": data(batch, n, 3 * h * d, layout=layout), "heads": h}

    return Case("attention_qkv", name, make, ("qkv",), **marks)


ATTENTION = [
    _attention("1x1-d1", 1, 1, 1),
    _attention("N1-S67", 2, 1, 31, 67),
    _attention("N67-S1", 2, 67, 31, 1),
    _attention("d5", 2, 31, 5),
    _attention("d13-ragged", 1, 7, 13, 31, layouts=("ragged", "offset", "pitch")),
    _attention("d16-dense", 2, 31, 16, layouts=("dense", "dense", "dense")),
    _attention("d24", 1, 31, 24),
    _attention("d67-S131", 1, 67, 67, 131),
    _attention("d72", 1, 31, 72),
    _attention("d80", 1, 31, 80),
    _attention("d88-offset", 1, 31, 88, layouts=("offset", "offset", "offset")),
    _attention("d104", 1, 31, 104),
    _attention("d256", 1, 17, 256),
    _attention("d251", 1, 17, 251),
    _attention("transposed", 1, 31, 32, layouts=("transposed", "transposed", "transposed")),
    _attention("broadcast-kv", 2, 31, 32, layouts=("heads", "broadcast", "broadcast")),
    _attention("negative-scale", 1, 31, 32, scale=-0.7),
    _attention("zero-scale", 1, 31, 32, scale=0.0),
    # scores of several thousands: the softmax is a choice of one key
    _attention("huge-scale", 1, 31, 32, scale=200.0),
    _attention("bias-full", 2, 31, 16, 37, bias=(-1, 2, 31, 37)),
    _attention("bias-rows", 2, 31, 16, 37, bias=(31, 37), bias_layout="ragged"),
    _attention("bias-heads", 2, 31, 16, bias=(2, 31, 31), bias_layout="transposed"),
    _attention("bias-keys", 2, 31, 16, 37, bias=(-1, 1, 1, 37)),
    _attention("bias-queries", 2, 31, 16, 37, bias=(31, 1)),
    _attention("bias-one", 2, 31, 16, bias=(1,)),
    _masked("masked", 37, 16, whole_rows=False),
    _masked("masked-rows", 37, 16, whole_rows=True),
    _attention("ViT-B-bias", 12, 197, 64, bias=(12, 197, 197), real=True, interpret=False, core=True),
    _attention("cross", 16, 1, 64, 257, real=True),
    _attention("pooling-d72", 16, 1, 72, 729, real=True, interpret=False),
]
# the same calls with one output more
ATTENTION_LSE = [
    dataclasses.replace(case, op="attention_lse", core=False)
    for case in ATTENTION
    if case.name in ("1x1-d1", "N1-S67", "d67-S131", "d80", "bias-keys", "masked", "ViT-B-bias", "cross")
]
ATTENTION_QKV = [
    _attention_qkv("d5", 3, 7, 5),
    _attention_qkv("d40-ragged", 2, 31, 40, layout="ragged"),
    _attention_qkv("d64-pitch", 2, 67, 64, layout="pitch"),
    _attention_qkv("d64-offset", 1, 131, 64, layout="offset"),
    _attention_qkv("ViT-Ti", 3, 197, 64, real=True),
    _attention_qkv("ViT-B", 12, 197, 64, real=True, interpret=False, core=True),
    _attention_qkv("ViT-B-32", 12, 50, 64, real=True, interpret=False),
    _attention_qkv("ViT-B-GAP", 12, 196, 64, real=True, interpret=False),
    _attention_qkv("DeiT", 6, 198, 64, real=True, interpret=False),
    _attention_qkv("DINOv2-S-registers", 6, 201, 64, real=True, interpret=False),
    _attention_qkv("CLIP-L", 16, 257, 64, real=True, interpret=False),
    _attention_qkv("ViT-B-384", 12, 577, 64, real=True, interpret=False, core=True),
    _attention_qkv("DINOv2-518", 12, 1370, 64, real=True, interpret=False),
    _attention_qkv("SoViT-224", 16, 197, 72, real=True, interpret=False),
    _attention_qkv("SoViT-384", 16, 577, 72, real=True, interpret=False),
    _attention_qkv("ViT-H", 16, 257, 80, real=True, interpret=False),
    _attention_qkv("ViT-H-16", 16, 197, 80, real=True, interpret=False),
    _attention_qkv("ViT-g", 16, 257, 88, real=True, interpret=False, core=True),
    _attention_qkv("ViT-g-16", 16, 197, 88, real=True, interpret=False),
    _attention_qkv("ViT-bigG", 16, 257, 104, real=True, interpret=False),
    _attention_qkv("ViT-bigG-16", 16, 197, 104, real=True, interpret=False),
    _attention_qkv("d96", 8, 197, 96, real=True, interpret=False),
    _attention_qkv("d128", 8, 197, 128, real=True, interpret=False),
    _attention_qkv("d128-577", 8, 577, 128, real=True, interpret=False),
    _attention_qkv("d16", 8, 197, 16, real=True, interpret=False),
    _attention_qkv("d256", 4, 197, 256, real=True, interpret=False),
]

# relative_attention


def _relative_attention(
    name: str,
    h: int,
    grid: tuple[int, int],
    d: int,
    *,
    prefix: int = 1,
    layout: str = "packed",
    table_layout: str = "transposed",
    scale: float | None = None,
    **marks: bool,
) -> Case:
    n = grid[0] * grid[1] + prefix

    def make(data: Data, batch: int) -> Arguments:
        if layout == "packed":
            q, k, v = data(batch, n, 3 * h * d).unflatten(2, (3, h, d)).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (data(batch, h, n, d, layout=layout) for _ in range(3))
        # large beside the scores: a wrong row of it shows
        table = data((2 * grid[0] - 1) * (2 * grid[1] - 1) + 3 * prefix, h, layout=table_layout, scale=2.0)
        return {"q": q, "k": k, "v": v, "table": table, "grid": grid, "scale": scale}

    return Case("relative_attention", name, make, ("q", "k", "v", "table"), **marks)


RELATIVE_ATTENTION = [
    _relative_attention("1x1", 1, (1, 1), 1),
    _relative_attention("1x1-patches", 1, (1, 1), 5, prefix=0),
    _relative_attention("1x7", 2, (1, 7), 5),
    _relative_attention("7x1-patches", 2, (7, 1), 5, prefix=0),
    _relative_attention("3x5", 2, (3, 5), 16),
    _relative_attention("5x3-patches", 2, (5, 3), 16, prefix=0),
    _relative_attention("3x11-ragged", 2, (3, 11), 13, layout="ragged", table_layout="ragged"),
    _relative_attention("6x7-d72-offset", 2, (6, 7), 72, layout="offset", table_layout="offset"),
    _relative_attention("9x8-heads", 2, (9, 8), 24, prefix=0, layout="heads", table_layout="dense", scale=0.3),
    _relative_attention("4x4-broadcast", 2, (4, 4), 16, layout="transposed", table_layout="broadcast"),
    _relative_attention("BEiT-B", 12, (14, 14), 64, real=True, interpret=False, core=True),
    _relative_attention("BEiT-B-table", 12, (14, 14), 64, table_layout="dense", real=True, interpret=False, core=True),
    _relative_attention("BEiT-B-384", 12, (24, 24), 64, real=True, interpret=False, core=True),
    _relative_attention("BEiT-L-512", 16, (32, 32), 64, real=True, interpret=False),
    _relative_attention("relpos-B", 12, (14, 14), 64, prefix=0, real=True, interpret=False),
    _relative_attention("d72", 16, (14, 14), 72, real=True, interpret=False, core=True),
    _relative_attention("d128", 8, (14, 14), 128, real=True, interpret=False),
]

# window_attention


def _window_attention(
    name: str,
    size: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    h: int,
    d: int,
    *,
    cosine: bool = False,
    scale: float | None = None,
    layout: str = "dense",
    table_layout: str = "dense",
    wide: bool = False,
    **marks: bool,
) -> Case:
    def make(data: Data, batch: int) -> Arguments:
        parameters = torch.promote_types(data.dtype, torch.float32) if wide else None
        rows = (2 * window[0] - 1) * (2 * window[1] - 1)
        return {
            "qkv": data(batch, *size, 3 * h * d, layout=layout),
            "heads": h,
            "window": window,
            "shift": shift,
            # large beside the scores: a wrong row of it shows
            "table": data(rows, h, layout=table_layout, scale=2.0, dtype=parameters),
            "scale": data(h, scale=3.0, shift=10.0, dtype=parameters) if cosine else scale,
        }

    return Case("window_attention", name, make, ("qkv", "table", *(["scale"] if cosine else [])), **marks)


WINDOW_ATTENTION = [
    _window_attention("1x1", (1, 1), (1, 1), (0, 0), 1, 1),
    _window_attention("1x1-of-2x3", (2, 3), (1, 1), (0, 0), 2, 5),
    _window_attention("7x7", (7, 14), (7, 7), (0, 0), 2, 16),
    _window_attention("7x7-shifted", (14, 14), (7, 7), (3, 3), 1, 32),
    _window_attention("3x5", (6, 10), (3, 5), (1, 2), 2, 32),
    _window_attention("3x5-down", (6, 10), (3, 5), (1, 0), 2, 5),
    _window_attention("3x5-right", (6, 10), (3, 5), (0, 2), 2, 5),
    _window_attention("3x5-furthest", (6, 10), (3, 5), (2, 4), 1, 16),
    _window_attention("one-long", (3, 10), (3, 5), (0, 2), 2, 16),
    _window_attention("one-long-shifted", (3, 10), (3, 5), (1, 2), 2, 16),
    _window_attention("1x7", (3, 14), (1, 7), (0, 3), 2, 13),
    _window_attention("9x8", (18, 8), (9, 8), (4, 0), 1, 24),
    _window_attention("12x12", (12, 24), (12, 12), (6, 6), 1, 16),
    _window_attention("d24-pitch", (6, 6), (3, 3), (1, 1), 3, 24, layout="pitch", table_layout="pitch"),
    _window_attention("d40-ragged", (6, 6), (3, 3), (1, 1), 1, 40, layout="ragged", table_layout="ragged"),
    _window_attention("d72-offset", (4, 6), (4, 3), (2, 1), 2, 72, layout="offset", table_layout="offset"),
    _window_attention("d251", (4, 4), (2, 2), (1, 1), 1, 251),
    _window_attention("transposed", (6, 6), (3, 3), (1, 1), 2, 16, layout="transposed", table_layout="transposed"),
    _window_attention("columns-first", (6, 4), (3, 4), (1, 2), 2, 16, layout="heads"),
    _window_attention("broadcast", (6, 6), (3, 3), (1, 1), 2, 16, layout="broadcast", table_layout="broadcast"),
    _window_attention("negative-scale", (6, 6), (3, 3), (1, 1), 2, 16, scale=-0.7),
    _window_attention("fp32-table", (6, 6), (3, 3), (1, 1), 2, 16, wide=True),
    _window_attention("cosine", (6, 10), (3, 5), (1, 2), 2, 16, cosine=True),
    _window_attention("cosine-fp32-scale", (6, 10), (3, 5), (1, 2), 3, 32, cosine=True, wide=True),
    _window_attention("cosine-9x8", (9, 16), (9, 8), (4, 4), 2, 13, cosine=True, layout="ragged"),
    _window_attention("cosine-d72", (6, 6), (3, 3), (0, 1), 2, 72, cosine=True, layout="offset"),
    _window_attention(
        "Swin-T-1", (56, 56), (7, 7), (3, 3), 3, 32, real=True, table_layout="transposed", interpret=False, core=True
    ),
    _window_attention("Swin-T-3", (14, 14), (7, 7), (0, 0), 12, 32, real=True, interpret=False),
    _window_attention("Swin-T-4", (7, 7), (7, 7), (0, 0), 24, 32, real=True, table_layout="transposed"),
    _window_attention(
        "Swin-B-2", (28, 28), (7, 7), (3, 3), 8, 32, real=True, table_layout="transposed", interpret=False
    ),
    _window_attention(
        "Swin-B-384", (96, 96), (12, 12), (6, 6), 4, 32, real=True, table_layout="transposed", interpret=False
    ),
    _window_attention(
        "Swin-S3-T-3", (14, 14), (14, 14), (0, 0), 12, 32, real=True, table_layout="transposed", interpret=False
    ),
    _window_attention(
        "SwinV2-T-8-1", (64, 64), (8, 8), (4, 4), 3, 32, cosine=True, real=True, interpret=False, core=True
    ),
    _window_attention(
        "SwinV2-B-16-1", (64, 64), (16, 16), (8, 8), 4, 32, cosine=True, real=True, interpret=False, core=True
    ),
    _window_attention(
        "SwinV2-B-16-3",
        (16, 16),
        (16, 16),
        (0, 0),
        16,
        32,
        cosine=True,
        real=True,
        table_layout="transposed",
        interpret=False,
    ),
    _window_attention(
        "SwinV2-B-24-1",
        (96, 96),
        (24, 24),
        (12, 12),
        4,
        32,
        cosine=True,
        real=True,
        table_layout="transposed",
        interpret=False,
    ),
]

# patch_embed


def _patch_embed(
    name: str,
    size: tuple[int, int, int],
    patch: tuple[int, int],
    d: int,
    *,
    prefix: int = 1,
    pos: str | None = "all",
    bias: bool = True,
    layout: str = "dense",
    uint8: bool = False,
    normalize: bool = False,
    wide: bool = False,
    crop: bool = False,
    weight_layout: str = "dense",
    real: bool = False,
    **marks: bool,
) -> Case:
    (c, height, width), (p, q) = size, patch
    n = (height // p) * (width // q)

    def make(data: Data, batch: int) -> Arguments:
        added = torch.promote_types(data.dtype, torch.float32) if wide else None
        shape = (batch, c, height + 5, width + 3) if crop else (batch, c, height, width)
        step = 1 / 255 if uint8 else 1.0
        pixels = data(*shape, layout=layout, dtype=torch.uint8 if uint8 else None)
        return {
            "pixels": pixels[:, :, 2 : 2 + height, 1 : 1 + width] if crop else pixels,
            "weight": data(d, c, p, q, scale=(c * p * q) ** -0.5, layout=weight_layout),
            "bias": data(d) if bias else None,
            "prefix": data(prefix, d, dtype=added) if prefix else None,
            "pos_embed": None if pos is None else data(n + (prefix if pos == "all" else 0), d, dtype=added),
            "scale": data(c, scale=0.1 * step, shift=4.0 * step) if normalize else None,
            "shift": data(c, scale=0.1, shift=-2.0) if normalize else None,
        }

    wrt = ["weight", *([] if uint8 else ["pixels"]), *(["bias"] if bias else [])]
    wrt += (["prefix"] if prefix else []) + ([] if pos is None else ["pos_embed"])
    return Case("patch_embed", name, make, tuple(wrt), real, **marks)


PATCH_EMBED = [
    _patch_embed("1x1", (1, 1, 1), (1, 1), 1),
    _patch_embed("small", (3, 12, 20), (4, 4), 13),
    _patch_embed("plain", (3, 12, 20), (4, 4), 13, prefix=0, pos=None, bias=False),
    _patch_embed("pos-of-patches", (3, 12, 20), (4, 4), 13, prefix=2, pos="patches"),
    _patch_embed("prefix-without-pos", (3, 12, 20), (4, 4), 13, prefix=5, pos=None),
    _patch_embed("prefix9", (3, 12, 20), (4, 4), 13, prefix=9),
    _patch_embed("non-square", (3, 14, 12), (7, 3), 31),
    _patch_embed("channels-last", (3, 12, 20), (4, 4), 13, layout="channels_last"),
    _patch_embed("channels-last-4", (4, 12, 20), (4, 2), 13, layout="channels_last", normalize=True),
    _patch_embed("channels-last-1", (1, 12, 20), (4, 4), 13, layout="channels_last"),
    _patch_embed("weight-channels-last", (3, 12, 20), (4, 4), 13, weight_layout="channels_last"),
    _patch_embed("normalized", (3, 12, 20), (4, 4), 13, normalize=True),
    _patch_embed("uint8", (3, 12, 20), (4, 4), 13, uint8=True, normalize=True),
    _patch_embed("uint8-plain", (3, 12, 20), (4, 4), 13, uint8=True),
    _patch_embed("uint8-channels-last", (3, 12, 20), (4, 4), 13, uint8=True, normalize=True, layout="channels_last"),
    _patch_embed("uint8-crop", (3, 12, 20), (4, 4), 13, uint8=True, normalize=True, crop=True),
    _patch_embed(
        "uint8-crop-channels-last",
        (3, 12, 20),
        (4, 4),
        13,
        uint8=True,
        normalize=True,
        crop=True,
        layout="channels_last",
    ),
    _patch_embed("crop", (3, 12, 20), (4, 4), 13, crop=True),
    _patch_embed("channels-last-cut", (3, 12, 20), (4, 4), 13, layout="channels_last_cut", normalize=True),
    _patch_embed("transposed", (3, 12, 20), (4, 4), 13, layout="transposed"),
    _patch_embed("broadcast", (3, 12, 20), (4, 4), 13, layout="broadcast"),
    _patch_embed("fp32-pos", (3, 12, 20), (4, 4), 13, wide=True),
    _patch_embed("many-images", (3, 4, 4), (2, 2), 71),
    _patch_embed("ViT-Ti-16", (3, 224, 224), (16, 16), 192, real=True),
    _patch_embed("ViT-B-16", (3, 224, 224), (16, 16), 768, real=True, interpret=False, core=True),
    _patch_embed(
        "ViT-B-16-uint8",
        (3, 224, 224),
        (16, 16),
        768,
        uint8=True,
        normalize=True,
        real=True,
        interpret=False,
        core=True,
    ),
    _patch_embed(
        "ViT-B-16-channels-last", (3, 224, 224), (16, 16), 768, layout="channels_last", real=True, interpret=False
    ),
    _patch_embed(
        "ViT-B-16-uint8-channels-last",
        (3, 224, 224),
        (16, 16),
        768,
        uint8=True,
        normalize=True,
        layout="channels_last",
        real=True,
        interpret=False,
        core=True,
    ),
    _patch_embed("CLIP-L-14", (3, 224, 224), (14, 14), 1024, bias=False, real=True, interpret=False),
    _patch_embed("DINOv2-registers", (3, 224, 224), (14, 14), 384, prefix=5, real=True, interpret=False),
    _patch_embed("ViT-B-32-384", (3, 384, 384), (32, 32), 768, real=True, interpret=False),
    _patch_embed("ViT-H-14-518", (3, 518, 518), (14, 14), 1280, real=True, interpret=False),
    _patch_embed("ViT-S-8", (3, 224, 224), (8, 8), 384, prefix=0, pos="patches", real=True, interpret=False),
]

CASES: dict[str, list[Case]] = {
    "layer_norm": LAYER_NORM,
    "add_layer_norm": ADD_LAYER_NORM,
    "row_stats": ROW_STATS,
    "linear": LINEAR,
    "linear_stats": LINEAR_STATS,
    "norm_linear": NORM_LINEAR,
    "mlp": MLP,
    "attention": ATTENTION,
    "attention_lse": ATTENTION_LSE,
    "attention_qkv": ATTENTION_QKV,
    "relative_attention": RELATIVE_ATTENTION,
    "window_attention": WINDOW_ATTENTION,
    "patch_embed": PATCH_EMBED,
}


# the lanes that compare numbers


@dataclass(frozen=True)
class Lane:
    name: str
    device: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.name}-{str(self.dtype)[6:]}"


# bf16 in the interpreter has wrong dots and truncating stores; a GPU sees every dtype
LANES = [
    *(Lane("reference", "cpu", dtype) for dtype in (torch.float32, torch.bfloat16)),
    *(Lane("interpret", "cpu", dtype) for dtype in (torch.float32, torch.float16)),
    *(Lane("gpu", "cuda", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
]
_MARKS = {
    "reference": [pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1 replaces the reference on CPU")],
    "interpret": [pytest.mark.interpret],
    "gpu": [pytest.mark.gpu],
}


def across_lanes(*ops: str) -> pytest.MarkDecorator:
    """Parametrise a test by `(case, lane)` over the cases of `ops`."""
    return pytest.mark.parametrize(
        ("case", "lane"),
        [
            pytest.param(case, lane, id=f"{case}-{lane}", marks=_MARKS[lane.name])
            for op in ops
            for case in CASES[op]
            for lane in LANES
            if case.interpret or lane.name == "gpu"
        ],
    )


def reference(op: str, **arguments: Any) -> Any:
    """An op's `<op>_ref` behind the public function's signature."""
    if op == "layer_norm":
        return kernels.layer_norm_ref(*_pick(arguments, "x weight bias"), arguments.get("eps", 1e-6))[0]
    if op == "add_layer_norm":
        x, residual, weight, bias, scale = _pick(arguments, "x residual weight bias scale")
        return kernels.add_layer_norm_ref(x, residual, weight, bias, arguments.get("eps", 1e-6), scale)[:2]
    if op == "row_stats":
        return kernels.row_stats_ref(arguments["x"])
    if op in ("linear", "linear_stats"):
        x, weight, bias, residual, scale = _pick(arguments, "x weight bias residual scale")
        function = getattr(kernels, f"{op}_ref")
        return function(x, weight, bias, arguments.get("activation", "none"), residual, scale, False)
    if op == "norm_linear":
        return kernels.norm_linear_ref(**arguments, tf32=False)
    if op == "mlp":
        return kernels.mlp_ref(**arguments)
    if op == "attention":
        q, k, v, bias, scale = _pick(arguments, "q k v bias scale")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return kernels.attention_ref(q, k, v, bias, scale, False).transpose(1, 2)
    if op == "attention_lse":
        q, k, v, bias, scale = _pick(arguments, "q k v bias scale")
        out, lse = kernels.attention_lse_ref(q, k, v, bias, q.shape[-1] ** -0.5 if scale is None else scale, False)
        return out.transpose(1, 2), lse
    if op == "attention_qkv":
        qkv, heads = arguments["qkv"], arguments["heads"]
        b, n, width = qkv.shape
        q, k, v = qkv.reshape(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4)
        return kernels.attention_ref(q, k, v, None, q.shape[-1] ** -0.5, False).reshape(b, n, width // 3)
    if op == "relative_attention":
        q, k, v, table, grid, scale = _pick(arguments, "q k v table grid scale")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return kernels.relative_attention_ref(q, k, v, table, *grid, scale, False).transpose(1, 2)
    if op == "window_attention":
        qkv, heads, window, shift, table, scale = _pick(arguments, "qkv heads window shift table scale")
        factor = (qkv.shape[-1] // (3 * heads)) ** -0.5 if scale is None else scale
        by_head = scale if isinstance(scale, Tensor) else None
        return kernels.window_attention_ref(qkv, heads, window, shift, table, by_head, factor, False)
    assert op == "patch_embed", op
    return kernels.patch_embed_ref(*_pick(arguments, "pixels weight bias prefix pos_embed scale shift"), False)


def _pick(arguments: Arguments, names: str) -> list[Any]:
    return [arguments.get(name) for name in names.split()]


def forward_backward(
    function: Callable[..., Any], arguments: Arguments, wrt: tuple[str, ...], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Outputs and gradients of a call by name.

    Args:
        function: takes `arguments`.
        wrt: names of the arguments that get gradients. An argument passed twice stays one tensor.
        dtype: cast what is floating point to it first.
    """
    leaves: dict[int, Tensor] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and id(value) not in leaves:
            cast = value.to(dtype) if dtype and value.is_floating_point() else value.detach()
            leaves[id(value)] = cast.requires_grad_(name in wrt)
    outputs = function(**{k: leaves[id(v)] if isinstance(v, Tensor) else v for k, v in arguments.items()})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # the same numbers for every dtype of one shape
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=generator).bfloat16().to(o.device, o.dtype) for o in outputs]
    results = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    if wrt:
        differentiable = [o.requires_grad for o in outputs]
        torch.autograd.backward(
            list(itertools.compress(outputs, differentiable)), list(itertools.compress(upstream, differentiable))
        )
        for name in wrt:
            gradient = leaves[id(arguments[name])].grad
            assert gradient is not None, f"no gradient for {name}"
            results[f"gradient of {name}"] = gradient
    return results


def check(case: Case, device: str, dtype: torch.dtype, batch: int | None = None) -> None:
    """Hold an op's outputs and gradients to the tolerance rule, against `<op>_ref` in float64."""
    arguments = case.arguments(dtype, device, batch)
    actual = forward_backward(getattr(kernels, case.op), arguments, case.wrt)

    def by_reference(**kwargs: Any) -> Any:
        return reference(case.op, **kwargs)

    truth = forward_backward(by_reference, arguments, case.wrt, torch.float64)
    baseline = forward_backward(by_reference, arguments, case.wrt)
    assert list(actual) == list(truth)
    for name, value in actual.items():
        assert value.dtype == baseline[name].dtype, (
            f"{name} has dtype {value.dtype}; torch's has {baseline[name].dtype}"
        )
        assert_close(value, truth[name], baseline[name], name=name)
