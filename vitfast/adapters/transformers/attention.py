"""The attentions of Transformers' models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import layers
from ..known import Rebuilt

# implementations of plain softmax attention: one may stand for the other. A function that somebody registered may not
IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "vitfast")


# what these take that no kernel here does
_EXTRAS = frozenset(("position_bias", "softcap", "sliding_window", "s_aux", "cu_seq_lens_q", "cache"))


def _collects(key: str) -> bool:
    """Whether a forward is under way that captures these outputs."""
    from transformers.utils import output_capturing

    collector = output_capturing._active_collector.get()
    return collector is not None and key in collector


def _idle(module: nn.Module) -> bool:
    """Whether the only hooks are those that Transformers left there, and nothing is captured now."""
    own = module.__dict__
    hooks = own["_forward_hooks"].values()
    return (
        bool(hooks)
        and not own["_forward_pre_hooks"]
        and not own["_backward_hooks"]
        and not own["_backward_pre_hooks"]
        and "forward" not in own
        and not layers._has_any_global_hook()
        and all(hook.__module__ == "transformers.utils.output_capturing" for hook in hooks)
        and not _collects("attentions")
    )


class _Attention(layers.FusedSplitAttention, Rebuilt):
    """What the attentions of all models share."""

    q_norm = k_norm = attn_drop = proj_drop = layers.IDENTITY
    config: Any
    head_dim: int
    # as Transformers counts heads, so that some may be cut out
    num_heads = property(lambda self: self.q_proj.weight.shape[0] // self.head_dim, lambda self, count: None)  # type: ignore[assignment]
    # attribute with the rate of the dropout
    dropout_name = "dropout"

    def fusable(self) -> bool:
        """Whether the kernel computes what the original would: no dropout, no function of somebody's own."""
        return not (self.training and getattr(self, self.dropout_name)) and not self._other()

    def _other(self) -> str | None:
        name = self.config._attn_implementation
        return None if name is None or name in IMPLEMENTATIONS else name

    def beyond(self, kwargs: dict[str, Any]) -> bool:
        """Whether a call asks for more than a softmax over all tokens: it is causal, say, or has a bias."""
        causal = kwargs.get("is_causal")
        return (getattr(self, "is_causal", False) if causal is None else causal) or not _EXTRAS.isdisjoint(kwargs)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """`[B, N, D]` to `([B, N, D], None)`; where a mask or the weights are asked for, it is the original's."""
        if (
            attention_mask is not None
            or kwargs.get("causal_attention_mask") is not None
            or hidden_states.dim() != 3
            or layers.symbolic(hidden_states)
            or self.beyond(kwargs)
            or kwargs.get("output_attentions")
            # eager attention hands out weights always
            or self.config._attn_implementation == "eager"
            or not self.fusable()
        ):
            return super().forward(hidden_states, attention_mask, **kwargs)
        return self.fused(hidden_states), None

    def query_key(self, x: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `FusedAttention.query_key`, with the mask."""
        q, k, _ = super().query_key(x)
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            attention_mask = q.new_zeros(()).masked_fill(~attention_mask, float("-inf"))
        return q, k, attention_mask

    def limits(self) -> list[str]:
        limits = self.limits_in() + layers._why_called("proj", self.proj, nn.Linear)
        if name := self._other():
            limits.append(f"attn_implementation {name!r} is no known one: the original forward runs")
        if rate := getattr(self, self.dropout_name):
            limits.append(f"attention dropout {rate:g}: the original forward runs in training")
        return limits


class ViTAttention(_Attention):
    """`q_proj`, `k_proj`, `v_proj`, `o_proj`."""

    scale = layers.alias("scaling")
    proj = layers.alias("o_proj")
    dropout_name = "attention_dropout"

    # BEiT's layer hands over its table of relative positions, and the grid of patches

    def core(self, qkv: Tensor, relative: tuple[Tensor, tuple[int, int]] | None = None) -> Tensor:
        """`[B, N, 3 * H * d]` to `[B, N, H * d]`."""
        return super().core(qkv) if relative is None else self.mixed(*self.heads(qkv), relative=relative)

    def mixed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None = None,
        relative: tuple[Tensor, tuple[int, int]] | None = None,
    ) -> Tensor:
        """`[B, H, N, d]` thrice to `[B, N, H * d]`."""
        return super().mixed(q, k, v, bias) if relative is None else self.relative(q, k, v, *relative)


class CLIPAttention(_Attention):
    """`q_proj`, `k_proj`, `v_proj`, `out_proj`."""

    proj = layers.alias("out_proj")


class ViTSelfAttention(_Attention):
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
        if (
            any(value is not None and value is not False for value in (*args, *kwargs.values()))
            or hidden_states.dim() != 3
            or layers.symbolic(hidden_states)
            or self.is_causal
            or self.config._attn_implementation == "eager"
            or not self.fusable()
        ):
            return super(_Attention, self).forward(hidden_states, *args, **kwargs)
        out = self.attended(hidden_states)
        return (out,) if self.alone else (out, None)

    def limits(self) -> list[str]:
        return [limit for limit in super().limits() if not limit.startswith("proj")]


class LoneSelfAttention(ViTSelfAttention):
    """Until 4.55."""

    alone = True
