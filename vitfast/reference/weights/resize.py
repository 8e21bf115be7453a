"""Fits the position embeddings of a checkpoint to a model's grid.

The interpolation is the model's own (`vitfast.reference.positions`), so a checkpoint loaded at another
resolution and a model called at another resolution give the same numbers.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..positions import resize_pos_embed, resize_rel_pos_embed
from ..vit import VisionTransformer


def _square_grid(name: str, positions: int, num_prefix_tokens: int) -> tuple[int, int]:
    patches = positions - num_prefix_tokens
    side = math.isqrt(max(patches, 0))
    if side < 1 or side * side != patches:
        raise ValueError(
            f"{name} in the checkpoint has {positions} positions, which less the model's {num_prefix_tokens} "
            "prefix tokens are no square grid; pass source_grid=(rows, cols) if it was made for another one"
        )
    return side, side


def fit_pos_embed(
    tensors: dict[str, Tensor], model: VisionTransformer, source_grid: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Resizes every position table in a state dict of timm's names to the model's grid, in fp32.

    Absolute tables follow the model's `pos_interpolation` and `pos_antialias` (timm's rule by default),
    relative ones are resized linearly. A table that already fits is left alone.

    Args:
        tensors: State dict; not changed.
        model: The model that it is for.
        source_grid: (rows, cols) the checkpoint was made for. By default the model's own grid where the count
            of positions agrees, else a square.

    Returns:
        A new dict, with the resized tables in the checkpoint's dtype.

    Raises:
        ValueError: If the checkpoint's grid is not `source_grid`, or can't be told and isn't square.
    """
    fitted = dict(tensors)
    grid = model.patch_embed.grid_size
    options = (model.pos_interpolation, model.pos_antialias)

    pos = tensors.get("pos_embed")
    if pos is not None and pos.ndim == 3 and model.pos_embed is not None:
        prefix = model.num_prefix_positions
        if source_grid is not None:
            old = source_grid
            if old[0] * old[1] + prefix != pos.shape[1]:
                raise ValueError(
                    f"pos_embed in the checkpoint has {pos.shape[1]} positions; source_grid={old} with "
                    f"{prefix} prefix tokens makes {old[0] * old[1] + prefix}"
                )
        elif pos.shape[1] == model.pos_embed.shape[1]:
            old = grid
        else:
            old = _square_grid("pos_embed", pos.shape[1], prefix)
        if old != grid:
            fitted["pos_embed"] = resize_pos_embed(pos, grid, old, prefix, *options)

    # the halves of a 2-D embedding are one-column and one-row images
    row, col = tensors.get("pos_embed_row"), tensors.get("pos_embed_col")
    if row is not None and row.ndim == 3 and row.shape[1] != grid[0]:
        fitted["pos_embed_row"] = resize_pos_embed(row, (grid[0], 1), (row.shape[1], 1), 0, *options)
    if col is not None and col.ndim == 3 and col.shape[1] != grid[1]:
        fitted["pos_embed_col"] = resize_pos_embed(col, (1, grid[1]), (1, col.shape[1]), 0, *options)

    for name, own in model.named_parameters():
        table = tensors.get(name)
        if name.endswith("rel_pos_embed") and table is not None and table.ndim == 2 and table.shape != own.shape:
            fitted[name] = resize_rel_pos_embed(table, (own.shape[0] + 1) // 2)
    return fitted
