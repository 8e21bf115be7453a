"""Transformers: ViT, DeiT, BEiT, CLIP, SigLIP, DINOv2, Swin, and every model that holds copies of their layers.

Transformers repeats a layer's source in each model that has it, so a class is known by what its `forward` does: step by
step the same as that of one of the prototypes here, in the version that is installed. And a prototype counts only
while its `forward` mentions nothing but what is known here, so a layer that a new version changed is left alone.

Contracts read in the sources of 5.23 and 4.57: an attention returns `(output, weights)`; outputs are captured by
hooks that are set once and stay; the models' own classes carry the registry of what is captured by name, so they are
left as they are.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import activations

from .. import attention_backends, kernels, layers
from . import Rebuilt, Swap, around, instructions
from .torch import decline_head_dim, never

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
        return (self.is_causal if causal is None else causal) or not _EXTRAS.isdisjoint(kwargs)

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

    num_heads = layers.alias("num_attention_heads")
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

    num_heads = layers.alias("num_attention_heads")
    scale = layers.alias("scaling")
    q_proj = layers.alias("query")
    k_proj = layers.alias("key")
    v_proj = layers.alias("value")
    proj = layers.IDENTITY
    dropout_name = "dropout_prob"

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
        return self.attended(hidden_states), None

    def limits(self) -> list[str]:
        return [limit for limit in super().limits() if not limit.startswith("proj")]


# classes of Transformers that compute what an epilogue does; versions differ in which there are
ACTIVATIONS: dict[type[nn.Module], str] = {
    getattr(activations, name): epilogue
    for name, epilogue in (
        ("GELUActivation", "gelu"),
        ("GELUTanh", "gelu_tanh"),
        ("PytorchGELUTanh", "gelu_tanh"),
        ("NewGELUActivation", "gelu_tanh"),
        ("FastGELUActivation", "gelu_tanh"),
        ("AccurateGELUActivation", "gelu_tanh"),
        ("QuickGELUActivation", "quick_gelu"),
    )
    if hasattr(activations, name)
}


class ViTMLP(layers.FusedMlp, Rebuilt):
    """`fc1`, `activation_fn`, `fc2`."""

    activations = ACTIVATIONS
    act = layers.alias("activation_fn")
    drop1 = drop2 = layers.IDENTITY


class Dinov2MLP(ViTMLP):
    """Version 4: `fc1`, `activation`, `fc2`."""

    act = layers.alias("activation")


class ViTIntermediate(layers.FusedLayer, Rebuilt):
    """Version 4, and models that kept its layout: the MLP's first layer and its activation."""

    kind = "mlp"
    dense: Any
    intermediate_act_fn: Any

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., D]` to `[..., F]`."""
        act, dense = self.intermediate_act_fn, self.dense
        activation = None if layers.hooked(act) else ViTMLP.epilogue(act)
        if layers.symbolic(hidden_states) or activation is None or not layers.plain_linear(dense):
            return super().forward(hidden_states)
        return kernels.linear(hidden_states, dense.weight, dense.bias, activation, tf32=self.tf32)

    def limits(self) -> list[str]:
        limits = layers._why_called("dense", self.dense, nn.Linear)
        act = self.intermediate_act_fn
        return limits + (["intermediate_act_fn has hooks: called as a module"] if layers.hooked(act) else [])


class ViTOutput(layers.FusedLayer, Rebuilt):
    """Version 4, and models that kept its layout: the MLP's second layer with the residual."""

    kind = "mlp"
    dense: Any
    dropout: Any

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """`[..., F]` and `[..., D]` to `[..., D]`."""
        if layers.symbolic(hidden_states) or not layers._inactive(self.dropout):
            return super().forward(hidden_states, input_tensor)
        return layers._linear(self.dense, hidden_states, input_tensor, None, self.tf32)

    def limits(self) -> list[str]:
        return layers._why_called("dense", self.dense, nn.Linear)


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
            cls.layer_scale_class = _copy_beside(original, "dinov2.Dinov2LayerScale")
            cls.drop_path_class = _copy_beside(original, "dinov2.Dinov2DropPath")


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
            cls.drop_path_class = _copy_beside(original, "beit.BeitDropPath")
            cls.relative_class = _copy_beside(original, "beit.BeitRelativePositionBias")

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


class SwinLayer(layers.FusedBlock, Rebuilt):
    """A layer of shifted windows: one kernel for what Transformers does by rolling, cutting and pasting the map."""

    norm1 = layers.alias("layernorm_before")
    attn = layers.alias("attention")
    norm2 = layers.alias("layernorm_after")
    ls1 = ls2 = layers.IDENTITY
    drop_path1 = layers.alias("drop_path")
    # the second branch has a dropout where the first has a drop path
    drop_path2 = layers.alias("dropout")
    attention_class: type[nn.Module]
    bias_class: type[nn.Module]
    window_size: int
    shift_size: int

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if original := vars(cls).get("replaces"):
            cls.drop_path_class = _copy_beside(original, "swin.SwinDropPath")
            cls.attention_class = _copy_beside(original, "swin.SwinAttention")
            cls.bias_class = _copy_beside(original, "swin.SwinRelativePositionBias")

    def _undropped(self, module: nn.Module) -> bool:
        return layers._inactive(module) or super()._undropped(module)

    def _fits(self, tokens: Tensor, size: Any, kwargs: dict[str, Any]) -> bool:
        """Whether the kernel computes what the original would of a map of this size."""
        attn, window = self.attention, self.window_size
        return (
            not layers.symbolic(tokens)
            and layers.windows_pay(tokens)
            and not torch.jit.is_tracing()
            # padded maps have tokens that are none; the libraries pad in different ways
            and size[0] % window == 0
            and size[1] % window == 0
            and layers.plain(attn, self.attention_class)
            and layers.plain(attn.relative_position_bias, self.bias_class)
            # a map smaller than the window fails in the original
            and attn.relative_position_bias.window_size == (window, window)
            and all(layers.plain_linear(m) for m in (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj))
            and not (self.training and attn.attention_dropout)
            and self._undropped(self.drop_path1)
            and self._undropped(self.dropout)
            and attn.config._attn_implementation in IMPLEMENTATIONS
            and self.attention_backend in attention_backends.OURS
            # what hands out weights
            and not kwargs.get("output_attentions")
            and not (attn.config._attn_implementation == "eager" and (_collects("attentions") or layers.hooked(self)))
        )

    def forward(
        self, hidden_states: Tensor, input_dimensions: Any, always_partition: bool = False, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """`[B, H * W, D]` to `([B, H * W, D], None)`."""
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        if not self._fits(hidden_states, input_dimensions, kwargs):
            return super().forward(hidden_states, input_dimensions, always_partition, **kwargs)  # type: ignore[misc]
        attn: Any = self.attention
        normed = self.norm1(hidden_states)
        parts = (attn.q_proj, attn.k_proj, attn.v_proj)
        if layers.packable(normed, *parts):
            qkv = kernels.linear(normed, *layers.packed(*parts), tf32=self.tf32)
        elif normed.shape[:-1].numel() > normed.shape[-1]:
            # weights are fewer than what comes of them
            qkv = kernels.linear(normed, *layers.joined(*parts), tf32=self.tf32)
        else:
            qkv = torch.cat([layers._linear(part, normed, None, None, self.tf32) for part in parts], dim=-1)
        out = kernels.window_attention(
            qkv.unflatten(1, tuple(input_dimensions)),
            attn.num_attention_heads,
            (self.window_size,) * 2,
            (int(self.shift_size),) * 2,
            layers.by_columns(attn.relative_position_bias.relative_position_bias_table),
            attn.scaling,
            tf32=self.tf32,
        )
        x = layers._linear(attn.o_proj, out.flatten(1, 2), hidden_states, None, self.tf32)
        if self._takes_residual(self.mlp):
            return self.mlp.fused(self.norm2(x), x), None
        return self.mlp(self.norm2(x)) + x, None

    def limits(self) -> list[str]:
        if not layers.plain(self.attention, self.attention_class):
            return ["attention has hooks or is another: the original forward runs"]
        return layers.why_uncut(self.attention_backend)


def _tensor_or_none(scale: Any) -> Tensor | None:
    return scale if isinstance(scale, Tensor) else None


class _PatchEmbeddings(layers.FusedPatchEmbed, Rebuilt):
    """A convolution's tokens, where its stride divides the image."""

    def fusable(self, pixels: Tensor) -> bool:
        """Whether the kernel computes what Transformers would."""
        if not super().fusable(pixels):
            return False
        rows, cols = self.proj.kernel_size
        return pixels.shape[2] % rows == 0 and pixels.shape[3] % cols == 0


class ViTPatchEmbeddings(_PatchEmbeddings):
    """`projection`."""

    proj = layers.alias("projection")
    # whether pixels of another dtype than the weights are cast rather than refused
    casts = False

    def fusable(self, pixels: Tensor) -> bool:
        """Whether the kernel computes what Transformers would."""
        return super().fusable(pixels) and (
            self.casts or pixels.dtype == self.projection.weight.dtype or torch.is_autocast_enabled(pixels.device.type)
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, N, D]`."""
        return self.tokens(pixel_values) if self.fusable(pixel_values) else super().forward(pixel_values)


class SizedPatchEmbeddings(ViTPatchEmbeddings):
    """Version 4: refuses images of another size by itself."""

    image_size: Any

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """`[B, C, H, W]` to `[B, N, D]`."""
        if interpolate_pos_encoding or pixel_values.shape[2:] == tuple(self.image_size):
            return super().forward(pixel_values)
        # for its error
        return super(ViTPatchEmbeddings, self).forward(pixel_values, interpolate_pos_encoding)


class Dinov2PatchEmbeddings(ViTPatchEmbeddings):
    """`projection`, for pixels of any dtype."""

    casts = True

    def tokens(self, pixels: Tensor, *args: Any) -> Tensor:
        """As `FusedPatchEmbed.tokens`."""
        return super().tokens(pixels.to(self.projection.weight.dtype), *args)


class ViTEmbeddings(layers.FusedLayer, Rebuilt):
    """Prefix tokens and position embeddings written by the patch-embed kernel."""

    kind = "patch_embed"
    patch_embeddings: Any
    position_embeddings: Any
    cls_token: Any
    image_size: Any

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """`[B, C, H, W]` to `[B, T + N, D]`; masked patches are Transformers' own."""
        stem = self.patch_embeddings
        if (
            bool_masked_pos is not None
            or layers.symbolic(pixel_values)
            or not isinstance(stem, ViTPatchEmbeddings)
            or layers.hooked(stem)
            or not stem.fusable(pixel_values)
            or torch.jit.is_tracing()
        ):
            return super().forward(pixel_values, bool_masked_pos, *args, **kwargs)
        interpolates = args[0] if args else kwargs.get("interpolate_pos_encoding", False)
        position = self._positions(pixel_values, interpolates)
        if position is False:
            # for its error
            return super().forward(pixel_values, bool_masked_pos, *args, **kwargs)
        prefix, position = self._prefix(position)
        return self.dropout(stem.tokens(pixel_values, prefix, position))

    def _counted(self, pixels: Tensor) -> Tensor:
        """Something of the shape `[1, T + N, D]`, which is all that Transformers' resizing reads."""
        rows, cols = self.patch_embeddings.projection.kernel_size
        count = (pixels.shape[2] // rows) * (pixels.shape[3] // cols) + self._prefix_length()
        return self.cls_token.expand(1, count, -1)

    def _prefix_length(self) -> int:
        return 1

    def _positions(self, pixels: Tensor, interpolates: Any) -> Any:
        """`[1, T + N, D]`, None where the model has none, False where the image does not fit."""
        height, width = pixels.shape[2:]
        if interpolates:
            return self.interpolate_pos_encoding(self._counted(pixels), height, width)
        return self.position_embeddings if (height, width) == tuple(self.image_size) else False

    def _prefix(self, position: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The prefix tokens `[T, D]` and what is added behind: `[T + N, D]` or, if the prefix has its own, `[N, D]`."""
        return self.cls_token[0], None if position is None else position[0]


class DeiTEmbeddings(ViTEmbeddings):
    """Class and distillation token."""

    distillation_token: Any

    def _prefix_length(self) -> int:
        return 2

    def _prefix(self, position: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return torch.cat((self.cls_token[0], self.distillation_token[0])), None if position is None else position[0]


class Dinov2Embeddings(ViTEmbeddings):
    """Position embeddings of whatever size the image has; BEiT may have none."""

    def _positions(self, pixels: Tensor, interpolates: Any) -> Any:
        if self.position_embeddings is None:
            return None
        return self.interpolate_pos_encoding(self._counted(pixels), *pixels.shape[2:])


class Dinov2WithRegistersEmbeddings(Dinov2Embeddings):
    """Registers between class token and patches, without position."""

    register_tokens: Any

    def _prefix(self, position: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert position is not None
        return torch.cat((self.cls_token[0] + position[0, :1], self.register_tokens[0])), position[0, 1:]


class SiglipVisionEmbeddings(_PatchEmbeddings):
    """`patch_embedding` and `position_embedding`."""

    proj = layers.alias("patch_embedding")
    position_embedding: Any
    position_ids: Any
    image_size: Any

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """`[B, C, H, W]` to `[B, T + N, D]`."""
        if not self.fusable(pixel_values) or layers.hooked(self.position_embedding) or torch.jit.is_tracing():
            return super().forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        height, width = pixel_values.shape[2:]
        rows, cols = self.proj.kernel_size
        if interpolate_pos_encoding:
            count = (height // rows) * (width // cols) + len(self._prefix())
            like = self.position_embedding.weight[:1].expand(1, count, -1)
            position = self.interpolate_pos_encoding(like, height, width)
        elif self._fits(height, width):
            position = self.position_embedding(self.position_ids)
        else:
            # for its error
            return super().forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        pixels = pixel_values.to(self.proj.weight.dtype)
        prefix = self._prefix()
        return self.tokens(pixels, prefix[0] if prefix else None, position[0])

    def _fits(self, height: int, width: int) -> bool:
        rows, cols = self.proj.kernel_size
        return (height // rows) * (width // cols) == self.position_ids.shape[1]

    def _prefix(self) -> tuple[Tensor, ...]:
        return ()


class CLIPVisionEmbeddings(SiglipVisionEmbeddings):
    """`class_embedding` in front."""

    class_embedding: Any

    def _fits(self, height: int, width: int) -> bool:
        return height == width == self.image_size

    def _prefix(self) -> tuple[Tensor, ...]:
        return (self.class_embedding[None],)


def _decline_attention(module: Any) -> str | None:
    function = inspect.unwrap(type(module).forward).__globals__.get("eager_attention_forward")
    if function is not None and instructions(function) not in _softmaxes():
        return "its eager attention is not the plain softmax"
    names = ("q_proj", "k_proj", "v_proj") if hasattr(module, "q_proj") else ("query", "key", "value")
    # what stands in the place of a linear layer need not say how wide it is
    widths = [linear.out_features for name in names if hasattr(linear := getattr(module, name), "out_features")]
    if len(set(widths)) > 1:
        return f"q, k and v are {widths} wide: no kernel shares keys and values between heads"
    heads = getattr(module, "num_heads", None) or getattr(module, "num_attention_heads", None)
    if heads is None:
        return "does not say how many heads it has"
    return decline_head_dim(widths[0] // heads) if widths else None


def _decline_mlp(module: Any) -> str | None:
    names = ("activation_fn", "activation", "intermediate_act_fn")
    act: Any = next(getattr(module, name) for name in names if hasattr(module, name))
    if not isinstance(act, nn.Module) or ViTMLP.epilogue(act) is None:
        return f"activation {getattr(act, '__name__', type(act).__name__)} is in no epilogue"
    return None


def _decline_gated(module: Any) -> str:
    return "gated MLP: no kernel has its gate in an epilogue"


@dataclass(frozen=True)
class _Prototype:
    """One class of Transformers whose copies are known.

    Attributes:
        name: `"vit.ViTLayer"` for `transformers.models.vit.modeling_vit.ViTLayer`.
        mixin: the fused layer for it and its copies.
        mentions: the names that its forward takes and mentions, every one. The names of torch's own functions and
            attributes that most of them mention (`_COMMON`) are left out.
        decline: says why a module must stay, or None.
    """

    name: str
    mixin: type[nn.Module]
    mentions: str
    decline: Callable[[nn.Module], str | None] = never


_COMMON = frozenset(
    "self kwargs ValueError cat expand flatten shape size torch transpose type_as unsqueeze to dtype weight view"
    " reshape contiguous training where".split()
)
_INTERFACE = "hidden_states config _attn_implementation ALL_ATTENTION_FUNCTIONS eager_attention_forward"
_SPLIT = f"{_INTERFACE} attention_mask q_proj k_proj v_proj head_dim"
_KEPT_ATTENTION = (
    f"{_INTERFACE} query key value num_attention_heads attention_head_size all_head_size dropout_prob scaling is_causal"
)
_V4_ATTENTION = f"{_KEPT_ATTENTION} head_mask"
_PIXELS = "pixel_values num_channels projection"
_TOKENS = "pixel_values bool_masked_pos interpolate_pos_encoding cls_token mask_token dropout patch_embeddings"
_TOWER = "pixel_values interpolate_pos_encoding patch_embedding position_embedding position_ids"

_PROTOTYPES = (
    _Prototype(
        "vit.ViTAttention",
        ViTAttention,
        f"{_SPLIT} o_proj attention_dropout scaling get_interface",
        _decline_attention,
    ),
    _Prototype(
        "clip.CLIPAttention", CLIPAttention, f"{_SPLIT} out_proj dropout scale get_interface", _decline_attention
    ),
    _Prototype(
        "clip.CLIPAttention",
        CLIPAttention,
        f"{_SPLIT} out_proj dropout scale is_causal causal_attention_mask output_attentions",
        _decline_attention,
    ),
    _Prototype(
        "siglip.SiglipAttention",
        CLIPAttention,
        f"{_SPLIT} out_proj dropout scale is_causal get_interface",
        _decline_attention,
    ),
    _Prototype(
        "siglip.SiglipAttention",
        CLIPAttention,
        f"{_SPLIT} out_proj dropout scale is_causal num_heads",
        _decline_attention,
    ),
    _Prototype("vit.ViTSelfAttention", ViTSelfAttention, _V4_ATTENTION, _decline_attention),
    _Prototype("dinov2.Dinov2SelfAttention", ViTSelfAttention, _V4_ATTENTION, _decline_attention),
    _Prototype("yolos.YolosSelfAttention", ViTSelfAttention, f"{_KEPT_ATTENTION} get_interface", _decline_attention),
    _Prototype("vit.ViTMLP", ViTMLP, "hidden_states activation_fn fc1 fc2", _decline_mlp),
    _Prototype("clip.CLIPMLP", ViTMLP, "hidden_states activation_fn fc1 fc2", _decline_mlp),
    _Prototype("dinov2.Dinov2MLP", Dinov2MLP, "hidden_state activation fc1 fc2", _decline_mlp),
    _Prototype("vit.ViTIntermediate", ViTIntermediate, "hidden_states dense intermediate_act_fn", _decline_mlp),
    _Prototype("vit.ViTOutput", ViTOutput, "hidden_states input_tensor dense dropout"),
    _Prototype("yolos.YolosIntermediate", ViTIntermediate, "hidden_states dense intermediate_act_fn", _decline_mlp),
    _Prototype("yolos.YolosOutput", ViTOutput, "hidden_states input_tensor dense dropout"),
    _Prototype("vitpose_backbone.VitPoseBackboneMLP", Dinov2MLP, "hidden_state activation fc1 fc2", _decline_mlp),
    _Prototype(
        "vit.ViTLayer",
        ViTLayer,
        "hidden_states attention_mask layernorm_before attention layernorm_after mlp dropout",
    ),
    _Prototype(
        "clip.CLIPEncoderLayer",
        CLIPEncoderLayer,
        "hidden_states attention_mask layer_norm1 self_attn layer_norm2 mlp",
    ),
    _Prototype(
        "dinov2.Dinov2Layer",
        Dinov2Layer,
        "hidden_states attention_mask norm1 attention layer_scale1 drop_path norm2 mlp layer_scale2",
    ),
    _Prototype(
        "beit.BeitLayer",
        BeitLayer,
        "hidden_states attention_mask interpolate_pos_encoding resolution patch_size relative_position_bias"
        " layernorm_before attention dropout lambda_1 drop_path layernorm_after mlp lambda_2",
    ),
    _Prototype(
        "swin.SwinLayer",
        SwinLayer,
        "hidden_states input_dimensions always_partition set_shift_and_window_size layernorm_before maybe_pad"
        " window_partition cyclic_shift window_size get_attn_mask device attention dropout window_reverse drop_path"
        " layernorm_after mlp",
    ),
    _Prototype("vit.ViTPatchEmbeddings", ViTPatchEmbeddings, _PIXELS),
    _Prototype("vit.ViTPatchEmbeddings", SizedPatchEmbeddings, f"{_PIXELS} interpolate_pos_encoding image_size"),
    _Prototype("dinov2.Dinov2PatchEmbeddings", Dinov2PatchEmbeddings, _PIXELS),
    _Prototype("vit.ViTEmbeddings", ViTEmbeddings, f"{_TOKENS} position_embeddings image_size"),
    _Prototype("deit.DeiTEmbeddings", DeiTEmbeddings, f"{_TOKENS} position_embeddings image_size distillation_token"),
    _Prototype("dinov2.Dinov2Embeddings", Dinov2Embeddings, f"{_TOKENS} position_embeddings"),
    _Prototype(
        "dinov2_with_registers.Dinov2WithRegistersEmbeddings",
        Dinov2WithRegistersEmbeddings,
        f"{_TOKENS} register_tokens",
    ),
    _Prototype("clip.CLIPVisionEmbeddings", CLIPVisionEmbeddings, f"{_TOWER} class_embedding image_size"),
    _Prototype("siglip.SiglipVisionEmbeddings", SiglipVisionEmbeddings, _TOWER),
    _Prototype("dinov2.Dinov2SwiGLUFFN", layers.FusedMlp, "x down_proj act_fn gate_proj up_proj", _decline_gated),
)


def _class(name: str) -> type[nn.Module] | None:
    """A class of Transformers by a prototype's name, or None where the installed version has none."""
    model, _, kind = name.partition(".")
    try:
        module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    except ImportError:
        return None
    return getattr(module, kind, None)


@functools.cache
def _known() -> dict[tuple[tuple[str, Any], ...], _Prototype]:
    """Prototypes by what their forward does."""
    known = {}
    for prototype in _PROTOTYPES:
        kind = _class(prototype.name)
        if kind is None:
            continue
        forward = inspect.unwrap(kind.forward)
        names = {*inspect.signature(forward).parameters, *forward.__code__.co_names}
        if names - _COMMON == set(prototype.mentions.split()):
            known[instructions(forward)] = prototype
    return known


@functools.cache
def _softmaxes() -> frozenset[tuple[tuple[str, Any], ...]]:
    """The ways in which the layers' files write eager attention: all are the plain softmax.

    Some repeat keys and values for the heads that share them, which is once for the modules that are not declined.
    """
    found = set()
    names = (
        *("vit.ViTLayer", "clip.CLIPEncoderLayer", "siglip.SiglipEncoderLayer", "dinov2.Dinov2Layer"),
        *("altclip.AltCLIPEncoderLayer", "idefics2.Idefics2EncoderLayer", "lw_detr.LwDetrViTAttention"),
    )
    for name in names:
        kind = _class(name)
        function = None if kind is None else inspect.unwrap(kind.forward).__globals__.get("eager_attention_forward")
        if function is not None:
            found.add(instructions(function))
    return frozenset(found)


def _copy_beside(kind: type[nn.Module], name: str) -> type[nn.Module]:
    """The class in a class's file that does what that of another file does; where there is none, one that is unused."""
    original: Any = _class(name)
    wanted = None if original is None else instructions(original.forward)
    for candidate in vars(sys.modules[kind.__module__]).values():
        if isinstance(candidate, type) and issubclass(candidate, nn.Module) and candidate.__module__ == kind.__module__:
            if instructions(candidate.forward) == wanted:
                return candidate
    return nn.Identity


@functools.cache
def find(kind: Any) -> Swap | None:
    """The swap for a class, or None where it is of no interest."""
    if not issubclass(kind, nn.Module) or not hasattr(inspect.unwrap(kind.forward), "__code__"):
        return None
    prototype = _known().get(instructions(kind.forward))
    # language models have gated MLPs too, and those are nobody's business here
    if prototype is None or (prototype.decline is _decline_gated and "SwiGLUFFN" not in kind.__name__):
        return None
    return Swap(around(prototype.mixin, kind), prototype.decline)
