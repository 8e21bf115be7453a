"""What the GEMMs of `gemm.py` and `pingpong.py` share: the order of tiles, and what becomes of an accumulator.

But for `store_stats` these say nothing of layouts, so that Gluon compiles them too.
"""

from ._triton import tl, triton
from .activation import activate

STATS_WIDTH = 64
"""Columns whose statistics are kept together: the narrowest tile's width, so that every tile has whole groups."""


@triton.jit
def merge_stats(means_ptr, squares_ptr, rows, group, M, K, eps, WIDTH: tl.constexpr):
    # (mean, rstd) of K elements from those of groups of WIDTH; means and squares: [M, ceil(K / WIDTH)]
    count = tl.cdiv(K, WIDTH)
    at = tl.where(rows < M, rows, 0)[:, None] * count + group[None, :]
    present = (group < count)[None, :]
    means = tl.load(means_ptr + at, mask=present, other=0.0)  # [BLOCK_M, GROUPS]
    squares = tl.load(squares_ptr + at, mask=present, other=0.0)
    sizes = tl.maximum(tl.minimum(K - group * WIDTH, WIDTH), 0).to(tl.float32)[None, :]
    mean = tl.sum(means * sizes, axis=1) / K
    apart = means - mean[:, None]
    rstd = tl.rsqrt(tl.sum(squares + sizes * apart * apart, axis=1) / K + eps)
    return mean, rstd


@triton.jit
def store_stats(y, means_ptr, squares_ptr, rows, col, M, N, WIDTH: tl.constexpr):
    # y: [BLOCK_M, BLOCK_N], rounded; col: its first column, a multiple of WIDTH
    BLOCK_M: tl.constexpr = y.shape[0]
    GROUPS: tl.constexpr = y.shape[1] // WIDTH
    count = tl.cdiv(N, WIDTH)
    group = col // WIDTH + tl.arange(0, GROUPS)
    left = (N - group * WIDTH)[None, :, None]
    inside = tl.arange(0, WIDTH)[None, None, :] < left
    y = tl.where(inside, tl.reshape(y.to(tl.float32), (BLOCK_M, GROUPS, WIDTH)), 0.0)
    sizes = tl.maximum(tl.minimum(left, WIDTH), 1).to(tl.float32)
    mean = tl.sum(y, axis=2, keep_dims=True) / sizes  # [BLOCK_M, GROUPS, 1]
    apart = tl.where(inside, y - mean, 0.0)
    squares = tl.sum(apart * apart, axis=2)
    at = rows[:, None] * count + group[None, :]
    mask = (rows < M)[:, None] & (group < count)[None, :]
    tl.store(means_ptr + at, tl.reshape(mean, (BLOCK_M, GROUPS)), mask=mask)
    tl.store(squares_ptr + at, squares, mask=mask)


@triton.jit
def before_residual(
    acc,
    mean,
    rstd,
    colsum_ptr,
    bias_ptr,
    scale_ptr,
    cols,
    N,
    ACTIVATION: tl.constexpr,
    dtype: tl.constexpr,
):
    # acc: [BLOCK_M, BLOCK_N] fp32; the activation stands between bias and scale
    if colsum_ptr is not None:
        colsum = tl.load(colsum_ptr + cols, mask=cols < N, other=0.0)
        acc = rstd[:, None] * (acc - mean[:, None] * colsum[None, :])
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION, dtype)
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def tile_ids(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    # walk GROUP_M rows of tiles down before the next column, so that neighbours share operands in L2
    group = tile // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return first_m + within % group_m, within // group_m
