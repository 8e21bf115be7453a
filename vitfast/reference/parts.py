"""The layers of the Vision Transformer: equations 1 to 3 of the paper, see `vitfast.reference.vit`.

Parameter names are timm's. Letters in shapes: `B` images, `C` channels, `H, W` pixels, `N` patches or tokens,
`T` prefix tokens, `D` embedding width, `h` heads, `d` head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .options import one_of, pair
from .positions import relative_logits

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
MLPS = ("mlp", "swiglu")


class PatchEmbed(nn.Module):
    """Splits images into patches and projects each linearly: the `x_i E` of equation 1.

    Images of any size that the patch divides are taken; `img_size` only sets the native `grid_size`.

    Raises:
        ValueError: If the patch does not divide the image, or the channel count is not `in_chans`.
    """

    def __init__(
        self,
        img_size: int | Sequence[int],
        patch_size: int | Sequence[int],
        in_chans: int,
        embed_dim: int,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.img_size = pair("img_size", img_size)
        self.patch_size = pair("patch_size", patch_size)
        self.grid_size = self.grid(*self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size, bias=bias)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, cols) of patches in an image of `height` by `width` pixels."""
        rows, cols = self.patch_size
        if height % rows or width % cols:
            raise ValueError(
                f"image size is {height}x{width}; accepted are heights divisible by {rows} and widths by {cols}"
            )
        return height // rows, width // cols

    def forward(self, pixels: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, N, D]`, patches in row-major order."""
        if pixels.ndim != 4 or pixels.shape[1] != self.proj.in_channels:
            raise ValueError(f"pixels have shape {tuple(pixels.shape)}; accepted is [B, {self.proj.in_channels}, H, W]")
        self.grid(pixels.shape[2], pixels.shape[3])
        return self.proj(pixels).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention: the MSA of equation 2 (appendix A of the paper).

    With `relative_tokens`, the 1-D relative attention of appendix D.4: every offset i - j between two tokens
    owns a learned key, and the query's logit against it is added to the content logit before the softmax.

    Args:
        dim: `D`, a multiple of `num_heads`.
        num_heads: `h`.
        qkv_bias: Bias of the joint query, key and value projection.
        qk_norm: LayerNorm over each head's queries and keys.
        proj_bias: Bias of the output projection.
        attn_drop: Dropout rate of the attention weights.
        proj_drop: Dropout rate of the output.
        eps: Epsilon of the query and key norms.
        relative_tokens: Token count `M` that the table `rel_pos_embed` `[2M - 1, d]` is made for; 0 for no
            table. It is resized linearly, in fp32, to any other count.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        eps: float = 1e-6,
        relative_tokens: int = 0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim is {dim}; accepted are multiples of num_heads={num_heads}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(self.head_dim, eps=eps) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim, eps=eps) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)
        self.rel_pos_embed: nn.Parameter | None = None
        if relative_tokens:
            self.rel_pos_embed = nn.Parameter(torch.empty(2 * relative_tokens - 1, self.head_dim))
            nn.init.trunc_normal_(self.rel_pos_embed, std=0.02)

    def relative_logits(self, q: Tensor, table: Tensor) -> Tensor:
        """Logits of queries `[B, h, N, d]` against the offset keys `[2M - 1, d]`: `[B, h, N, N]`."""
        return relative_logits(q * self.scale, table)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`."""
        B, N, D = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        bias = None if self.rel_pos_embed is None else self.relative_logits(q, self.rel_pos_embed)
        drop = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop, scale=self.scale)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, N, D)))


class QuickGELU(nn.Module):
    """`x * sigmoid(1.702 x)`, the GELU approximation that OpenAI's CLIP weights were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise, any shape."""
        return x * torch.sigmoid(1.702 * x)


def _activation(name: str) -> nn.Module:
    if name == "quick_gelu":
        return QuickGELU()
    return nn.GELU(approximate="tanh" if name == "gelu_tanh" else "none")


class Mlp(nn.Module):
    """Two linear layers with an activation between them: the MLP of equation 3."""

    def __init__(
        self, dim: int, hidden_dim: int, act_layer: str = "gelu", bias: bool = True, drop: float = 0.0
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, bias=bias)
        self.act = _activation(one_of("act_layer", act_layer, ACTIVATIONS))
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=bias)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`."""
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class GluMlp(nn.Module):
    """SwiGLU with packed weights: `fc2(silu(gate) * value)`, where `fc1(x)` is `[gate | value]`.

    Args:
        dim: `D`.
        hidden_dim: Width of gate and value together; even.
        bias: Bias of both linear layers.
        drop: Dropout rate after the gating and after `fc2`.
    """

    def __init__(self, dim: int, hidden_dim: int, bias: bool = True, drop: float = 0.0) -> None:
        super().__init__()
        if hidden_dim % 2:
            raise ValueError(f"hidden_dim is {hidden_dim}; accepted are even widths, half gate and half value")
        self.fc1 = nn.Linear(dim, hidden_dim, bias=bias)
        self.act = nn.SiLU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_dim // 2, dim, bias=bias)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`."""
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.drop2(self.fc2(self.drop1(self.act(gate) * value)))


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch (Touvron et al., arXiv 2103.17239)."""

    def __init__(self, dim: int, init_values: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init_values)))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth: in training, zeroes a residual branch for whole samples and rescales the others."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """`[B, ...]` to `[B, ...]`."""
        if not self.training or self.drop_prob == 0.0:
            return x
        keep = 1.0 - self.drop_prob
        mask = x.new_empty([x.shape[0]] + [1] * (x.ndim - 1)).bernoulli_(keep)
        return x * (mask / keep)


class Block(nn.Module):
    """One pre-norm encoder layer: equations 2 and 3, with LayerScale and stochastic depth where asked for.

    Args:
        dim: `D`.
        num_heads: `h`.
        mlp_ratio: Width of the MLP's first layer over `D`; for "swiglu" that layer holds gate and value.
        qkv_bias: See `Attention`.
        qk_norm: See `Attention`.
        proj_bias: Bias of the attention's output projection and of the MLP.
        proj_drop: Dropout rate of the attention's output and in the MLP.
        attn_drop: Dropout rate of the attention weights.
        init_values: Initial LayerScale factor; `None` (or 0) for no LayerScale.
        drop_path: Stochastic depth rate of both branches.
        act_layer: One of `ACTIVATIONS`; "swiglu" always uses SiLU.
        mlp_layer: One of `MLPS`.
        eps: LayerNorm epsilon.
        relative_tokens: See `Attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: str = "gelu",
        mlp_layer: str = "mlp",
        eps: float = 1e-6,
        relative_tokens: int = 0,
    ) -> None:
        super().__init__()
        hidden_dim = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_norm, proj_bias, attn_drop, proj_drop, eps, relative_tokens)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = (
            GluMlp(dim, hidden_dim, proj_bias, proj_drop)
            if one_of("mlp_layer", mlp_layer, MLPS) == "swiglu"
            else Mlp(dim, hidden_dim, act_layer, proj_bias, proj_drop)
        )
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T + N, D]` to `[B, T + N, D]`."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
