"""Softmax attention for sequences of ViT length.

    o = softmax(scale * q k^T + bias) v

q is `[B, H, N, d]`, k and v `[B, H, S, d]`, bias anything that broadcasts to `[B, H, N, S]`, o `[B, H, N, d]` laid out
as `[B, N, H, d]`, so that merging the heads is free. q, k and v are read through their strides: the packed output of a
qkv projection, `[B, N, 3, H, d]`, goes in as it is. d is any size up to 256, N and S are any size. The kernel reads
BEiT's bias from its table too, see `relative_attention.py`.

Scores, softmax and accumulator are fp32; the softmax runs in base 2 with log2(e) folded into the scale. Where S fits
one tile (up to 256 keys on sm_90: every ViT at 224 with patches of 16) K and V are read once and the softmax is the
plain one; else the online form rescales tile by tile. A head dim that is no power of two is split into the largest
power of two below it and a tail (72 = 64 + 8, tail tile 16), since padding 72 to 128 would compute and hold 78 %
more.

FLOPs: 4*B*H*N*S*d. Bytes of e-byte elements: B*H*(2*N + 2*S)*d*e. At N = S = 197, d = 64, bf16 that is N/2 = 98 FLOP a
byte: bound by memory on every GPU since Volta. Unfused, the N x S scores alone add 4*B*H*N*S*e bytes.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words" (arXiv 2010.11929), equations 5 to 8; the online softmax is
Milakov and Gimelshein (arXiv 1805.02867), algorithm 3; its tiling Dao et al., "FlashAttention" (arXiv 2205.14135),
algorithm 1.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ._config import Key, arch, early, lookup, sm_count
from ._launch import launch
from ._op import autocast, check_same_dtype, check_tensors, dot_precision, kernel_op
from ._triton import add_dot, cdiv, next_power_of_2, tl, triton, wait_for_previous

MAX_HEAD_DIM = 256

RESIDENT_KEYS = 272
"""The most keys whose scores of 64 queries four warps hold in registers."""


def aligned(x: Tensor) -> Tensor:
    """x as torch's attention kernels for CUDA can read it, which take 16 bytes at once and look at nothing but d: with
    rows that are contiguous and start at multiples of that, or, where d is none, as torch pads it itself."""
    size = x.element_size()
    steps = (x.storage_offset(), *(() if x.shape[-1] * size % 16 else x.stride()[:-1]))
    fits = x.stride(-1) == 1 and not any(step * size % 16 for step in steps)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def attention_ref(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, tf32: bool) -> Tensor:
    """`[B, N, H, d]` in torch's own calls. `tf32` chooses a kernel's arithmetic and has no meaning here."""
    if bias is not None and bias.dim() < 2:
        # torch's CPU kernel wants both dimensions of a mask
        bias = bias.expand(q.shape[2], k.shape[2])
    if q.is_cuda:
        if scale <= 0:
            # there torch's kernels for 16 bits give NaN
            q, scale = q * math.copysign(float(scale < 0), scale), abs(scale) or 1.0
        q, k, v = map(aligned, (q, k, v))
        bias = None if bias is None else aligned(bias.expand(*bias.shape[:-1], k.shape[2]))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return out.transpose(1, 2).contiguous()


def attention_lse_ref(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, tf32: bool
) -> tuple[Tensor, Tensor]:
    """`([B, N, H, d], [B, H, N])` in torch's own calls, with the scores in memory."""
    wide = torch.float32 if q.dtype in (torch.float16, torch.bfloat16) else q.dtype
    scores = q.detach().to(wide) @ k.detach().to(wide).mT * scale
    if bias is not None:
        scores = scores + bias.detach().to(wide)
    return attention_ref(q, k, v, bias, scale, tf32), scores.logsumexp(-1)


