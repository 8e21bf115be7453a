"""Layers of Transformers 4.50 to 5.8: attention in a wrapper, the MLP in two halves, tuples of one."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ... import layers
from ..known import asked
from .attention import TransformersAttention, idle
from .layers import CLIPEncoderLayer, Dinov2Layer, TransformersLayer, ViTLayer


def _watched(module: nn.Module) -> bool:
    return layers.hooked(module) and not idle(module)


def _inner(name: str) -> Any:
    return property(lambda self: getattr(self.attention, name))


class WrappedAttention(TransformersAttention):
    """`attention` with `query`, `key` and `value`, and `output` with the projection and its dropout."""

    attention: Any
    output: Any
    config = _inner("config")
    head_dim = _inner("attention_head_size")
    scale = _inner("scaling")
    is_causal = _inner("is_causal")
    dropout_prob = _inner("dropout_prob")
    q_proj = _inner("query")
    k_proj = _inner("key")
    v_proj = _inner("value")
    proj = property(lambda self: self.output.dense)
    proj_drop = property(lambda self: self.output.dropout)
    dropout_name = "dropout_prob"
    # whether the output stands in a tuple
    tupled: ClassVar[bool] = False

    def why_dropout(self, notes: list[str]) -> str:
        """Why the original runs: somebody looks at the modules inside, too."""
        hooked = [f"{name} has hooks" for name in ("attention", "output") if _watched(getattr(self, name))]
        return "; ".join(hooked) or super().why_dropout(notes)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """`[B, N, D]` to `[B, N, D]`, as the original hands it out."""
        plan = None if asked(args, kwargs) or self.is_causal else self.plan_for(hidden_states)
        if plan is None or hidden_states.dim() != 3:
            return super(TransformersAttention, self).forward(hidden_states, *args, **kwargs)
        out = self.fused(hidden_states, plan)
        return (out,) if self.tupled else out


class TupledAttention(WrappedAttention):
    """Until 4.55."""

    tupled = True


class _Halves(layers.FusedMlp):
    """`intermediate` and `output` of a block seen as one MLP."""

    replaces = nn.Identity
    forwards = layers.own_forwards(nn.Identity)
    drop1 = layers.IDENTITY

    def __init__(self, block: Any) -> None:
        first, second = block.intermediate, block.output
        # a view: what looks for hooks finds none, since the block has looked at both
        self.__dict__.update(vars(nn.Identity()))
        self.__dict__.update(
            fc1=first.dense, act=first.intermediate_act_fn, fc2=second.dense, drop2=second.dropout, tf32=block.tf32
        )


class _Wrapped(TransformersLayer):
    """What the blocks share."""

    tupled: ClassVar[bool] = False

    def make_plan(self, derive: bool = False) -> layers.BlockPlan:
        """As of any block; both halves of the MLP are looked at here."""
        halves = [name for name in ("intermediate", "output") if name in self._modules]
        hooked = [f"{name} has hooks" for name in halves if _watched(getattr(self, name))]
        return layers.BlockPlan("; ".join(hooked), ()) if hooked else super().make_plan(derive)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """`[B, N, D]` to `[B, N, D]`, as the original hands it out; masked attention is Transformers' own."""
        plan = None if asked(args, kwargs) else self.plan_of(hidden_states, None, {})
        if plan is None:
            return super(TransformersLayer, self).forward(hidden_states, *args, **kwargs)
        out = self.fused(hidden_states, plan)
        return (out,) if self.tupled else out

    def attend(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Call the attention as the original block does."""
        out = self.attn(x)
        return out[0] if isinstance(out, tuple) else out


class WrappedLayer(_Wrapped, ViTLayer):
    """`layernorm_before`, `attention`, `layernorm_after`, `intermediate`, `output`."""

    drop_path1 = drop_path2 = layers.IDENTITY
    mlp = property(_Halves)


class TupledLayer(WrappedLayer):
    """Until 4.55."""

    tupled = True


class WrappedDinov2Layer(_Wrapped, Dinov2Layer):
    """`norm1`, `attention`, `layer_scale1`, `norm2`, `mlp`, `layer_scale2`."""


class TupledDinov2Layer(WrappedDinov2Layer):
    """Until 4.55."""

    tupled = True


class TupledCLIPLayer(_Wrapped, CLIPEncoderLayer):
    """Until 4.57."""

    tupled = True

    def attend(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Call the attention as the original block does."""
        return self.self_attn(hidden_states=x)[0]
