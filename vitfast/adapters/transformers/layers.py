"""The pre-norm blocks of Transformers' models."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ... import layers
from ..known import Rebuilt
from .attention import TransformersAttention, collects, idle, relative_of


class TransformersLayer(layers.FusedBlock, Rebuilt):
    """What the pre-norm blocks of all models share."""

    ls1 = ls2 = drop_path1 = drop_path2 = layers.IDENTITY

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`; masked attention is Transformers' own."""
        plan = self.plan_of(hidden_states, attention_mask, kwargs)
        if plan is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        return self.fused(hidden_states, plan, **kwargs)

    def plan_of(self, tokens: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> layers.BlockPlan | None:
        """The plan, or None where the original has to run: fused attention takes no mask, and hands out no weights."""
        attn = self.attn
        # Transformers captures weights by hooks on modules inside, which fused kernels pass by
        if mask is not None or collects("attentions"):
            return None
        # another attention is called with all that there is
        if isinstance(attn, TransformersAttention) and (attn.beyond(kwargs) or attn.unknown_implementation()):
            return None
        return self.plan_for(tokens)

    def watched(self, module: nn.Module) -> bool:
        """Whether somebody looks at what a module of this block does; Transformers' own hooks stay, mostly idle."""
        return layers.hooked(module) and not idle(module)

    def attend(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Call the attention as the original block does."""
        return self.attn(x, attention_mask=None, **kwargs)[0]


class ViTLayer(TransformersLayer):
    """`layernorm_before`, `attention`, `layernorm_after`, `mlp`, `dropout` behind both."""

    norm1 = layers.alias("layernorm_before")
    attn = layers.alias("attention")
    norm2 = layers.alias("layernorm_after")
    drop_path1 = drop_path2 = layers.alias("dropout")

    def attend(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Call the attention as the original block does."""
        return self.attention(x, None, **kwargs)[0]


class CLIPEncoderLayer(TransformersLayer):
    """`layer_norm1`, `self_attn`, `layer_norm2`, `mlp`."""

    norm1 = layers.alias("layer_norm1")
    attn = layers.alias("self_attn")
    norm2 = layers.alias("layer_norm2")

    def attend(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Call the attention as the original block does."""
        return self.self_attn(hidden_states=x, attention_mask=None, **kwargs)[0]


class Dinov2Layer(TransformersLayer):
    """`norm1`, `attention`, `layer_scale1`, `norm2`, `mlp`, `layer_scale2`, one `drop_path` for both."""

    attn = layers.alias("attention")
    ls1 = layers.alias("layer_scale1")
    ls2 = layers.alias("layer_scale2")
    drop_path1 = drop_path2 = layers.alias("drop_path")


class BeitLayer(ViTLayer):
    """ViT's names, `lambda_1` and `lambda_2`, a drop path behind both, and relative positions, which the kernel reads
    from their table where the image has the size that it is made for."""

    ls1 = property(lambda self: _tensor_or_none(self.lambda_1))
    ls2 = property(lambda self: _tensor_or_none(self.lambda_2))
    drop_path1 = drop_path2 = layers.alias("drop_path")
    bias_from_block = True
    # a mask that all layers share is Transformers' own, and with it the norms
    can_fold = False
    relative_position_bias: Any
    dropout: Any
    patch_size: int

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`; positions that all layers share come as a mask, and are Transformers' own."""
        relative = relative_of(self.relative_position_bias, self.patch_size, interpolate_pos_encoding, resolution)
        plan = None
        if relative is not False and layers.inactive(self.dropout):
            plan = self.plan_of(hidden_states, attention_mask, kwargs)
        if plan is None:
            return super(TransformersLayer, self).forward(  # type: ignore[misc]
                hidden_states, attention_mask, interpolate_pos_encoding, resolution, **kwargs
            )
        return self.fused(hidden_states, plan, relative=relative, **kwargs)

    def attention_inputs(self, relative: Any = None, **kwargs: Any) -> dict[str, Any]:
        """The table and the grid, for fused attention."""
        return {"relative": relative}

    def attend(self, x: Tensor, relative: Any = None, **kwargs: Any) -> Tensor:
        """Call the attention as the original block does."""
        bias = None if relative is None else self.relative_position_bias(relative[1])
        return self.attention(x, attention_mask=bias, **kwargs)[0]


def _tensor_or_none(scale: Any) -> Tensor | None:
    return scale if isinstance(scale, Tensor) else None
