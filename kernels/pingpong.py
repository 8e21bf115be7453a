"""The GEMM of `gemm.py` on Hopper with its epilogue under its own tensor cores: two consumers take turns.

A program is one producer warp, which has the copy engine fill a ring of operand tiles, and two consumers of four warps
each, which walk over every second of the program's tiles. The tensor cores belong to one consumer at a time: while it
multiplies, the other one runs its epilogue. A residual's tile arrives through the copy engine in the buffer that the
output's leaves from. Registers move from the producer to the consumers (`setmaxnreg`).

16-bit operands and output; statistics of the output's rows need N to be a multiple of their groups' width. Of x's rows
it takes mean and 1 / standard deviation: to merge groups of them here would take a consumer longer than its turn lasts.
Nothing imports this file before its kernel is needed, since Gluon takes a while to import.

Source: the schedule is CUTLASS's "warp-specialized persistent ping-pong" (NVIDIA/cutlass,
media/docs/cpp/efficient_gemm.md).
"""

import functools
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ._launch import launch
from ._triton import wait_for_previous
from .epilogue import before_residual, tile_ids

# Triton has renamed them between 3.7 and 3.9
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

BLOCK_M = BLOCK_N = 128
BLOCK_K = 64
"""One consumer's tile: its accumulators take half of its registers."""


def shared_bytes(num_stages: int) -> int:
    """Bytes of shared memory: the ring of 16-bit operand tiles, two tiles of output, 1 KiB of barriers and scratch."""
    return 2 * (num_stages * (BLOCK_M + BLOCK_N) * BLOCK_K + 2 * BLOCK_M * BLOCK_N) + 1024


