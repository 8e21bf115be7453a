"""layer_norm and add_layer_norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.kernels._cases import Lane, across_lanes, check
from tests.kernels._data import Case
from vitfast.kernels import INTERPRET, add_layer_norm, layer_norm

reference_lane = pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1 replaces the reference on CPU")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@across_lanes("layer_norm", "add_layer_norm")
def test_numbers(case: Case, lane: Lane, through_op: None, poisoned: None) -> None:
    check(case, lane.device, lane.dtype)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_constant_rows(dtype: torch.dtype, poisoned: None) -> None:
    # no variance: what eps leaves is 0, not a quotient of roundings
    x, bias = torch.full((3, 67), 1000.0, dtype=dtype), torch.randn(67).to(dtype)
    assert torch.equal(layer_norm(x, None, bias, eps=1e-12), bias.expand(3, 67))


@reference_lane
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_cpu_it_is_torch(dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 7, 67).to(dtype), torch.randn(2, 7, 67).to(dtype)
    weight, bias, scale = (torch.randn(67).to(dtype) for _ in range(3))
    assert torch.equal(layer_norm(x, weight, bias, 1e-5), F.layer_norm(x, (67,), weight, bias, 1e-5))
    total, y = add_layer_norm(x, residual, weight, bias, 1e-5, scale)
    assert torch.equal(total, residual + x * scale)
    assert torch.equal(y, F.layer_norm(total, (67,), weight, bias, 1e-5))


@reference_lane
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_torch_s(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(2, 7, 67), torch.randn(67), torch.randn(67)
    with torch.autocast("cpu", dtype):
        for given in (x, x.to(dtype)):
            wanted = F.layer_norm(given, (67,), weight, bias)
            actual = layer_norm(given, weight, bias, 1e-5)
            assert actual.dtype == wanted.dtype
            assert torch.equal(actual, wanted)


@pytest.mark.parametrize("given", ["weight", "bias", "weight and bias"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_16_bits_beside_fp32_parameters(dtype: torch.dtype, given: str) -> None:
    x = torch.randn(5, 67).to(dtype).requires_grad_()
    weight, bias = (torch.randn(67).requires_grad_() if name in given else None for name in ("weight", "bias"))
    leaves = [t for t in (x, weight, bias) if t is not None]
    y = layer_norm(x, weight, bias, 1e-5)
    dy = torch.randn(5, 67).to(dtype)
    actual = torch.autograd.grad(y, leaves, dy)
    wide = F.layer_norm(x.float(), (67,), weight, bias, 1e-5)
    assert y.dtype == dtype
    torch.testing.assert_close(y, wide.to(dtype))
    for value, wanted, leaf in zip(actual, torch.autograd.grad(wide, leaves, dy.float()), leaves, strict=True):
        assert value.dtype == leaf.dtype
        torch.testing.assert_close(value, wanted)


@pytest.mark.gpu
def test_autocast_is_torch_s_on_the_gpu() -> None:
    x, weight, bias = (torch.randn(*shape, device="cuda") for shape in ((2, 7, 67), (67,), (67,)))
    with torch.autocast("cuda", torch.float16):
        wanted = F.layer_norm(x.half(), (67,), weight, bias)
        actual = layer_norm(x.half(), weight, bias, 1e-5)
    assert actual.dtype == wanted.dtype == torch.float32
    torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("shape", [(0, 7, 13), (2, 0, 13), (0, 13)], ids=str)
def test_empty(shape: tuple[int, ...], through_op: None) -> None:
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(13, requires_grad=True)
    y = layer_norm(x, weight)
    assert y.shape == shape
    y.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(13))
    total, y = add_layer_norm(x, x)
    assert total.shape == y.shape == shape


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": _x()}, ValueError, r"'x' has shape \[\]; expected \[\.\.\., D\] with 1 <= D <= 16384"),
        ({"x": _x(3, 0)}, ValueError, r"'x' has shape \[3, 0\]; expected \[\.\.\., D\] with 1 <= D"),
        ({"x": _x(1, 16385)}, ValueError, r"'x' has shape \[1, 16385\]; expected .* D <= 16384"),
        ({"x": _x(2, 8), "weight": _x(7)}, ValueError, r"'weight' has shape \[7\]; expected \[8\]"),
        ({"x": _x(2, 8), "bias": _x(2, 8)}, ValueError, r"'bias' has shape \[2, 8\]; expected \[8\]"),
        ({"x": _x(2, 8, dtype=torch.int32)}, TypeError, r"'x' has dtype torch\.int32; expected float16, bfloat16 or"),
        (
            {"x": _x(2, 8), "weight": _x(8, dtype=torch.float16)},
            TypeError,
            r"'weight' has dtype torch\.float16; expected torch\.float32",
        ),
        (
            {"x": _x(2, 8, dtype=torch.float16), "weight": _x(8), "bias": _x(8, dtype=torch.float16)},
            TypeError,
            r"'weight' is torch\.float32, 'bias' is torch\.float16; expected one dtype",
        ),
        (
            {"x": _x(2, 8), "weight": torch.zeros(8, device="meta")},
            ValueError,
            r"'weight' is on meta, but 'x' is on cpu; expected one device",
        ),
    ],
)
def test_wrong_input_is_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        layer_norm(**arguments)
    assert str(raised.value).startswith("layer_norm: ")
    residual = torch.zeros_like(arguments["x"])
    with pytest.raises(error, match=message) as raised:
        add_layer_norm(arguments.pop("x"), residual, **arguments)
    assert str(raised.value).startswith("add_layer_norm: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"residual": _x(1, 8)}, r"'residual' has shape \[1, 8\]; expected \[2, 8\]"),
        ({"residual": _x(2, 8), "scale": _x(1)}, r"'scale' has shape \[1\]; expected \[8\]"),
    ],
)
def test_wrong_sums_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"add_layer_norm: {message}"):
        add_layer_norm(_x(2, 8), **arguments)
