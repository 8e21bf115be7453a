"""Pooling and heads of the Vision Transformer: equation 4 of the paper, and what timm's heads can do besides."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .options import one_of
from .parts import Mlp, PatchEmbed

POOLINGS = ("token", "avg", "map", "")


class AttentionPool(nn.Module):
    """Attention-map head: a learned query attends to the tokens, then a residual MLP (arXiv 2303.15343)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, act_layer: str, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.latent = nn.Parameter(torch.empty(1, 1, dim))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer)
        nn.init.trunc_normal_(self.latent, std=dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, D]` to `[B, D]`."""
        B, _, D = x.shape
        q = self.q(self.latent.expand(B, -1, -1)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        pooled = F.scaled_dot_product_attention(q, k, v)  # [B, h, 1, d]
        pooled = self.proj(pooled.transpose(1, 2).reshape(B, D))
        return pooled + self.mlp(self.norm(pooled))


class TanhLayer(nn.Module):
    """The hidden layer of the paper's pre-training head: `tanh(fc(x))`."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., hidden_dim]`."""
        return torch.tanh(self.fc(x))


class Head(nn.Module):
    """What a Vision Transformer makes of its tokens. A base class of it, since the names of its layers are timm's."""

    patch_embed: PatchEmbed
    embed_dim: int
    has_class_token: bool
    num_prefix_tokens: int
    dist_token: nn.Parameter | None
    distilled_training: bool
    head_hidden_size: int
    fc_norm: nn.Module
    attn_pool: AttentionPool | None
    pre_logits: nn.Module
    head_drop: nn.Dropout

    def _set_pooling(self, global_pool: str) -> None:
        if global_pool == "token" and not self.has_class_token:
            raise ValueError("global_pool is 'token'; accepted with class_token=False are 'avg', 'map' and ''")
        self.global_pool = global_pool

    def _new_heads(self, num_classes: int) -> None:
        weight = self.patch_embed.proj.weight

        def head() -> nn.Module:
            if num_classes == 0:
                return nn.Identity()
            linear = nn.Linear(self.head_hidden_size, num_classes, device=weight.device, dtype=weight.dtype)
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
            return linear.train(self.training)

        self.num_classes = num_classes
        self.head = head()
        if self.dist_token is not None:
            self.head_dist = head()

    def pool(self, x: Tensor) -> Tensor:
        """`[B, T + N, D]` to `[B, D]`, or unchanged where `global_pool` is ""."""
        if self.attn_pool is not None:
            return self.attn_pool(x[:, self.num_prefix_tokens :])
        if self.global_pool == "avg":
            return x[:, self.num_prefix_tokens :].mean(dim=1)
        return x[:, 0] if self.global_pool == "token" else x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Pooling and head: `[B, T + N, D]` to logits `[B, num_classes]`.

        Args:
            x: What `forward_features` returns.
            pre_logits: Return what the head would read, `[B, head_hidden_size]`.

        Returns:
            A tensor; while training with `distilled_training`, the two heads' logits as a tuple.
        """
        if self.dist_token is not None:
            cls, dist = self.head_drop(x[:, 0]), self.head_drop(x[:, 1])
            if not pre_logits:
                cls, dist = self.head(cls), self.head_dist(dist)
                if self.distilled_training and self.training:
                    return cls, dist
            return (cls + dist) / 2
        x = self.head_drop(self.pre_logits(self.fc_norm(self.pool(x))))
        return x if pre_logits else self.head(x)

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """The head; both heads of a distilled model."""
        return self.head if self.dist_token is None else (self.head, self.head_dist)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head by the fine-tuning head of the paper: one linear layer, zero-initialised.

        The pre-training head's tanh layer goes, as section 3.2 of the paper does.

        Args:
            num_classes: Outputs of the new head; 0 for none.
            global_pool: New pooling; `None` keeps it. "map" cannot be added to a model built without it.
        """
        if num_classes < 0:
            raise ValueError(f"num_classes is {num_classes}; accepted is 0 or more")
        if global_pool is not None:
            one_of("global_pool", global_pool, POOLINGS)
            if global_pool == "map" and self.attn_pool is None:
                raise ValueError("global_pool is 'map'; accepted only if the model was built with it")
            if global_pool != "token" and self.dist_token is not None:
                raise ValueError(f"global_pool is {global_pool!r}; accepted for a distilled model is 'token'")
            self._set_pooling(global_pool)
            if global_pool != "map":
                self.attn_pool = None
        self.pre_logits = nn.Identity()
        self.head_hidden_size = self.embed_dim
        self._new_heads(num_classes)

    def set_distilled_training(self, enable: bool = True) -> None:
        """Whether a distilled model in training mode returns both heads' logits (see `forward_head`)."""
        self.distilled_training = enable
