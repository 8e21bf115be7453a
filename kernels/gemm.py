"""`x W^T` with an epilogue: the kernels of `linear`, `linear_stats` and `norm_linear`, and how they are launched.

    y = residual + scale * activation(rstd * (x W^T - mean * colsum) + bias), and y's row statistics

Every part of it but the product may be left out. Statistics are kept as mean and sum of squared deviations of each
STATS_WIDTH columns; `norm_linear.py` says what for.

Two kernels, one epilogue. From sm_90 on: persistent programs, operands through tensor descriptors (TMA), the tile loop
flattened into the K loop so that the next tile's loads start before the previous epilogue ends. Elsewhere, and where a
descriptor cannot describe a tensor (rows not 16-byte aligned, exact fp32): one tile per program, `cp.async` pipeline.
The second one also splits K, for a few rows of a long K: ViT-B/16's fc2 at batch 1 has 48 tiles of 64 x 64 for an
A100's 108 multiprocessors, each of which reads 786 KB; in three parts 144 programs read 262 KB each. A kernel of its
own adds the parts' sums in their order, so that the result does not depend on timing, and runs the epilogue. A third
route is torch's own GEMM; a tuned config may choose it for a 16-bit shape.

Source: the order of tiles for L2 reuse is that of Triton's matrix multiplication tutorial. Statistics of groups are
merged by Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983), equation 2.1.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._config import Key, arch, early, has_library, lookup, sm_count
from ._launch import launch
from ._op import dense, dot_precision, flatten_rows
from ._triton import TensorDescriptor, add_dot, cdiv, next_power_of_2, tl, triton, wait_for_previous
from .activation import activate_ref
from .epilogue import STATS_WIDTH, before_residual, merge_stats, store_stats, tile_ids

# No kernel is compiled anew for another number of rows: its divisors, and whether the second half of the statistics is
# aligned, which follows from it, gain nothing.
_SECOND = ["squares_ptr", "y_squares_ptr"]


@triton.jit
def _epilogue(
    acc,
    mean,
    rstd,
    colsum_ptr,
    bias_ptr,
    scale_ptr,
    residual_ptr,
    rows,
    cols,
    M,
    N,
    stride_rm,
    ACTIVATION: tl.constexpr,
    dtype: tl.constexpr,
):
    acc = before_residual(acc, mean, rstd, colsum_ptr, bias_ptr, scale_ptr, cols, N, ACTIVATION, dtype)
    if residual_ptr is not None:
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        acc += tl.load(residual_ptr + rows[:, None] * stride_rm + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    return acc.to(dtype)


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=_SECOND)
def _linear_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    scale_ptr,
    means_ptr,
    squares_ptr,
    colsum_ptr,
    y_ptr,
    y_means_ptr,
    y_squares_ptr,
    partials_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    stride_rm,
    eps,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    tile = tl.program_id(0)
    tile_m, tile_n = tile_ids(tile, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k_tiles = tl.cdiv(K, BLOCK_K)
    if SPLIT_K == 1:
        first = 0
        last = k_tiles
    else:
        each = tl.cdiv(k_tiles, SPLIT_K)
        first = tl.program_id(1) * each
        last = tl.minimum(first + each, k_tiles)
    wait_for_previous(EARLY)
    ks = first * BLOCK_K + tl.arange(0, BLOCK_K)
    # rows and columns past the end read row 0: cheaper than a mask, and the store drops what they give
    x_ptrs = x_ptr + tl.where(rows < M, rows, 0)[:, None] * stride_xm + ks[None, :]  # [BLOCK_M, BLOCK_K]
    w_ptrs = weight_ptr + tl.where(cols < N, cols, 0)[None, :] * stride_wn + ks[:, None]  # [BLOCK_K, BLOCK_N]
    ks = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(first, last):
        left = K - k * BLOCK_K
        x = tl.load(x_ptrs, mask=(ks < left)[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=(ks < left)[:, None], other=0.0)
        acc = add_dot(x, w, acc, PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    if SPLIT_K > 1:
        part = partials_ptr + tl.program_id(1).to(tl.int64) * M * N
        tl.store(part + rows[:, None] * N + cols[None, :], acc, mask=mask)
    else:
        mean = None
        rstd = None
        if means_ptr is not None:
            mean, rstd = merge_stats(means_ptr, squares_ptr, rows, tl.arange(0, GROUPS), M, K, eps, WIDTH)
        y = _epilogue(
            acc, mean, rstd, colsum_ptr, bias_ptr, scale_ptr, residual_ptr, rows, cols, M, N, stride_rm,
            ACTIVATION, y_ptr.dtype.element_ty,
        )  # fmt: skip
        tl.store(y_ptr + rows[:, None] * N + cols[None, :], y, mask=mask)
        if y_means_ptr is not None:
            store_stats(y, y_means_ptr, y_squares_ptr, rows, tile_n * BLOCK_N, M, N, WIDTH)


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=_SECOND)
def _sum_parts_kernel(
    partials_ptr,
    bias_ptr,
    residual_ptr,
    scale_ptr,
    means_ptr,
    squares_ptr,
    colsum_ptr,
    y_ptr,
    y_means_ptr,
    y_squares_ptr,
    M,
    N,
    K,
    stride_rm,
    eps,
    ACTIVATION: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    # the epilogue of a GEMM whose K was split; partials: [SPLIT_K, M, N] fp32, added in their own order
    wait_for_previous(EARLY)
    tiles_n = tl.cdiv(N, BLOCK_N)
    col = tl.program_id(0) % tiles_n * BLOCK_N
    rows = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col.to(tl.int64) + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    at = rows[:, None] * N + cols[None, :]
    acc = tl.load(partials_ptr + at, mask=mask, other=0.0)
    for part in tl.static_range(1, SPLIT_K):
        acc += tl.load(partials_ptr + part * M.to(tl.int64) * N + at, mask=mask, other=0.0)
    mean = None
    rstd = None
    if means_ptr is not None:
        mean, rstd = merge_stats(means_ptr, squares_ptr, rows, tl.arange(0, GROUPS), M, K, eps, WIDTH)
    y = _epilogue(
        acc, mean, rstd, colsum_ptr, bias_ptr, scale_ptr, residual_ptr, rows, cols, M, N, stride_rm,
        ACTIVATION, y_ptr.dtype.element_ty,
    )  # fmt: skip
    tl.store(y_ptr + at, y, mask=mask)
    if y_means_ptr is not None:
        store_stats(y, y_means_ptr, y_squares_ptr, rows, col, M, N, WIDTH)


@triton.jit(do_not_specialize=["M", "n_programs"], do_not_specialize_on_alignment=_SECOND)
def _linear_fwd_tma_kernel(
    x_desc,
    weight_desc,
    y_desc,
    bias_ptr,
    residual_ptr,
    scale_ptr,
    means_ptr,
    squares_ptr,
    colsum_ptr,
    y_means_ptr,
    y_squares_ptr,
    M,
    N,
    K,
    stride_rm,
    eps,
    n_programs,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILE: tl.constexpr,
    EARLY: tl.constexpr,
):
    STORE_N: tl.constexpr = BLOCK_N // 2 if SUBTILE else BLOCK_N
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    first = tl.program_id(0)
    wait_for_previous(EARLY)
    # the epilogue counts its tiles itself: with that the flattened loop has no edge from prologue to epilogue
    done = first
    for tile in tl.range(first, tiles_m * tiles_n, n_programs, flatten=True):
        tile_m, tile_n = tile_ids(tile, tiles_m, tiles_n, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, tl.cdiv(K, BLOCK_K)):
            x = x_desc.load([tile_m * BLOCK_M, k * BLOCK_K])  # [BLOCK_M, BLOCK_K]
            w = weight_desc.load([tile_n * BLOCK_N, k * BLOCK_K])  # [BLOCK_N, BLOCK_K]
            acc = tl.dot(x, w.T, acc, input_precision=PRECISION)

        tile_m, tile_n = tile_ids(done, tiles_m, tiles_n, GROUP_M)
        done += n_programs
        rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mean = None
        rstd = None
        if means_ptr is not None:
            mean, rstd = merge_stats(means_ptr, squares_ptr, rows, tl.arange(0, GROUPS), M, K, eps, WIDTH)
        if SUBTILE:
            # half a tile at a time: half the registers and half the shared memory of the store
            halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            accs = tl.split(halves)
        else:
            accs = (acc,)
        for half in tl.static_range(len(accs)):
            col = tile_n * BLOCK_N + half * STORE_N
            cols = col.to(tl.int64) + tl.arange(0, STORE_N)
            y = _epilogue(
                accs[half], mean, rstd, colsum_ptr, bias_ptr, scale_ptr, residual_ptr, rows, cols, M, N, stride_rm,
                ACTIVATION, y_desc.dtype,
            )  # fmt: skip
            y_desc.store([tile_m * BLOCK_M, col], y)
            if y_means_ptr is not None:
                store_stats(y, y_means_ptr, y_squares_ptr, rows, col, M, N, WIDTH)


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["squares_ptr", "rstd_ptr"])
def _merge_stats_kernel(
    means_ptr,
    squares_ptr,
    mean_ptr,
    rstd_ptr,
    M,
    K,
    eps,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_previous(EARLY)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mean, rstd = merge_stats(means_ptr, squares_ptr, rows, tl.arange(0, GROUPS), M, K, eps, WIDTH)
    tl.store(mean_ptr + rows, mean, mask=rows < M)
    tl.store(rstd_ptr + rows, rstd, mask=rows < M)


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch parameters of one GEMM.

    Attributes:
        tma: the persistent descriptor kernel instead of the pointer kernel.
        subtile: store the tile in two halves (descriptor kernel only).
        split_k: parts of K that are summed by programs of their own (pointer kernel only).
        library: torch's own GEMM instead, with the other fields unused; 16-bit, without statistics.
        pingpong: the kernel of `pingpong.py`, which has tiles of 128 x 128 x 64 and 4 warps (with `tma`, on sm_90).
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    tma: bool = False
    subtile: bool = False
    split_k: int = 1
    library: bool = False
    pingpong: bool = False


@functools.lru_cache(maxsize=4096)
def heuristic(
    m: int, n: int, k: int, dtype: torch.dtype, out_dtype: torch.dtype, arch: int, tma: bool, sms: int, pingpong: bool
) -> Config:
    """Tiles from the shape alone.

    In the pointer kernel the largest that still give every multiprocessor one; a long K is split for that. In the
    descriptor kernel, of which a multiprocessor runs one program, those with which the busiest one reads least. On an
    H200, for ViT-B/16's GEMMs at batch 1 and 8 that are not ping-pong's, these were the fastest of 45 to 105 configs or
    within 5 % of it.

    Args:
        m, n, k: the GEMM's sizes.
        dtype: of the operands; exact fp32 runs outside the tensor cores and keeps small tiles.
        out_dtype: of the output, whose tile passes through shared memory in the descriptor kernel.
        arch: 10 * major + minor of the compute capability.
        tma: the operands can be described to the copy engine.
        sms: number of multiprocessors.
        pingpong: the kernel of `pingpong.py` can compute it.
    """
    tiles = cdiv(m, 128) * cdiv(n, 128)
    large = tiles >= sms
    if dtype == torch.float32:
        if tma and arch != 120:
            return Config(128, 128, 32, 8, num_warps=8, num_stages=3, tma=True)
        return Config(64, 64, 32, 8, num_warps=4, num_stages=3)
    # a tile of fp32 output takes twice the shared memory: store it in halves
    wide = out_dtype == torch.float32
    # two tiles for every multiprocessor, one of which is multiplied while the other is finished
    if pingpong and tiles >= 2 * sms:
        return Config(128, 128, 64, 16, num_warps=4, num_stages=5, tma=True, pingpong=True)
    if tma and arch != 120:
        block_m, block_n = min(
            ((128, 128), (64, 128), (64, 64)),
            key=lambda tile: cdiv(cdiv(m, tile[0]) * cdiv(n, tile[1]), sms) * sum(tile),
        )
        if block_m == 128:
            return Config(128, 128, 64, 8, num_warps=8, num_stages=4, tma=True, subtile=wide)
        return Config(64, block_n, 128, 8, num_warps=4, num_stages=4, tma=True, subtile=wide and block_n == 128)
    if tma and large:
        # sm_120 has the copy engine, but 99 KiB of shared memory for a block instead of 227
        return Config(128, 128, 32, 8, num_warps=8, num_stages=3, tma=True, subtile=wide)
    small = cdiv(m, 64) * cdiv(n, 64)
    # each part keeps at least 16 rounds of the K loop: below that, adding the parts costs what splitting gains
    if (split_k := min(4, cdiv(sms, small), k // 1024)) > 1 and not large:
        return Config(64, 64, 64, 8, num_warps=4, num_stages=3, split_k=split_k)
    if tma:
        return Config(64, 64, 64, 8, num_warps=4, num_stages=3, tma=True)
    if large:
        return Config(128, 128, 32, 8, num_warps=8, num_stages=4 if arch in (80, 90, 100) else 3)
    return Config(64, 64, 64, 8, num_warps=4, num_stages=3)


def _describable(*tensors: Tensor) -> bool:
    """Whether the copy engine can address these matrices: dense rows, 16-byte aligned like the base, none broadcast."""
    return all(
        t.data_ptr() % 16 == 0
        and t.stride(1) == 1
        and t.stride(0) * t.element_size() % 16 == 0
        and t.stride(0) >= t.shape[1]
        for t in tensors
    )


def _output_dtype(x: Tensor, residual: Tensor | None, scale: Tensor | None) -> torch.dtype:
    dtype = x.dtype if scale is None else torch.promote_types(x.dtype, scale.dtype)
    return dtype if residual is None else torch.promote_types(dtype, residual.dtype)


def library_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None, scale: Tensor | None
) -> Tensor:
    """`linear` by torch's GEMM and the epilogues that it has; what is left over costs passes of its own."""
    x2d = flatten_rows(x)
    if activation == "gelu_tanh" and bias is not None and x.is_cuda:
        # torch's CPU form of this function is the erf one
        y = torch._addmm_activation(bias, x2d, weight.t(), use_gelu=True)
    elif residual is not None and residual.dtype == x.dtype and activation == "none" and scale is None:
        y = torch.addmm(flatten_rows(residual), x2d, weight.t())
        if bias is not None:
            y += bias
        residual = None
    else:
        y = activate_ref(F.linear(x2d, weight, bias), activation)
    y = y.view(*x.shape[:-1], weight.shape[0])
    if scale is not None:
        y = y * scale
    return y if residual is None else residual + y


