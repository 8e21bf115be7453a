"""Ops and their files, and what a case is: the arguments of a call for any dtype, device and batch.

A case is on `meta` for the compile lane, on CPU for the reference and the interpreter, on CUDA for the gpu lane. `real`
cases have the sizes of published ViTs, the others are small, odd, or laid out to hurt.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import vitfast.kernels as kernels

Arguments = dict[str, Any]
OPS = (
    "layer_norm",
    "add_layer_norm",
    "row_stats",
    "linear",
    "linear_stats",
    "norm_linear",
    "mlp",
    "attention",
    "attention_lse",
    "attention_qkv",
    "relative_attention",
    "window_attention",
    "patch_embed",
)


def module(name: str) -> ModuleType:
    """A kernel's file; as an attribute of the package the name is the function."""
    return importlib.import_module(f"vitfast.kernels.{name}")


FILES = tuple(map(module, ("gemm", *(op for op in OPS if (Path(kernels.__file__).parent / f"{op}.py").is_file()))))


def file_of(op: str) -> ModuleType:
    """The file whose `Config` and `heuristic` an op's launches use."""
    shared = {"add_layer_norm": "layer_norm", "row_stats": "layer_norm", "attention_lse": "attention"}
    shared |= {"relative_attention": "attention", **dict.fromkeys(("linear", "linear_stats", "norm_linear"), "gemm")}
    return module(shared.get(op, op))


class Data:
    """Seeded random tensors of one dtype on one device, in any layout.

    Layouts: `dense`; `pitch`, rows of a matrix 8 elements wider; `ragged`, rows of a matrix 3 elements wider, so that
    they start at odd addresses; `offset`, one element behind a 16-byte boundary; `transposed`, the last two dimensions
    swapped in memory; `heads`, dimensions 1 and 2 swapped in memory; `broadcast`, stride 0 in the first dimension;
    `channels_last`; `channels_last_cut`, the first channels of channels_last pixels with one more.
    """

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype = dtype
        self.device = device
        self._generator = torch.Generator().manual_seed(0)

    def __call__(
        self,
        *shape: int,
        layout: str = "dense",
        dtype: torch.dtype | None = None,
        scale: float = 1.0,
        shift: float = 0.0,
    ) -> Tensor:
        dtype = dtype or self.dtype
        *lead, width = shape
        if layout == "pitch":
            return self._base([*lead, width + 8], dtype, scale, shift)[..., :width]
        if layout == "ragged":
            return self._base([*lead, width + 3], dtype, scale, shift)[..., :width]
        if layout == "offset":
            count = torch.Size(shape).numel()
            return self._base([count + 1], dtype, scale, shift)[1:].view(shape)
        if layout == "transposed":
            return self._base([*lead[:-1], width, lead[-1]], dtype, scale, shift).mT
        if layout == "heads":
            b, h, n, d = shape
            return self._base([b, n, h, d], dtype, scale, shift).transpose(1, 2)
        if layout == "broadcast":
            return self._base([1, *shape[1:]], dtype, scale, shift).expand(shape)
        if layout == "channels_last":
            b, c, h, w = shape
            return self._base([b, h, w, c], dtype, scale, shift).permute(0, 3, 1, 2)
        if layout == "channels_last_cut":
            b, c, h, w = shape
            return self._base([b, h, w, c + 1], dtype, scale, shift)[..., :c].permute(0, 3, 1, 2)
        assert layout == "dense", layout
        return self._base(list(shape), dtype, scale, shift)

    def _base(self, shape: list[int], dtype: torch.dtype, scale: float, shift: float) -> Tensor:
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        if dtype == torch.uint8:
            x = torch.randint(0, 256, shape, generator=self._generator)
        else:
            x = torch.randn(shape, generator=self._generator) * scale + shift
        return x.to(self.device, dtype)


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        op: the public function's name.
        name: what is special about it.
        make: keyword arguments from `Data` and a batch size.
        wrt: the arguments that get gradients.
        real: sizes of a published ViT.
        interpret: small enough for the interpreter.
        core: in the small set that every target compiles.
    """

    op: str
    name: str
    make: Callable[[Data, int], Arguments]
    wrt: tuple[str, ...]
    real: bool = False
    interpret: bool = True
    core: bool = False

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    def arguments(self, dtype: torch.dtype, device: str, batch: int | None = None) -> Arguments:
        return self.make(Data(dtype, device), batch or (1 if self.real else 2))

    @property
    def dot(self) -> bool:
        """Whether the op multiplies matrices."""
        return self.op not in ("layer_norm", "add_layer_norm", "row_stats")
