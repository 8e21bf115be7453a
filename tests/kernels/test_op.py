"""kernel_op: every op is whole in eager mode, under torch.compile and torch.export, on meta, with gradients."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import vitfast.kernels
from tests.kernels._cases import CASES, forward_backward
from tests.kernels._data import FILES, OPS, Case, module
from vitfast.kernels import INTERPRET, by_reference
from vitfast.kernels._op import autocast, check_same_dtype, check_shape, check_tensors, dot_precision, kernel_op

pytestmark = pytest.mark.skipif(INTERPRET, reason="the operator around the kernels is tested in the reference lane")

SMALL = [case for op in OPS for case in CASES[op] if not case.real]
# one case for each op that has every argument
FULL = {
    "layer_norm": "D67-offset",
    "add_layer_norm": "D67-broadcast-residual",
    "row_stats": "D67-offset",
    "linear": "primes-gelu",
    "linear_stats": "primes-gelu",
    "norm_linear": "primes-gelu",
    "mlp": "gelu",
    "attention": "bias-full",
    "attention_lse": "bias-keys",
    "attention_qkv": "d5",
    "relative_attention": "3x11-ragged",
    "window_attention": "cosine",
    "patch_embed": "small",
}
EACH_OP = [next(case for case in CASES[op] if case.name == name) for op, name in FULL.items()]
# what is registered: the public function, and the operators it may call
REGISTERED = {op: op for op in OPS} | {"mlp": "linear", "attention_qkv": "attention"}


def public(case: Case) -> Any:
    return getattr(vitfast.kernels, case.op)


def operator(op: str) -> Any:
    return getattr(torch.ops.vitfast, REGISTERED[op]).default


@pytest.mark.parametrize("case", [case for case in SMALL if case.wrt], ids=str)
def test_gradcheck(case: Case, through_op: None) -> None:
    arguments = case.arguments(torch.float64, "cpu")
    if case.name in ("masked", "masked-rows", "masked-rows-least", "huge-scale"):
        pytest.skip("no finite differences across a mask or a choice")
    leaves = {name: arguments[name].detach().requires_grad_() for name in case.wrt}
    if any(arguments[name].numel() and 0 in arguments[name].stride() for name in case.wrt):
        pytest.skip("finite differences need memory of their own for each element")
    if "residual" in case.wrt and arguments["residual"] is arguments["x"]:
        leaves["residual"] = leaves["x"]

    def function(*values: Tensor) -> Any:
        return public(case)(**{**arguments, **dict(zip(leaves, values, strict=True))})

    torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("case", [case for case in EACH_OP if case.wrt], ids=str)
def test_second_derivatives(case: Case, through_op: None) -> None:
    arguments = case.arguments(torch.float64, "cpu")
    leaves = {name: arguments[name].detach().clone().requires_grad_() for name in case.wrt}

    def function(*values: Tensor) -> Any:
        return public(case)(**{**arguments, **dict(zip(leaves, values, strict=True))})

    torch.autograd.gradgradcheck(function, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("case", EACH_OP, ids=str)
def test_around_the_operator_and_through_it(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = case.arguments(torch.float32, "cpu")
    around = forward_backward(public(case), arguments, case.wrt)
    # torch has another kernel for a mask that needs a gradient; one made of a table does so only around the operator
    exact = forward_backward(public(case), arguments, ())
    for file in FILES:
        for name, function in vars(file).copy().items():
            if hasattr(function, "launch") and hasattr(function, "op"):
                monkeypatch.setattr(file, name, function.op)
    through = forward_backward(public(case), arguments, case.wrt)
    for name, value in around.items():
        torch.testing.assert_close(through[name], value, msg=lambda text, name=name: f"{name}: {text}")
    for name, value in forward_backward(public(case), arguments, ()).items():
        assert torch.equal(value, exact[name]), name


def _operator_arguments(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """What the public function hands its operator."""
    seen: list[tuple[Any, ...]] = []
    homes = {"add_layer_norm": "layer_norm", "attention_qkv": "attention", "attention_lse": "attention"}
    homes |= {"row_stats": "norm_linear", "linear_stats": "norm_linear"}
    file = module(homes.get(case.op, case.op))
    name = f"_{REGISTERED[case.op]}"
    inner = getattr(file, name)

    def record(*args: Any) -> Any:
        seen.append(args)
        return inner(*args)

    with monkeypatch.context() as patch:
        patch.setattr(file, name, record)
        arguments = case.arguments(dtype, "cpu")
        public(case)(**{k: v.requires_grad_() if k in case.wrt else v for k, v in arguments.items()})
    return seen[0]


STRANGE = ["x-transposed", "residual-broadcast", "residual-fp32", "d13-ragged", "uint8-crop", "D64-transposed"]
CHECKED = EACH_OP + [case for case in SMALL if case.name in STRANGE]


@pytest.mark.parametrize("case", [case for case in CHECKED if case.op != "mlp"], ids=str)
def test_opcheck(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.library.opcheck(operator(case.op), _operator_arguments(case, torch.float32, monkeypatch))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_meta(case: Case, dtype: torch.dtype) -> None:
    wanted = public(case)(**case.arguments(dtype, "cpu"))
    actual = public(case)(**case.arguments(dtype, "meta"))
    for a, w in zip(*(o if isinstance(o, tuple) else (o,) for o in (actual, wanted)), strict=True):
        assert (a.device.type, a.shape, a.dtype) == ("meta", w.shape, w.dtype)
        # a dimension of one element has no stride to speak of
        strides = [[s for s, size in zip(t.stride(), t.shape, strict=True) if size > 1] for t in (a, w)]
        assert strides[0] == strides[1]


@pytest.mark.parametrize("case", EACH_OP, ids=str)
def test_compile_without_graph_breaks(case: Case) -> None:
    torch._dynamo.reset()
    arguments = case.arguments(torch.float32, "cpu")
    eager = forward_backward(public(case), arguments, case.wrt)
    compiled = torch.compile(public(case), backend="aot_eager", fullgraph=True)
    for name, value in forward_backward(compiled, arguments, case.wrt).items():
        torch.testing.assert_close(value, eager[name], msg=lambda text, name=name: f"{name}: {text}")


# what grows with the batch, in which dimension
BATCHED = {"x": 0, "residual": 0, "q": 0, "k": 0, "v": 0, "qkv": 0, "pixels": 0, "stats": 1}


@pytest.mark.parametrize("case", EACH_OP, ids=str)
def test_one_graph_for_every_batch(case: Case) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(public(case), backend=counter, fullgraph=True)
    for batch in (2, 3, 7):
        arguments = case.arguments(torch.float32, "cpu", batch)
        for name, dim in (BATCHED | ({"bias": 0} if "attention" in case.op else {})).items():
            if name in arguments:
                torch._dynamo.mark_dynamic(arguments[name], dim)
        actual, wanted = compiled(**arguments), public(case)(**arguments)
        torch.testing.assert_close(actual, wanted)
    assert counter.frame_count == 1


@pytest.mark.parametrize("case", EACH_OP, ids=str)
def test_export_keeps_the_operator(case: Case) -> None:
    class Module(torch.nn.Module):
        def forward(self, arguments: dict[str, Tensor]) -> Any:
            return public(case)(**arguments, **rest)

    arguments = case.arguments(torch.float32, "cpu")
    if case.op in ("attention", "attention_lse"):
        # a bias for every image would tie two arguments' batches together; that is not what is tested
        arguments["bias"] = arguments["bias"][:1]
    rest = {name: value for name, value in arguments.items() if not isinstance(value, Tensor)}
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    batch = torch.export.Dim("batch", min=2)
    shapes = {name: {BATCHED[name]: batch} if name in BATCHED else {} for name in tensors}
    program = torch.export.export(Module(), (tensors,), dynamic_shapes=(shapes,))
    assert operator(case.op) in {node.target for node in program.graph.nodes}
    larger = {name: torch.cat([t, t, t], BATCHED[name]) if name in BATCHED else t for name, t in tensors.items()}
    torch.testing.assert_close(program.module()(larger), public(case)(**larger, **rest))


def test_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch, vitfast.kernels as kernels
from vitfast.kernels._triton import HAS_TRITON
assert not HAS_TRITON and not kernels.INTERPRET
x = torch.randn(2, 7, 13)
assert torch.equal(kernels.layer_norm(x), torch.nn.functional.layer_norm(x, (13,), eps=1e-6))
assert kernels.linear(x, torch.randn(5, 13)).shape == (2, 7, 5)
assert kernels.attention_qkv(torch.randn(2, 7, 48), 2).shape == (2, 7, 16)
assert kernels.patch_embed(torch.randn(1, 3, 8, 8), torch.randn(5, 3, 4, 4)).shape == (1, 4, 5)
try:
    sys.modules["vitfast.kernels.layer_norm"]._layer_norm.launch(x, None, None, 1e-6)
    raise AssertionError("launched")
except RuntimeError as error:
    assert "Triton is not installed" in str(error), error
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_kernel_op_checks_before_it_runs() -> None:
    ran = []

    def check(x: Tensor) -> None:
        if x.dim() != 1:
            raise ValueError(f"twice: 'x' has shape {list(x.shape)}; expected [N]")

    def reference(x: Tensor) -> Tensor:
        ran.append("reference")
        return 2 * x

    @kernel_op("vitfast_test::twice", reference=reference, check=check)
    def twice(x: Tensor) -> Tensor:
        raise AssertionError("a launch on CPU")

    assert torch.equal(twice(torch.ones(3)), torch.full((3,), 2.0))
    assert torch.equal(twice.op(torch.ones(3)), torch.full((3,), 2.0))
    assert ran == ["reference", "reference"]
    for function in (twice, twice.op, twice.launch):
        with pytest.raises(ValueError, match=r"twice: 'x' has shape \[2, 2\]; expected \[N\]"):
            function(torch.ones(2, 2))
    with pytest.raises(ValueError, match="expected"):
        twice(torch.ones(2, 2, device="meta"))
    assert twice(torch.ones(3, device="meta")).shape == (3,)


class Subclass(Tensor):
    pass


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class WatchingFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _dual(f: Any, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return f(x)


def _inside(context: Any) -> Any:
    def call(f: Any, x: Tensor) -> Tensor:
        with context():
            return f(x)

    return call


OBSERVED = {
    "gradients": lambda f, x: f(x.requires_grad_()),
    "forward mode": _dual,
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[0],
    "vmap": lambda f, x: torch.vmap(f)(x[None])[0],
    "subclass": lambda f, x: f(x.as_subclass(Subclass)),
    "second argument": lambda f, x: f(torch.zeros(3), x.requires_grad_()),
    "negative view": lambda f, x: f(torch._neg_view(x.neg())),
    "dispatch mode": _inside(Watching),
    "function mode": _inside(WatchingFunctions),
    "profile": _inside(torch.profiler.profile),
    "trace": lambda f, x: torch.jit.trace(f, (x,), check_trace=False)(x),
    "compile": lambda f, x: torch.compile(f, backend="eager", fullgraph=True)(x),
}
UNOBSERVED = {
    "no gradient": lambda f, x: f(x),
    "no_grad": lambda f, x: torch.no_grad()(f)(x.requires_grad_()),
    "inference": lambda f, x: torch.inference_mode()(f)(x),
    "parameter": lambda f, x: f(torch.nn.Parameter(x, requires_grad=False)),
    "autocast": lambda f, x: _inside(lambda: torch.autocast("cpu"))(f, x),
}


@pytest.fixture(scope="module")
def add_op() -> Any:
    ran: list[str] = []

    def reference(x: Tensor, y: Tensor | None) -> Tensor:
        ran.append("crossed")
        return 2 * x if y is None else x + y

    @kernel_op("vitfast_test::add", reference=reference, check=lambda x, y: None)
    def add(x: Tensor, y: Tensor | None) -> Tensor:
        ran.append("launched")
        return 2 * x if y is None else x + y

    add.op.register_autograd(lambda ctx, grad: (grad, grad), setup_context=lambda ctx, inputs, output: None)
    add.op.register_vmap(lambda info, dims, x, y: (reference(x, y), 0))
    return add, ran


@pytest.mark.parametrize("way", [*OBSERVED, *UNOBSERVED])
def test_torch_is_crossed_only_where_it_adds_something(way: str, add_op: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    add, ran = add_op
    with by_reference():
        pass  # it leaves nothing behind
    # the operator's kernel for CPU tensors is the reference, so that one tells the crossing from the launch
    monkeypatch.setattr("vitfast.kernels._op.INTERPRET", True)
    ran.clear()
    expected = "crossed" if way in OBSERVED else "launched"
    y = {**OBSERVED, **UNOBSERVED}[way](lambda x, y=None: add(x, y), torch.ones(3))
    assert set(ran) == {expected}
    assert torch.equal(y, torch.full((3,), 1.0 if way == "second argument" else 2.0))


def test_autocast_casts_what_torch_casts() -> None:
    x, half, double = torch.ones(2), torch.ones(2, dtype=torch.float16), torch.ones(2, dtype=torch.float64)
    index = torch.ones(2, dtype=torch.int64)
    assert autocast(x, half)[0] is x
    with torch.autocast("cpu", torch.bfloat16):
        kinds = [t if t is None else t.dtype for t in autocast(x, half, None, double, index)]
        assert kinds == [torch.bfloat16, torch.bfloat16, None, torch.float64, torch.int64]
        assert autocast(half, to=torch.float32)[0].dtype == torch.float32
    meta = torch.ones(2, device="meta")
    assert autocast(meta)[0] is meta


def test_checks() -> None:
    x = torch.ones(2)
    check_tensors("op", x=x, y=None)
    check_shape("op", "y", None, 3)
    check_shape("op", "x", x, 2)
    check_same_dtype("op", x=x, y=None, z=torch.ones(5))
    with pytest.raises(ValueError, match=r"op: 'y' is on meta, but 'x' is on cpu; expected one device"):
        check_tensors("op", x=x, y=torch.ones(2, device="meta"))
    with pytest.raises(TypeError, match=r"op: 'x' has dtype torch\.complex64; expected float16, bfloat16 or float32"):
        check_tensors("op", x=torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"op: 'x' has shape \[2\]; expected \[2, 1\]"):
        check_shape("op", "x", x, 2, 1)
    with pytest.raises(TypeError, match=r"'z' has dtype torch\.float16, but 'x' has torch\.float32; expected one"):
        check_same_dtype("op", x=x, y=None, z=x.half())


NEWER = {
    "torch.backends.fp32_precision = 'tf32'": "tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": "tf32",
    "torch.backends.fp32_precision = 'tf32'; torch.backends.cuda.matmul.fp32_precision = 'ieee'": "ieee",
    "torch.backends.cudnn.conv.fp32_precision = 'ieee'": "ieee",
    "torch.set_float32_matmul_precision('high')": "tf32",
}


@pytest.mark.parametrize("setting", NEWER)
def test_tf32_by_torch_s_newer_settings(setting: str) -> None:
    # in a process of its own: nothing takes torch back to where its older settings can be read
    script = f"""
import torch
from vitfast.kernels._op import dot_precision, fp32_products
{setting}
def settings():
    backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    return dot_precision(torch.float32, False), [backend.fp32_precision for backend in backends][1:]
before = settings()
assert before[0] == "{NEWER[setting]}", before
for tf32 in (False, True):
    with fp32_products(torch.device("cuda"), tf32):
        assert dot_precision(torch.float32, False) == ("tf32" if tf32 else "ieee")
    assert settings() == before, settings()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_tf32_is_torch_s_choice() -> None:
    allowed = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = False
        assert dot_precision(torch.float32, False) == "ieee"
        assert dot_precision(torch.float32, True) == "tf32"
        assert dot_precision(torch.float16, True) == "ieee"
        torch.backends.cuda.matmul.allow_tf32 = True
        assert dot_precision(torch.float32, False) == "tf32"
        assert dot_precision(torch.bfloat16, False) == "ieee"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