@gluon.jit
def _producer(
    descs,
    buffers,
    bars,
    pointers,
    sizes,
    GROUP_M: gl.constexpr,
    ACTIVATION: gl.constexpr,
    WIDTH: gl.constexpr,
    WHO: gl.constexpr,
):
    x_desc, w_desc, _, residual_desc = descs
    x_ring, w_ring, outs = buffers
    full, empty, residual_full, residual_empty, _ = bars
    M, N, K, n_programs = sizes
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = w_desc.block_type.shape[0]
    STAGES: gl.constexpr = x_ring.shape[0]
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_n = gl.cdiv(N, BLOCK_N)
    step = 0
    count = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, n_programs):
        tile_m, tile_n = tile_ids(tile, tiles_m, tiles_n, GROUP_M)
        for k in range(0, K, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), x_desc.block_type.nbytes + w_desc.block_type.nbytes)
            async_load(x_desc, [tile_m * BLOCK_M, k], full.index(stage), x_ring.index(stage))
            async_load(w_desc, [tile_n * BLOCK_N, k], full.index(stage), w_ring.index(stage))
            step += 1
        if residual_desc is not None:
            # into the buffer of the tile's output, once the store of two tiles ago has read that
            who = count % 2
            mbarrier.wait(residual_empty.index(who), ((count // 2) & 1) ^ 1)
            mbarrier.expect(residual_full.index(who), residual_desc.block_type.nbytes)
            at = [tile_m * BLOCK_M, tile_n * BLOCK_N]
            async_load(residual_desc, at, residual_full.index(who), outs.index(who))
        count += 1


@gluon.jit
def _consumer(
    descs,
    buffers,
    bars,
    pointers,
    sizes,
    GROUP_M: gl.constexpr,
    ACTIVATION: gl.constexpr,
    WIDTH: gl.constexpr,
    WHO: gl.constexpr,
):
    x_desc, w_desc, y_desc, residual_desc = descs
    x_ring, w_ring, outs = buffers
    full, empty, residual_full, residual_empty, turn = bars
    bias_ptr, scale_ptr, mean_ptr, rstd_ptr, colsum_ptr, y_means_ptr, y_squares_ptr = pointers
    M, N, K, n_programs = sizes
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = w_desc.block_type.shape[0]
    STAGES: gl.constexpr = x_ring.shape[0]
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, mma)
    by_column: gl.constexpr = gl.SliceLayout(0, mma)
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_n = gl.cdiv(N, BLOCK_N)
    k_tiles = gl.cdiv(K, BLOCK_K)
    step = WHO * k_tiles
    count = 0
    out = outs.index(WHO)
    for tile in range(gl.program_id(0) + WHO * n_programs, tiles_m * tiles_n, 2 * n_programs):
        tile_m, tile_n = tile_ids(tile, tiles_m, tiles_n, GROUP_M)
        acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, mma)
        mbarrier.wait(turn.index(WHO), count & 1)
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        w = w_ring.index(stage).permute((1, 0))
        acc = warpgroup_mma(x_ring.index(stage), w, acc, is_async=True, use_acc=False)
        step += 1
        for _ in range(1, k_tiles):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            w = w_ring.index(stage).permute((1, 0))
            acc = warpgroup_mma(x_ring.index(stage), w, acc, is_async=True)
            acc = warpgroup_mma_init(warpgroup_mma_wait(1, (acc,)))
            mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
            step += 1
        mbarrier.arrive(turn.index(1 - WHO), count=1)
        acc = warpgroup_mma_wait(0, (acc,))
        mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
        # the other consumer's tile
        step += k_tiles

        mean = None
        rstd = None
        if mean_ptr is not None:
            rows = tile_m * BLOCK_M + gl.arange(0, BLOCK_M, by_row)
            mean = gl.load(mean_ptr + rows, mask=rows < M, other=0.0)
            rstd = gl.load(rstd_ptr + rows, mask=rows < M, other=0.0)
        cols = tile_n * BLOCK_N + gl.arange(0, BLOCK_N, by_column)
        y = before_residual(acc, mean, rstd, colsum_ptr, bias_ptr, scale_ptr, cols, N, ACTIVATION, y_desc.dtype)
        if residual_desc is not None:
            mbarrier.wait(residual_full.index(WHO), count & 1)
            y += out.load(mma).to(gl.float32)
        else:
            tma.store_wait(0)
        rounded = y.to(y_desc.dtype)
        out.store(rounded)
        fence_async_shared()
        async_store(y_desc, [tile_m * BLOCK_M, tile_n * BLOCK_N], out)
        if y_means_ptr is not None:
            each = gl.reshape(rounded.to(gl.float32), (BLOCK_M, BLOCK_N // WIDTH, WIDTH))
            y_mean = gl.sum(each, 2) * (1.0 / WIDTH)
            apart = each - gl.expand_dims(y_mean, 2)
            y_square = gl.sum(apart * apart, 2)
            layout: gl.constexpr = y_mean.type.layout
            row = tile_m.to(gl.int64) * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
            column = tile_n * (BLOCK_N // WIDTH) + gl.arange(0, BLOCK_N // WIDTH, gl.SliceLayout(0, layout))
            at = gl.expand_dims(row, 1) * (N // WIDTH) + gl.expand_dims(column, 0)
            inside = gl.expand_dims(row < M, 1) & gl.expand_dims(column < N // WIDTH, 0)
            gl.store(y_means_ptr + at, y_mean, mask=inside)
            gl.store(y_squares_ptr + at, y_square, mask=inside)
        if residual_desc is not None:
            tma.store_wait(0)
            mbarrier.arrive(residual_empty.index(WHO), count=1)
        count += 1
    tma.store_wait(0)


@gluon.jit
def _linear_fwd_pingpong_kernel(
    x_desc,
    weight_desc,
    y_desc,
    residual_desc,
    bias_ptr,
    scale_ptr,
    mean_ptr,
    rstd_ptr,
    colsum_ptr,
    y_means_ptr,
    y_squares_ptr,
    M,
    N,
    K,
    n_programs,
    ACTIVATION: gl.constexpr,
    WIDTH: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    EARLY: gl.constexpr,
):
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = weight_desc.block_type.shape[0]
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    w_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], weight_desc.layout)
    outs = gl.allocate_shared_memory(y_desc.dtype, [2, BLOCK_M, BLOCK_N], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    residual_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    residual_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(residual_full.index(i), count=1)
        mbarrier.init(residual_empty.index(i), count=1)
        mbarrier.init(turn.index(i), count=1)
    # the first consumer's first turn
    mbarrier.arrive(turn.index(0), count=1)
    wait_for_previous(EARLY)
    descs = (x_desc, weight_desc, y_desc, residual_desc)
    buffers = (x_ring, w_ring, outs)
    bars = (full, empty, residual_full, residual_empty, turn)
    pointers = (bias_ptr, scale_ptr, mean_ptr, rstd_ptr, colsum_ptr, y_means_ptr, y_squares_ptr)
    sizes = (M, N, K, n_programs)
    gl.warp_specialize(
        [
            (
                _consumer,
                (descs, buffers, bars, pointers, sizes, GROUP_M, ACTIVATION, WIDTH, 0),
            ),
            (
                _consumer,
                (descs, buffers, bars, pointers, sizes, GROUP_M, ACTIVATION, WIDTH, 1),
            ),
            (
                _producer,
                (descs, buffers, bars, pointers, sizes, GROUP_M, ACTIVATION, WIDTH, 2),
            ),
        ],
        [4, 1],
        [232, 40],
    )


@functools.cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> Any:
    kind = gl.float16 if dtype == torch.float16 else gl.bfloat16
    return gl.NVMMASharedLayout.get_default_for([rows, columns], kind)


def _descriptor(matrix: Tensor, rows: int, columns: int) -> Any:
    return TensorDescriptor.from_tensor(matrix, [rows, columns], _layout(rows, columns, matrix.dtype))


def launch_pingpong(
    x: Tensor, weight: Tensor, y: Tensor, residual: Tensor | None, *, programs: int, num_stages: int, **common: Any
) -> None:
    """Launch the kernel on matrices that the copy engine can address.

    Args:
        x, weight, y, residual: `[M, K]`, `[N, K]`, `[M, N]` and `[M, N]` or None, of one 16-bit dtype.
        programs: at most one for each multiprocessor.
        num_stages: of the ring.
        common: the kernel's other arguments by name.
    """
    launch(
        _linear_fwd_pingpong_kernel,
        (programs,),
        x_desc=_descriptor(x, BLOCK_M, BLOCK_K),
        weight_desc=_descriptor(weight, BLOCK_N, BLOCK_K),
        y_desc=_descriptor(y, BLOCK_M, BLOCK_N),
        residual_desc=None if residual is None else _descriptor(residual, BLOCK_M, BLOCK_N),
        n_programs=programs,
        STAGES=num_stages,
        # of the consumers; 384 threads have 168 registers each to share
        num_warps=4,
        maxnreg=168,
        **common,
    )
