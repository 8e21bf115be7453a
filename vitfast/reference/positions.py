"""Position embeddings: the `E_pos` of equation 1, the variants of the paper's appendix D.4, and how each is resized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .options import one_of

if TYPE_CHECKING:
    from .parts import PatchEmbed

POSITIONS = ("learn", "learn_2d", "relative", "none")
PLACEMENTS = ("stem", "every_layer", "every_layer_shared")
INTERPOLATIONS = ("bicubic", "bilinear")


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


def resize_rel_pos_embed(table: Tensor, tokens: int) -> Tensor:
    """Resamples the keys of a relative attention's offsets to another count of tokens, linearly and in fp32.

    Args:
        table: `[2M - 1, d]`, made for `M` tokens, any floating dtype.
        tokens: `N`, the count wanted.

    Returns:
        `[2N - 1, d]` in the dtype of `table`.
    """
    # align_corners keeps offset 0 in the middle and the largest offsets at the ends
    columns = table.float().t()[None]  # [1, d, 2M - 1]
    columns = F.interpolate(columns, size=2 * tokens - 1, mode="linear", align_corners=True)
    return columns[0].t().to(table.dtype)


def relative_logits(q: Tensor, table: Tensor) -> Tensor:
    """Logits of scaled queries `[B, h, N, d]` against the keys of offsets `[2M - 1, d]`: `[B, h, N, N]`."""
    tokens = q.shape[2]
    if not _known_equal([table.shape[0]], [2 * tokens - 1]):
        table = resize_rel_pos_embed(table, tokens).to(q.dtype)
    position = torch.arange(tokens, device=q.device)
    offset = position[:, None] - position[None, :] + tokens - 1  # [N, N], 0 for the most negative one
    by_offset = q @ table.t()  # [B, h, N, 2N - 1]
    return by_offset.gather(-1, offset.expand(*q.shape[:2], -1, -1))


class PositionEmbedding(nn.Module):
    """Absolute position tables of a Vision Transformer. A base class of it, since their names in it are timm's."""

    patch_embed: PatchEmbed

    def _make_positions(self, kind: str, at: str, interpolation: str, antialias: bool, depth: int, prefix: int) -> None:
        """Makes the tables of one of `POSITIONS`, without values, for the native grid and `prefix` tokens before it."""
        one_of("pos_embed", kind, POSITIONS)
        one_of("pos_embed_at", at, PLACEMENTS)
        if kind in ("relative", "none") and at != "stem":
            raise ValueError(f"pos_embed_at is {at!r}; accepted with pos_embed={kind!r} is 'stem'")
        embed_dim = self.patch_embed.proj.out_channels
        if kind == "learn_2d" and embed_dim % 2:
            raise ValueError(f"embed_dim is {embed_dim}; accepted with pos_embed='learn_2d' are even widths")
        self.pos_embed_at = at
        self.pos_interpolation = one_of("pos_interpolation", interpolation, INTERPOLATIONS)
        self.pos_antialias = antialias
        self.num_prefix_positions = prefix
        rows, cols = self.patch_embed.grid_size

        def table(positions: int, width: int, wanted: bool) -> nn.Parameter | None:
            tables = depth if at == "every_layer" else 1
            return nn.Parameter(torch.empty(tables, positions, width)) if wanted and positions else None

        is_1d, is_2d = kind == "learn", kind == "learn_2d"
        self.pos_embed = table(prefix + rows * cols, embed_dim, is_1d)
        self.pos_embed_row = table(rows, embed_dim // 2, is_2d)
        self.pos_embed_col = table(cols, embed_dim // 2, is_2d)
        self.pos_embed_prefix = table(prefix, embed_dim, is_2d)

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
