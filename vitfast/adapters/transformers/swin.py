"""Transformers' Swin: a layer of shifted windows."""

from __future__ import annotations

from typing import Any, ClassVar

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
    covers: ClassVar[tuple[str, ...]] = ("attention",)
    window_size: int
    shift_size: int

    can_fold = False

    # the attention's parts
    parts = layers.alias("attention")

    def make_plan(self, derive: bool = False) -> layers.BlockPlan:
        """The kernel's way, or the original's: it takes the attention's parts, which are then not called."""
        attn, parts = self.attention, self.parts
        notes: list[str] = []
        hooked = [f"attention.{name or 'forward'} has hooks" for name, m in attn.named_modules() if self.watched(m)]
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        linears = all([layers.linear(name, getattr(parts, name), notes) for name in names])
        reasons = [
            *hooked,
            "" if linears else "; ".join(notes),
            self.why_dropout(),
            self.why_implementation(),
            layers.why_uncut(self.attention_backend),
        ]
        plan = super().make_plan(derive)
        attn_plan = layers.AttentionPlan("", (), True, True, False, False)
        if derive and linears:
            attn_plan = attn_plan._replace(packed=self._packed(), table=self._table())
        return plan._replace(
            original=next(filter(None, (plan.original, *reasons)), ""), attn=attn_plan, complete=False, notes=()
        )

    def why_dropout(self) -> str:
        """Why the original runs: some dropout is at work."""
        rate = self.attention.attention_dropout if self.training else 0.0
        if rate:
            return f"attention dropout {rate:g}, in training"
        return "" if layers.inactive(self.drop_path1) and layers.inactive(self.dropout) else "dropout is at work"

    def why_implementation(self) -> str:
        """Why the original runs: the implementation hands out weights, or is somebody's own."""
        name = self.attention.config._attn_implementation
        if name == "eager":
            return "attn_implementation 'eager' hands out weights"
        return "" if name in IMPLEMENTATIONS else f"attn_implementation {name!r} is no known one"

    def _packed(self) -> tuple[Tensor, Tensor | None]:
        return layers.joined(self.parts.q_proj, self.parts.k_proj, self.parts.v_proj)

    def _table(self) -> Tensor:
        return layers.by_columns(self.parts.relative_position_bias.relative_position_bias_table)

    def watched(self, module: nn.Module) -> bool:
        """Whether somebody looks at what a module of this layer does."""
        return layers.hooked(module) and not idle(module)

    def _cuts(self, tokens: Tensor, size: Any) -> bool:
        """Whether the kernel computes what the original would of a map of this size."""
        window = self.window_size
        return (
            layers.windows_pay(tokens)
            # padded maps have tokens that are none; the libraries pad in different ways
            and size[0] % window == 0
            and size[1] % window == 0
            # a map smaller than the window fails in the original
            and tuple(self.parts.relative_position_bias.window_size) == (window, window)
            # read in each call, since a config is set in place
            and not self.why_implementation()
        )

    def forward(
        self, hidden_states: Tensor, input_dimensions: Any, always_partition: bool = False, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """`[B, H * W, D]` to `([B, H * W, D], None)`."""
        out = self.windowed(hidden_states, input_dimensions, always_partition, **kwargs)
        if out is None:
            return super().forward(hidden_states, input_dimensions, always_partition, **kwargs)  # type: ignore[misc]
        return out, None

    def windowed(
        self,
        hidden_states: Tensor,
        input_dimensions: Any,
        always_partition: bool = False,
        output_attentions: bool = False,
        head_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | None:
        """`[B, H * W, D]` to `[B, H * W, D]`, or None where the original has to run."""
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        if output_attentions or head_mask is not None or not self._cuts(hidden_states, input_dimensions):
            return None
        plan = self.plan_for(hidden_states)
        if plan is None:
            return None
        parts = self.parts
        normed = self.norm1(hidden_states)
        # weights are fewer than what comes of them
        weight, bias = layers.kept(plan.attn.packed, normed, self._packed)
        qkv = kernels.linear(normed, weight, bias, tf32=self.tf32)
        out = kernels.window_attention(
            qkv.unflatten(1, tuple(input_dimensions)),
            parts.q_proj.weight.shape[0] // parts.head_dim,
            (self.window_size,) * 2,
            (int(self.shift_size),) * 2,
            layers.kept(plan.attn.table, normed, self._table),
            parts.scaling,
            tf32=self.tf32,
        )
        x = layers.compute_linear(True, parts.o_proj, out.flatten(1, 2), hidden_states, None, self.tf32)
        if plan.mlp is not None:
            return self.mlp.fused(self.norm2(x), plan.mlp, x)
        return self.mlp(self.norm2(x)) + x
