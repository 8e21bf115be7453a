"""linear: both kernels, their epilogue, and the operator around them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests._close import assert_close
from tests.kernels._cases import CASES, LINEAR, Lane, across_lanes, check
from tests.kernels._data import Case, module
from vitfast.kernels import INTERPRET, linear, linear_ref
from vitfast.kernels._triton import tl, triton

reference_lane = pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1 replaces the reference on CPU")
FILE = module("gemm")
_gelu_16 = module("activation")._gelu_16


@across_lanes("linear")
def test_numbers(case: Case, lane: Lane, through_op: None, poisoned: None) -> None:
    check(case, lane.device, lane.dtype)


SIXTEEN_BITS = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
GEMMS = [case for op in ("linear", "linear_stats", "norm_linear") for case in CASES[op]]


@pytest.mark.gpu
@SIXTEEN_BITS
@pytest.mark.parametrize("case", [case for case in GEMMS if case.real], ids=str)
def test_numbers_of_a_large_batch(case: Case, dtype: torch.dtype, poisoned: None) -> None:
    check(case, "cuda", dtype, batch=32)


@pytest.mark.gpu
@SIXTEEN_BITS
@pytest.mark.parametrize("case", [case for case in GEMMS if not case.real], ids=str)
def test_pingpong_of_any_size(case: Case, dtype: torch.dtype, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = FILE.heuristic

    def heuristic(*args: Any) -> Any:
        pingpong = args[-1]
        return FILE.Config(128, 128, 64, 8, 4, 5, tma=True, pingpong=True) if pingpong else usual(*args)

    monkeypatch.setattr(FILE, "heuristic", heuristic)
    check(case, "cuda", dtype)


DESCRIBED = [case for case in LINEAR if not case.real]


@pytest.mark.interpret
@pytest.mark.parametrize("subtile", [False, True], ids=["whole", "halves"])
@pytest.mark.parametrize("case", DESCRIBED, ids=str)
def test_descriptor_kernel(case: Case, subtile: bool, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # tiles far below the sizes: ragged edges, several rounds of the persistent loop and of the groups
    config = FILE.Config(16, 32, 16, 2, num_warps=4, num_stages=2, tma=True, subtile=subtile)

    def heuristic(*args: Any) -> Any:
        # a tensor that has no descriptor still goes to the other kernel
        return config if args[-3] else dataclasses.replace(config, tma=False)

    ran = []
    kernel = FILE._linear_fwd_tma_kernel

    class Recorder:
        def __getitem__(self, grid: Any) -> Any:
            ran.append(grid)
            return kernel[grid]

    monkeypatch.setattr(FILE, "arch", lambda device: 90)
    monkeypatch.setattr(FILE, "heuristic", heuristic)
    monkeypatch.setattr(FILE, "_linear_fwd_tma_kernel", Recorder())
    check(case, "cpu", torch.float16)
    if "x-pitch" in case.name or "many-tiles" in case.name:
        assert ran, "the descriptor kernel did not run"


@pytest.mark.interpret
@pytest.mark.parametrize("split_k", [2, 3, 7])
@pytest.mark.parametrize("case", DESCRIBED, ids=str)
def test_split_k(case: Case, split_k: int, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # more parts than some of the K loops have rounds
    config = FILE.Config(32, 16, 16, 2, num_warps=4, num_stages=2, split_k=split_k)
    monkeypatch.setattr(FILE, "heuristic", lambda *args: config)
    check(case, "cpu", torch.float16)


@pytest.mark.interpret
def test_parts_are_added_in_their_own_order(poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # whoever comes last: adding as they come would give another sum of these in each order
    x = torch.tensor([[1e8, 1.0, -1e8, 1.0]]).repeat_interleave(16, 1)
    config = FILE.Config(16, 16, 16, 1, num_warps=4, num_stages=1, split_k=4)
    monkeypatch.setattr(FILE, "heuristic", lambda *args: config)
    weight = torch.zeros(1, 64)
    weight[0, ::16] = 1.0
    assert linear(x, weight).item() == ((torch.tensor(1e8) + 1.0) - 1e8 + 1.0).item()


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, pytest.param(torch.float32, marks=reference_lane)], ids=str
)
@pytest.mark.parametrize("case", [case for case in LINEAR if case.interpret], ids=str)
def test_library_route(case: Case, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype, "cpu")
    names = ("x", "weight", "bias", "activation", "residual", "scale")

    def call(function: Any, to: torch.dtype | None = None) -> torch.Tensor:
        values = [arguments[name] for name in names]
        return function(*(v.to(to) if to and isinstance(v, torch.Tensor) else v for v in values))

    def reference(*values: Any) -> torch.Tensor:
        return linear_ref(*values, False)

    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    actual = call(FILE.library_linear)
    assert_close(actual, call(reference, torch.float64), call(reference))
    assert actual.shape == call(reference).shape
    for name, value in before.items():
        assert torch.equal(arguments[name], value), f"{name} was written to"


@pytest.mark.interpret
def test_library_route_of_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    config = FILE.Config(16, 16, 16, 1, num_warps=4, num_stages=1, library=True)
    monkeypatch.setattr(FILE, "heuristic", lambda *args: config)
    calls = []
    monkeypatch.setattr(FILE, "library_linear", lambda *args: calls.append(args) or args[0].clone())
    x, weight = torch.randn(3, 16, dtype=torch.float16), torch.randn(16, 16, dtype=torch.float16)
    linear(x, weight)
    assert len(calls) == 1
    # torch's switch, not the argument, decides what its fp32 products are
    with pytest.raises(ValueError, match=r"the config of 'm=3,.*float32.*' has library=True; expected in 16 bits"):
        linear(x.float(), weight.float(), tf32=True)


@pytest.mark.interpret
@pytest.mark.parametrize("group_m", [1, 3, 8])
def test_every_tile_is_written_once(group_m: int, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = FILE.Config(16, 16, 16, group_m, num_warps=4, num_stages=1)
    monkeypatch.setattr(FILE, "heuristic", lambda *args: config)
    x, weight = torch.randn(7 * 16 - 3, 16), torch.eye(16).repeat(5, 1)[:67]
    assert torch.equal(linear(x, weight), x.repeat(1, 5)[:, :67])


@reference_lane
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_cpu_it_is_torch(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(2, 7, 67).to(dtype), torch.randn(31, 67).to(dtype), torch.randn(31).to(dtype)
    residual, scale = torch.randn(2, 7, 31).to(dtype), torch.randn(31).to(dtype)
    z = F.linear(x, weight, bias)
    assert torch.equal(linear(x, weight, bias), z)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert torch.equal(linear(x, weight, bias, "gelu"), F.gelu(z))
    assert torch.equal(linear(x, weight, bias, "gelu_tanh"), F.gelu(z, approximate="tanh"))
    assert torch.equal(linear(x, weight, bias, "quick_gelu"), z * torch.sigmoid(1.702 * z))
    assert torch.equal(linear(x, weight, bias, "gelu", residual, scale), residual + F.gelu(z) * scale)
    assert torch.equal(linear(x[0, 0], weight, bias), F.linear(x[0, 0], weight, bias))


@reference_lane
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_torch_s(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(2, 7, 67), torch.randn(31, 67), torch.randn(31)
    residual = torch.randn(2, 7, 31)
    with torch.autocast("cpu", dtype):
        wanted = F.linear(x, weight, bias)
        actual = linear(x, weight, bias)
        assert actual.dtype == wanted.dtype == dtype
        assert torch.equal(actual, wanted)
        # the stream stays in fp32, as it does through torch's `residual + ...`
        assert linear(x, weight, bias, residual=residual).dtype == torch.float32


@pytest.mark.interpret
@pytest.mark.parametrize("m", [1, 67])
def test_one_dimension_and_more(m: int, poisoned: None) -> None:
    x, weight, bias = torch.randn(m, 3, 31), torch.randn(13, 31), torch.randn(13)
    whole = linear(x, weight, bias, "gelu")
    torch.testing.assert_close(whole, F.gelu(F.linear(x, weight, bias)))
    torch.testing.assert_close(linear(x[0, 0], weight, bias, "gelu"), whole[0, 0])


@pytest.mark.interpret
def test_large_values_reach_the_ends_of_the_activations(poisoned: None) -> None:
    x = torch.tensor([[-200.0], [-30.0], [0.0], [30.0], [200.0]])
    for activation in ("gelu", "gelu_tanh", "quick_gelu"):
        y = linear(x, torch.ones(1, 1), None, activation)
        torch.testing.assert_close(y, x.clamp(min=0), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", [(0, 7, 13), (2, 0, 13), (0, 13)], ids=str)
def test_empty(shape: tuple[int, ...], through_op: None) -> None:
    x, weight, bias = torch.randn(shape, requires_grad=True), torch.randn(5, 13, requires_grad=True), torch.randn(5)
    scale = torch.ones(5, requires_grad=True)
    y = linear(x, weight, bias, "gelu", scale=scale)
    assert y.shape == (*shape[:-1], 5)
    y.sum().backward()
    assert x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros(5, 13))
    assert torch.equal(scale.grad, torch.zeros(5))


def test_no_inner_dimension(through_op: None) -> None:
    bias = torch.randn(5)
    y = linear(torch.randn(3, 0), torch.randn(5, 0), bias)
    assert torch.equal(y, bias.expand(3, 5))


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual", "scale"])
def test_gradient_of_one_argument_alone(wanted: str, through_op: None) -> None:
    case = next(case for case in LINEAR if case.name == "primes-gelu")
    check(dataclasses.replace(case, wrt=(wanted,)), "cpu", torch.float32)


def _t(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": _t()}, ValueError, r"'x' has shape \[\] and 'weight' \[5, 8\]; expected \[\.\.\., K\] and \[N, K\]"),
        ({"x": _t(2, 7)}, ValueError, r"'x' has shape \[2, 7\] and 'weight' \[5, 8\]; expected"),
        ({"weight": _t(8)}, ValueError, r"'weight' \[8\]; expected \[\.\.\., K\] and \[N, K\]"),
        ({"bias": _t(4)}, ValueError, r"'bias' has shape \[4\]; expected \[5\]"),
        ({"scale": _t(1)}, ValueError, r"'scale' has shape \[1\]; expected \[5\]"),
        ({"residual": _t(1, 5)}, ValueError, r"'residual' has shape \[1, 5\]; expected \[2, 5\]"),
        ({"activation": "relu"}, ValueError, r"activation 'relu'; expected one of none, gelu, gelu_tanh, quick_gelu"),
        ({"x": _t(2, 8, dtype=torch.int8)}, TypeError, r"'x' has dtype torch\.int8; expected float16, bfloat16 or"),
        (
            {"weight": _t(5, 8, dtype=torch.float16)},
            TypeError,
            r"'weight' has dtype torch\.float16, but 'x' has torch\.float32; expected one dtype",
        ),
        (
            {"weight": torch.zeros(5, 8, device="meta")},
            ValueError,
            r"'weight' is on meta, but 'x' is on cpu; expected one device",
        ),
    ],
)
def test_wrong_input_is_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"linear: .*{message}"):
        linear(**{"x": _t(2, 8), "weight": _t(5, 8), **arguments})


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("m", [1, 197, 50432])
@pytest.mark.parametrize("n", [1, 192, 5120])
def test_heuristic_is_a_valid_config(arch: int, dtype: torch.dtype, m: int, n: int) -> None:
    for tma in (False, arch >= 90):
        for out_dtype in (dtype, torch.float32):
            pingpong = tma and arch == 90 and out_dtype == torch.float16
            arguments = (m, n, 768, dtype, out_dtype, arch, tma, 132, pingpong)
            config = FILE.heuristic(*arguments)
            assert config == FILE.heuristic(*arguments)
            for size in (config.block_m, config.block_n, config.block_k):
                assert size >= 16 and size & (size - 1) == 0, config
            assert not config.tma or tma, "a descriptor kernel for tensors without descriptors"
            assert not config.pingpong or (pingpong and config.tma)
            assert config.pingpong == (pingpong and m == 50432)
            assert config.split_k == 1, "768 is too short to be split"


def test_a_long_k_is_split_where_tiles_are_few() -> None:
    def split(m: int, n: int, k: int) -> int:
        return FILE.heuristic(m, n, k, torch.bfloat16, torch.bfloat16, 80, False, 132, False).split_k

    assert split(197, 768, 3072) == 3
    assert split(197, 1024, 4096) == 3
    assert split(197, 3072, 768) == split(50432, 768, 3072) == 1
    assert split(1, 1000, 768) == 1


def test_the_busiest_multiprocessor_reads_least() -> None:
    def tile(batch: int, n: int, k: int) -> tuple[int, int]:
        config = FILE.heuristic(197 * batch, n, k, torch.bfloat16, torch.bfloat16, 90, True, 132, True)
        assert config.tma and config.split_k == 1
        return config.block_m, config.block_n

    # 144 tiles of 64 x 64 are two for some of the 132, 72 of 64 x 128 one
    assert tile(1, 2304, 768) == tile(1, 3072, 768) == (64, 128)
    # 48 of 64 x 64
    assert tile(1, 768, 768) == tile(1, 768, 3072) == (64, 64)
    # 78 of 128 x 128; 300 of 64 x 64 are three for some
    assert tile(8, 768, 768) == tile(8, 768, 3072) == (128, 128)


@triton.jit
def _gelu_kernel(x_ptr, y_ptr, FP16: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, _gelu_16(tl.load(x_ptr + at), FP16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.interpret), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_gelu_in_16_bits_is_right_to_half_an_ulp(device: str, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = every.float().to(device)
    y = torch.empty_like(x)
    _gelu_kernel[(16,)](x, y, FP16=dtype == torch.float16, BLOCK=4096)
    x, y = x.double().cpu(), y.double().cpu()
    assert y[x.isnan()].isnan().all()
    assert y[x == torch.inf].item() == torch.inf
    finite = x.isfinite()
    x, y = x[finite], y[finite]
    # x * Phi(x) without the cancellation of 1 + erf
    truth = x * torch.special.log_ndtr(x).exp()
    info = torch.finfo(dtype)
    # the spacing of dtype at the truth; what is below its smallest normal number has that one's
    ulp = 2.0 ** truth.abs().clamp(min=info.smallest_normal).log2().floor() * info.eps
    worst = ((y - truth).abs() / ulp).max().item()
    assert worst < 0.5, f"{worst:.3f} ulp"
