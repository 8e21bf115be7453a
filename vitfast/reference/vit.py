"""The reference Vision Transformer, in plain torch.

Dosovitskiy et al., "An Image is Worth 16x16 Words" (arXiv 2010.11929), section 3.1:

    z_0  = [x_class; x_1 E; ...; x_N E] + E_pos                   (1)  PatchEmbed, VisionTransformer.embed
    z'_l = MSA(LN(z_{l-1})) + z_{l-1},   l = 1 ... L              (2)  Attention, Block
    z_l  = MLP(LN(z'_l)) + z'_l,         l = 1 ... L              (3)  Mlp, Block
    y    = LN(z_L^0)                                              (4)  norm, then pool and head

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

POOLINGS = ("token", "avg", "map", "")
POSITIONS = ("learn", "learn_2d", "relative", "none")
PLACEMENTS = ("stem", "every_layer", "every_layer_shared")
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
MLPS = ("mlp", "swiglu")


def _one_of(name: str, value: str, accepted: tuple[str, ...]) -> str:
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}; accepted are {', '.join(map(repr, accepted))}")
    return value


def _pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) from one int or two; both must be positive."""
    sides = (value, value) if isinstance(value, int) else tuple(value)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"{name} is {value!r}; accepted is a positive int or two of them (height, width)")
    return sides[0], sides[1]


def _known_equal(a: Sequence[int], b: Sequence[int]) -> bool:
    if torch.compiler.is_compiling():
        # `==` on a symbolic size would guard on the answer, and so compile the native size a second time.
        # imported here because it pulls in sympy, which eager users never need
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))
    return tuple(a) == tuple(b)


