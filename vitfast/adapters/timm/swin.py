"""timm's Swin and Swin V2: attention in shifted windows."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import kernels, layers
from ..known import Rebuilt
from .parts import FusedTimmPartBias, Scaled


class FusedTimmWindowAttention(Scaled):
    """Attention within windows: of a map where a block asks, of windows that timm has cut where it is called."""

    q_norm = k_norm = layers.IDENTITY
    window_size: tuple[int, int]
    softmax: Any

    def why_dropout(self, notes: list[str]) -> str:
        """Why the original runs: who looks at windows shall see windows, and dropout of their tokens draws in order."""
        names = ("qkv", "attn_drop", "softmax", "proj", "proj_drop")
        hooked = [f"{name} has hooks" for name in names if layers.hooked(getattr(self, name))]
        reasons = [
            *hooked,
            self.why_rate("attention dropout", layers.rate_of(self.attn_drop), notes),
            self.why_rate("dropout of windows", layers.rate_of(self.proj_drop), notes),
            *(f"{name} is at work" for name in ("attn_drop", "proj_drop") if not layers.inactive(getattr(self, name))),
            layers.why_uncut(self.attention_backend),
        ]
        return next(filter(None, reasons), "")

    def derive(self, plan: layers.AttentionPlan) -> dict[str, Any]:
        """The table of positions, by columns."""
        return {"table": self.table()}

    def table(self) -> Tensor:
        """`[(2 * wh - 1) * (2 * ww - 1), H]`."""
        return layers.by_columns(self.relative_position_bias_table)

    def scales(self) -> Any:
        """Of the scores: a number, or one per head for cosine attention."""
        return self.scale

    def attend(  # type: ignore[override]
        self, qkv: Tensor, plan: layers.AttentionPlan, shift: tuple[int, int] = (0, 0)
    ) -> Tensor:
        """Packed map `[B, H, W, 3 * H * d]` to the heads' `[B, H, W, H * d]`."""
        height, width = self.window_size
        table = layers.kept(plan.table, qkv, self.table)
        scales = layers.kept(plan.scales, qkv, self.scales)
        return kernels.window_attention(qkv, self.num_heads, (height, width), shift, table, scales, tf32=self.tf32)

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Refused: tokens of two windows do not meet."""
        raise ValueError(f"{type(self).__name__} attends within windows; it has no map of all tokens")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Windows `[B, N, D]` to `[B, N, D]`; masked attention is timm's own, so it is a block that shifts windows."""
        height, width = self.window_size
        plan = None if mask is not None else self.plan_for(x)
        if plan is None or x.shape[1] != height * width or not layers.windows_pay(x):
            return super().forward(x, mask)  # type: ignore[misc]
        return self.fused(x.unflatten(1, (height, width)), plan).flatten(1, 2)


class FusedTimmWindowAttentionV2(FusedTimmWindowAttention, FusedTimmPartBias):  # type: ignore[misc]
    """`timm.models.swin_transformer_v2.WindowAttention`: cosine attention, its table from a small MLP."""

    def plan_in(self, notes: list[str]) -> bool:
        """As with biases beside the layer."""
        return FusedTimmPartBias.plan_in(self, notes)

    def derive(self, plan: layers.AttentionPlan) -> dict[str, Any]:
        """The biases as one, the table and the scales."""
        biases = FusedTimmPartBias.derive(self, plan)
        return {**biases, "table": self.table(), "scales": self.scales()}

    def table(self) -> Tensor:
        """`[(2 * wh - 1) * (2 * ww - 1), H]`."""
        return layers.position_table(self.cpb_mlp, self.relative_coords_table)

    def scales(self) -> Tensor:
        """Of the cosines, one per head."""
        return layers.cosine_scales(self.logit_scale)


class _SwinBlock(layers.FusedBlock, Rebuilt):
    """Windows are shifted and cut by index arithmetic in the kernel; a map that they do not divide is timm's own."""

    ls1 = ls2 = layers.IDENTITY
    # the kernel reads a map, whose norm it does not fold
    can_fold = False
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
            and isinstance(attn, FusedTimmWindowAttention)
            and not self.watched(attn)
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

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, D]` to `[B, H, W, D]`."""
        plan = self.plan_for(x)
        if plan is None:
            return super().forward(x)
        b, h, w, _ = x.shape
        attn_plan = (plan.attn or self.attn.plan()) if self._cuts(x) else None
        if attn_plan is not None and attn_plan.original:
            attn_plan = None
        if attn_plan is not None and plan.attn is not None:
            x = self.attn.fused(self.norm1(x), attn_plan, x, shift=self.shift_size)
        elif attn_plan is not None:
            x = x + self.drop_path1(self.attn.fused(self.norm1(x), attn_plan, shift=self.shift_size))
        else:
            x = x + self.drop_path1(self._attn(self.norm1(x)))
        x = x.reshape(b, h * w, -1)
        if plan.mlp is not None:
            x = self.mlp.fused(self.norm2(x), plan.mlp, x)
        else:
            x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x.reshape(b, h, w, -1)


class FusedTimmSwinV2Block(_SwinBlock):
    """`timm.models.swin_transformer_v2.SwinTransformerV2Block`; its norms stand between branch and residual."""

    def _attn(self, x: Tensor) -> Tensor:
        plan = self.plan_for(x)
        if plan is None or not self._cuts(x):
            return super()._attn(x)
        attn_plan = self.attn.plan()
        return super()._attn(x) if attn_plan.original else self.attn.fused(x, attn_plan, shift=self.shift_size)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, D]` to `[B, H, W, D]`."""
        return super(layers.FusedBlock, self).forward(x)
