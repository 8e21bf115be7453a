"""Patch embedding as an implicit GEMM: `vitfast.kernels.patch_embed`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import kernels
from .base import FusedLayer, Plan
from .guards import foreign, plain, takes
from .known import inactive


def for_dropout(tokens: Tensor, dropout: Any) -> Tensor:
    """Tokens `[B, N, D]` in memory as a convolution leaves them, where dropout draws in that order."""
    return tokens if inactive(dropout) else tokens.transpose(1, 2).contiguous().transpose(1, 2)


class FusedPatchEmbed(FusedLayer):
    """A convolution whose stride is its kernel.

    With `accelerate(normalize=...)` it holds mean and std in a buffer outside the state dict, and takes uint8 pixels.
    """

    kind = "patch_embed"
    patch_size: Any
    # attribute with the convolution
    conv_name: ClassVar[str] = "proj"

    @property
    def conv(self) -> Any:
        """The convolution that embeds patches."""
        return getattr(self, self.conv_name)

    def set_normalize(self, normalize: tuple[Sequence[float], Sequence[float]] | None) -> None:
        """Take uint8 pixels, with this mean and std per channel for pixels between 0 and 1; None: take none again."""
        if normalize is None:
            if "pixel_affine" in self._buffers:
                del self.pixel_affine
            return
        mean, std = (torch.tensor(values, dtype=torch.float64, device="cpu") for values in normalize)
        # (x / 255 - mean) / std = x * scale + shift; as bytes, since casting a model casts its floating-point buffers
        affine = torch.stack([1.0 / (255.0 * std), -mean / std]).float().view(torch.uint8)
        self.register_buffer("pixel_affine", affine.to(self.conv.weight.device), persistent=False)

    def make_plan(self, derive: bool = False) -> Plan:
        """Whether the kernel stands for the convolution; asked once a forward, so it is not kept."""
        notes = self.why_convolved()
        return Plan("; ".join(notes), ())

    def plan(self) -> Plan:
        """Made in each call, of which there is one in a forward."""
        return self.make_plan()

    def embeds(self, pixels: Tensor) -> bool:
        """Whether the kernel computes what the original would of these pixels."""
        # what the original refuses, it shall refuse in its own words; raw bytes without mean and std are among that
        return (
            takes(pixels)
            and pixels.dim() == 4
            and (pixels.is_floating_point() or (pixels.dtype == torch.uint8 and "pixel_affine" in self._buffers))
            and not self.why_convolved()
            and pixels.shape[1] == self.conv.in_channels
        )

    def why_convolved(self) -> list[str]:
        """Why the convolution is called as a module, in a sentence each; empty where the kernel runs."""
        name, conv, patch = self.conv_name, self.conv, self.patch_size
        notes: list[str] = []
        if not plain(name, conv, nn.Conv2d, notes):
            return notes
        if held := foreign(conv):
            return [f"{name} holds a {held}: called as a module"]
        patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
        # dense feature extractors make the stride smaller than the patch, in place
        if conv.kernel_size != patch or conv.stride != patch:
            return [f"{name} has kernel {conv.kernel_size} and stride {conv.stride}: called as a module"]
        if conv.padding not in ((0, 0), "valid") or conv.dilation != (1, 1) or conv.groups != 1:
            return [f"{name} is padded, dilated or grouped: called as a module"]
        return []

    def tokens(self, pixels: Tensor, prefix: Tensor | None = None, pos_embed: Tensor | None = None) -> Tensor:
        """`[B, C, H, W]` to `[B, T + N, D]`, with prefix tokens `[T, D]` and position embeddings `[N or T + N, D]`."""
        scale = shift = None
        if pixels.dtype == torch.uint8:
            scale, shift = self._buffers["pixel_affine"].view(torch.float32).unbind()  # type: ignore[union-attr]
        conv = self.conv
        return kernels.patch_embed(pixels, conv.weight, conv.bias, prefix, pos_embed, scale, shift, tf32=self.tf32)

    def limits(self) -> list[str]:
        return self.why_convolved()