def resize_pos_embed(
    pos_embed: Tensor,
    new_grid: tuple[int, int],
    old_grid: tuple[int, int],
    num_prefix_tokens: int,
    interpolation: str = "bicubic",
    antialias: bool = True,
) -> Tensor:
    """Resamples position embeddings to another grid; the defaults are timm's rule. Always computed in fp32.

    Args:
        pos_embed: `[L, T + rows * cols, D]`, any floating dtype; `L` tables are resized alike.
        new_grid: (rows, cols) wanted.
        old_grid: (rows, cols) of `pos_embed`.
        num_prefix_tokens: `T`, the leading positions that belong to no patch and are kept as they are.
        interpolation: `mode` of `torch.nn.functional.interpolate`, "bicubic" or "bilinear".
        antialias: Whether to low-pass when shrinking (and to use the matching bicubic kernel).

    Returns:
        `[L, T + new_rows * new_cols, D]` in the dtype of `pos_embed`. The old grid comes back bit for bit.
    """
    prefix, patches = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    image = patches.float().unflatten(1, old_grid).permute(0, 3, 1, 2)  # [L, D, rows, cols]
    image = F.interpolate(image, size=new_grid, mode=interpolation, antialias=antialias)
    patches = image.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)
    return torch.cat([prefix, patches], dim=1) if num_prefix_tokens else patches


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
        self.img_size = _pair("img_size", img_size)
        self.patch_size = _pair("patch_size", patch_size)
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
        tokens = q.shape[2]
        if not _known_equal([table.shape[0]], [2 * tokens - 1]):
            # align_corners keeps offset 0 in the middle and the largest offsets at the ends
            columns = table.float().t()[None]  # [1, d, 2M - 1]
            columns = F.interpolate(columns, size=2 * tokens - 1, mode="linear", align_corners=True)
            table = columns[0].t().to(q.dtype)
        position = torch.arange(tokens, device=q.device)
        offset = position[:, None] - position[None, :] + tokens - 1  # [N, N], 0 for the most negative one
        by_offset = (q * self.scale) @ table.t()  # [B, h, N, 2N - 1]
        return by_offset.gather(-1, offset.expand(*q.shape[:2], -1, -1))

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
        self.act = _activation(_one_of("act_layer", act_layer, ACTIVATIONS))
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
            if _one_of("mlp_layer", mlp_layer, MLPS) == "swiglu"
            else Mlp(dim, hidden_dim, act_layer, proj_bias, proj_drop)
        )
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T + N, D]` to `[B, T + N, D]`."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


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


class VisionTransformer(nn.Module):
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
        _one_of("global_pool", global_pool, POOLINGS)
        _one_of("pos_embed", pos_embed, POSITIONS)
        _one_of("pos_embed_at", pos_embed_at, PLACEMENTS)
        _one_of("pos_interpolation", pos_interpolation, ("bicubic", "bilinear"))
        if pos_embed in ("relative", "none") and pos_embed_at != "stem":
            raise ValueError(f"pos_embed_at is {pos_embed_at!r}; accepted with pos_embed={pos_embed!r} is 'stem'")
        if pos_embed == "learn_2d" and embed_dim % 2:
            raise ValueError(f"embed_dim is {embed_dim}; accepted with pos_embed='learn_2d' are even widths")
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
        self.pos_embed_at = pos_embed_at
        self.pos_interpolation = pos_interpolation
        self.pos_antialias = pos_antialias
        self.grad_checkpointing = False
        # as in DeiT: set it to get both heads' outputs while training
        self.distilled_training = False

        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, bias=not pre_norm)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if class_token else None
        self.dist_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if distilled else None
        self.reg_token = nn.Parameter(torch.empty(1, reg_tokens, embed_dim)) if reg_tokens else None

        tables = depth if pos_embed_at == "every_layer" else 1
        rows, cols = self.patch_embed.grid_size
        self.num_prefix_positions = 0 if no_embed_class else self.num_prefix_tokens
        positions = self.num_prefix_positions + rows * cols
        half = embed_dim // 2
        is_1d, is_2d = pos_embed == "learn", pos_embed == "learn_2d"
        self.pos_embed = nn.Parameter(torch.empty(tables, positions, embed_dim)) if is_1d else None
        self.pos_embed_row = nn.Parameter(torch.empty(tables, rows, half)) if is_2d else None
        self.pos_embed_col = nn.Parameter(torch.empty(tables, cols, half)) if is_2d else None
        self.pos_embed_prefix = (
            nn.Parameter(torch.empty(tables, self.num_prefix_positions, embed_dim))
            if is_2d and self.num_prefix_positions
            else None
        )
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.norm_pre = nn.LayerNorm(embed_dim, eps=norm_eps) if pre_norm else nn.Identity()

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
                    relative_tokens=self.num_prefix_tokens + rows * cols if pos_embed == "relative" else 0,
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

    def _positions(self, grid: tuple[int, int]) -> Tensor | None:
        """Absolute position tables `[1 or depth, T + N or N, D]` for a grid, or `None`."""
        table: Tensor | None = self.pos_embed
        native = self.patch_embed.grid_size
        if self.pos_embed_row is not None and self.pos_embed_col is not None:
            row = self.pos_embed_row[:, :, None].expand(-1, -1, native[1], -1)
            col = self.pos_embed_col[:, None, :].expand(-1, native[0], -1, -1)
            table = torch.cat([row, col], dim=-1).flatten(1, 2)
            if self.pos_embed_prefix is not None:
                table = torch.cat([self.pos_embed_prefix, table], dim=1)
        if table is None or _known_equal(grid, native):
            return table
        return resize_pos_embed(
            table, grid, native, self.num_prefix_positions, self.pos_interpolation, self.pos_antialias
        )

    def pos_embed_for(self, grid: tuple[int, int]) -> Tensor | None:
        """Position embedding that the stem adds for a (rows, cols) grid, resized in fp32 unless it is native.

        Returns:
            `[1, T + N, D]`, or `[1, N, D]` with `no_embed_class`, in the dtype of the parameters; `None` if the
            stem adds none.
        """
        return self._positions(grid) if self.pos_embed_at == "stem" else None

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

    def forward(self, x: Tensor) -> Any:
        """Images `[B, C, H, W]` to logits `[B, num_classes]`; see `forward_head`."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Features of chosen blocks, with timm's arguments and results.

        Args:
            x: Images `[B, C, H, W]`.
            indices: `None` for all blocks, an int for the last so many, or block indices (negative ones count
                from the end).
            return_prefix_tokens: Also return the prefix tokens `[B, T, D]` of each block.
            norm: Apply the final norm to the intermediates.
            stop_early: Skip the blocks after the last one wanted (the final features then come from that one).
            output_fmt: "NCHW" for `[B, D, rows, cols]` or "NLC" for `[B, N, D]`.
            intermediates_only: Leave out the final features.
            output_dict: Return a dict with `image_intermediates`, `image_intermediates_prefix`, `image_features`.

        Returns:
            (final features, intermediates), the intermediates alone, or the dict. Intermediates are in block
            order; with `return_prefix_tokens` each is a pair (patches, prefix).
        """
        _one_of("output_fmt", output_fmt, ("NCHW", "NLC"))
        depth = len(self.blocks)
        wanted = range(depth) if indices is None else indices
        if isinstance(wanted, int):
            if not 1 <= wanted <= depth:
                raise ValueError(f"indices is {wanted}; accepted are counts from 1 to {depth}")
            wanted = range(depth - wanted, depth)
        if not wanted or not all(-depth <= i < depth for i in wanted):
            raise ValueError(f"indices are {list(wanted)}; accepted are block indices from {-depth} to {depth - 1}")
        take = [i % depth for i in wanted]

        final, taken = self._encode(x, max(take) + 1 if stop_early else depth, take)
        if norm:
            taken = [self.norm(y) for y in taken]
        prefix = [y[:, : self.num_prefix_tokens] for y in taken]
        patches = [y[:, self.num_prefix_tokens :] for y in taken]
        if output_fmt == "NCHW":
            grid = self.patch_embed.grid(x.shape[2], x.shape[3])
            patches = [y.unflatten(1, grid).permute(0, 3, 1, 2).contiguous() for y in patches]

        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": patches}
            if with_prefix:
                result["image_intermediates_prefix"] = prefix
            if not intermediates_only:
                result["image_features"] = self.norm(final)
            return result
        outputs: list[Any] = list(zip(patches, prefix, strict=True)) if with_prefix else patches
        return outputs if intermediates_only else (self.norm(final), outputs)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Any]:
        """`forward_intermediates` under DINO's name: the last `n` blocks (or those listed), as `[B, N, D]`.

        With `reshape` they are `[B, D, rows, cols]`; `return_prefix_tokens` and `norm` as there.
        """
        output_fmt = "NCHW" if reshape else "NLC"
        return self.forward_intermediates(
            x, n, return_prefix_tokens, norm, output_fmt=output_fmt, intermediates_only=True
        )

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
            _one_of("global_pool", global_pool, POOLINGS)
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

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def set_distilled_training(self, enable: bool = True) -> None:
        """Whether a distilled model in training mode returns both heads' logits (see `forward_head`)."""
        self.distilled_training = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that an optimiser should not decay: prefix tokens and position embeddings."""
        tables = {name for name, _ in self.named_parameters() if "pos_embed" in name}
        return {"pos_embed", "cls_token", "reg_token", "dist_token"} | tables
