"""open_clip: its `VisionTransformer`, and the blocks that its text towers share.

Contracts read in the sources of 3.3: norms hand out the dtype that they are given, so under autocast the residual
stream is in 16 bits; class token and position embedding are cast to the tokens' dtype; the attention is
`nn.MultiheadAttention`; towers of timm hold timm's modules, which are timm's adapter's.
"""

from __future__ import annotations

from typing import Any

import torch
from open_clip import transformer
from torch import Tensor

from .. import layers
from .known import Declined, Offer, Rebuilt, of_images, of_tokens
from .torch_nn import decline_layer_norm, of_norm


class FusedOpenClipLayerNorm(layers.FusedLayerNorm, Rebuilt):
    """A LayerNorm that keeps its input's dtype under autocast too."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        return super().forward(x).to(x.dtype)


class FusedOpenClipLayerNormFp32(FusedOpenClipLayerNorm, Rebuilt):
    """`open_clip.transformer.LayerNormFp32`: the kernel computes in fp32 always."""


class FusedOpenClipBlock(layers.FusedBlock, Rebuilt):
    """`open_clip.transformer.ResidualAttentionBlock`."""

    norm1 = layers.alias("ln_1")
    ls1 = layers.alias("ls_1")
    norm2 = layers.alias("ln_2")
    ls2 = layers.alias("ls_2")
    drop_path1 = drop_path2 = layers.IDENTITY
    layer_scale_class = transformer.LayerScale

    def attend(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Call the attention as open_clip's block does."""
        return self.attention(q_x=x, k_x=None, v_x=None, attn_mask=None)

    def forward(
        self,
        q_x: Tensor,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`; attention that is masked, or to other tokens, is open_clip's own."""
        if (
            k_x is not None
            or v_x is not None
            or attn_mask is not None
            or layers.symbolic(q_x)
            # where the sum is normalised as it is made, autocast would widen it
            or (torch.is_autocast_enabled(q_x.device.type) and not self._takes_residual(self.attn))
        ):
            return super().forward(q_x, k_x, v_x, attn_mask)
        return self.fused(q_x)


class FusedOpenClipVisionTransformer(layers.FusedStemModel, Rebuilt):
    """`open_clip.transformer.VisionTransformer`: the patch-embed kernel writes class token and position embedding."""

    conv_name = "conv1"
    blocks = property(lambda self: self.transformer.resblocks)
    norm = layers.alias("ln_post")

    def fusable(self, pixels: Tensor) -> bool:
        """Whether the kernel computes what open_clip would."""
        if not super().fusable(pixels):
            return False
        rows, cols = pixels.shape[2] / self.patch_size[0], pixels.shape[3] / self.patch_size[1]
        return rows % 1 == cols % 1 == 0 and rows * cols + 1 == self.positional_embedding.shape[0]

    def pooled_tokens(self) -> int | None:
        """1 where the class token is the pooled output, and the only one."""
        return 1 if self.pool_type == "tok" and self.attn_pool is None and not self.output_tokens else None

    def straight(self) -> bool:
        """Whether `through` runs the blocks one after another and nothing else."""
        stack = self.transformer
        return layers.plain(stack, transformer.Transformer) and stack.batch_first and not stack.grad_checkpointing

    def through(self, x: Tensor) -> Tensor:
        """All blocks as the original runs them: `[B, N, D]` to `[B, N, D]`."""
        return self.transformer(x)

    def forward(self, x: Tensor) -> Any:
        """`[B, C, H, W]` to features, or to `(features, tokens)`; the last block computes what is pooled."""
        if layers.symbolic(x) or layers.overridden(self):
            return super().forward(x)
        # without a name, which would keep the first tokens' memory through all blocks
        pooled, tokens = self._pool(self.encode(self._embeds(x), self.kept()))
        if self.proj is not None:
            pooled = pooled @ self.proj
        return (pooled, tokens) if self.output_tokens else pooled

    def _embeds(self, x: Tensor) -> Tensor:
        if not self.fusable(x):
            return super()._embeds(x)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.conv1.weight.dtype
        x = self.tokens(x, self.class_embedding.to(dtype)[None], self.positional_embedding.to(dtype))
        return self.ln_pre(self.patch_dropout(x))


OFFERS = (
    # where a norm computes in fp32, a comparison in float64 is no nearer
    Offer("LayerNorm", "layer_norm", (FusedOpenClipLayerNorm,), "normalized_shape eps", (of_norm,), decline_layer_norm),
    Offer(
        "LayerNormFp32",
        "layer_norm",
        (FusedOpenClipLayerNormFp32,),
        "normalized_shape eps",
        (of_norm,),
        decline_layer_norm,
        rtol=3e-6,
    ),
    Offer(
        "ResidualAttentionBlock",
        "block",
        (FusedOpenClipBlock,),
        "ln_1 attn ls_1 ln_2 mlp ls_2",
        (of_tokens,),
        rtol=3e-6,
    ),
    Offer(
        "VisionTransformer",
        "model",
        (FusedOpenClipVisionTransformer,),
        "conv1 class_embedding positional_embedding transformer ln_post pool_type",
        of_images(lambda model: model.patch_size, lambda model: model.image_size),
        rtol=3e-6,
    ),
)
DECLINED = (
    Declined("Attention", "attention", "open_clip's own attention, of custom blocks: its options have no kernel"),
    Declined("CustomResidualAttentionBlock", "block", "not the plain pre-norm block"),
)
