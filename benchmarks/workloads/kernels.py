"""The kernels at a model's shapes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vitfast.kernels import add_layer_norm_ref, attention_ref, layer_norm_ref, linear_ref, patch_embed_ref

from .base import DTYPES, Workload, dimensions, draws

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

Inputs = Callable[[Callable[..., Tensor]], dict[str, Any]]


def kernel_workload(
    model: str,
    batch: int,
    dtype: str,
    name: str,
    shape: dict[str, int],
    flops: float,
    elements: float,
    inputs: Inputs,
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
        lambda device, index: inputs(draws(device, DTYPES[dtype], index)),
        reference,
    )


def kernel_workloads(model: str, batch: int, dtype: str) -> Iterator[Workload]:
    size = dimensions(model)
    n, d, h, hidden = size["tokens"], size["dim"], size["heads"], size["hidden"]
    rows = batch * n
    patches = (size["height"] // size["patch"]) * (size["width"] // size["patch"])

    make = functools.partial(kernel_workload, model, batch, dtype)
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
            functools.partial(_linear_inputs, (batch, n), out_features, in_features, activation, residual),
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
