"""Who computes softmax attention: our kernel, torch, or a library that is imported when it is asked for.

What a backend cannot compute it refuses with an error. None stands in for another.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..kernels._op import KERNEL_DTYPES, autocast
from ..kernels.relative_attention import relative_index

BACKENDS = ("auto", "triton", "sdpa", "flash_attn", "xformers")

# which of them stand for our kernels, the ones for windows and tables of relative positions too
OURS = ("auto", "triton")

# module that has the function, extra of vitfast that installs it
_LIBRARIES = {"flash_attn": ("flash_attn", "flash-attn"), "xformers": ("xformers.ops", "xformers")}


@dataclass(frozen=True)
class _Takes:
    """What a backend computes. A head dim is a multiple of `multiple`, up to `head_dim` where there is a bound."""

    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    head_dim: int | None = None
    multiple: int = 1
    bias: bool = True


# of "sdpa" nothing stands here: torch says itself what it does not take
_TAKES = {
    "triton": _Takes(("cuda", "cpu") if kernels.interprets() else ("cuda",), KERNEL_DTYPES, kernels.MAX_HEAD_DIM),
    "flash_attn": _Takes(("cuda",), (torch.float16, torch.bfloat16), 256, multiple=8, bias=False),
    "xformers": _Takes(("cuda",), KERNEL_DTYPES),
}


def require(backend: str) -> None:
    """Raise unless a backend is known and its library can be imported.

    Raises:
        ValueError: no backend has this name.
        ImportError: its library is missing or broken; names the extra that installs it.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention={backend!r}; expected one of {', '.join(BACKENDS)}")
    if backend in _LIBRARIES:
        module, extra = _LIBRARIES[backend]
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ImportError(
                f'attention={backend!r} needs {extra}: pip install "vitfast[{extra}]", beside a CUDA build of torch'
                f" ({error})"
            ) from error


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None = None,
    *,
    tf32: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`softmax(scale * q @ k.T + bias) @ v` per head, by a backend.

    Args:
        q: `[B, H, N, d]`, any strides.
        k: `[B, H, S, d]` in q's dtype.
        v: `[B, H, S, d]` in q's dtype.
        scale: of the scores.
        bias: added to the scaled scores, broadcastable to `[B, H, N, S]`, in q's dtype.
        tf32: as `vitfast.kernels.attention` takes it; the other libraries follow torch's global switch.
        backend: "auto" (our kernel, or torch where the tuned table says so), "triton" (our kernel), "sdpa" (torch),
            "flash_attn" (fp16 and bf16 on CUDA, no bias, head dims 8, 16, ... 256) or "xformers" (CUDA).

    Returns:
        `[B, H, N, d]`, whose `.transpose(1, 2).flatten(2)` merges the heads.

    Raises:
        ValueError: the backend is unknown, or does not take this device, dtype, head dim or bias.
        ImportError: its library is missing.
    """
    if backend == "auto":
        return kernels.attention(q, k, v, scale, bias, tf32=tf32)
    q, k, v, bias = autocast(q, k, v, bias)
    _check(backend, q, bias)
    if backend == "triton":
        # the op that also returns the log-sum-exp, of 4 bytes a row: no table sends it to torch
        return kernels.attention_lse(q, k, v, scale, bias, tf32=tf32)[0]
    if backend == "sdpa":
        return kernels.attention_ref(q, k, v, bias, scale, tf32).transpose(1, 2)
    require(backend)
    # both libraries have the heads behind the tokens
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if backend == "flash_attn":
        from flash_attn import flash_attn_func

        return flash_attn_func(q, k, v, softmax_scale=scale).transpose(1, 2)
    from xformers.ops import memory_efficient_attention

    mask = None if bias is None else _aligned(bias, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
    return memory_efficient_attention(q, k, v, attn_bias=mask, scale=scale).transpose(1, 2)


def attention_qkv(qkv: Tensor, heads: int, scale: float, *, tf32: bool = False, backend: str = "auto") -> Tensor:
    """Self-attention on the packed output of a qkv projection, by a backend.

    Args:
        qkv: `[B, N, 3 * H * d]`: q, k, v, each H heads of d.
        heads: H.
        scale, tf32, backend: as in `attention`.

    Returns:
        `[B, N, H * d]`.

    Raises:
        ValueError, ImportError: as `attention`.
    """
    if backend == "auto":
        return kernels.attention_qkv(qkv, heads, scale, tf32=tf32)
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return attention(q, k, v, scale, tf32=tf32, backend=backend).transpose(1, 2).flatten(2)


def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    grid: tuple[int, int],
    scale: float,
    *,
    tf32: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`attention` with a bias that stands in BEiT's table of relative positions, by a backend.

    Args:
        q, k, v, table, grid: as `vitfast.kernels.relative_attention` takes them; other backends than ours are given the
            bias as `[1, H, N, N]` in memory.
        scale, tf32, backend: as in `attention`.

    Returns:
        As `attention`.

    Raises:
        ValueError, ImportError: as `attention`.
    """
    if backend == "triton":
        _check(backend, q, None)
    if backend in OURS:
        return kernels.relative_attention(q, k, v, table, grid, scale, tf32=tf32)
    n = q.shape[2]
    index = relative_index(*grid, n - grid[0] * grid[1], table.device)
    bias = table.t().index_select(1, index.view(-1)).view(1, -1, n, n)
    return attention(q, k, v, scale, bias, tf32=tf32, backend=backend)


def _aligned(bias: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A bias of the shape `[B, H, N, S]` whose rows begin where xformers can read them: at 16 bytes."""
    bias = bias[(None,) * (4 - bias.dim())]
    bias = bias.expand(*bias.shape[:2], *shape[2:])
    return F.pad(bias, (0, -shape[3] % 8))[..., : shape[3]].expand(shape)


def _check(backend: str, q: Tensor, bias: Tensor | None) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"attention={backend!r}; expected one of {', '.join(BACKENDS)}")
    takes = _TAKES.get(backend)
    if takes is None:
        return
    d = q.shape[-1]
    if q.device.type not in takes.devices:
        raise ValueError(f"attention={backend!r} takes tensors on {' or '.join(takes.devices)}; q is on {q.device}")
    if q.dtype not in takes.dtypes:
        names = ", ".join(str(dtype)[6:] for dtype in takes.dtypes)
        raise ValueError(f"attention={backend!r} takes {names}; q has {str(q.dtype)[6:]}")
    if takes.head_dim is not None and not (0 < d <= takes.head_dim and d % takes.multiple == 0):
        kind = "head dims" if takes.multiple == 1 else f"head dims that are multiples of {takes.multiple},"
        raise ValueError(f"attention={backend!r} takes {kind} up to {takes.head_dim}; this one is {d}")
    if bias is not None and not takes.bias:
        raise ValueError(f"attention={backend!r} takes no bias or mask")