def launch_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    tf32: bool,
    *,
    stats: Tensor | None = None,
    colsum: Tensor | None = None,
    eps: float = 0.0,
    y_stats: Tensor | None = None,
) -> Tensor:
    """Allocate y and launch the GEMM of this file with any of its epilogues.

    Args:
        x, weight, bias, activation, residual, scale, tf32: as in `linear`; bias may be fp32.
        stats: `[2, ..., ceil(K / STATS_WIDTH)]` fp32 of x's rows, which are normalised by them.
        colsum: `[N]` fp32, sum of each row of `weight`; with `stats`.
        eps: added to the variance; with `stats`.
        y_stats: `[2, ..., ceil(N / STATS_WIDTH)]` fp32, receives those of y's rows.
    """
    (n, k), shape = weight.shape, x.shape[:-1]
    y = torch.empty((*shape, n), dtype=_output_dtype(x, residual, scale), device=x.device)
    if y.numel() == 0:
        return y
    x2d, y2d, weight = flatten_rows(x), y.view(-1, n), flatten_rows(weight)
    m, sms, precision = x2d.shape[0], sm_count(x.device), dot_precision(x.dtype, tf32)
    capability = arch(x.device)
    # exact fp32 has no tensor-core form, so the pointer kernel serves it everywhere
    on_tensor_cores = x.dtype != torch.float32 or precision == "tf32"
    residual = None if residual is None else flatten_rows(residual)
    matrices = (x2d, weight, y2d) if residual is None else (x2d, weight, y2d, residual)
    tma = capability >= 90 and k > 0 and on_tensor_cores and _describable(*matrices)
    flags: tuple[str, ...] = () if y.dtype == x.dtype else (f"{str(y.dtype)[6:]} out",)
    flags += () if tma else ("pointers",)
    flags += () if stats is None else ("norm",)
    flags += () if y_stats is None else ("stats",)
    key = Key("linear", (("m", m), ("n", n), ("k", k)), x.dtype, flags)
    # the ping-pong kernel writes whole groups of statistics
    whole = y_stats is None or n % STATS_WIDTH == 0
    pingpong = tma and capability == 90 and x.dtype == y.dtype != torch.float32 and whole
    config = lookup(key, x.device, Config, lambda: heuristic(m, n, k, x.dtype, y.dtype, capability, tma, sms, pingpong))
    store_n = config.block_n // 2 if config.subtile else config.block_n
    if config.library:
        if not has_library(key):
            raise ValueError(f"linear: the config of {key.text!r} has library=True; expected in 16 bits without stats")
        return library_linear(x, weight, bias, activation, residual, scale)
    if y_stats is not None and store_n % STATS_WIDTH:
        raise ValueError(f"linear: the config of {key.text!r} stores {store_n} columns; expected whole {STATS_WIDTH}s")
    if config.pingpong and not pingpong:
        raise ValueError(
            f"linear: the config of {key.text!r} has pingpong=True; expected sm_90, 16-bit operands and output that the"
            f" copy engine can address, and whole groups of statistics"
        )
    if config.tma and config.split_k > 1:
        raise ValueError(f"linear: the config of {key.text!r} splits K in the descriptor kernel; expected one")
    means, squares = (None, None) if stats is None else stats
    y_means, y_squares = (None, None) if y_stats is None else y_stats
    tiles = cdiv(m, config.block_m) * cdiv(n, config.block_n)
    # what all kernels take
    common: dict[str, Any] = {
        "bias_ptr": dense(bias),
        "scale_ptr": dense(scale),
        "colsum_ptr": colsum,
        "y_means_ptr": y_means,
        "y_squares_ptr": y_squares,
        "M": m,
        "N": n,
        "K": k,
        "ACTIVATION": activation,
        "WIDTH": STATS_WIDTH,
        "EARLY": early(x.device),
    }
    groups = 1 if stats is None else next_power_of_2(stats.shape[-1])
    if config.pingpong:
        from .pingpong import launch_pingpong

        mean, rstd = (None, None) if stats is None else torch.empty((2, m), dtype=torch.float32, device=x.device)
        if stats is not None:
            block_m = max(1, 1024 // groups)
            launch(
                _merge_stats_kernel,
                (cdiv(m, block_m),),
                means_ptr=means,
                squares_ptr=squares,
                mean_ptr=mean,
                rstd_ptr=rstd,
                M=m,
                K=k,
                eps=eps,
                WIDTH=STATS_WIDTH,
                GROUPS=groups,
                BLOCK_M=block_m,
                EARLY=early(x.device),
                num_warps=4,
            )
        common |= {"mean_ptr": mean, "rstd_ptr": rstd}
        common |= {"GROUP_M": config.group_m, "num_stages": config.num_stages}
        launch_pingpong(x2d, weight, y2d, residual, programs=min(sms, tiles), **common)
        return y
    common |= {
        "means_ptr": means,
        "squares_ptr": squares,
        "eps": eps,
        "GROUPS": groups,
        "residual_ptr": residual,
        "stride_rm": 0 if residual is None else residual.stride(0),
    }
    tile = {
        "PRECISION": precision,
        "GROUP_M": config.group_m,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    if config.tma:
        programs = min(sms, tiles)
        launch(
            _linear_fwd_tma_kernel,
            (programs,),
            x_desc=TensorDescriptor.from_tensor(x2d, [config.block_m, config.block_k]),
            weight_desc=TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k]),
            y_desc=TensorDescriptor.from_tensor(y2d, [config.block_m, store_n]),
            n_programs=programs,
            SUBTILE=config.subtile,
            **common,
            **tile,
        )
        return y
    partials = None
    if config.split_k > 1:
        partials = torch.empty((config.split_k, m, n), dtype=torch.float32, device=x.device)
    launch(
        _linear_fwd_kernel,
        (tiles, config.split_k),
        x_ptr=x2d,
        weight_ptr=weight,
        y_ptr=y2d,
        partials_ptr=partials,
        stride_xm=x2d.stride(0),
        stride_wn=weight.stride(0),
        SPLIT_K=config.split_k,
        **common,
        **tile,
    )
    if config.split_k > 1:
        block_m = 8
        launch(
            _sum_parts_kernel,
            (cdiv(m, block_m) * cdiv(n, 2 * STATS_WIDTH),),
            partials_ptr=partials,
            y_ptr=y2d,
            BLOCK_M=block_m,
            BLOCK_N=2 * STATS_WIDTH,
            SPLIT_K=config.split_k,
            num_warps=4,
            **common,
        )
    return y
