"""`kernel_op`: the only file that knows `torch.library`.

An op is whole when it works in eager mode, under `torch.compile(fullgraph=True)`, `torch.export`, autograd and
`opcheck`. `kernel_op` gives it all of that from three functions: `check` (the arguments), `reference` (the
same function in torch's calls) and the decorated one (allocate, launch).
"""

import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._config import steered
from ._launch import Recipes, prepared, recorded
from ._triton import HAS_TRITON

# triton reads this variable when a kernel is decorated, so it is a fact of the process
INTERPRET = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# tensors that torch's dispatcher asks nothing about
_PLAIN = (Tensor, torch.nn.Parameter)

_thread = threading.local()


@contextmanager
def by_reference() -> Iterator[list[str]]:
    """In this thread, while open, CPU tensors go to the references under Triton's interpreter too.

    Yields:
        The names of the operators that are called, as they are called.
    """
    before, _thread.called = _called(), []
    try:
        yield _thread.called
    finally:
        _thread.called = before


def _called() -> list[str] | None:
    """The names that `by_reference` gathers in this thread; `None` while it is not open."""
    return getattr(_thread, "called", None)


def interprets() -> bool:
    """Whether kernels run for CPU tensors in this thread, in Triton's interpreter."""
    return INTERPRET and _called() is None


def kernel_op(
    name: str, *, reference: Callable[..., Any], check: Callable[..., None]
) -> Callable[[Callable[..., Any]], Any]:
    """Make an operator of a function that launches Triton kernels.

    CUDA tensors go to the decorated function. CPU tensors go to `reference`, or to the decorated function under
    Triton's interpreter. `reference` is the fake kernel too, so shapes and dtypes come from it. `check` runs in
    front of each of them, with the same arguments.

    In eager mode `torch.library` is crossed only where that adds something, since it costs as much as a launch. On CPU
    the reference is called as it is: torch's own autograd of it is the better backward there. A launch is called as it
    is where nothing but the launch would happen (`quiet`, `describe`), and prepared there (`_launch`).

    Args:
        name: `"vitfast::<op>"`.
        reference: same signature as the decorated function, in torch's own calls, returning fresh tensors.
        check: same signature; raises `ValueError` or `TypeError`.

    Returns:
        A decorator. What it returns takes positional arguments only and carries the operator as `.op` and the
        checked launch as `.launch`.
    """

    def register(launch: Callable[..., Any]) -> Any:
        @functools.wraps(launch)
        def launched(*args: Any) -> Any:
            check(*args)
            device = args[0].device
            if device.type != "cuda" or device.index == torch.cuda.current_device():
                return launch(*args)
            # triton launches on the current device, which need not be the tensors' own
            with torch.cuda.device(device):
                return launch(*args)

        def repeated(args: Sequence[Any], described: tuple[tuple[Any, ...], list[int]]) -> Any:
            if INTERPRET or steered():
                return launched(*args)
            signature, addresses = described
            return prepared(launched, args, (name, *signature), addresses)

        @functools.wraps(launch)
        def below(*args: Any) -> Any:
            # torch.library has seen to gradients before it calls this
            if recorded() or not quiet() or (described := describe(args, gradients=False)) is None:
                return launched(*args)
            return repeated(args, described)

        @functools.wraps(reference)
        def referred(*args: Any) -> Any:
            check(*args)
            return reference(*args)

        op = torch.library.custom_op(name, below, mutates_args=(), device_types="cuda")
        op.register_kernel("cpu")(launched if INTERPRET else referred)
        op.register_fake(referred)

        @functools.wraps(launch)
        def call(*args: Any) -> Any:
            if torch.compiler.is_compiling():
                return op(*args)
            first = args[0]
            if first.is_cpu and not interprets():
                check(*args)
                if (called := _called()) is not None:
                    called.append(name)
                return reference(*args)
            if recorded():
                return launched(*args)
            if not (first.is_cuda or first.is_cpu) or not quiet() or (described := describe(args)) is None:
                return op(*args)
            return repeated(args, described)

        vars(call).update(op=op, launch=launched)
        return call

    return register


def together(
    name: str,
    function: Callable[..., Any],
    args: Sequence[Any],
    recipes: Recipes,
    constants: Callable[[], Sequence[Tensor]],
) -> Any:
    """Call a function that calls operators and nothing else, as one prepared launch where that changes nothing.

    Args:
        name: of what is called, among all that keep their recipes in one place.
        function: returns a tensor, or a tuple of tensors and None.
        args: its arguments, the first of which is a tensor.
        recipes: where recipes are kept; to be dropped as soon as a constant lies elsewhere.
        constants: gives the other tensors that it reads.
    """
    x = args[0]
    if (
        torch.compiler.is_compiling()
        or not (x.is_cuda or (x.is_cpu and interprets()))
        or INTERPRET
        or recorded()
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled(x.device.type)
        or steered()
        or not quiet()
        or (described := describe(args)) is None
    ):
        return function(*args)
    signature, addresses = described
    return prepared(function, args, (name, *signature), addresses, recipes, constants)


def quiet() -> bool:
    """Whether nothing in this thread would see an operator but its kernel.

    Transforms of `torch.func`, modes, traces, profiles and forward-mode derivatives would.
    """
    return not (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    )


