"""Triton where it is installed, and stand-ins that let the kernel files be imported where it is not.

Triton has wheels for Linux only. Elsewhere the references still run on CPU, so importing a kernel file must
succeed, and only a launch fails.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_wait
    from triton.tools.tensor_descriptor import TensorDescriptor

    HAS_TRITON = True
except ImportError:
    if not TYPE_CHECKING:

        class _Unlaunched:
            def __getitem__(self, grid: Any) -> Any:
                raise RuntimeError("Triton is not installed: vitfast.kernels needs it for tensors on a GPU")

        triton = SimpleNamespace(jit=lambda fn=None, **options: _Unlaunched() if fn else lambda fn: _Unlaunched())
        tl = SimpleNamespace(constexpr=Any)
        TensorDescriptor = None
    HAS_TRITON = False

__all__ = [
    "HAS_TRITON",
    "TensorDescriptor",
    "add_dot",
    "cdiv",
    "next_power_of_2",
    "tl",
    "triton",
    "wait_for_previous",
]


def cdiv(a: int, b: int) -> int:
    """`ceil(a / b)` for positive integers."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below `n` (`n >= 1`)."""
    return 1 << (n - 1).bit_length()


@triton.jit
def add_dot(x, y, acc, PRECISION: tl.constexpr):
    # acc + x @ y for one step of a loop. Exact fp32 is a sum of the steps' sums: one chain of fused multiply-adds over
    # all of K, which the compiler would make of it but for a limit that means something in fp8 alone, errs four times
    # as much at K = 3072
    if PRECISION == "ieee" and x.dtype == tl.float32:
        acc += tl.dot(x, y, input_precision=PRECISION, max_num_imprecise_acc=x.shape[1])
    else:
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    return acc


@triton.jit
def wait_for_previous(EARLY: tl.constexpr):
    # A kernel with EARLY is launched while the previous one ends. It touches no memory until that one has ended, and by
    # that all before it. None lets the next one start sooner: of two programs on a multiprocessor each is slower
    if EARLY:
        gdc_wait()
