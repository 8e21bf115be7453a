"""A workload: what is measured, with its sizes, its work, its inputs and its reference.

A workload says nothing of who runs it. Peers build a candidate for it from `inputs` (fresh random tensors) and, for
models, from `state_dict`, so that all candidates compute the same function on the same numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from vitfast import create_model

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

MODELS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "vit_small_patch16_224": {},
    "vit_base_patch16_224": {},
    "vit_base_patch32_224": {},
    "vit_large_patch16_224": {},
    "vit_huge_patch14_224": {},
    "vit_base_patch16_384": {},
    "vit_base_patch14_dinov2": {"num_classes": 1000},
}
"""The suite's models, with what is overridden (a headless model gets a head, so that every model gives logits)."""

BATCHES = (1, 8, 32, 128, 256)

BATCHED = ("pixels", "x", "residual", "qkv", "files")
"""Inputs whose first dimension is the batch."""


@dataclass(frozen=True)
class Workload:
    """One thing to measure, for one batch and dtype.

    Attributes:
        layer: one of `results.LAYERS`.
        name: of the workload, the same in every run.
        op: what a peer must offer: one of `KERNELS`' first parts, or "block", "model", "train", "end_to_end", or
            "library", a model of another library, which `reference` holds.
        model: the architecture it comes from.
        shape: sizes by name.
        dtype: a key of `DTYPES`.
        flops: of one call.
        bytes: fewest bytes of one call, weights included.
        inputs: makes one set of inputs on a device; called several times for rotation, seeded by the index.
        reference: the same function in plain torch on one set of inputs, or a module that takes its tensor (for
            "end_to_end" the decoded pixels); run in float64 it is the truth, in `dtype` the baseline of the parity
            rule.
    """

    layer: str
    name: str
    op: str
    model: str
    shape: dict[str, int]
    dtype: str
    flops: float
    bytes: float
    inputs: Callable[[torch.device, int], dict[str, Any]]
    reference: Callable[..., Tensor]

    def __str__(self) -> str:
        layer = "" if self.layer in ("kernel", "model") else f"{self.layer} "
        return f"{layer}{self.name} b{self.shape['batch']} {self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype of weights and activations."""
        return DTYPES[self.dtype]


@functools.cache
def reference_model(name: str) -> Any:
    """The plain model with seeded random parameters, all of them non-trivial; in eval mode, fp32, on CPU."""
    generator = torch.Generator().manual_seed(0)
    model = create_model(name, **MODELS.get(name, {})).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # gains near one, everything else small enough for activations of order one through all blocks
            noise = torch.randn(parameter.shape, generator=generator) * 0.02
            is_gain = parameter.dim() == 1 and parameter_name.endswith(("norm.weight", "norm1.weight", "norm2.weight"))
            parameter.copy_(noise + 1.0 if is_gain else noise)
    return model


def dimensions(name: str) -> dict[str, int]:
    """Sizes of an architecture: image, patch, tokens, width, heads, hidden, depth, classes."""
    model = reference_model(name)
    height, width = model.patch_embed.img_size
    block = model.blocks[0]
    return {
        "height": height,
        "width": width,
        "patch": model.patch_embed.patch_size[0],
        "tokens": model.num_prefix_tokens + model.patch_embed.num_patches,
        "dim": model.embed_dim,
        "heads": block.attn.num_heads,
        "hidden": block.mlp.fc1.out_features,
        "depth": len(model.blocks),
        "classes": model.num_classes,
    }


def count_flops(module: nn.Module, *shape: int) -> float:
    """FLOPs of a module on an input, counted by torch on the meta device."""
    tensors = {name: t.to("meta") for name, t in (*module.named_parameters(), *module.named_buffers())}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        functional_call(module, tensors, (torch.empty(shape, device="meta"),))
    return float(counter.get_total_flops())


@functools.cache
def model_flops(name: str) -> float:
    """FLOPs of one image through the model."""
    model = reference_model(name)
    return count_flops(model, 1, 3, *model.patch_embed.img_size)


def draws(device: torch.device, dtype: torch.dtype, index: int) -> Callable[..., Tensor]:
    generator = torch.Generator(device=device).manual_seed(1000 + index)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    return draw