def describe(args: Sequence[Any], gradients: bool = True) -> tuple[tuple[Any, ...], list[int]] | None:
    """All that an operator's launches follow from, but the addresses of its tensors, and these.

    Args:
        args: the operator's.
        gradients: whether they would still be torch's to see to.

    Returns:
        `(signature, addresses)`; None where torch would do more than to launch: for gradients, subclasses, and views
        that stand for other numbers than their memory.
    """
    differentiated = gradients and torch.is_grad_enabled()
    signature: list[Any] = [allows_tf32()]
    addresses = []
    for value in args:
        kind = type(value)
        if kind is Tensor or kind is torch.nn.Parameter:
            if (differentiated and value.requires_grad) or value.is_neg():
                return None
            address = value.data_ptr()
            addresses.append(address)
            # Triton and the copy engine care for multiples of 16 bytes
            signature += (value.shape, value.stride(), value.dtype, value.get_device(), address & 15)
        elif isinstance(value, Tensor):
            return None
        else:
            signature.append(tuple(value) if kind is list else value)
    return tuple(signature), addresses


def autocast(x: Tensor, *tensors: Tensor | None, to: torch.dtype | None = None) -> tuple[Any, ...]:
    """Cast floating-point arguments the way torch's autocast would; without autocast, return them as they are.

    Args:
        x: decides the device type; it is the first of the returned tensors.
        tensors: further arguments, `None` passes through.
        to: the dtype; default autocast's own (`torch.get_autocast_dtype`).
    """
    kind = x.device.type
    # asking about a device type that has no autocast (meta) is an error in torch
    available = kind == "cpu" or kind == "cuda" or torch.amp.is_autocast_available(kind)
    if not available or not torch.is_autocast_enabled(kind):
        return (x, *tensors)
    dtype = to or torch.get_autocast_dtype(kind)
    return tuple(
        t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype) for t in (x, *tensors)
    )


def check_tensors(op: str, **tensors: Tensor | None) -> None:
    """Raise unless all tensors are on one device, in a dtype that the op takes there.

    Raises:
        ValueError: two tensors are on different devices.
        TypeError: a dtype is not float16, bfloat16 or float32 (float64 too on CPU).
    """
    device = dtype = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if device is None:
            device, first = tensor.device, name
        elif tensor.device != device:
            raise ValueError(f"{op}: '{name}' is on {tensor.device}, but '{first}' is on {device}; expected one device")
        if tensor.dtype is dtype:
            continue
        dtype = tensor.dtype
        if dtype not in KERNEL_DTYPES and (dtype != torch.float64 or tensor.is_cuda or interprets()):
            raise TypeError(
                f"{op}: '{name}' has dtype {dtype}; expected float16, bfloat16 or float32 (float64 on CPU only)"
            )


def check_shape(op: str, name: str, tensor: Tensor | None, *shape: int) -> None:
    """Raise `ValueError` unless `tensor` is None or has exactly `shape`."""
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{op}: '{name}' has shape {list(tensor.shape)}; expected {list(shape)}")


def check_same_dtype(op: str, **tensors: Tensor | None) -> None:
    """Raise `TypeError` unless all tensors have the first one's dtype."""
    dtype = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if dtype is None:
            dtype, first = tensor.dtype, name
        elif tensor.dtype != dtype:
            raise TypeError(f"{op}: '{name}' has dtype {tensor.dtype}, but '{first}' has {dtype}; expected one dtype")


def flatten_rows(x: Tensor) -> Tensor:
    """`[..., D]` as `[rows, D]` with unit stride in a row; copies only what no row stride can describe."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def dense(x: Tensor | None) -> Tensor | None:
    """Contiguous, or None."""
    return None if x is None else x.contiguous()


def allows_tf32() -> bool:
    """Whether torch's settings let fp32 matrices be multiplied in tf32."""
    # by its newer name: the older one raises once a newer one was used
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


@contextmanager
def fp32_products(device: torch.device, tf32: bool) -> Iterator[None]:
    """While open, torch's own fp32 products on CUDA, of matrices and in cuDNN, are in tf32 or are not."""
    if device.type != "cuda":
        yield
        return
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    newer: tuple[Any, ...] = (backends[0], backends[1].conv, backends[1].rnn)
    before = [_older(backend) for backend in backends]
    before_newer = [setting.fp32_precision for setting in newer]
    try:
        for backend in backends:
            backend.allow_tf32 = tf32
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            if value is not None:
                backend.allow_tf32 = value
        if None in before:
            for setting, precision in zip(newer, before_newer, strict=True):
                setting.fp32_precision = precision


def _older(backend: Any) -> bool | None:
    """`allow_tf32`, or None where a setting by its newer name has replaced it."""
    try:
        return bool(backend.allow_tf32)
    except RuntimeError:
        return None


def dot_precision(dtype: torch.dtype, tf32: bool) -> str:
    """`input_precision` for `tl.dot`: tf32 only for fp32 operands and only where it is allowed, else exact."""
    if dtype == torch.float32 and (tf32 or allows_tf32()):
        return "tf32"
    return "ieee"
