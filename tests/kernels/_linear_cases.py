"""Cases of the norms and of everything that is a linear layer."""

from __future__ import annotations

import torch

import vitfast.kernels as kernels
from tests.kernels._data import Arguments, Case, Data

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
