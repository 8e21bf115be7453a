"""Triton where it is installed, and stand-ins that let the kernel files be imported where it is not.

Triton has wheels for Linux only. Elsewhere the references still run on CPU, so importing a kernel file must
succeed: `triton.jit` then hands the function back unlaunched, and nothing ever calls it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    HAS_TRITON = True
except ImportError:
    if not TYPE_CHECKING:
        triton = SimpleNamespace(jit=lambda fn: fn)
        tl = SimpleNamespace(constexpr=Any)
        TensorDescriptor = None
    HAS_TRITON = False

__all__ = ["HAS_TRITON", "TensorDescriptor", "cdiv", "next_power_of_2", "tl", "triton"]


def cdiv(a: int, b: int) -> int:
    """`ceil(a / b)` for positive integers."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below `n` (`n >= 1`)."""
    return 1 << (n - 1).bit_length()
