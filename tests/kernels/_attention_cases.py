"""Cases of attention: whole, packed, with relative positions, in windows."""

from __future__ import annotations

import dataclasses

import torch

from tests.kernels._data import Arguments, Case, Data

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


def _masked(name: str, n: int, d: int, *, whole_rows: bool, least: bool = False) -> Case:
    def make(data: Data, batch: int) -> Arguments:
        q, k, v = (data(batch, 2, n, d) for _ in range(3))
        mask = torch.zeros(n, n, dtype=data.dtype, device=data.device)
        if whole_rows:
            mask[::3] = float("-inf")
        # the first tiles of keys hidden from some rows: the online softmax meets -inf before any number
        mask[1::3, : n - 3] = float("-inf")
        if least:
            mask.clamp_(min=torch.finfo(data.dtype).min)
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
    _masked("masked-rows-least", 37, 16, whole_rows=True, least=True),
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
