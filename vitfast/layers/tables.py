"""Tables of relative positions and what cosine attention scales by, as the kernels read them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import kernels
from . import backends
from .guards import deriving

T = TypeVar("T")


def by_columns(table: Tensor) -> Tensor:
    """A table of positions `[rows, H]` with each head's column in one piece, for the kernels that gather from it.

    Neighbouring keys read neighbouring rows: of a table by rows each from a sector of memory of its own. It is a
    copy of a few KB; on a CPU nothing gains by it.
    """
    return table.t().contiguous().t() if table.is_cuda or kernels.interprets() else table


def position_table(mlp: Any, coords: Tensor) -> Tensor:
    """Swin V2's bias by offset, `[(2 * wh - 1) * (2 * ww - 1), H]`, from the small MLP that makes it of coordinates."""
    return by_columns(16 * torch.sigmoid(mlp(coords).flatten(0, -2)))


def cosine_scales(logit_scale: Tensor) -> Tensor:
    """Swin V2's factors of cosines, `[H]`, bounded by 100."""
    return torch.clamp(logit_scale, max=math.log(100.0)).exp().flatten()


def kept(derived: T | None, x: Tensor, make: Callable[[], T]) -> T:
    """What was derived from frozen weights, where it may be read for these tokens, else what is made now."""
    return derived if derived is not None and deriving(x) else make()


def why_uncut(backend: str) -> str:
    """Why a backend of attention leaves windows to the original; empty where it does not."""
    return "" if backend in backends.OURS else f"attention={backend!r} knows no windows"


def windows_pay(x: Tensor) -> bool:
    """Whether windows are cut by the kernel: in inference on a CPU a library's own calls are a little faster."""
    return x.is_cuda or kernels.interprets() or torch.is_grad_enabled() or torch.compiler.is_compiling()
