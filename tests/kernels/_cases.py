"""Every op's cases, and the lanes that hold them to the tolerance rule."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import vitfast.kernels as kernels
from tests._close import assert_close
from tests.kernels._attention_cases import (
    ATTENTION,
    ATTENTION_LSE,
    ATTENTION_QKV,
    RELATIVE_ATTENTION,
    WINDOW_ATTENTION,
)
from tests.kernels._data import Arguments, Case
from tests.kernels._linear_cases import ADD_LAYER_NORM, LAYER_NORM, LINEAR, LINEAR_STATS, MLP, NORM_LINEAR, ROW_STATS
from tests.kernels._patch_embed_cases import PATCH_EMBED
from vitfast.kernels import INTERPRET

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
    if device == "cuda":
        # from the second call with a signature on a launch is prepared
        with torch.no_grad():
            _, again = (getattr(kernels, case.op)(**arguments) for _ in range(2))
        for i, value in enumerate(again if isinstance(again, tuple) else (again,)):
            same = {"rtol": 0, "atol": 0, "equal_nan": True, "msg": lambda text, i=i: f"prepared output {i}: {text}"}
            torch.testing.assert_close(value, actual[f"output {i}"], **same)
