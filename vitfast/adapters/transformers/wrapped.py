"""Layers of Transformers 4.50 to 5.8: attention in a wrapper, the MLP in two halves, tuples of one."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ... import layers
from ..known import asked, handed_on
from .attention import TransformersAttention, idle, relative_of
from .layers import BeitLayer, CLIPEncoderLayer, Dinov2Layer, TransformersLayer, ViTLayer
from .swin import SwinLayer


def _watched(module: nn.Module) -> bool:
    return layers.hooked(module) and not idle(module)


def _inner(name: str) -> Any:
    return property(lambda self: getattr(self.attention, name))


class _Tupled:
    """For layers that hand out a tuple, or have arguments whose places differ from version to version."""

    # what stands in a tuple behind the output; None where the output stands alone
    behind: ClassVar[tuple[None, ...] | None] = None
    # arguments behind the tokens
    names: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if original := vars(cls).get("replaces"):
            cls.names = tuple(handed_on(original, 2))

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments behind the tokens, by name."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}

    def handed(self, out: Tensor) -> Any:
        """The output, as the original hands it out."""
        return out if self.behind is None else (out, *self.behind)


class WrappedAttention(_Tupled, TransformersAttention):
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

    def why_dropout(self, notes: list[str]) -> str:
        """Why the original runs: somebody looks at the modules inside, too."""
        hooked = [f"{name} has hooks" for name in ("attention", "output") if _watched(getattr(self, name))]
        return "; ".join(hooked) or super().why_dropout(notes)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """`[B, N, D]` to `[B, N, D]`, as the original hands it out."""
        plan = None if asked(args, kwargs) or self.is_causal else self.plan_for(hidden_states)
        if plan is None or hidden_states.dim() != 3:
            return super(TransformersAttention, self).forward(hidden_states, *args, **kwargs)
        return self.handed(self.fused(hidden_states, plan))


class TupledAttention(WrappedAttention):
    """Until 4.55."""

    behind = ()


class WrappedBeitAttention(WrappedAttention):
    """BEiT's with torch's function, which adds relative positions that it makes for the image."""

    covers = ("attention",)
    behind: ClassVar[tuple[None, ...] | None] = (None,)
    scale = property(lambda self: self.head_dim**-0.5)
    is_causal = False
    # one of its classes reads the module's rate, the other one the config's
    dropout_prob = property(lambda self: max(self.attention.dropout.p, self.config.attention_probs_dropout_prob))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """`[B, N, D]` to `[B, N, D]`, as the original hands it out; positions that layers share are a mask."""
        relative, more = _relative(self.attention, self.named(args, kwargs))
        plan = None if relative is False or asked((), more) else self.plan_for(hidden_states)
        if plan is None or hidden_states.dim() != 3:
            return super(TransformersAttention, self).forward(hidden_states, *args, **kwargs)
        return self.handed(self.fused(hidden_states, plan, relative=relative))

    def query_key(  # type: ignore[override]
        self,
        x: Tensor,
        relative_position_bias: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `FusedAttention.query_key`, with what the original makes its bias of."""
        q, k, bias = super().query_key(x, relative_position_bias)
        if self.attention.has_relative_position_bias:
            assert resolution is not None
            patch = self.config.patch_size
            grid = (resolution[0] // patch, resolution[1] // patch)
            own = self.attention.relative_position_bias(grid, interpolate_pos_encoding, dim_size=x.shape[1])
            bias = own if bias is None else own + bias
        return q, k, bias


class TupledBeitAttention(WrappedBeitAttention):
    """BEiT's with its softmax in Python."""

    behind = ()


def _relative(inner: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What `relative_of` says of BEiT's innermost attention, and the arguments that it was not made of."""
    bias = getattr(inner, "relative_position_bias", None)
    more = dict(named)
    interpolates, resolution = more.pop("interpolate_pos_encoding", False), more.pop("resolution", None)
    return relative_of(bias, inner.config.patch_size, interpolates, resolution), more


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

    def __call__(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`; whether the kernels take the tokens is the block's to say."""
        return self.fused(x, self.make_plan())


class _Halved(_Tupled, layers.FusedBlock):
    """A block whose MLP may stand in two halves."""

    def make_plan(self, derive: bool = False) -> layers.BlockPlan:
        """As of any block; both halves of the MLP are looked at here."""
        halves = [name for name in ("intermediate", "output") if name in self._modules]
        hooked = [f"{name} has hooks" for name in halves if _watched(getattr(self, name))]
        return layers.BlockPlan("; ".join(hooked), ()) if hooked else super().make_plan(derive)


class _Wrapped(_Halved, TransformersLayer):
    """What the blocks share."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """`[B, N, D]` to `[B, N, D]`, as the original hands it out; masked attention is Transformers' own."""
        plan = None if asked(args, kwargs) else self.plan_of(hidden_states, None, {})
        if plan is None:
            return super(TransformersLayer, self).forward(hidden_states, *args, **kwargs)
        return self.handed(self.fused(hidden_states, plan))

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

    behind = ()


class WrappedDinov2Layer(_Wrapped, Dinov2Layer):
    """`norm1`, `attention`, `layer_scale1`, `norm2`, `mlp`, `layer_scale2`."""


class TupledDinov2Layer(WrappedDinov2Layer):
    """Until 4.55."""

    behind = ()


class TupledCLIPLayer(_Wrapped, CLIPEncoderLayer):
    """Until 4.57."""

    behind = ()

    def attend(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Call the attention as the original block does."""
        return self.self_attn(hidden_states=x)[0]


class WrappedBeitLayer(_Wrapped, BeitLayer):
    """BEiT's names in ViT's layout; the attention makes the bias."""

    behind: ClassVar[tuple[None, ...] | None] = (None,)
    dropout = layers.IDENTITY
    mlp = property(_Halves)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """`[B, N, D]` to `[B, N, D]`, as the original hands it out; positions that layers share are a mask."""
        named = self.named(args, kwargs)
        relative, more = _relative(self.attention.attention, named)
        plan = None if relative is False or asked((), more) else self.plan_of(hidden_states, None, {})
        if plan is None:
            return super(TransformersLayer, self).forward(hidden_states, *args, **kwargs)
        return self.handed(self.fused(hidden_states, plan, relative=relative, **named))

    def attend(self, x: Tensor, relative: Any = None, **kwargs: Any) -> Tensor:
        """Call the attention as the original block does."""
        return self.attention(x, **kwargs)[0]


class TupledBeitLayer(WrappedBeitLayer):
    """Around an attention with its softmax in Python."""

    behind = ()


class _Parts:
    """`attention.self` and `attention.output` of Swin by version 5's names."""

    def __init__(self, attention: Any) -> None:
        inner = self.relative_position_bias = attention.self
        self.q_proj, self.k_proj, self.v_proj = inner.query, inner.key, inner.value
        self.o_proj = attention.output.dense
        self.head_dim = inner.attention_head_size
        self.scaling = self.head_dim**-0.5


class WrappedSwinLayer(_Halved, SwinLayer):
    """Swin's until 5.8, which hands out weights where it is asked for them."""

    behind = ()
    covers = ("attention", "attention.self")
    parts = property(lambda self: _Parts(self.attention))
    drop_path2 = layers.IDENTITY
    mlp = property(_Halves)

    def why_dropout(self) -> str:
        """Why the original runs: one of the attention's dropouts is at work."""
        drops = (self.drop_path1, self.attention.self.dropout, self.attention.output.dropout)
        return "" if all(map(layers.inactive, drops)) else "dropout is at work"

    def why_implementation(self) -> str:
        """There is one implementation."""
        return ""

    def forward(self, hidden_states: Tensor, input_dimensions: Any, *args: Any, **kwargs: Any) -> Any:
        """`[B, H * W, D]` to `([B, H * W, D],)`."""
        named = self.named((input_dimensions, *args), kwargs)
        out = self.windowed(hidden_states, **named)
        if out is None:
            return super(SwinLayer, self).forward(hidden_states, input_dimensions, *args, **kwargs)
        return self.handed(out)
