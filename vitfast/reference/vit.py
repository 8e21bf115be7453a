"""The reference Vision Transformer, in plain torch.

Dosovitskiy et al., "An Image is Worth 16x16 Words" (arXiv 2010.11929), section 3.1:

    z_0  = [x_class; x_1 E; ...; x_N E] + E_pos                   (1)  PatchEmbed, VisionTransformer.embed
    z'_l = MSA(LN(z_{l-1})) + z_{l-1},   l = 1 ... L              (2)  Attention, Block
    z_l  = MLP(LN(z'_l)) + z'_l,         l = 1 ... L              (3)  Mlp, Block
    y    = LN(z_L^0)                                              (4)  norm, then Head: pool and head

Parameter names are timm's, so timm's state dicts load unchanged. Letters in shapes: `B` images, `C` channels,
`H, W` pixels, `N` patches, `T` prefix tokens (class, distillation, registers, in this order), `D` embedding
width, `h` heads, `d` head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .features import Features
from .head import POOLINGS, AttentionPool, Head, TanhLayer
from .options import one_of
from .parts import Block, PatchEmbed
from .positions import PositionEmbedding


class VisionTransformer(PositionEmbedding, Head, Features):
    """Vision Transformer with timm's parameter names and methods; takes any image size the patch divides.

    Under `torch.compile(dynamic=True)` one graph serves all sizes, the native one included. Trace it on an image
    that is not square: torch assumes that sizes equal at tracing stay equal, and compiles again where they are not.

    Args:
        img_size: Native image size, one int or (height, width); sets the grid of the position embeddings.
        patch_size: Patch size, one int or (height, width).
        in_chans: `C`.
        num_classes: Outputs of the head; 0 for no head.
        global_pool: "token" (class token), "avg" (mean of the patches), "map" (attention-map head) or "" (all
            tokens).
        embed_dim: `D`.
        depth: Number of blocks.
        num_heads: `h`.
        mlp_ratio: See `Block`.
        qkv_bias: See `Block`.
        qk_norm: See `Block`.
        proj_bias: See `Block`.
        init_values: See `Block`.
        class_token: Whether there is a class token.
        distilled: DeiT's distillation token and its second head; the two heads' outputs are averaged.
        reg_tokens: Number of register tokens.
        no_embed_class: Position embeddings for patches only, none for prefix tokens.
        pos_embed: "learn" (1-D table), "learn_2d" (row and column halves), "relative" or "none".
        pos_embed_at: Where absolute positions are added: "stem", "every_layer" (a table for each block) or
            "every_layer_shared" (one table before every block). Appendix D.4 of the paper.
        pos_interpolation: How absolute positions are resized to another grid; see `resize_pos_embed`.
        pos_antialias: See `resize_pos_embed`.
        pre_norm: LayerNorm before the blocks and no patch embedding bias (CLIP).
        fc_norm: Final norm after the pooling instead of before; by default only for "avg".
        representation_size: Width of the pre-training head's tanh layer; `None` for the fine-tuning head.
        drop_rate: Dropout rate before the head.
        pos_drop_rate: Dropout rate after the position embedding.
        proj_drop_rate: See `Block`.
        attn_drop_rate: See `Block`.
        drop_path_rate: Stochastic depth rate of the last block; it grows linearly from 0 at the first.
        act_layer: See `Block`.
        mlp_layer: See `Block`.
        norm_eps: Epsilon of every LayerNorm (CLIP 1e-5, most others 1e-6).

    Raises:
        ValueError: For a value or a combination that has no meaning; the message says what is accepted.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        proj_bias: bool = True,
        init_values: float | None = None,
        class_token: bool = True,
        distilled: bool = False,
        reg_tokens: int = 0,
        no_embed_class: bool = False,
        pos_embed: str = "learn",
        pos_embed_at: str = "stem",
        pos_interpolation: str = "bicubic",
        pos_antialias: bool = True,
        pre_norm: bool = False,
        fc_norm: bool | None = None,
        representation_size: int | None = None,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act_layer: str = "gelu",
        mlp_layer: str = "mlp",
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        one_of("global_pool", global_pool, POOLINGS)
        two_heads = class_token and global_pool == "token" and not fc_norm and not representation_size
        if distilled and not two_heads:
            raise ValueError(
                "distilled is True; accepted with it are class_token=True, global_pool='token', no fc_norm and "
                "no representation_size, since each of its two heads reads its own token"
            )
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate is {drop_path_rate}; accepted are rates from 0 to below 1")
        if depth < 1 or reg_tokens < 0 or num_classes < 0:
            raise ValueError(
                f"depth, reg_tokens, num_classes are {depth}, {reg_tokens}, {num_classes}; "
                "accepted are at least 1, 0, 0"
            )

        self.num_classes = num_classes
        self.num_features = self.embed_dim = embed_dim
        self.head_hidden_size = representation_size or embed_dim
        self.has_class_token = class_token
        self.num_reg_tokens = reg_tokens
        self.num_prefix_tokens = int(class_token) + int(distilled) + reg_tokens
        self.no_embed_class = no_embed_class
        self.grad_checkpointing = False
        # as in DeiT: set it to get both heads' outputs while training
        self.distilled_training = False

        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, bias=not pre_norm)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if class_token else None
        self.dist_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if distilled else None
        self.reg_token = nn.Parameter(torch.empty(1, reg_tokens, embed_dim)) if reg_tokens else None

        prefix = 0 if no_embed_class else self.num_prefix_tokens
        self._make_positions(pos_embed, pos_embed_at, pos_interpolation, pos_antialias, depth, prefix)
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.norm_pre = nn.LayerNorm(embed_dim, eps=norm_eps) if pre_norm else nn.Identity()

        tokens = self.num_prefix_tokens + self.patch_embed.num_patches
        self.blocks = nn.Sequential(
            *(
                Block(
                    dim=embed_dim,
                    num_heads=num_heads,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    qk_norm=qk_norm,
                    proj_bias=proj_bias,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    init_values=init_values,
                    drop_path=drop_path_rate * i / max(depth - 1, 1),
                    act_layer=act_layer,
                    mlp_layer=mlp_layer,
                    eps=norm_eps,
                    relative_tokens=tokens if pos_embed == "relative" else 0,
                )
                for i in range(depth)
            )
        )
        norm_after_pool = global_pool == "avg" if fc_norm is None else fc_norm
        self.norm = nn.Identity() if norm_after_pool else nn.LayerNorm(embed_dim, eps=norm_eps)
        self.fc_norm = nn.LayerNorm(embed_dim, eps=norm_eps) if norm_after_pool else nn.Identity()
        self.attn_pool = (
            AttentionPool(embed_dim, num_heads, mlp_ratio, act_layer, norm_eps) if global_pool == "map" else None
        )
        self.pre_logits = TanhLayer(embed_dim, representation_size) if representation_size else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self._set_pooling(global_pool)
        self._init_weights()
        self._new_heads(num_classes)

    def _init_weights(self) -> None:
        # truncated normal matrices and tables, zero biases, near-zero class token and registers
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        positions = (self.pos_embed, self.pos_embed_row, self.pos_embed_col, self.pos_embed_prefix)
        for table in (*positions, self.dist_token):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)

    def embed(self, pixels: Tensor) -> Tensor:
        """Equation 1: patches, position embedding and prefix tokens. `[B, C, H, W]` to `[B, T + N, D]`."""
        x = self.patch_embed(pixels)
        pos = self.pos_embed_for(self.patch_embed.grid(pixels.shape[2], pixels.shape[3]))
        if pos is not None and self.no_embed_class:
            x = x + pos
        prefix = [token for token in (self.cls_token, self.dist_token, self.reg_token) if token is not None]
        if prefix:
            x = torch.cat([token.expand(x.shape[0], -1, -1) for token in prefix] + [x], dim=1)
        if pos is not None and not self.no_embed_class:
            x = x + pos
        return x

    def _encode(self, pixels: Tensor, depth: int, take: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Stem and the first `depth` blocks: their output, and the outputs of the blocks in `take`."""
        x = self.norm_pre(self.pos_drop(self.embed(pixels)))
        layer_pos = None
        if self.pos_embed_at != "stem":
            layer_pos = self._positions(self.patch_embed.grid(pixels.shape[2], pixels.shape[3]))
        if layer_pos is None and not self.grad_checkpointing and not take:
            # one call on the container, so that hooks on `blocks` fire as they do in timm
            return self.blocks(x), []
        if layer_pos is not None and self.no_embed_class:
            layer_pos = F.pad(layer_pos, (0, 0, self.num_prefix_tokens, 0))
        taken = []
        for i, block in enumerate(list(self.blocks)[:depth]):
            if layer_pos is not None:
                x = x + layer_pos[i if self.pos_embed_at == "every_layer" else 0]
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)
            if i in take:
                taken.append(x)
        return x, taken

    def forward_features(self, x: Tensor) -> Tensor:
        """All tokens after the last block and `norm`: `[B, C, H, W]` to `[B, T + N, D]`."""
        return self.norm(self._encode(x, len(self.blocks), ())[0])

    def forward(self, x: Tensor) -> Any:
        """Images `[B, C, H, W]` to logits `[B, num_classes]`; see `forward_head`."""
        return self.forward_head(self.forward_features(x))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that an optimiser should not decay: prefix tokens and position embeddings."""
        tables = {name for name, _ in self.named_parameters() if "pos_embed" in name}
        return {"pos_embed", "cls_token", "reg_token", "dist_token"} | tables
