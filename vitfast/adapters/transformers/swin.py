"""Transformers' Swin: a layer of shifted windows."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ... import kernels, layers
from ..known import Rebuilt
from .attention import IMPLEMENTATIONS, idle


class SwinLayer(layers.FusedBlock, Rebuilt):
    """A layer of shifted windows: one kernel for what Transformers does by rolling, cutting and pasting the map."""

    norm1 = layers.alias("layernorm_before")
    attn = layers.alias("attention")
    norm2 = layers.alias("layernorm_after")
    ls1 = ls2 = layers.IDENTITY
    drop_path1 = layers.alias("drop_path")
    # the second branch has a dropout where the first has a drop path
    drop_path2 = layers.alias("dropout")
    # computed here, not by a layer in its place
    covers = ("attention",)
    window_size: int
    shift_size: int

    can_fold = False

    def make_plan(self, derive: bool = False) -> layers.BlockPlan:
        """The kernel's way, or the original's: it takes the attention's parts, which are then not called."""
        attn: Any = self.attention
        notes: list[str] = []
        hooked = [f"attention.{name or 'forward'} has hooks" for name, m in attn.named_modules() if self.watched(m)]
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        linears = all([layers.linear(name, getattr(attn, name), notes) for name in names])
        rate = attn.attention_dropout if self.training else 0.0
        reasons = [
            *hooked,
            "" if linears else "; ".join(notes),
            f"attention dropout {rate:g}, in training" if rate else "",
            "" if layers.inactive(self.drop_path1) and layers.inactive(self.dropout) else "dropout is at work",
            "attn_implementation 'eager' hands out weights" if attn.config._attn_implementation == "eager" else "",
            layers.why_uncut(self.attention_backend),
        ]
        plan = super().make_plan(derive)
        attn_plan = layers.AttentionPlan("", (), True, True, False, False)
        if derive and linears:
            attn_plan = attn_plan._replace(packed=self._packed(), table=self._table())
        return plan._replace(
            original=next(filter(None, (plan.original, *reasons)), ""), attn=attn_plan, complete=False, notes=()
        )

    def _packed(self) -> tuple[Tensor, Tensor | None]:
        attn: Any = self.attention
        return layers.joined(attn.q_proj, attn.k_proj, attn.v_proj)

    def _table(self) -> Tensor:
        return layers.by_columns(self.attention.relative_position_bias.relative_position_bias_table)

    def watched(self, module: nn.Module) -> bool:
        """Whether somebody looks at what a module of this layer does."""
        return layers.hooked(module) and not idle(module)

    def _cuts(self, tokens: Tensor, size: Any, kwargs: dict[str, Any]) -> bool:
        """Whether the kernel computes what the original would of a map of this size."""
        attn, window = self.attention, self.window_size
        return (
            layers.windows_pay(tokens)
            # padded maps have tokens that are none; the libraries pad in different ways
            and size[0] % window == 0
            and size[1] % window == 0
            # a map smaller than the window fails in the original
            and attn.relative_position_bias.window_size == (window, window)
            and attn.config._attn_implementation in IMPLEMENTATIONS
            # what hands out weights
            and not kwargs.get("output_attentions")
            and attn.config._attn_implementation != "eager"
        )

    def forward(
        self, hidden_states: Tensor, input_dimensions: Any, always_partition: bool = False, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """`[B, H * W, D]` to `([B, H * W, D], None)`."""
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        plan = self.plan_for(hidden_states) if self._cuts(hidden_states, input_dimensions, kwargs) else None
        if plan is None:
            return super().forward(hidden_states, input_dimensions, always_partition, **kwargs)  # type: ignore[misc]
        attn: Any = self.attention
        normed = self.norm1(hidden_states)
        # weights are fewer than what comes of them
        weight, bias = layers.kept(plan.attn.packed, normed, self._packed)
        qkv = kernels.linear(normed, weight, bias, tf32=self.tf32)
        out = kernels.window_attention(
            qkv.unflatten(1, tuple(input_dimensions)),
            attn.q_proj.weight.shape[0] // attn.head_dim,
            (self.window_size,) * 2,
            (int(self.shift_size),) * 2,
            layers.kept(plan.attn.table, normed, self._table),
            attn.scaling,
            tf32=self.tf32,
        )
        x = layers.compute_linear(True, attn.o_proj, out.flatten(1, 2), hidden_states, None, self.tf32)
        if plan.mlp is not None:
            return self.mlp.fused(self.norm2(x), plan.mlp, x), None
        return self.mlp(self.norm2(x)) + x, None
