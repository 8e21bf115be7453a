"""Patch embeddings of Transformers' models, with prefix tokens and positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import layers
from ..known import Rebuilt, asked


class TransformersPatchEmbeddings(layers.FusedPatchEmbed, Rebuilt):
    """A convolution's tokens, where its stride divides the image."""

    def embeds(self, pixels: Tensor) -> bool:
        """Whether the kernel computes what Transformers would."""
        if not super().embeds(pixels):
            return False
        rows, cols = self.proj.kernel_size
        return pixels.shape[2] % rows == 0 and pixels.shape[3] % cols == 0


class ViTPatchEmbeddings(TransformersPatchEmbeddings):
    """`projection`."""

    proj = layers.alias("projection")
    # whether pixels of another dtype than the weights are cast rather than refused
    casts = False

    def embeds(self, pixels: Tensor) -> bool:
        """Whether the kernel computes what Transformers would."""
        return super().embeds(pixels) and (
            self.casts or pixels.dtype == self.projection.weight.dtype or torch.is_autocast_enabled(pixels.device.type)
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, N, D]`."""
        return self.tokens(pixel_values) if self.embeds(pixel_values) else super().forward(pixel_values)


class SizedPatchEmbeddings(ViTPatchEmbeddings):
    """Version 4: refuses images of another size by itself."""

    image_size: Any

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """`[B, C, H, W]` to `[B, N, D]`."""
        if interpolate_pos_encoding or pixel_values.shape[2:] == tuple(self.image_size):
            return super().forward(pixel_values)
        # for its error
        return super(ViTPatchEmbeddings, self).forward(pixel_values, interpolate_pos_encoding)


class Dinov2PatchEmbeddings(ViTPatchEmbeddings):
    """`projection`, for pixels of any dtype."""

    casts = True

    def tokens(self, pixels: Tensor, *args: Any) -> Tensor:
        """As `FusedPatchEmbed.tokens`."""
        return super().tokens(pixels.to(self.projection.weight.dtype), *args)


class ShapedPatchEmbeddings(ViTPatchEmbeddings):
    """Swin's, and BEiT's through 5.8: the numbers of rows and columns beside the tokens."""

    def forward(self, pixel_values: Tensor, *args: Any) -> Any:  # type: ignore[override]
        """`[B, C, H, W]` to `[B, N, D]` and `(rows, columns)`."""
        if asked(args, {}) or not self.embeds(pixel_values):
            return super(ViTPatchEmbeddings, self).forward(pixel_values, *args)  # type: ignore[misc]
        height, width = pixel_values.shape[2:]
        rows, cols = self.proj.kernel_size
        return self.tokens(pixel_values), (height // rows, width // cols)


class ViTEmbeddings(layers.FusedLayer, Rebuilt):
    """Prefix tokens and position embeddings written by the patch-embed kernel."""

    kind = "patch_embed"

    def make_plan(self, derive: bool = False) -> layers.Plan:
        """Decided in each call, of which there is one in a forward."""
        return layers.Plan("", ())

    patch_embeddings: Any
    position_embeddings: Any
    cls_token: Any
    image_size: Any

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """`[B, C, H, W]` to `[B, T + N, D]`; masked patches are Transformers' own."""
        stem = self.patch_embeddings
        if (
            bool_masked_pos is not None
            or not layers.takes(pixel_values)
            or not isinstance(stem, ViTPatchEmbeddings)
            or layers.hooked(stem)
            or not stem.embeds(pixel_values)
        ):
            return super().forward(pixel_values, bool_masked_pos, *args, **kwargs)
        interpolates = args[0] if args else kwargs.get("interpolate_pos_encoding", False)
        position = self._positions(pixel_values, interpolates)
        if position is False:
            # for its error
            return super().forward(pixel_values, bool_masked_pos, *args, **kwargs)
        prefix, position = self._prefix(position)
        return self.dropout(stem.tokens(pixel_values, prefix, position))

    def _counted(self, pixels: Tensor) -> Tensor:
        """Something of the shape `[1, T + N, D]`, which is all that Transformers' resizing reads."""
        rows, cols = self.patch_embeddings.projection.kernel_size
        count = (pixels.shape[2] // rows) * (pixels.shape[3] // cols) + self._prefix_length()
        return self.cls_token.expand(1, count, -1)

    def _prefix_length(self) -> int:
        return 1

    def _positions(self, pixels: Tensor, interpolates: Any) -> Any:
        """`[1, T + N, D]`, None where the model has none, False where the image does not fit."""
        height, width = pixels.shape[2:]
        if interpolates:
            return self.interpolate_pos_encoding(self._counted(pixels), height, width)
        # version 4 has the size in the patch embeddings
        own = vars(self).get("image_size") or self.patch_embeddings.image_size
        return self.position_embeddings if (height, width) == tuple(own) else False

    def _prefix(self, position: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The prefix tokens `[T, D]` and what is added behind: `[T + N, D]` or, if the prefix has its own, `[N, D]`."""
        return self.cls_token[0], None if position is None else position[0]


class DeiTEmbeddings(ViTEmbeddings):
    """Class and distillation token."""

    distillation_token: Any

    def _prefix_length(self) -> int:
        return 2

    def _prefix(self, position: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return torch.cat((self.cls_token[0], self.distillation_token[0])), None if position is None else position[0]


class Dinov2Embeddings(ViTEmbeddings):
    """Position embeddings of whatever size the image has; BEiT may have none."""

    def _positions(self, pixels: Tensor, interpolates: Any) -> Any:
        if self.position_embeddings is None:
            return None
        return self.interpolate_pos_encoding(self._counted(pixels), *pixels.shape[2:])


class ShapedEmbeddings(Dinov2Embeddings):
    """BEiT's through 5.8: the numbers of rows and columns beside the tokens."""

    def forward(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`[B, C, H, W]` to `[B, T + N, D]` and `(rows, columns)`."""
        out: Any = super().forward(pixel_values, *args, **kwargs)
        if isinstance(out, tuple):
            # the original's
            return out
        height, width = pixel_values.shape[2:]
        rows, cols = self.patch_embeddings.proj.kernel_size
        return out, (height // rows, width // cols)


class Dinov2WithRegistersEmbeddings(Dinov2Embeddings):
    """Registers between class token and patches, without position."""

    register_tokens: Any

    def _prefix(self, position: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert position is not None
        return torch.cat((self.cls_token[0] + position[0, :1], self.register_tokens[0])), position[0, 1:]


class SiglipVisionEmbeddings(TransformersPatchEmbeddings):
    """`patch_embedding` and `position_embedding`."""

    proj = layers.alias("patch_embedding")
    position_embedding: Any
    position_ids: Any
    image_size: Any

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """`[B, C, H, W]` to `[B, T + N, D]`."""
        if not self.embeds(pixel_values) or layers.hooked(self.position_embedding):
            return super().forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        height, width = pixel_values.shape[2:]
        rows, cols = self.proj.kernel_size
        if interpolate_pos_encoding:
            count = (height // rows) * (width // cols) + len(self._prefix())
            like = self.position_embedding.weight[:1].expand(1, count, -1)
            position = self.interpolate_pos_encoding(like, height, width)
        elif self._fits(height, width):
            position = self.position_embedding(self.position_ids)
        else:
            # for its error
            return super().forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        pixels = pixel_values.to(self.proj.weight.dtype)
        prefix = self._prefix()
        return self.tokens(pixels, prefix[0] if prefix else None, position[0])

    def _fits(self, height: int, width: int) -> bool:
        rows, cols = self.proj.kernel_size
        return (height // rows) * (width // cols) == self.position_ids.shape[1]

    def _prefix(self) -> tuple[Tensor, ...]:
        return ()


class CLIPVisionEmbeddings(SiglipVisionEmbeddings):
    """`class_embedding` in front."""

    class_embedding: Any

    def _fits(self, height: int, width: int) -> bool:
        return height == width == self.image_size

    def _prefix(self) -> tuple[Tensor, ...]:
        return (self.class_embedding[None],)
