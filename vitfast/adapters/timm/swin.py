"""timm's Swin and Swin V2: attention in shifted windows."""

from __future__ import annotations

from typing import Any

import timm.layers
from torch import Tensor, nn

from ... import attention_backends, kernels, layers
from ..known import Rebuilt
from .parts import Scaled, _PartBias


class FusedTimmWindowAttention(Scaled):
    """Attention within windows: of a map where a block asks, of windows that timm has cut where it is called."""

    q_norm = k_norm = layers.IDENTITY
    window_size: tuple[int, int]
    softmax: Any

    def fusable(self) -> bool:
        """Whether the kernel computes what the original would."""
        # hooks shall see windows, and dropout of their tokens draws in another order than that of the map's
        called = (self.qkv, self.softmax, self.proj)
        return (
            super().fusable()
            and layers._inactive(self.proj_drop)
            and not any(map(layers.hooked, called))
            and self.attention_backend in attention_backends.OURS
        )

    def packed(self, x: Tensor) -> Tensor:
        """Normed `[..., D]` to q, k and v `[..., 3 * H * d]`."""
        return layers._linear(self.qkv, x, None, None, self.tf32)

    def table(self) -> Tensor:
        """`[(2 * wh - 1) * (2 * ww - 1), H]`."""
        return layers.by_columns(self.relative_position_bias_table)

    def scales(self) -> Any:
        """Of the scores: a number, or one per head for cosine attention."""
        return self.scale

    def attended(self, x: Tensor, shift: tuple[int, int] = (0, 0)) -> Tensor:  # type: ignore[override]
        """Normed map `[B, H, W, D]` to the heads' `[B, H, W, H * d]`."""
        return kernels.window_attention(
            self.packed(x), self.num_heads, self.window_size, shift, self.table(), self.scales(), tf32=self.tf32
        )

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Refused: tokens of two windows do not meet."""
        raise ValueError(f"{type(self).__name__} attends within windows; it has no map of all tokens")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Windows `[B, N, D]` to `[B, N, D]`; masked attention is timm's own, so it is a block that shifts windows."""
        height, width = self.window_size
        cut = mask is not None or layers.symbolic(x) or x.shape[1] != height * width
        if cut or not layers.windows_pay(x) or not self.fusable():
            return super().forward(x, mask)  # type: ignore[misc]
        return self.fused(x.unflatten(1, (height, width))).flatten(1, 2)

    def limits(self) -> list[str]:
        names = ("qkv", "attn_drop", "softmax", "proj", "proj_drop")
        hooked = [name for name in names if layers.hooked(getattr(self, name))]
        limits = [f"{name} has hooks: the original forward runs" for name in hooked]
        if not hooked:
            limits = self.limits_in() + layers._why_called("proj", self.proj, nn.Linear)
        for what, drop in (("attention dropout", self.attn_drop), ("dropout of windows", self.proj_drop)):
            if rate := getattr(drop, "p", 0.0):
                limits.append(f"{what} {rate:g}: the original forward runs in training")
        return limits + layers.why_uncut(self.attention_backend)


class FusedTimmWindowAttentionV2(FusedTimmWindowAttention, _PartBias):  # type: ignore[misc]
    """`timm.models.swin_transformer_v2.WindowAttention`: cosine attention, its table from a small MLP."""

    def packed(self, x: Tensor) -> Tensor:
        """Normed `[..., D]` to q, k and v `[..., 3 * H * d]`."""
        return _PartBias.packed(self, x)

    def table(self) -> Tensor:
        """`[(2 * wh - 1) * (2 * ww - 1), H]`."""
        return layers.position_table(self.cpb_mlp, self.relative_coords_table)

    def scales(self) -> Tensor:
        """Of the cosines, one per head."""
        return layers.cosine_scales(self.logit_scale)


class _SwinBlock(layers.FusedBlock, Rebuilt):
    """Windows are shifted and cut by index arithmetic in the kernel; a map that they do not divide is timm's own."""

    ls1 = ls2 = layers.IDENTITY
    drop_path_class = timm.layers.DropPath
    input_resolution: tuple[int, int]
    window_size: tuple[int, int]
    shift_size: tuple[int, int]
    dynamic_mask: bool
    _attn: Any

    def _cuts(self, x: Tensor) -> bool:
        """Whether the kernel cuts this map as timm would."""
        attn: Any = self.attn
        size = tuple(x.shape[1:3])
        return (
            layers.windows_pay(x)
            and self._takes_residual(attn)
            and isinstance(attn, FusedTimmWindowAttention)
            and "_attn" not in vars(self)
            and tuple(attn.window_size) == tuple(self.window_size)
            and not any(side % window for side, window in zip(size, self.window_size, strict=True))
            # timm's mask is of one size, unless it is made in each call
            and (self.dynamic_mask or not any(self.shift_size) or size == tuple(self.input_resolution))
        )

    def limits(self) -> list[str]:
        limits = super().limits()
        if any(side % window for side, window in zip(self.input_resolution, self.window_size, strict=True)):
            size, window = ("x".join(map(str, sides)) for sides in (self.input_resolution, self.window_size))
            limits.append(f"maps of {size} are padded to windows of {window}: timm's own windows")
        return limits


class FusedTimmSwinBlock(_SwinBlock):
    """`timm.models.swin_transformer.SwinTransformerBlock`."""

    def _branch(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if self._cuts(x):
            return self.attn.fused(x, residual, shift=self.shift_size)
        return layers._residual(self._attn(x), residual, None)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, D]` to `[B, H, W, D]`."""
        if layers.symbolic(x):
            return super().forward(x)
        b, h, w, _ = x.shape
        if self._undropped(self.drop_path1):
            x = self._branch(self.norm1(x), x)
        else:
            x = x + self.drop_path1(self._branch(self.norm1(x), None))
        x = x.reshape(b, h * w, -1)
        if self._undropped(self.drop_path2) and self._takes_residual(self.mlp):
            x = self.mlp.fused(self.norm2(x), x)
        else:
            x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x.reshape(b, h, w, -1)


class FusedTimmSwinV2Block(_SwinBlock):
    """`timm.models.swin_transformer_v2.SwinTransformerV2Block`; its norms stand between branch and residual."""

    def _attn(self, x: Tensor) -> Tensor:
        if layers.symbolic(x) or not self._cuts(x):
            return super()._attn(x)
        return self.attn.fused(x, shift=self.shift_size)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, D]` to `[B, H, W, D]`."""
        return super(layers.FusedBlock, self).forward(x)
