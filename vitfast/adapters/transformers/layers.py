"""The pre-norm blocks of Transformers' models."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ... import layers
from ..known import Rebuilt, beside
from .attention import _Attention, _idle


class _Layer(layers.FusedBlock, Rebuilt):
    """What the pre-norm blocks of all models share."""

    ls1 = ls2 = drop_path1 = drop_path2 = layers.IDENTITY
    folds_itself = True

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`; masked attention is Transformers' own."""
        if self._leaves(hidden_states, attention_mask, kwargs):
            return super().forward(hidden_states, attention_mask, **kwargs)
        return self.fused(hidden_states, **kwargs)

    def _leaves(self, tokens: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
        """Whether the original has to run: fused attention takes no mask, and nothing else."""
        attn = self.attn
        return (
            mask is not None
            or layers.symbolic(tokens)
            # another attention is called with all that there is
            or (isinstance(attn, _Attention) and attn.beyond(kwargs))
        )

    def _watched(self, module: nn.Module) -> bool:
        return layers.hooked(module) and not _idle(module)

    def attend(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Call the attention as the original block does."""
        return self.attn(x, attention_mask=None, **kwargs)[0]


class ViTLayer(_Layer):
    """`layernorm_before`, `attention`, `layernorm_after`, `mlp`, `dropout` behind both."""

    norm1 = layers.alias("layernorm_before")
    attn = layers.alias("attention")
    norm2 = layers.alias("layernorm_after")
    drop_path1 = drop_path2 = layers.alias("dropout")
    drop_path_class: ClassVar[type[nn.Module]] = nn.Dropout
    rate_name = "p"

    def attend(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Call the attention as the original block does."""
        return self.attention(x, None, **kwargs)[0]


class CLIPEncoderLayer(_Layer):
    """`layer_norm1`, `self_attn`, `layer_norm2`, `mlp`."""

    norm1 = layers.alias("layer_norm1")
    attn = layers.alias("self_attn")
    norm2 = layers.alias("layer_norm2")

    def attend(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Call the attention as the original block does."""
        return self.self_attn(hidden_states=x, attention_mask=None, **kwargs)[0]


class Dinov2Layer(_Layer):
    """`norm1`, `attention`, `layer_scale1`, `norm2`, `mlp`, `layer_scale2`, one `drop_path` for both."""

    attn = layers.alias("attention")
    ls1 = layers.alias("layer_scale1")
    ls2 = layers.alias("layer_scale2")
    drop_path1 = drop_path2 = layers.alias("drop_path")

    gamma_name = "lambda1"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if original := vars(cls).get("replaces"):
            # each model has classes of its own for these
            cls.layer_scale_class = beside(original, ".*LayerScale")
            cls.drop_path_class = beside(original, ".*DropPath")


class BeitLayer(ViTLayer):
    """ViT's names, `lambda_1` and `lambda_2`, a drop path behind both, and relative positions, which the kernel reads
    from their table where the image has the size that it is made for."""

    ls1 = property(lambda self: _tensor_or_none(self.lambda_1))
    ls2 = property(lambda self: _tensor_or_none(self.lambda_2))
    drop_path1 = drop_path2 = layers.alias("drop_path")
    rate_name = "drop_prob"
    bias_from_block = True
    folds_itself = False
    relative_class: type[nn.Module]
    relative_position_bias: Any
    dropout: Any
    patch_size: int

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if original := vars(cls).get("replaces"):
            cls.drop_path_class = beside(original, ".*DropPath")
            cls.relative_class = beside(original, ".*RelativePositionBias")

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`; positions that all layers share come as a mask, and are Transformers' own."""
        relative = self._relative(interpolate_pos_encoding, resolution)
        if (
            relative is False
            or not layers._inactive(self.dropout)
            or self._leaves(hidden_states, attention_mask, kwargs)
        ):
            return super(_Layer, self).forward(  # type: ignore[misc]
                hidden_states, attention_mask, interpolate_pos_encoding, resolution, **kwargs
            )
        return self.fused(hidden_states, relative=relative, **kwargs)

    def _relative(self, interpolates: bool, resolution: tuple[int, int] | None) -> Any:
        """The table and the grid; None where there is none, False where the original has to make the bias."""
        module = self.relative_position_bias
        if module is None:
            return None
        if interpolates or resolution is None or not layers.plain(module, self.relative_class):
            return False
        grid = (resolution[0] // self.patch_size, resolution[1] // self.patch_size)
        # the original reads a table that is not square with its sides exchanged
        if grid != tuple(module.window_size) or grid[0] != grid[1]:
            return False
        return module.relative_position_bias_table, grid

    def given(self, relative: Any = None, **kwargs: Any) -> dict[str, Any]:
        """The table and the grid, for fused attention."""
        return {"relative": relative}

    def attend(self, x: Tensor, relative: Any = None, **kwargs: Any) -> Tensor:
        """Call the attention as the original block does."""
        bias = None if relative is None else self.relative_position_bias(relative[1])
        return self.attention(x, attention_mask=bias, **kwargs)[0]


def _tensor_or_none(scale: Any) -> Tensor | None:
    return scale if isinstance(scale, Tensor) else None
