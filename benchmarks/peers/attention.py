"""Attention peers: torch's SDPA backends, FlexAttention, xformers, flash-attn 2 and 4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..workloads.base import Workload
from . import Peer, unusable

_OPS = frozenset({"attention"})


def _split(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """q, k and v `[B, N, H, d]`, views of the packed projection."""
    return qkv.unflatten(2, (3, heads, -1)).unbind(2)


def _of(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[dict[str, Any]], Tensor]:
    """A workload's function from one of `[B, N, H, d]` tensors."""

    def run(inputs: dict[str, Any]) -> Tensor:
        with torch.inference_mode():
            return attend(*_split(inputs["qkv"], inputs["heads"])).flatten(2)

    return run


def _cuda_16bit(workload: Workload, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA device"
    if workload.torch_dtype not in (torch.float16, torch.bfloat16):
        return f"takes fp16 and bf16, not {workload.dtype}"
    return None


def _sdpa(name: str, backend: SDPBackend) -> Peer:
    def missing(workload: Workload, device: torch.device) -> str | None:
        if backend is SDPBackend.MATH:
            return None
        if backend is SDPBackend.FLASH_ATTENTION and device.type == "cpu":
            return None
        if backend is SDPBackend.EFFICIENT_ATTENTION and device.type == "cuda":
            return None
        return _cuda_16bit(workload, device)

    def build(workload: Workload, device: torch.device) -> Callable[[dict[str, Any]], Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                q, k, v = (t.transpose(1, 2) for t in (q, k, v))
                return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

        return _of(attend)

    return Peer(f"SDPA {name}", _OPS, missing, build)


def _flex(workload: Workload, device: torch.device) -> Callable[[dict[str, Any]], Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    return _of(attend)


def _flex_missing(workload: Workload, device: torch.device) -> str | None:
    return None if device.type == "cuda" else "FlexAttention is measured on CUDA only"


def _xformers(workload: Workload, device: torch.device) -> Callable[[dict[str, Any]], Tensor]:
    from xformers.ops import memory_efficient_attention

    return _of(memory_efficient_attention)


def _flash2(workload: Workload, device: torch.device) -> Callable[[dict[str, Any]], Tensor]:
    from flash_attn import flash_attn_func

    return _of(flash_attn_func)


def _flash4(workload: Workload, device: torch.device) -> Callable[[dict[str, Any]], Tensor]:
    from flash_attn.cute import flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(q, k, v)
        return out[0] if isinstance(out, tuple) else out

    return _of(attend)


def _library(module: str, extra: str | None) -> Callable[[Workload, torch.device], str | None]:
    return lambda workload, device: _cuda_16bit(workload, device) or unusable(module, extra)


PEERS = (
    _sdpa("flash", SDPBackend.FLASH_ATTENTION),
    _sdpa("efficient", SDPBackend.EFFICIENT_ATTENTION),
    _sdpa("cuDNN", SDPBackend.CUDNN_ATTENTION),
    _sdpa("math", SDPBackend.MATH),
    Peer("FlexAttention", _OPS, _flex_missing, _flex),
    Peer("xformers", _OPS, _library("xformers", "xformers"), _xformers),
    Peer("flash-attn 2", _OPS, _library("flash_attn.flash_attn_interface", "flash-attn"), _flash2),
    Peer("flash-attn 4", _OPS, _library("flash_attn.cute", None), _flash4),
)
