"""The attentions of Transformers' models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ... import layers
from ..known import Rebuilt

try:
    from transformers.utils import output_capturing
except ImportError:
    # until version 5 nothing was captured by hooks
    output_capturing = None

# implementations of plain softmax attention: one may stand for the other. A function that somebody registered may not
IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "vitfast")


# what these take that no kernel here does
_EXTRAS = frozenset(("position_bias", "softcap", "sliding_window", "s_aux", "cu_seq_lens_q", "cache"))


def collects(key: str) -> bool:
    """Whether a forward is under way that captures these outputs."""
    if output_capturing is None:
        return False
    # a compiler cannot read the variable, which knows if it was set while that traces
    if torch.compiler.is_compiling() and not getattr(output_capturing._active_collector, "compiling", True):
        return False
    collector = output_capturing._active_collector.get()
    return collector is not None and key in collector


def idle(module: nn.Module) -> bool:
    """Whether the only hooks are those that Transformers left there; `collects` says whether they do something."""
    own = module.__dict__
    hooks = own["_forward_hooks"].values()
    return (
        bool(hooks)
        and not own["_forward_pre_hooks"]
        and not own["_backward_hooks"]
        and not own["_backward_pre_hooks"]
        and not layers.own_forward(module)
        and not _has_any_global_hook()
        and all(hook.__module__ == "transformers.utils.output_capturing" for hook in hooks)
    )


def relative_of(module: Any, patch_size: int, interpolates: bool, resolution: tuple[int, int] | None) -> Any:
    """BEiT's relative positions, as the kernel reads them.

    Returns:
        The table and the grid; None where there is no table, False where the original has to make the bias.
    """
    if module is None:
        return None
    if interpolates or resolution is None or layers.hooked(module):
        return False
    grid = (resolution[0] // patch_size, resolution[1] // patch_size)
    # the original reads a table that is not square with its sides exchanged
    if grid != tuple(module.window_size) or grid[0] != grid[1]:
        return False
    return module.relative_position_bias_table, grid


class TransformersAttention(layers.FusedSplitAttention, Rebuilt):
    """What the attentions of all models share."""

    q_norm = k_norm = attn_drop = proj_drop = layers.IDENTITY
    config: Any
    head_dim: int
    # as Transformers counts heads, so that some may be cut out
    num_heads = property(lambda self: self.q_proj.weight.shape[0] // self.head_dim, lambda self, count: None)  # type: ignore[assignment]
    # attribute with the rate of the dropout
    dropout_name = "dropout"

    def why_dropout(self, notes: list[str]) -> str:
        """Why the original runs: dropout, or a function of somebody's own."""
        if name := self.unknown_implementation():
            return f"attn_implementation {name!r} is no known one"
        return self.why_rate("attention dropout", getattr(self, self.dropout_name), notes)

    def unknown_implementation(self) -> str | None:
        """The name of an attention function that somebody registered, which may compute anything."""
        name = self.config._attn_implementation
        return None if name is None or name in IMPLEMENTATIONS else name

    def plan_for(self, x: Any) -> Any:
        """As `FusedLayer.plan_for`; the implementation is read in each call, since a config is set in place."""
        eager = self.config._attn_implementation
        # eager attention hands out weights always
        return None if eager == "eager" or self.unknown_implementation() else super().plan_for(x)

    def beyond(self, kwargs: dict[str, Any]) -> bool:
        """Whether a call asks for more than a softmax over all tokens: it is causal, say, or has a bias."""
        causal = kwargs.get("is_causal")
        return (getattr(self, "is_causal", False) if causal is None else causal) or not _EXTRAS.isdisjoint(kwargs)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """`[B, N, D]` to `([B, N, D], None)`; where a mask or the weights are asked for, it is the original's."""
        if (
            attention_mask is not None
            or kwargs.get("causal_attention_mask") is not None
            or self.beyond(kwargs)
            or kwargs.get("output_attentions")
            or (plan := self.plan_for(hidden_states)) is None
            or hidden_states.dim() != 3
        ):
            return super().forward(hidden_states, attention_mask, **kwargs)
        return self.fused(hidden_states, plan), None

    def attend(  # type: ignore[override]
        self, qkv: Any, plan: layers.AttentionPlan, relative: tuple[Tensor, tuple[int, int]] | None = None
    ) -> Tensor:
        """q, k and v to merged heads `[B, N, H * d]`, with what `relative_of` says of BEiT's relative positions."""
        if relative is None:
            return super().attend(qkv, plan)
        table, grid = relative
        q, k, v = qkv if isinstance(qkv, tuple) else self.heads(qkv)
        return self.relative_attention(q, k, v, layers.by_columns(table), grid)

    def query_key(self, x: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `FusedAttention.query_key`, with the mask."""
        q, k, _ = super().query_key(x)
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            attention_mask = q.new_zeros(()).masked_fill(~attention_mask, float("-inf"))
        return q, k, attention_mask


class ViTAttention(TransformersAttention):
    """`q_proj`, `k_proj`, `v_proj`, `o_proj`."""

    scale = layers.alias("scaling")
    proj = layers.alias("o_proj")
    dropout_name = "attention_dropout"


class CLIPAttention(TransformersAttention):
    """`q_proj`, `k_proj`, `v_proj`, `out_proj`."""

    proj = layers.alias("out_proj")


class ViTSelfAttention(TransformersAttention):
    """Version 4, and models that kept its layout: `query`, `key`, `value`; the output projection is the caller's."""

    head_dim = layers.alias("attention_head_size")
    scale = layers.alias("scaling")
    q_proj = layers.alias("query")
    k_proj = layers.alias("key")
    v_proj = layers.alias("value")
    proj = layers.IDENTITY
    dropout_name = "dropout_prob"
    # whether the output stands in a tuple alone, without a place for weights
    alone = False

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """`[B, N, D]` to `([B, N, H * d], None)`."""
        asked = any(value is not None and value is not False for value in (*args, *kwargs.values()))
        plan = None if asked or self.is_causal else self.plan_for(hidden_states)
        if plan is None or hidden_states.dim() != 3:
            return super(TransformersAttention, self).forward(hidden_states, *args, **kwargs)
        out = self.attend(self.project_in(hidden_states, plan), plan)
        return (out,) if self.alone else (out, None)

    def plan_out(self, notes: list[str]) -> bool:
        """There is none here."""
        return True


class LoneSelfAttention(ViTSelfAttention):
    """Until 4.55."""

    alone = True