@triton.jit
def _load_rows(ptr, rows, n_rows, stride_row, cols, D: tl.constexpr):
    # [rows, cols], zero past the last row and past the head dim
    mask = (rows < n_rows)[:, None] & (cols < D)[None, :]
    return tl.load(ptr + rows[:, None] * stride_row + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _relative_offsets(rows, keys, stride, PREFIX: tl.constexpr, GRID_H: tl.constexpr, GRID_W: tl.constexpr):
    # [BLOCK_M, BLOCK_S]: `relative_index` of a tile in elements, one 32-bit subtraction for each pair of patches
    ROWS: tl.constexpr = (2 * GRID_H - 1) * (2 * GRID_W - 1)
    query = rows.to(tl.int32) - PREFIX
    key = keys.to(tl.int32) - PREFIX
    query = (query + query // GRID_W * (GRID_W - 1) + ROWS // 2) * stride
    key = (key + key // GRID_W * (GRID_W - 1)) * stride
    offsets = query[:, None] - key[None, :]
    if PREFIX:
        from_class = tl.where(keys == 0, (ROWS + 2) * stride, ROWS * stride)
        offsets = tl.where((keys == 0)[None, :], (ROWS + 1) * stride, offsets)
        offsets = tl.where((rows == 0)[:, None], from_class[None, :], offsets)
    return offsets


@triton.jit
def _scores(
    q,
    q_tail,
    k_ptr,
    bias_ptr,
    rows,
    keys,
    N,
    S,
    stride_ks,
    stride_bias_n,
    stride_bias_s,
    scale_log2,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_TAIL: tl.constexpr,
    PREFIX: tl.constexpr,
    GRID_H: tl.constexpr,
    GRID_W: tl.constexpr,
):
    # [BLOCK_M, BLOCK_S] in base 2: log2(e) * (scale * q k^T + bias), -inf past the last key
    k = _load_rows(k_ptr, keys, S, stride_ks, tl.arange(0, D_MAIN), D)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if D_TAIL > 0:
        k_tail = _load_rows(k_ptr, keys, S, stride_ks, D_MAIN + tl.arange(0, D_TAIL), D)
        scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision=PRECISION)
    scores *= scale_log2
    if bias_ptr is not None:
        mask = (rows < N)[:, None] & (keys < S)[None, :]
        if GRID_W > 0:
            bias_ptrs = bias_ptr + _relative_offsets(rows, keys, stride_bias_n, PREFIX, GRID_H, GRID_W)
        else:
            bias_ptrs = bias_ptr + rows[:, None] * stride_bias_n + keys[None, :] * stride_bias_s
        bias = tl.load(bias_ptrs, mask=mask, other=0.0).to(tl.float32)
        if GRID_W > 0:
            scores += bias * 1.4426950408889634
        else:
            # the least number of a dtype, which libraries mask with, stays one: a row of it is a mean, one of -inf zero
            least = tl.maximum(bias * 1.4426950408889634, -3.4028234663852886e38)
            scores += tl.where(bias == float("-inf"), bias, least)
    return tl.where((keys < S)[None, :], scores, float("-inf"))


@triton.jit
def _row_max(scores, bias_ptr):
    # a row that a bias masks entirely has no maximum; with 0 in its place its probabilities come out 0, not NaN
    top = tl.max(scores, axis=1)
    if bias_ptr is not None:
        top = tl.where(top == float("-inf"), 0.0, top)
    return top


@triton.jit
def _attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    o_ptr,
    lse_ptr,
    H,
    N,
    S,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_bias_b,
    stride_bias_h,
    stride_bias_n,
    stride_bias_s,
    scale_log2,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_TAIL: tl.constexpr,
    PREFIX: tl.constexpr,
    GRID_H: tl.constexpr,
    GRID_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_previous(EARLY)
    # with a grid, bias_ptr is BEiT's table: stride_bias_n is its rows', stride_bias_h its columns'
    # programs of one head are neighbours, so that its K and V stay in L2
    tiles_m = tl.cdiv(N, BLOCK_M)
    tile_m = tl.program_id(0) % tiles_m
    head = (tl.program_id(0) // tiles_m) % H
    batch = (tl.program_id(0) // tiles_m // H).to(tl.int64)
    head = head.to(tl.int64)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    main = tl.arange(0, D_MAIN)
    # triton knows of a stride only whether 16 divides it; head dims of 72 or 88 are 16-byte aligned without that
    q_ptr += tl.multiple_of(batch * stride_qb + head * stride_qh, ALIGN)
    k_ptr += tl.multiple_of(batch * stride_kb + head * stride_kh, ALIGN)
    v_ptr += tl.multiple_of(batch * stride_vb + head * stride_vh, ALIGN)
    if bias_ptr is not None:
        bias_ptr += batch * stride_bias_b + head * stride_bias_h

    q = _load_rows(q_ptr, rows, N, stride_qn, main, D)  # [BLOCK_M, D_MAIN]
    q_tail = q
    if D_TAIL > 0:
        tail = D_MAIN + tl.arange(0, D_TAIL)
        q_tail = _load_rows(q_ptr, rows, N, stride_qn, tail, D)  # [BLOCK_M, D_TAIL]

    # A tail of V that took over the place of K's in shared memory would have the same descriptor, and ptxas 12.8 then
    # derives V's further ones from registers that nothing has written. So where one is read, the other is still held.
    if WHOLE:
        keys = tl.arange(0, BLOCK_S).to(tl.int64)
        v = _load_rows(v_ptr, keys, S, stride_vs, main, D)
        if D_TAIL > 0:
            v_tail = _load_rows(v_ptr, keys, S, stride_vs, tail, D)
        scores = _scores(
            q, q_tail, k_ptr, bias_ptr, rows, keys, N, S, stride_ks, stride_bias_n, stride_bias_s,
            scale_log2, PRECISION, D, D_MAIN, D_TAIL, PREFIX, GRID_H, GRID_W,
        )  # fmt: skip
        top = _row_max(scores, bias_ptr)
        p = tl.exp2(scores - top[:, None])  # [BLOCK_M, BLOCK_S]
        total = tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        if D_TAIL > 0:
            acc_tail = tl.dot(p.to(v.dtype), v_tail, input_precision=PRECISION)
    else:
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, D_MAIN), tl.float32)
        if D_TAIL > 0:
            acc_tail = tl.zeros((BLOCK_M, D_TAIL), tl.float32)
        for start in range(0, S, BLOCK_S):
            keys = start + tl.arange(0, BLOCK_S).to(tl.int64)
            scores = _scores(
                q, q_tail, k_ptr, bias_ptr, rows, keys, N, S, stride_ks, stride_bias_n, stride_bias_s,
                scale_log2, PRECISION, D, D_MAIN, D_TAIL, PREFIX, GRID_H, GRID_W,
            )  # fmt: skip
            new_top = tl.maximum(top, _row_max(scores, bias_ptr))
            p = tl.exp2(scores - new_top[:, None])
            rescale = tl.exp2(top - new_top)
            total = total * rescale + tl.sum(p, axis=1)
            v = _load_rows(v_ptr, keys, S, stride_vs, main, D)
            if D_TAIL > 0:
                v_tail = _load_rows(v_ptr, keys, S, stride_vs, tail, D)
            acc = add_dot(p.to(v.dtype), v, acc * rescale[:, None], PRECISION)
            if D_TAIL > 0:
                acc_tail = add_dot(p.to(v.dtype), v_tail, acc_tail * rescale[:, None], PRECISION)
            top = new_top

    if lse_ptr is not None:
        # back from base 2; a row that is masked whole has total 0 and so -inf
        lse = (top + tl.log2(total)) * 0.6931471805599453
        tl.store(lse_ptr + (batch * H + head) * N + rows, lse, mask=rows < N)
    if bias_ptr is not None:
        total = tl.where(total == 0.0, 1.0, total)
    # o is [B, N, H, D], contiguous
    o_ptrs = o_ptr + ((batch * N + rows) * H + head)[:, None] * D
    row_mask = (rows < N)[:, None]
    out = acc / total[:, None]
    tl.store(o_ptrs + main[None, :], out.to(o_ptr.dtype.element_ty), mask=row_mask & (main < D)[None, :])
    if D_TAIL > 0:
        out = acc_tail / total[:, None]
        tl.store(o_ptrs + tail[None, :], out.to(o_ptr.dtype.element_ty), mask=row_mask & (tail < D)[None, :])


@triton.jit
def _attention_resident_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    H,
    N,
    S,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    scale_log2,
    programs,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    NEGATIVE: tl.constexpr,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    PART_0: tl.constexpr,
    PART_1: tl.constexpr,
    PART_2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_previous(EARLY)
    # K and V of one head stay in shared memory, in up to three parts, while `programs` programs walk over its queries;
    # scale_log2 is the scale's absolute value
    part = tl.program_id(0) % programs
    head = ((tl.program_id(0) // programs) % H).to(tl.int64)
    batch = (tl.program_id(0) // programs // H).to(tl.int64)
    main = tl.arange(0, D_MAIN)
    q_ptr += tl.multiple_of(batch * stride_qb + head * stride_qh, ALIGN)
    k_ptr += tl.multiple_of(batch * stride_kb + head * stride_kh, ALIGN)
    v_ptr += tl.multiple_of(batch * stride_vb + head * stride_vh, ALIGN)
    keys_0 = tl.arange(0, PART_0).to(tl.int64)
    k_0 = tl.trans(_load_rows(k_ptr, keys_0, S, stride_ks, main, D))  # [D_MAIN, PART_0]
    v_0 = _load_rows(v_ptr, keys_0, S, stride_vs, main, D)
    if PART_1 > 0:
        keys_1 = PART_0 + tl.arange(0, PART_1).to(tl.int64)
        k_1 = tl.trans(_load_rows(k_ptr, keys_1, S, stride_ks, main, D))
        v_1 = _load_rows(v_ptr, keys_1, S, stride_vs, main, D)
    if PART_2 > 0:
        keys_2 = PART_0 + PART_1 + tl.arange(0, PART_2).to(tl.int64)
        k_2 = tl.trans(_load_rows(k_ptr, keys_2, S, stride_ks, main, D))
        v_2 = _load_rows(v_ptr, keys_2, S, stride_vs, main, D)
    for tile in range(part, tl.cdiv(N, BLOCK_M), programs):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        q = _load_rows(q_ptr, rows, N, stride_qn, main, D)  # [BLOCK_M, D_MAIN]
        s_0 = _part_scores(q, k_0, keys_0, S, PRECISION, NEGATIVE, PART_1 == 0)
        top = tl.max(s_0, axis=1)
        if PART_1 > 0:
            s_1 = _part_scores(q, k_1, keys_1, S, PRECISION, NEGATIVE, PART_2 == 0)
            top = tl.maximum(top, tl.max(s_1, axis=1))
        if PART_2 > 0:
            s_2 = _part_scores(q, k_2, keys_2, S, PRECISION, NEGATIVE, True)
            top = tl.maximum(top, tl.max(s_2, axis=1))
        top *= scale_log2
        # scaled after the maximum, in the multiply-add that subtracts it
        p_0 = tl.exp2(s_0 * scale_log2 - top[:, None])
        total = tl.sum(p_0, axis=1)
        acc = tl.dot(p_0.to(v_0.dtype), v_0, input_precision=PRECISION)
        if PART_1 > 0:
            p_1 = tl.exp2(s_1 * scale_log2 - top[:, None])
            total += tl.sum(p_1, axis=1)
            acc = tl.dot(p_1.to(v_0.dtype), v_1, acc, input_precision=PRECISION)
        if PART_2 > 0:
            p_2 = tl.exp2(s_2 * scale_log2 - top[:, None])
            total += tl.sum(p_2, axis=1)
            acc = tl.dot(p_2.to(v_0.dtype), v_2, acc, input_precision=PRECISION)
        if lse_ptr is not None:
            lse = (top + tl.log2(total)) * 0.6931471805599453
            tl.store(lse_ptr + (batch * H + head) * N + rows, lse, mask=rows < N)
        out = acc * (1.0 / total)[:, None]
        o_ptrs = o_ptr + ((batch * N + rows) * H + head)[:, None] * D + main[None, :]
        tl.store(o_ptrs, out.to(o_ptr.dtype.element_ty), mask=(rows < N)[:, None] & (main < D)[None, :])


@triton.jit
def _part_scores(q, k, keys, S, PRECISION: tl.constexpr, NEGATIVE: tl.constexpr, LAST: tl.constexpr):
    # [BLOCK_M, part] without the scale, but with its sign; only the last part reaches past the last key
    scores = tl.dot(q, k, input_precision=PRECISION)
    if NEGATIVE:
        scores = -scores
    if LAST:
        scores = tl.where((keys < S)[None, :], scores, float("-inf"))
    return scores


def key_parts(s: int) -> tuple[int, int, int]:
    """Up to three powers of two that cover `s` keys, the largest first; 0 for a part that is not needed."""
    sixteens = cdiv(s, 16)
    while sixteens.bit_count() > 3:
        sixteens += sixteens & -sixteens
    parts = [16 << bit for bit in reversed(range(sixteens.bit_length())) if sixteens >> bit & 1]
    first, second, third = (*parts, 0, 0)[:3]
    return first, second, third


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch parameters; `block_s` covers all keys where they fit one tile.

    Attributes:
        library: torch's own attention instead, with the other fields unused.
        resident: the kernel that keeps K and V of a head in shared memory, `block_s` unused; head dims that are powers
            of two, no bias.
    """

    block_m: int
    block_s: int
    num_warps: int
    num_stages: int
    library: bool = False
    resident: bool = False


def split_head_dim(d: int) -> tuple[int, int]:
    """`(main, tail)`: power-of-two tiles that cover a head dim; tail 0 where one tile does, else at least 16.

    The dot's inner size must be 16 or more, so d below 16 is padded to 16. A tail of more than half the main tile saves
    nothing over padding to the next power of two.
    """
    main = next_power_of_2(d + 1) // 2
    if main == d or main < 16:
        return max(16, next_power_of_2(d)), 0
    tail = max(16, next_power_of_2(d - main))
    return (2 * main, 0) if tail >= main else (main, tail)


@functools.lru_cache(maxsize=4096)
def heuristic(n: int, s: int, d: int, dtype: torch.dtype, biased: bool, arch: int) -> Config:
    """Tiles that hold the scores in registers: BLOCK_M x BLOCK_S fp32 over the warps, at most 128 a thread.

    Args:
        n: queries.
        s: keys.
        d: head dim.
        dtype: of q, k and v; fp32 operands take twice the shared memory.
        biased: a bias is added, whose tile takes as many registers as the scores again, from a table or not.
        arch: 10 * major + minor of the compute capability.
    """
    main, tail = split_head_dim(d)
    width = main + tail
    keys = max(16, next_power_of_2(s))
    wgmma = arch in (90, 100)
    if dtype == torch.float32:
        if width > 128:
            return Config(16, 16, num_warps=8 if width > 160 else 4, num_stages=1)
        if width > 64:
            # smaller where all keys fit one tile: without a loop both products' operands are in registers at once
            return Config(32 if keys > 16 else 16, 16, num_warps=4, num_stages=2)
        # 32 keys beside a bias spill
        return Config(32, 16, num_warps=4, num_stages=2) if biased else Config(32, min(32, keys), 4, num_stages=1)
    if width > 128:
        # 128 + 64 holds the fragments of two wide tiles at once
        return Config(64, 16 if width == 192 or biased else min(32, keys), num_warps=8, num_stages=1)
    # three tiles of queries that share what they read, without the keys that a power of two would add. Measured on an
    # H200 at 197 tokens of 12 heads of 64, batch 256: 173 us, where one tile of 256 keys took 310 to 344
    if arch == 90 and not biased and tail == 0 and width <= 64 < n and 64 < s <= RESIDENT_KEYS:
        return Config(64, keys, num_warps=4, num_stages=2 if s <= 208 else 3, resident=True)
    # wgmma reads K from shared memory and leaves the registers to the scores; mma.sync holds fragments of K too
    if biased:
        whole = 64
    elif wgmma:
        whole = 256 if width <= 64 and tail == 0 else 128
    else:
        whole = 128 if width <= 64 else 64
    if keys <= whole:
        block_m = min(128, max(16, next_power_of_2(n)))
        warps = 8 if block_m * keys > 64 * 128 else 2 if width > 64 and block_m * keys <= 32 * 32 else 4
        return Config(block_m, keys, num_warps=warps, num_stages=1)
    if arch == 90 and not biased and width <= 96:
        # measured on an H200 against tiles of 128 x 64 on 8 warps: 292 for 385 us at 577 tokens of 12 heads of 64,
        # batch 64; 328 for 414 at 1370 tokens, batch 16; with tails 144 for 212 at 257 tokens of 16 heads of 80
        return Config(64, 32 if tail else 64, num_warps=4, num_stages=3)
    small = arch not in (80, 90, 100)
    if (biased or small) and width > (64 if biased and small else 96):
        # twice the warps for a tile of bias
        return Config(64, 32, num_warps=8 if biased else 4, num_stages=2)
    # beside a bias, as compiled for sm_90 and sm_100, 64 keys leave the stack alone only with a main tile of 64
    many = wgmma and main == 64 if biased else wgmma or width <= 64
    return Config(128, 64 if many else 32, num_warps=8, num_stages=3 if wgmma or arch == 80 else 2)


def check_heads(op: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int, int]:
    """`(B, H, N, S)`, or an error."""
    check_same_dtype(op, q=q, k=k, v=v)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{op}: '{name}' has shape {list(tensor.shape)}; expected [B, H, N, d]")
    b, h, n, d = q.shape
    if not 1 <= d <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: head dim {d}; expected 1 to {MAX_HEAD_DIM}")
    s = k.shape[2]
    if s == 0 or k.shape != (b, h, s, d) or v.shape != (b, h, s, d):
        raise ValueError(
            f"{op}: 'q' has shape {list(q.shape)}, 'k' {list(k.shape)}, 'v' {list(v.shape)};"
            " expected [B, H, N, d] and twice [B, H, S, d] with S >= 1"
        )
    return b, h, n, s


def _check_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, tf32: bool) -> None:
    check_tensors("attention", q=q, k=k, v=v, bias=bias)
    b, h, n, s = check_heads("attention", q, k, v)
    if bias is not None:
        check_same_dtype("attention", q=q, bias=bias)
        if bias.dim() > 4 or any(
            size not in (1, whole) for size, whole in zip(reversed(bias.shape), (s, n, h, b), strict=False)
        ):
            raise ValueError(
                f"attention: 'bias' has shape {list(bias.shape)}; expected one that broadcasts to {[b, h, n, s]}"
            )


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def launch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    tf32: bool,
    *,
    library: Callable[[], Tensor] | None = None,
    lse: Tensor | None = None,
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """Allocate o `[B, N, H, d]` and launch this file's kernel.

    Args:
        q, k, v, scale, tf32: as in `attention`.
        bias: as in `attention`; with `grid` the table of relative positions.
        library: the same in torch's own calls, for a config that chooses it; None where there is none.
        lse: `[B, H, N]`, receives the logarithms of the softmax's denominators.
        grid: height and width of the patches.
    """
    b, h, n, d = q.shape
    s = k.shape[2]
    out = torch.empty((b, n, h, d), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    flags = () if bias is None else ("bias",) if grid is None else ("bias", "table")
    config = lookup(
        Key("attention", (("n", n), ("s", s), ("d", d)), q.dtype, flags),
        q.device,
        Config,
        lambda: heuristic(n, s, d, q.dtype, bias is not None, arch(q.device)),
    )
    if config.library and library is not None:
        return library()
    q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
    bias_strides: tuple[int, ...] = (0, 0, 0, 0)
    prefix = height = width = 0
    if bias is not None and grid is not None:
        height, width = grid
        prefix = n - height * width
        # offsets into a column are 32-bit, and the last tile's rows reach past the table before they are masked
        if 2 * bias.shape[0] * bias.stride(0) > 2**31:
            bias = bias.contiguous()
        bias_strides = (0, bias.stride(1), bias.stride(0), 0)
    elif bias is not None:
        bias = bias.expand(b, h, n, s)
        bias_strides = bias.stride()
    d_main, d_tail = split_head_dim(d)
    q_strides, k_strides, v_strides = q.stride(), k.stride(), v.stride()
    tiles = cdiv(n, config.block_m)
    # what both kernels take
    common = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "o_ptr": out,
        "lse_ptr": lse,
        "H": h,
        "N": n,
        "S": s,
        "stride_qb": q_strides[0],
        "stride_qh": q_strides[1],
        "stride_qn": q_strides[2],
        "stride_kb": k_strides[0],
        "stride_kh": k_strides[1],
        "stride_ks": k_strides[2],
        "stride_vb": v_strides[0],
        "stride_vh": v_strides[1],
        "stride_vs": v_strides[2],
        "PRECISION": dot_precision(q.dtype, tf32),
        "ALIGN": math.gcd(16, *q_strides[:3], *k_strides[:3], *v_strides[:3]),
        "D": d,
        "D_MAIN": d_main,
        "BLOCK_M": config.block_m,
        "EARLY": early(q.device),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    if config.resident:
        if d_tail or bias is not None:
            raise ValueError(
                f"attention: a config has resident=True for a head dim of {d}{' and a bias' if flags else ''}; expected"
                " a power of two, without bias"
            )
        # as many programs for a head as give every multiprocessor two
        programs = min(tiles, cdiv(2 * sm_count(q.device), b * h))
        part_0, part_1, part_2 = key_parts(s)
        launch(
            _attention_resident_kernel,
            (programs * b * h,),
            # of zero, which would make NaN of the keys past the last one, a number that rounds to it
            scale_log2=max(abs(scale) * math.log2(math.e), 1e-30),
            programs=programs,
            NEGATIVE=scale < 0,
            PART_0=part_0,
            PART_1=part_1,
            PART_2=part_2,
            **common,
        )
        return out
    launch(
        _attention_fwd_kernel,
        (tiles * b * h,),
        bias_ptr=bias,
        stride_bias_b=bias_strides[0],
        stride_bias_h=bias_strides[1],
        stride_bias_n=bias_strides[2],
        stride_bias_s=bias_strides[3],
        scale_log2=scale * math.log2(math.e),
        WHOLE=s <= config.block_s,
        D_TAIL=d_tail,
        PREFIX=prefix,
        GRID_H=height,
        GRID_W=width,
        BLOCK_S=config.block_s,
        **common,
    )
    return out


@kernel_op("vitfast::attention", reference=attention_ref, check=_check_attention)
def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, tf32: bool) -> Tensor:
    return launch_attention(q, k, v, bias, scale, tf32, library=lambda: attention_ref(q, k, v, bias, scale, tf32))


@kernel_op("vitfast::attention_lse", reference=attention_lse_ref, check=_check_attention)
def _attention_lse(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, tf32: bool
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.empty(q.shape[:3], dtype=wide, device=q.device)
    return launch_attention(q, k, v, bias, scale, tf32, lse=lse), lse


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, bias, scale, _ = inputs
    ctx.save_for_backward(q, k, v, bias)
    ctx.scale = scale


def attention_gradients(
    ctx: Any, grad: Tensor, needs: Sequence[bool], reference: Callable[..., Tensor]
) -> Iterator[Tensor | None]:
    """Gradients of the saved tensors, where needed, by torch's own backward of `reference`.

    Where they are to be differentiated again they are those of torch's plain attention, the one that can be.
    """
    # torch's own attention once more, for its backward: it never holds the N x S probabilities
    again = torch.is_grad_enabled()
    pairs = zip(ctx.saved_tensors, needs, strict=True)
    inputs: list[Any] = [
        t if t is None else (t.view_as(t) if again else t.detach().requires_grad_(need)) for t, need in pairs
    ]
    if not again:
        # on CUDA torch keeps the softmax's denominators only where q, k or v needs a gradient
        inputs[0].requires_grad_()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH) if again else nullcontext():
        out = reference(*inputs)
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        # of no images torch's attention leaves the bias out
        grads = iter(torch.autograd.grad(out, wanted, grad, materialize_grads=True, create_graph=again))
    return (next(grads) if need else None for need in needs)


def _attention_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    def reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        return attention_ref(q, k, v, bias, ctx.scale, False)

    return *attention_gradients(ctx, grad, ctx.needs_input_grad[:4], reference), None, None


def _attention_lse_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.mark_non_differentiable(output[1])
    _attention_setup(ctx, inputs, output)


def _attention_lse_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    return _attention_backward(ctx, grad)


_attention.op.register_autograd(_attention_backward, setup_context=_attention_setup)
_attention_lse.op.register_autograd(_attention_lse_backward, setup_context=_attention_lse_setup)


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, bias: Tensor | None = None, tf32: bool = False
) -> Tensor:
    """`softmax(scale * q @ k.T + bias) @ v` per head.

    Args:
        q: `[B, H, N, d]`, fp16, bf16 or fp32 (float64 on CPU), any strides, d from 1 to 256.
        k: `[B, H, S, d]` in q's dtype.
        v: `[B, H, S, d]` in q's dtype.
        scale: of the scores; default `d ** -0.5`.
        bias: added to the scaled scores, broadcastable to `[B, H, N, S]`, in q's dtype. A mask is a bias of 0 and
            -inf; a row that is masked whole gives zeros.
        tf32: let fp32 operands be multiplied in tf32 on CUDA even where
            `torch.backends.cuda.matmul.allow_tf32` is off.

    Returns:
        `[B, H, N, d]`, a view of contiguous `[B, N, H, d]`, so `.transpose(1, 2).flatten(2)` merges heads without a
        copy.

    Raises:
        ValueError: a shape or device does not fit.
        TypeError: a dtype does not fit.
    """
    q, k, v, bias = autocast(q, k, v, bias)
    return _attention(q, k, v, bias, score_scale(scale, q.shape[-1]), tf32).transpose(1, 2)


def attention_lse(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, bias: Tensor | None = None, tf32: bool = False
) -> tuple[Tensor, Tensor]:
    """`attention`, and the logarithm of each row's softmax denominator.

    From these, `exp(scale * q @ k.T + bias - lse)` gives any part of the attention probabilities by itself.

    Args:
        q, k, v, scale, bias, tf32: as in `attention`.

    Returns:
        `(o, lse)`: o as `attention` returns it, lse `[B, H, N]` in fp32 (float64 of float64), -inf for a row that is
        masked whole, without gradient.

    Raises:
        ValueError: a shape or device does not fit.
        TypeError: a dtype does not fit.
    """
    q, k, v, bias = autocast(q, k, v, bias)
    out, lse = _attention_lse(q, k, v, bias, score_scale(scale, q.shape[-1]), tf32)
    return out.transpose(1, 2), lse


def attention_qkv(qkv: Tensor, heads: int, scale: float | None = None, tf32: bool = False) -> Tensor:
    """Self-attention on the packed output of a qkv projection, with merged heads out.

    Args:
        qkv: `[B, N, 3 * H * d]`, in the order of timm's `attn.qkv`: q, k, v, each H heads of d.
        heads: H.
        scale: of the scores; default `d ** -0.5`.
        tf32: as in `attention`.

    Returns:
        `[B, N, H * d]`, contiguous.

    Raises:
        ValueError: the last dimension is not `3 * heads * d`, or a shape or device does not fit.
        TypeError: a dtype does not fit.
    """
    if qkv.dim() != 3 or heads < 1 or qkv.shape[-1] % (3 * heads):
        raise ValueError(
            f"attention_qkv: 'qkv' has shape {list(qkv.shape)} for {heads} heads; expected [B, N, 3 * heads * d]"
        )
    (qkv,) = autocast(qkv)
    b, n, width = qkv.shape
    d = width // (3 * heads)
    q, k, v = qkv.view(b, n, 3, heads, d).permute(2, 0, 3, 1, 4).unbind(0)
    return _attention(q, k, v, None, score_scale(scale, d), tf32).view(b, n, heads * d)


def score_scale(scale: float | None, d: int) -> float:
    """The scale of scores, by default `d ** -0.5`."""
    return max(d, 1) ** -0.5 if scale is None else float(scale)
