"""torchvision's Swin and Swin V2: attention in shifted windows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import kernels, layers
from ..known import Rebuilt


class FusedTorchvisionWindows(layers.FusedAttention, Rebuilt):
    """Attention in shifted windows of a map; one that they do not divide is torchvision's own, which pads it.

    torchvision reads the weights of `qkv` and `proj` and calls neither, so hooks on them never fire.
    """

    q_norm = k_norm = attn_drop = proj_drop = layers.IDENTITY
    scale = property(lambda self: (self.qkv.weight.shape[1] // self.num_heads) ** -0.5)  # type: ignore[assignment]
    window_size: list[int]
    shift_size: list[int]
    attention_dropout: float
    dropout: float

    def why_dropout(self, notes: list[str]) -> str:
        """Why the original runs: dropout, or a backend that knows no windows."""
        reasons = [
            self.why_rate("attention dropout", self.attention_dropout, notes),
            self.why_rate("dropout", self.dropout, notes),
            layers.why_uncut(self.attention_backend),
        ]
        return next(filter(None, reasons), "")

    def plan_in(self, notes: list[str]) -> bool:
        """Always: weights are read."""
        return True

    def plan_out(self, notes: list[str]) -> bool:
        """Always: weights are read."""
        return True

    def derive(self, plan: layers.AttentionPlan) -> dict[str, Any]:
        """The table of positions, by columns."""
        return {"table": self.table()}

    def cuts(self, x: Tensor) -> bool:
        """Whether the kernel cuts this map `[B, H, W, D]`: windows divide it."""
        sides = zip(x.shape[1:3], self.window_size, strict=True)
        return x.dim() == 4 and layers.windows_pay(x) and not any(side % window for side, window in sides)

    def table(self) -> Tensor:
        """`[(2 * wh - 1) * (2 * ww - 1), H]`."""
        return layers.by_columns(self.relative_position_bias_table)

    def scales(self) -> Any:
        """Of the scores: a number, or one per head for cosine attention."""
        return self.scale

    def project_in(self, x: Tensor, plan: layers.AttentionPlan) -> Tensor:
        """Normed map `[B, H, W, D]` to q, k and v `[B, H, W, 3 * H * d]`."""
        weight, bias = layers.kept(plan.packed, x, self.weights_in)
        return kernels.linear(x, weight, bias, tf32=self.tf32)

    def attend(self, qkv: Tensor, plan: layers.AttentionPlan) -> Tensor:
        """Packed map to the heads' `[B, H, W, H * d]`."""
        window = (self.window_size[0], self.window_size[1])
        # no shift where one window is as long as the map
        down, right = (
            0 if window >= side else shift
            for window, side, shift in zip(window, qkv.shape[1:3], self.shift_size, strict=True)
        )
        table = layers.kept(plan.table, qkv, self.table)
        scales = layers.kept(plan.scales, qkv, self.scales)
        return kernels.window_attention(qkv, self.num_heads, window, (down, right), table, scales, tf32=self.tf32)

    def project(
        self,
        out: Tensor,
        plan: layers.AttentionPlan,
        residual: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """`residual + scale * proj(out)`, `[B, H, W, H * d]` to `[B, H, W, D]`."""
        proj = self.proj
        return kernels.linear(out, proj.weight, proj.bias, residual=residual, scale=scale, tf32=self.tf32)

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Refused: tokens of two windows do not meet."""
        raise ValueError(f"{type(self).__name__} attends within windows; it has no map of all tokens")

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, D]` to `[B, H, W, D]`."""
        plan = self.plan_for(x)
        if plan is None or not self.cuts(x):
            return super().forward(x)  # type: ignore[misc]
        return self.fused(x, plan)


class FusedTorchvisionWindowsV2(FusedTorchvisionWindows):
    """`torchvision.models.swin_transformer.ShiftedWindowAttentionV2`: cosine attention, keys without bias."""

    def weights_in(self) -> tuple[Tensor, Tensor | None]:
        """Of the projection to q, k and v; the keys' part of the bias counts as zero, whatever it is."""
        weight, bias = super().weights_in()
        if bias is None:
            return weight, None
        q, k, v = bias.chunk(3)
        return weight, torch.cat((q, torch.zeros_like(k), v))

    def derive(self, plan: layers.AttentionPlan) -> dict[str, Any]:
        """The bias, the table and the scales."""
        return {"packed": self.weights_in(), "table": self.table(), "scales": self.scales()}

    def table(self) -> Tensor:
        """`[(2 * wh - 1) * (2 * ww - 1), H]`."""
        return layers.position_table(self.cpb_mlp, self.relative_coords_table)

    def scales(self) -> Tensor:
        """Of the cosines, one per head."""
        return layers.cosine_scales(self.logit_scale)


class FusedTorchvisionSwinBlock(layers.FusedBlock, Rebuilt):
    """`torchvision.models.swin_transformer.SwinTransformerBlock`."""

    ls1 = ls2 = None
    drop_path1 = drop_path2 = layers.alias("stochastic_depth")
    # the kernel reads a map, whose norm it does not fold
    can_fold = False

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, D]` to `[B, H, W, D]`."""
        attn: Any = self.attn
        plan = self.plan_for(x) if isinstance(attn, FusedTorchvisionWindows) else None
        return super().forward(x) if plan is None or not attn.cuts(x) else self.fused(x, plan)
