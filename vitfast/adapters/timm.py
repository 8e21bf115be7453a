"""timm: `VisionTransformer` and DeiT with their hybrids, BEiT, EVA-02, Swin and Swin-V2.

Imported only for models that hold a class of timm. Contracts read in timm 1.0.31's sources: `Attention.forward` and
`Block.forward` take `attn_mask` and `is_causal`; position embedding and prefix tokens are added in
`VisionTransformer._pos_embed`; `PatchEmbed` hands out NLC, or NHWC with `dynamic_img_size`. BEiT, EVA-02 and Swin-V2
keep biases of q and v beside a qkv layer that has none, and do not call that layer as a module. Swin's blocks take
maps `[B, H, W, D]`; their MLPs see them as `[B, H * W, D]`.

`fused_attn` chooses between two ways to write one formula, so it is not asked for.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import timm.layers
import torch
from timm.layers import apply_rot_embed_cat, resample_abs_pos_embed
from timm.models import (
    beit,
    deit,
    eva,
    swin_transformer,
    swin_transformer_v2,
    swin_transformer_v2_cr,
    vision_transformer,
    vision_transformer_relpos,
    vision_transformer_sam,
)
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn

from .. import attention_backends, kernels, layers
from . import Swap
from .torch import decline_head_dim, decline_layer_norm, never


class FusedTimmLayerNorm(layers.FusedLayerNorm, timm.layers.LayerNorm):
    """`timm.layers.LayerNorm`."""

    replaces = timm.layers.LayerNorm


class FusedTimmPatchEmbed(layers.FusedPatchEmbed, timm.layers.PatchEmbed):
    """`timm.layers.PatchEmbed` without image padding."""

    replaces = timm.layers.PatchEmbed

    def fusable(self, pixels: Tensor) -> bool:
        """Whether the kernel computes what timm would; what timm refuses, timm shall refuse in its own words."""
        if not super().fusable(pixels):
            return False
        height, width = pixels.shape[2:]
        if self.img_size is not None and self.strict_img_size and (height, width) != tuple(self.img_size):
            return False
        return height % self.patch_size[0] == 0 and width % self.patch_size[1] == 0

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, N, D]`, or `[B, rows, cols, D]` where timm keeps the grid."""
        if not self.fusable(x):
            return super().forward(x)
        tokens = self.tokens(x)
        if not self.flatten:
            tokens = tokens.unflatten(1, (x.shape[2] // self.patch_size[0], x.shape[3] // self.patch_size[1]))
        return self.norm(tokens)


class FusedTimmAttention(layers.FusedAttention, timm.layers.Attention):
    """`timm.layers.Attention` without a gate."""

    replaces = timm.layers.Attention

    def merged(self, out: Tensor) -> Tensor:
        """timm's optional norm of the merged heads."""
        return self.norm(out)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`; masked attention is timm's own."""
        if attn_mask is not None or is_causal or layers.symbolic(x):
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        return self.fused(x) if self.fusable() else super().forward(x)


class FusedTimmMlp(layers.FusedMlp, timm.layers.Mlp):
    """`timm.layers.Mlp` of linear layers."""

    replaces = timm.layers.Mlp
    activations: ClassVar = {
        timm.layers.activations.GELU: "gelu",
        timm.layers.activations.GELUTanh: "gelu_tanh",
        timm.layers.activations.QuickGELU: "quick_gelu",
    }

    def between(self, hidden: Tensor) -> Tensor:
        """timm's optional norm between the two layers."""
        return self.norm(hidden)


class FusedTimmBlock(layers.FusedBlock, vision_transformer.Block):
    """`timm.models.vision_transformer.Block`."""

    replaces = vision_transformer.Block
    layer_scale_class = timm.layers.LayerScale
    drop_path_class = timm.layers.DropPath

    def attend(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Call the attention with the keywords that timm's block gives it: hooks see them."""
        return self.attn(x, attn_mask=None, is_causal=False)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`; masked attention is timm's own."""
        if attn_mask is not None or is_causal or layers.symbolic(x):
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        return self.fused(x)


class _FusedModel(layers.FusedModel):
    """Prefix tokens and position embedding written by the patch-embed kernel, blocks run by `encode`."""

    patch_embed: Any
    pos_embed: Any
    cls_token: Any
    reg_token: Any

    def _prefix(self) -> list[Tensor]:
        return [token[0] for token in (self.cls_token, self.reg_token) if token is not None]

    def pooled_tokens(self) -> int | None:
        """1 where the class token is the pooled output."""
        return 1 if self.global_pool == "token" and self.attn_pool is None else None

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """`[B, C, H, W]` to `[B, T + N, D]`."""
        if attn_mask is not None or is_causal or layers.symbolic(x):
            return super().forward_features(x, attn_mask=attn_mask, is_causal=is_causal)  # type: ignore[misc]
        return self._features(x, None)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """`[B, C, H, W]` to logits; the last block computes what the head reads."""
        kept = None if attn_mask is not None or is_causal or layers.symbolic(x) else self.kept()
        if kept is None or self.grad_checkpointing:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)  # type: ignore[misc]
        return self.forward_head(self._features(x, kept))

    def _features(self, x: Tensor, kept: int | None) -> Tensor:
        # without a name, which would keep the first tokens' memory through all blocks
        if self.grad_checkpointing:
            return self.norm(checkpoint_seq(self.blocks, self._embed(x)))
        return self.norm(self.encode(self._embed(x), kept))

    def _embed(self, x: Tensor) -> Tensor:
        stem = self.patch_embed
        if (
            not isinstance(stem, FusedTimmPatchEmbed)
            or layers.hooked(stem)
            or not layers.plain(stem.norm, nn.Identity)
            or "_pos_embed" in vars(self)
            or not stem.fusable(x)
        ):
            return self.norm_pre(self.patch_drop(self._pos_embed(stem(x))))
        pos = self.pos_embed
        if pos is not None and self.dynamic_img_size:
            pos = resample_abs_pos_embed(
                pos,
                new_size=[x.shape[2] // stem.patch_size[0], x.shape[3] // stem.patch_size[1]],
                old_size=stem.grid_size,
                num_prefix_tokens=0 if self.no_embed_class else self.num_prefix_tokens,
            )
        prefix = self._prefix()
        tokens = stem.tokens(
            x,
            prefix[0] if len(prefix) == 1 else torch.cat(prefix) if prefix else None,
            None if pos is None else pos[0],
        )
        # timm adds no dropout where there is no position embedding
        tokens = tokens if pos is None else self.pos_drop(tokens)
        return self.norm_pre(self.patch_drop(tokens))


class FusedTimmVisionTransformer(_FusedModel, vision_transformer.VisionTransformer):
    """`timm.models.vision_transformer.VisionTransformer`."""

    replaces = vision_transformer.VisionTransformer


class FusedTimmVisionTransformerDistilled(_FusedModel, deit.VisionTransformerDistilled):
    """`timm.models.deit.VisionTransformerDistilled`."""

    replaces = deit.VisionTransformerDistilled

    def _prefix(self) -> list[Tensor]:
        return [self.cls_token[0], self.dist_token[0]]

    def pooled_tokens(self) -> int | None:
        """Class and distillation token."""
        return 2


class _PartBias(layers.FusedAttention):
    """q and v have biases beside a qkv layer without: all are one layer."""

    q_bias: Any
    k_bias: Any
    v_bias: Any
    qkv_bias_separate: bool

    def _apart(self) -> bool:
        # the layer is called as a module, and what it hands out is rounded before a bias is added
        return self.q_bias is None or self.qkv_bias_separate

    def packed(self, x: Tensor) -> Tensor:
        """Normed `[..., D]` to q, k and v `[..., 3 * H * d]`."""
        if not self._apart():
            return kernels.linear(x, self.qkv.weight, self._bias(), tf32=self.tf32)
        qkv = layers._linear(self.qkv, x, None, None, self.tf32)
        if self.q_bias is not None:
            qkv += self._bias()
        return qkv

    def attended(self, x: Tensor, **given: Any) -> Tensor:
        """Normed tokens `[B, N, D]` to merged heads `[B, N, H * d]`."""
        return self.core(self.packed(x), **given)

    def plain_in(self) -> bool:
        """Whether the projection to q, k and v can be computed without calling a module."""
        return layers.plain_linear(self.qkv) and (self.q_bias is None or not self._apart())

    def weights_in(self) -> tuple[Tensor, Tensor | None]:
        """The layer's weight, and the bias, which may be three."""
        return self.qkv.weight, self.qkv.bias if self.q_bias is None else self._bias()

    def _bias(self) -> Tensor:
        biases = (self.q_bias, self.k_bias, self.v_bias)
        if not layers.derivable(self.q_bias) or any(bias.is_inference() for bias in biases):
            return torch.cat(biases)
        return kernels.derived("packed", _pack, *biases)[0]

    def whole(self) -> bool:
        """Never: what is added to the scores depends on where a token stands."""
        return False

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `FusedAttention.query_key`."""
        q, k, _ = self.heads(self.packed(x))
        return q, k, None

    def limits_in(self) -> list[str]:
        """`limits` of the projection to q, k and v."""
        return layers._why_called("qkv", self.qkv, nn.Linear) if self._apart() else []


def _pack(*biases: Tensor) -> tuple[Tensor]:
    return (torch.cat(biases),)


class FusedTimmBeitAttention(_PartBias, beit.Attention):
    """`timm.models.beit.Attention`: the relative position bias is read from its table inside the kernel."""

    replaces = beit.Attention
    q_norm = k_norm = layers.IDENTITY

    def core(self, qkv: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[B, N, 3 * H * d]` to `[B, N, H * d]`, with a bias `[H, N, N]` that blocks share."""
        table = self.relative_position_bias_table
        if table is None and bias is None:
            return super().core(qkv)
        q, k, v = self.heads(qkv)
        if bias is not None or self.attention_backend not in attention_backends.OURS:
            return self.mixed(q, k, v, self._summed(bias))
        return self.relative(q, k, v, table, tuple(self.window_size))

    def _summed(self, bias: Tensor | None) -> Tensor | None:
        # of the block and of all blocks, N x N in memory
        if self.relative_position_bias_table is None:
            return bias
        return self._get_rel_pos_bias() if bias is None else self._get_rel_pos_bias() + bias

    def query_key(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `FusedAttention.query_key`; a bias that blocks share is an argument of the forward's."""
        q, k, _ = super().query_key(x)
        return q, k, self._summed(shared_rel_pos_bias)

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`."""
        if layers.symbolic(x) or not self.fusable():
            return super().forward(x, shared_rel_pos_bias)
        return self.fused(x, bias=shared_rel_pos_bias)


class _ScaledBlock(layers.FusedBlock):
    """BEiT's and EVA's blocks: LayerScale as a parameter of the block, and a model that calls them one by one."""

    ls1 = layers.alias("gamma_1")
    ls2 = layers.alias("gamma_2")
    drop_path_class = timm.layers.DropPath
    folds_itself = True


class FusedTimmBeitBlock(_ScaledBlock, beit.Block):
    """`timm.models.beit.Block`."""

    replaces = beit.Block

    def given(self, bias: Tensor | None = None, **kwargs: Any) -> dict[str, Any]:
        """The bias that blocks share."""
        return {"bias": bias}

    def attend(self, x: Tensor, bias: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Call the attention with the keyword that timm's block gives it."""
        return self.attn(x, shared_rel_pos_bias=bias)

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`."""
        if layers.symbolic(x):
            return super().forward(x, shared_rel_pos_bias)
        return self.fused(x, bias=shared_rel_pos_bias)


class _RotaryAttention(_PartBias, layers.FusedSplitAttention):
    """Tokens behind the prefix are rotated by their position, by timm's own function.

    q, k and v come from one layer or from three.
    """

    num_prefix_tokens: int
    norm: Any

    def _form(self) -> Any:
        return layers.FusedSplitAttention if self.qkv is None else _PartBias

    def attended(self, x: Tensor, rope: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Normed tokens `[B, N, D]` to merged heads `[B, N, H * d]`."""
        if self.qkv is not None:
            return self.core(self.packed(x), rope)
        if layers.packable(x, self.q_proj, self.k_proj, self.v_proj):
            return self.core(kernels.linear(x, *self.weights_in(), tf32=self.tf32), rope)
        return self.turned(*self._projected(x), rope)

    def plain_in(self) -> bool:
        """Whether the projection to q, k and v can be computed without calling a module."""
        return self._form().plain_in(self)

    def weights_in(self) -> tuple[Tensor, Tensor | None]:
        """As the form of the projection has it."""
        return self._form().weights_in(self)

    def limits_in(self) -> list[str]:
        """`limits` of the projection to q, k and v."""
        return self._form().limits_in(self)

    def core(self, qkv: Tensor, rope: Tensor | None = None) -> Tensor:
        """`[B, N, 3 * H * d]` to `[B, N, H * d]`."""
        return super().core(qkv) if rope is None else self.turned(*self.heads(qkv), rope)

    def turned(self, q: Tensor, k: Tensor, v: Tensor, rope: Tensor | None) -> Tensor:
        """`mixed` of rotated q and k: `[B, H, N, d]` thrice to `[B, N, H * d]`."""
        return self.mixed(self._rotated(q, rope, v), self._rotated(k, rope, v), v)

    def _rotated(self, x: Tensor, rope: Tensor | None, like: Tensor) -> Tensor:
        if rope is None:
            return x
        prefix, rest = x[:, :, : self.num_prefix_tokens], x[:, :, self.num_prefix_tokens :]
        rest = apply_rot_embed_cat(rest, rope, half=getattr(self, "rotate_half", False))
        return torch.cat([prefix, rest], dim=2).type_as(like)

    def merged(self, out: Tensor) -> Tensor:
        """timm's optional norm of the merged heads."""
        return self.norm(out)

    def query_key(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `FusedAttention.query_key`; the rotation is an argument of the forward's."""
        q, k, _ = self._form().query_key(self, x)
        return self._rotated(q, rope, q), self._rotated(k, rope, k), None

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`; masked attention is timm's own."""
        if attn_mask is not None or is_causal or layers.symbolic(x) or not self.fusable():
            return super().forward(x, rope=rope, attn_mask=attn_mask, is_causal=is_causal)  # type: ignore[misc]
        return self.fused(x, rope=rope)


class FusedTimmEvaAttention(_RotaryAttention, eva.EvaAttention):
    """`timm.models.eva.EvaAttention` without a gate."""

    replaces = eva.EvaAttention


class FusedTimmAttentionRope(_RotaryAttention, timm.layers.AttentionRope):
    """`timm.layers.AttentionRope` without a gate, with as many heads of k and v as of q."""

    replaces = timm.layers.AttentionRope
    q_bias = k_bias = v_bias = None


class FusedTimmEvaBlock(_ScaledBlock, eva.EvaBlock):
    """`timm.models.eva.EvaBlock`."""

    replaces = eva.EvaBlock

    def given(self, rope: Tensor | None = None, **kwargs: Any) -> dict[str, Any]:
        """The rotation."""
        return {"rope": rope}

    def attend(self, x: Tensor, rope: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Call the attention with the keywords that timm's block gives it."""
        return self.attn(x, rope=rope, attn_mask=None, is_causal=False)

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`; masked attention is timm's own."""
        if attn_mask is not None or is_causal or layers.symbolic(x):
            return super().forward(x, rope=rope, attn_mask=attn_mask, is_causal=is_causal)
        return self.fused(x, rope=rope)


class _WindowAttention(layers.FusedAttention):
    """Attention within windows: of a map where a block asks, of windows that timm has cut where it is called."""

    q_norm = k_norm = layers.IDENTITY
    window_size: tuple[int, int]
    softmax: Any

    def fusable(self) -> bool:
        """Whether the kernel computes what the original would."""
        # hooks shall see windows, and dropout of their tokens draws in another order than that of the map's
        called = (self.qkv, self.softmax, self.proj)
        return (
            super().fusable()
            and layers._inactive(self.proj_drop)
            and not any(map(layers.hooked, called))
            and self.attention_backend in attention_backends.OURS
        )

    def packed(self, x: Tensor) -> Tensor:
        """Normed `[..., D]` to q, k and v `[..., 3 * H * d]`."""
        return layers._linear(self.qkv, x, None, None, self.tf32)

    def table(self) -> Tensor:
        """`[(2 * wh - 1) * (2 * ww - 1), H]`."""
        return layers.by_columns(self.relative_position_bias_table)

    def scales(self) -> Any:
        """Of the scores: a number, or one per head for cosine attention."""
        return self.scale

    def attended(self, x: Tensor, shift: tuple[int, int] = (0, 0)) -> Tensor:  # type: ignore[override]
        """Normed map `[B, H, W, D]` to the heads' `[B, H, W, H * d]`."""
        return kernels.window_attention(
            self.packed(x), self.num_heads, self.window_size, shift, self.table(), self.scales(), tf32=self.tf32
        )

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Refused: tokens of two windows do not meet."""
        raise ValueError(f"{type(self).__name__} attends within windows; it has no map of all tokens")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Windows `[B, N, D]` to `[B, N, D]`; masked attention is timm's own, so it is a block that shifts windows."""
        height, width = self.window_size
        cut = mask is not None or layers.symbolic(x) or x.shape[1] != height * width
        if cut or not layers.windows_pay(x) or not self.fusable():
            return super().forward(x, mask)  # type: ignore[misc]
        return self.fused(x.unflatten(1, (height, width))).flatten(1, 2)

    def limits(self) -> list[str]:
        names = ("qkv", "attn_drop", "softmax", "proj", "proj_drop")
        hooked = [name for name in names if layers.hooked(getattr(self, name))]
        limits = [f"{name} has hooks: the original forward runs" for name in hooked]
        if not hooked:
            limits = self.limits_in() + layers._why_called("proj", self.proj, nn.Linear)
        for what, drop in (("attention dropout", self.attn_drop), ("dropout of windows", self.proj_drop)):
            if rate := getattr(drop, "p", 0.0):
                limits.append(f"{what} {rate:g}: the original forward runs in training")
        return limits + layers.why_uncut(self.attention_backend)


class FusedTimmWindowAttention(_WindowAttention, swin_transformer.WindowAttention):
    """`timm.models.swin_transformer.WindowAttention`."""

    replaces = swin_transformer.WindowAttention


class FusedTimmWindowAttentionV2(_WindowAttention, _PartBias, swin_transformer_v2.WindowAttention):  # type: ignore[misc]
    """`timm.models.swin_transformer_v2.WindowAttention`: cosine attention, its table from a small MLP."""

    replaces = swin_transformer_v2.WindowAttention

    def packed(self, x: Tensor) -> Tensor:
        """Normed `[..., D]` to q, k and v `[..., 3 * H * d]`."""
        return _PartBias.packed(self, x)

    def table(self) -> Tensor:
        """`[(2 * wh - 1) * (2 * ww - 1), H]`."""
        return layers.position_table(self.cpb_mlp, self.relative_coords_table)

    def scales(self) -> Tensor:
        """Of the cosines, one per head."""
        return layers.cosine_scales(self.logit_scale)


class _SwinBlock(layers.FusedBlock):
    """Windows are shifted and cut by index arithmetic in the kernel; a map that they do not divide is timm's own."""

    ls1 = ls2 = layers.IDENTITY
    drop_path_class = timm.layers.DropPath
    input_resolution: tuple[int, int]
    window_size: tuple[int, int]
    shift_size: tuple[int, int]
    dynamic_mask: bool
    _attn: Any

    def _cuts(self, x: Tensor) -> bool:
        """Whether the kernel cuts this map as timm would."""
        attn: Any = self.attn
        size = tuple(x.shape[1:3])
        return (
            layers.windows_pay(x)
            and self._takes_residual(attn)
            and isinstance(attn, _WindowAttention)
            and "_attn" not in vars(self)
            and tuple(attn.window_size) == tuple(self.window_size)
            and not any(side % window for side, window in zip(size, self.window_size, strict=True))
            # timm's mask is of one size, unless it is made in each call
            and (self.dynamic_mask or not any(self.shift_size) or size == tuple(self.input_resolution))
        )

    def limits(self) -> list[str]:
        limits = super().limits()
        if any(side % window for side, window in zip(self.input_resolution, self.window_size, strict=True)):
            size, window = ("x".join(map(str, sides)) for sides in (self.input_resolution, self.window_size))
            limits.append(f"maps of {size} are padded to windows of {window}: timm's own windows")
        return limits


class FusedTimmSwinBlock(_SwinBlock, swin_transformer.SwinTransformerBlock):
    """`timm.models.swin_transformer.SwinTransformerBlock`."""

    replaces = swin_transformer.SwinTransformerBlock

    def _branch(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if self._cuts(x):
            return self.attn.fused(x, residual, shift=self.shift_size)
        return layers._residual(self._attn(x), residual, None)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, D]` to `[B, H, W, D]`."""
        if layers.symbolic(x):
            return super().forward(x)
        b, h, w, _ = x.shape
        if self._undropped(self.drop_path1):
            x = self._branch(self.norm1(x), x)
        else:
            x = x + self.drop_path1(self._branch(self.norm1(x), None))
        x = x.reshape(b, h * w, -1)
        if self._undropped(self.drop_path2) and self._takes_residual(self.mlp):
            x = self.mlp.fused(self.norm2(x), x)
        else:
            x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x.reshape(b, h, w, -1)


class FusedTimmSwinV2Block(_SwinBlock, swin_transformer_v2.SwinTransformerV2Block):
    """`timm.models.swin_transformer_v2.SwinTransformerV2Block`; its norms stand between branch and residual."""

    replaces = swin_transformer_v2.SwinTransformerV2Block

    def _attn(self, x: Tensor) -> Tensor:
        if layers.symbolic(x) or not self._cuts(x):
            return super()._attn(x)
        return self.attn.fused(x, shift=self.shift_size)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, D]` to `[B, H, W, D]`."""
        return super(layers.FusedBlock, self).forward(x)


def _decline_norm(module: Any) -> str | None:
    if module._fast_norm:
        return "timm's fast norm is on: it keeps autocast's dtype, the kernel torch's"
    return decline_layer_norm(module)


def _decline_patch_embed(module: Any) -> str | None:
    if module.dynamic_img_pad:
        return "pads images (dynamic_img_pad)"
    if not module.flatten and module.output_fmt is not timm.layers.Format.NHWC:
        return f"hands out {module.output_fmt.value}; the kernel NLC or NHWC"
    return None


def _decline_attention(module: Any) -> str | None:
    if module.gate is not None:
        return "gated attention"
    return decline_head_dim(module.head_dim)


def _decline_rotary(module: Any) -> str | None:
    if getattr(module, "num_kv_groups", 1) != 1:
        return "grouped-query attention: k and v have fewer heads than q"
    return _decline_attention(module)


def _decline_merged(module: Any) -> str | None:
    return decline_head_dim(module.proj.in_features // module.num_heads)


def _decline_mlp(module: Any) -> str | None:
    if not isinstance(module.fc1, nn.Linear):
        return f"fc1 is a {type(module.fc1).__name__}; the kernel replaces nn.Linear"
    if FusedTimmMlp.epilogue(module.act) is None:
        return f"activation {type(module.act).__name__} is in no epilogue"
    return None


@functools.cache
def swaps() -> dict[type[nn.Module], Swap]:
    """Replaceable classes of timm."""
    return {
        timm.layers.LayerNorm: Swap(FusedTimmLayerNorm, _decline_norm),
        timm.layers.PatchEmbed: Swap(FusedTimmPatchEmbed, _decline_patch_embed),
        timm.layers.Attention: Swap(FusedTimmAttention, _decline_attention),
        timm.layers.Mlp: Swap(FusedTimmMlp, _decline_mlp),
        timm.layers.AttentionRope: Swap(FusedTimmAttentionRope, _decline_rotary),
        beit.Attention: Swap(FusedTimmBeitAttention, _decline_merged),
        eva.EvaAttention: Swap(FusedTimmEvaAttention, _decline_rotary),
        swin_transformer.WindowAttention: Swap(FusedTimmWindowAttention, _decline_merged),
        swin_transformer_v2.WindowAttention: Swap(FusedTimmWindowAttentionV2, _decline_merged),
        vision_transformer.Block: Swap(FusedTimmBlock, never),
        beit.Block: Swap(FusedTimmBeitBlock, never),
        eva.EvaBlock: Swap(FusedTimmEvaBlock, never),
        swin_transformer.SwinTransformerBlock: Swap(FusedTimmSwinBlock, never),
        swin_transformer_v2.SwinTransformerV2Block: Swap(FusedTimmSwinV2Block, never),
        vision_transformer.VisionTransformer: Swap(FusedTimmVisionTransformer, never),
        deit.VisionTransformerDistilled: Swap(FusedTimmVisionTransformerDistilled, never),
    }


@functools.cache
def declined() -> dict[type[nn.Module], tuple[str, str]]:
    """Classes of timm that are known and left alone."""
    gated = ("mlp", "gated MLP: no kernel has its gate in an epilogue")
    pooling = ("attention", "attention pooling has one query and is not worth a kernel")
    other_block = ("block", "not the plain pre-norm block")
    positions = ("attention", "relative positions from a module: no kernel reads them")
    stem = ("patch_embed", "convolutional stem: the kernel embeds pixels")
    return {
        timm.layers.GluMlp: gated,
        timm.layers.SwiGLU: gated,
        timm.layers.DiffAttention: ("attention", "differential attention: two softmaxes, no kernel"),
        timm.layers.AttentionPoolLatent: pooling,
        timm.layers.AttentionPoolPrr: pooling,
        timm.layers.HybridEmbed: stem,
        timm.layers.HybridEmbedWithSize: stem,
        eva.EvaBlockPostNorm: other_block,
        swin_transformer_v2_cr.WindowMultiHeadAttention: positions,
        vision_transformer_relpos.RelPosAttention: positions,
        vision_transformer_sam.Attention: positions,
        vision_transformer.ResPostBlock: other_block,
        vision_transformer.ParallelScalingBlock: other_block,
        vision_transformer.DiffParallelScalingBlock: other_block,
        vision_transformer.ParallelThingsBlock: other_block,
    }
