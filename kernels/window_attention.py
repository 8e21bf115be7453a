"""Attention inside the windows of a feature map, shifted or not: Swin and Swin V2.

    o_i = sum_j softmax_j(scale * q_i k_j^T + table[row(i, j)] - 100 * [i and j lie in different regions]) v_j

qkv is `[B, H, W, 3 * h * d]`, the packed projection of the map as it lies in memory; o is `[B, H, W, h * d]`. i and j
run through one window of wh x ww tokens of the map rolled by -shift, and

    row(i, j) = (yi - yj + wh - 1) * (2 * ww - 1) + (xi - xj + ww - 1).

Roll, partition and their inverses are index arithmetic: each token is read where it is, and written there. The table
is gathered by the kernel, so no `[h, N, N]` bias and no mask are ever in memory (N = wh * ww). As row(i, j) is a
function of i less one of j, an element of the bias costs one addition and one load. With `scale` a tensor the scores
are Swin V2's, cosines of q and k times each head's scale; the norms are taken from the tiles that are there anyway, in
fp32, and divide the scores, so that q and k are never rounded again.

One program owns one window and head, 49 tokens of 32 in most Swins: less work than the bias that it needs. So where a
window fits one tile the program keeps that bias in registers and takes the same window of several images in turn.
Larger windows (12 x 12, 16 x 16, 24 x 24) go through the online softmax, tile by tile.

The regions are those of the rolled map's last rows and columns, which came from the other edge: timm's slices
[0, -w), [-w, -s), [-s, end) along each axis. Between the first two runs an edge of windows, so what divides a window
is -s alone. With a shift of 0 the slice [-0, end) is the whole axis in timm and torchvision, written last: one region,
nothing divided. The axis is followed by timm's rule here, whichever the other's shift; Transformers' comparisons give
the same, and it has no two shifts.

FLOPs: 4*B*H*W*h*N*d. Bytes of e-byte elements: 4*B*H*W*h*d*e. At N = 49 in bf16 that is 24.5 FLOP a byte: bound by
memory. In torch's calls the roll and the partition alone move as much again, and the scores, N/d maps in size, are
written and read by each of product, bias, mask and softmax.

Source: Liu et al., "Swin Transformer" (arXiv 2103.14030), equation 4 and section 3.2; Liu et al., "Swin Transformer V2"
(arXiv 2111.09883), equation 2; timm's models/swin_transformer.py, `SwinTransformerBlock._attn` and `get_attn_mask`.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._config import Key, arch, early, lookup, sm_count
from ._launch import launch
from ._op import autocast, check_shape, check_tensors, dense, dot_precision, kernel_op
from ._triton import cdiv, next_power_of_2, tl, triton, wait_for_previous
from .attention import MAX_HEAD_DIM, attention_gradients, split_head_dim


def window_attention_ref(
    qkv: Tensor,
    heads: int,
    window: list[int],
    shift: list[int],
    table: Tensor,
    scale: Tensor | None,
    factor: float,
    tf32: bool,
) -> Tensor:
    """`[B, H, W, h * d]` in torch's own calls. `tf32` chooses a kernel's arithmetic and has no meaning here."""
    b, height, width, channels = qkv.shape
    (wh, ww), (sh, sw) = window, shift
    rows, columns, d = height // wh, width // ww, channels // (3 * heads)
    if sh or sw:
        # roll and partition as one gather: alone, the roll would copy q, k and v once for each axis
        order = torch.arange(height * width, device=qkv.device).view(height, width).roll((-sh, -sw), (0, 1))
        order = order.view(rows, wh, columns, ww).transpose(1, 2).flatten()
        tokens = qkv.flatten(1, 2).index_select(1, order).view(b, rows * columns, wh * ww, 3, heads, d)
        q, k, v = tokens.permute(3, 0, 1, 4, 2, 5).unbind(0)
    else:
        tokens = qkv.reshape(b, rows, wh, columns, ww, 3, heads, d).permute(5, 0, 1, 3, 6, 2, 4, 7)
        q, k, v = tokens.reshape(3, b, rows * columns, heads, wh * ww, d).unbind(0)
    if scale is None:
        q = q * factor
    else:
        q, k = (F.normalize(q, dim=-1) * scale[:, None, None]).to(k.dtype), F.normalize(k, dim=-1)
    # not scaled_dot_product_attention: for rows this short its CPU kernel is the slower one
    scores = q @ k.mT + _bias_ref(table, wh, ww)
    if sh or sw:
        scores += _mask_ref(height, width, wh, ww, sh, sw, scores)
    out = scores.softmax(-1).to(v.dtype) @ v
    out = out.view(b, rows, columns, heads, wh, ww, d).permute(0, 1, 4, 2, 5, 3, 6)
    out = out.reshape(b, height, width, heads * d)
    return out.roll((sh, sw), (1, 2)) if sh or sw else out


def _bias_ref(table: Tensor, wh: int, ww: int) -> Tensor:
    # [h, N, N]: token i of a window sees the table's rows from yi to yi + wh - 1, the last one first, and so columns
    seen = table.reshape(2 * wh - 1, 2 * ww - 1, -1).unfold(0, wh, 1).unfold(1, ww, 1).flip(-2, -1)
    return seen.permute(2, 0, 1, 3, 4).reshape(-1, wh * ww, wh * ww)


def _mask_ref(height: int, width: int, wh: int, ww: int, sh: int, sw: int, scores: Tensor) -> Tensor:
    # [windows, 1, N, N]: -100 between tokens that came from two edges of the map
    below = torch.arange(height, device=scores.device) >= height - sh
    right = torch.arange(width, device=scores.device) >= width - sw
    region = 2 * below[:, None] + right
    region = region.view(height // wh, wh, width // ww, ww).transpose(1, 2).reshape(-1, 1, 1, wh * ww)
    return scores.new_zeros(()).masked_fill(region != region.mT, -100.0)


@triton.jit
def _load_tokens(ptr, offsets, valid, cols, D: tl.constexpr):
    # [tokens, cols], zero past the window's last token and past the head dim
    return tl.load(ptr + offsets[:, None] + cols[None, :], mask=valid[:, None] & (cols < D)[None, :], other=0.0)


@triton.jit
def _inverse_norms(x, x_tail, D_TAIL: tl.constexpr):
    # 1 / max(|row|, 1e-12), F.normalize's divisor
    x = x.to(tl.float32)
    squares = tl.sum(x * x, axis=1)
    if D_TAIL > 0:
        x_tail = x_tail.to(tl.float32)
        squares += tl.sum(x_tail * x_tail, axis=1)
    return 1.0 / tl.maximum(tl.sqrt(squares), 1e-12)


@triton.jit
def _shifted(tokens, top, left, shift_h, shift_w, H, W, WW: tl.constexpr):
    # row and column in memory of a window's tokens, [tokens] each
    y = top + tokens // WW + shift_h
    x = left + tokens % WW + shift_w
    return tl.where(y < H, y, y - H).to(tl.int64), tl.where(x < W, x, x - W).to(tl.int64)


@triton.jit
def _regions(tokens, top, left, shift_h, shift_w, H, W, WW: tl.constexpr):
    # [tokens]: 0 to 3, by the edges of the map that they were rolled past
    below = top + tokens // WW >= H - shift_h
    right = left + tokens % WW >= W - shift_w
    return tl.where(below, 2, 0) + tl.where(right, 1, 0)


@triton.jit
def _bias(
    table_ptr,
    queries,
    keys,
    top,
    left,
    shift_h,
    shift_w,
    H,
    W,
    stride_row,
    SHIFTED: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
):
    # [BLOCK_M, BLOCK_S] in base 2: log2(e) * (table + mask), -inf past the last key
    N: tl.constexpr = WH * WW
    LAST: tl.constexpr = (WH - 1) * (2 * WW - 1) + WW - 1
    of_query = (queries // WW * (2 * WW - 1) + queries % WW + LAST) * stride_row
    of_key = (keys // WW * (2 * WW - 1) + keys % WW) * stride_row
    valid = (queries < N)[:, None] & (keys < N)[None, :]
    bias = tl.load(table_ptr + (of_query[:, None] - of_key[None, :]), mask=valid, other=0.0).to(tl.float32)
    if SHIFTED:
        of_query = _regions(queries, top, left, shift_h, shift_w, H, W, WW)
        of_key = _regions(keys, top, left, shift_h, shift_w, H, W, WW)
        bias = tl.where(of_query[:, None] == of_key[None, :], bias, bias - 100.0)
    return tl.where((keys < N)[None, :], bias * 1.4426950408889634, float("-inf"))


@triton.jit
def _scores(
    q,
    q_tail,
    k_ptr,
    k_offsets,
    valid,
    row_scale,
    COSINE: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_TAIL: tl.constexpr,
):
    # [BLOCK_M, BLOCK_S] in base 2, without bias
    k = _load_tokens(k_ptr, k_offsets, valid, tl.arange(0, D_MAIN), D)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    k_tail = k
    if D_TAIL > 0:
        k_tail = _load_tokens(k_ptr, k_offsets, valid, D_MAIN + tl.arange(0, D_TAIL), D)
        scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision=PRECISION)
    if COSINE:
        scores *= row_scale[:, None] * _inverse_norms(k, k_tail, D_TAIL)[None, :]
    else:
        scores *= row_scale
    return scores


@triton.jit(do_not_specialize=["B"])
def _window_attention_fwd_kernel(
    qkv_ptr,
    table_ptr,
    scale_ptr,
    o_ptr,
    B,
    heads,
    H,
    W,
    shift_h,
    shift_w,
    stride_b,
    stride_y,
    stride_x,
    stride_table_row,
    stride_table_head,
    factor_log2,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    SHIFTED: tl.constexpr,
    ALIGN: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    IMAGES: tl.constexpr,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_previous(EARLY)
    # programs of one window are neighbours: its tokens' heads share cache lines, its tiles of queries K and V
    N: tl.constexpr = WH * WW
    COSINE: tl.constexpr = scale_ptr is not None
    tiles_m = tl.cdiv(N, BLOCK_M)
    windows_x = W // WW
    windows = H // WH * windows_x
    tile_m = tl.program_id(0) % tiles_m
    head = (tl.program_id(0) // tiles_m % heads).to(tl.int64)
    window = tl.program_id(0) // tiles_m // heads % windows
    first = (tl.program_id(0) // tiles_m // heads // windows).to(tl.int64) * IMAGES
    top = window // windows_x * WH
    left = window % windows_x * WW

    queries = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    query_y, query_x = _shifted(queries, top, left, shift_h, shift_w, H, W, WW)
    # triton knows of a stride only whether 16 divides it; head dims of 24 or 40 are 16-byte aligned without that
    q_offsets = tl.multiple_of(query_y * stride_y + query_x * stride_x, ALIGN)
    o_offsets = (query_y * W + query_x) * heads * D
    main = tl.arange(0, D_MAIN)
    tail = D_MAIN + tl.arange(0, D_TAIL if D_TAIL > 0 else 1)
    table_ptr += head * stride_table_head
    if COSINE:
        factor_log2 = tl.load(scale_ptr + head).to(tl.float32) * 1.4426950408889634
    if WHOLE:
        keys = tl.arange(0, BLOCK_S)
        key_y, key_x = _shifted(keys, top, left, shift_h, shift_w, H, W, WW)
        k_offsets = tl.multiple_of(key_y * stride_y + key_x * stride_x, ALIGN)
        bias = _bias(
            table_ptr, queries, keys, top, left, shift_h, shift_w, H, W, stride_table_row, SHIFTED, WH, WW
        )  # fmt: skip

    last = first + 1
    if IMAGES > 1:
        last = tl.minimum(first + IMAGES, B)
    for b in range(first, last):
        q_ptr = qkv_ptr + tl.multiple_of(b * stride_b + head * D, ALIGN)
        k_ptr = q_ptr + heads * D
        v_ptr = k_ptr + heads * D
        q = _load_tokens(q_ptr, q_offsets, queries < N, main, D)  # [BLOCK_M, D_MAIN]
        q_tail = q
        if D_TAIL > 0:
            q_tail = _load_tokens(q_ptr, q_offsets, queries < N, tail, D)  # [BLOCK_M, D_TAIL]
        row_scale = factor_log2
        if COSINE:
            row_scale = factor_log2 * _inverse_norms(q, q_tail, D_TAIL)
        if WHOLE:
            scores = _scores(
                q, q_tail, k_ptr, k_offsets, keys < N, row_scale, COSINE, PRECISION, D, D_MAIN, D_TAIL
            )  # fmt: skip
            scores += bias
            p = tl.exp2(scores - tl.max(scores, axis=1)[:, None])  # [BLOCK_M, BLOCK_S]
            total = tl.sum(p, axis=1)
            v = _load_tokens(v_ptr, k_offsets, keys < N, main, D)
            acc = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
            if D_TAIL > 0:
                v_tail = _load_tokens(v_ptr, k_offsets, keys < N, tail, D)
                acc_tail = tl.dot(p.to(v.dtype), v_tail, input_precision=PRECISION)
        else:
            highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK_M,), tl.float32)
            acc = tl.zeros((BLOCK_M, D_MAIN), tl.float32)
            if D_TAIL > 0:
                acc_tail = tl.zeros((BLOCK_M, D_TAIL), tl.float32)
            for start in range(0, N, BLOCK_S):
                keys = start + tl.arange(0, BLOCK_S)
                key_y, key_x = _shifted(keys, top, left, shift_h, shift_w, H, W, WW)
                k_offsets = tl.multiple_of(key_y * stride_y + key_x * stride_x, ALIGN)
                scores = _scores(
                    q, q_tail, k_ptr, k_offsets, keys < N, row_scale, COSINE, PRECISION, D, D_MAIN, D_TAIL
                )  # fmt: skip
                scores += _bias(
                    table_ptr, queries, keys, top, left, shift_h, shift_w, H, W, stride_table_row, SHIFTED, WH, WW
                )  # fmt: skip
                new_highest = tl.maximum(highest, tl.max(scores, axis=1))
                p = tl.exp2(scores - new_highest[:, None])
                rescale = tl.exp2(highest - new_highest)
                total = total * rescale + tl.sum(p, axis=1)
                v = _load_tokens(v_ptr, k_offsets, keys < N, main, D)
                acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
                if D_TAIL > 0:
                    v_tail = _load_tokens(v_ptr, k_offsets, keys < N, tail, D)
                    acc_tail = tl.dot(p.to(v.dtype), v_tail, acc_tail * rescale[:, None], input_precision=PRECISION)
                highest = new_highest

        # o is [B, H, W, heads * D], contiguous
        o_ptrs = o_ptr + b * H * W * heads * D + head * D + o_offsets[:, None]
        out = (acc / total[:, None]).to(o_ptr.dtype.element_ty)
        tl.store(o_ptrs + main[None, :], out, mask=(queries < N)[:, None] & (main < D)[None, :])
        if D_TAIL > 0:
            out = (acc_tail / total[:, None]).to(o_ptr.dtype.element_ty)
            tl.store(o_ptrs + tail[None, :], out, mask=(queries < N)[:, None] & (tail < D)[None, :])


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch parameters; `block_s` covers a whole window where it can.

    Attributes:
        images: that one program takes in turn; with a whole window in one tile they share its bias.
    """

    block_m: int
    block_s: int
    images: int
    num_warps: int
    num_stages: int


@functools.lru_cache(maxsize=4096)
def heuristic(windows: int, n: int, d: int, dtype: torch.dtype, arch: int, sms: int) -> Config:
    """Tiles that hold scores and bias in registers, and as many images a program as leave the device full.

    Args:
        windows: of all images and heads.
        n: tokens of a window.
        d: head dim.
        dtype: of qkv; fp32 operands take twice the shared memory.
        arch: 10 * major + minor of the compute capability.
        sms: number of multiprocessors.
    """
    width = sum(split_head_dim(d))
    tokens = max(16, next_power_of_2(n))
    if dtype == torch.float32:
        block_m, block_s, num_warps = (32, 16, 4) if width <= 64 else (16, 16, 8)
    elif width <= 128:
        # past one tile 32 keys: scores of 64 and the addresses of their bias are more than the registers hold
        block_m, block_s, num_warps = (64, 64, 4) if tokens <= 64 else (64, 32, 8 if width > 96 else 4)
    else:
        # no Swin has such heads; the widest use some stack
        block_m, block_s, num_warps = (64, 32, 8) if width <= 192 else (32, 16, 8)
    # two waves of programs, four to a multiprocessor, come before sharing a bias; the online form shares none
    images = next((k for k in (8, 4, 2) if n <= block_s and windows >= 8 * sms * k), 1)
    num_stages = 2 if dtype != torch.float32 and width <= 128 else 1
    return Config(min(block_m, tokens), min(block_s, tokens), images, num_warps, num_stages)


def _check_window_attention(
    qkv: Tensor,
    heads: int,
    window: list[int],
    shift: list[int],
    table: Tensor,
    scale: Tensor | None,
    factor: float,
    tf32: bool,
) -> None:
    op = "window_attention"
    check_tensors(op, qkv=qkv, table=table, scale=scale)
    if qkv.dim() != 4 or heads < 1 or qkv.shape[-1] % (3 * heads):
        raise ValueError(
            f"{op}: 'qkv' has shape {list(qkv.shape)} for {heads} heads; expected [B, H, W, 3 * heads * d]"
        )
    d = qkv.shape[-1] // (3 * heads)
    if not 1 <= d <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: head dim {d}; expected 1 to {MAX_HEAD_DIM}")
    if len(window) != 2 or len(shift) != 2 or min(window) < 1:
        raise ValueError(f"{op}: 'window' is {window} and 'shift' {shift}; expected height and width of each")
    for axis, size, extent, step in zip(("height", "width"), qkv.shape[1:3], window, shift, strict=True):
        if size % extent:
            raise ValueError(f"{op}: a map of {axis} {size}; expected a multiple of the window's {extent}")
        if not 0 <= step < extent:
            raise ValueError(f"{op}: a shift of {step} in {axis}; expected 0 to {extent - 1}, less than the window")
    check_shape(op, "table", table, (2 * window[0] - 1) * (2 * window[1] - 1), heads)
    check_shape(op, "scale", scale, heads)
    for name, tensor in (("table", table), ("scale", scale)):
        if tensor is not None and tensor.dtype not in (qkv.dtype, torch.float32):
            raise TypeError(
                f"{op}: '{name}' has dtype {tensor.dtype}, 'qkv' {qkv.dtype}; expected the same dtype or float32"
            )


@kernel_op("vitfast::window_attention", reference=window_attention_ref, check=_check_window_attention)
def _window_attention(
    qkv: Tensor,
    heads: int,
    window: list[int],
    shift: list[int],
    table: Tensor,
    scale: Tensor | None,
    factor: float,
    tf32: bool,
) -> Tensor:
    b, height, width, channels = qkv.shape
    (wh, ww), d = window, channels // (3 * heads)
    out = torch.empty((b, height, width, heads * d), dtype=qkv.dtype, device=qkv.device)
    if out.numel() == 0:
        return out
    n, maps = wh * ww, (height // wh) * (width // ww) * heads
    sizes = (("windows", b * maps), ("height", wh), ("width", ww), ("d", d))
    config = lookup(
        Key("window_attention", sizes, qkv.dtype, () if scale is None else ("cosine",)),
        qkv.device,
        Config,
        lambda: heuristic(b * maps, n, d, qkv.dtype, arch(qkv.device), sm_count(qkv.device)),
    )
    if qkv.stride(-1) != 1:
        qkv = qkv.contiguous()
    if (table.shape[0] - 1) * table.stride(0) >= 2**31:
        # offsets into the table are of 32 bits, half the registers
        table = table.contiguous()
    stride_b, stride_y, stride_x, _ = qkv.stride()
    d_main, d_tail = split_head_dim(d)
    launch(
        _window_attention_fwd_kernel,
        (cdiv(b, config.images) * maps * cdiv(n, config.block_m),),
        qkv_ptr=qkv,
        table_ptr=table,
        scale_ptr=dense(scale),
        o_ptr=out,
        B=b,
        heads=heads,
        H=height,
        W=width,
        shift_h=shift[0],
        shift_w=shift[1],
        stride_b=stride_b,
        stride_y=stride_y,
        stride_x=stride_x,
        stride_table_row=table.stride(0),
        stride_table_head=table.stride(1),
        factor_log2=factor * math.log2(math.e),
        PRECISION=dot_precision(qkv.dtype, tf32),
        WHOLE=n <= config.block_s,
        SHIFTED=any(shift),
        ALIGN=math.gcd(16, d, stride_b, stride_y, stride_x),
        WH=wh,
        WW=ww,
        IMAGES=config.images,
        D=d,
        D_MAIN=d_main,
        D_TAIL=d_tail,
        BLOCK_M=config.block_m,
        BLOCK_S=config.block_s,
        EARLY=early(qkv.device),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, heads, window, shift, table, scale, factor, _ = inputs
    ctx.save_for_backward(qkv, table, scale)
    ctx.heads, ctx.window, ctx.shift, ctx.factor = heads, window, shift, factor


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    def reference(qkv: Tensor, table: Tensor, scale: Tensor | None) -> Tensor:
        return window_attention_ref(qkv, ctx.heads, ctx.window, ctx.shift, table, scale, ctx.factor, False)

    needs = [ctx.needs_input_grad[i] for i in (0, 4, 5)]
    qkv, table, scale = attention_gradients(ctx, grad, needs, reference)
    return qkv, None, None, None, table, scale, None, None


_window_attention.op.register_autograd(_backward, setup_context=_setup)


def window_attention(
    qkv: Tensor,
    heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    table: Tensor,
    scale: float | Tensor | None = None,
    tf32: bool = False,
) -> Tensor:
    """Attention with relative position bias inside the windows of a cyclically shifted map.

    The map is neither rolled nor partitioned beforehand, and comes back in its own order. As in timm's `get_attn_mask`
    keys that the shift brought from another edge of the map get -100 added, not -inf: cosine scores reach 100. A shift
    of 0 along one axis divides no window along it. Transformers' Swin V2 adds that mask twice, -200.

    Args:
        qkv: `[B, H, W, 3 * heads * d]`, fp16, bf16 or fp32 (float64 on CPU), in the order of Swin's `attn.qkv`: q, k,
            v, each `heads` heads of d; d from 1 to 256.
        heads: of attention.
        window: its height and width in tokens, which divide H and W. Padding is the caller's: libraries shift first or
            pad first, with different results.
        shift: of the windows, down and to the right, each less than the window. Libraries set it to 0 along an axis
            that is one window long; here it is taken as it is.
        table: `[(2 * wh - 1) * (2 * ww - 1), heads]`, the bias by offset of query and key, in qkv's dtype or fp32, any
            strides. Swin V2's is `16 * sigmoid(cpb_mlp(coordinates))`.
        scale: of the scores, default `d ** -0.5`. A tensor `[heads]`, in qkv's dtype or fp32, makes them cosines: q
            and k are normalised as by `F.normalize` first, in fp32. Swin V2's is
            `logit_scale.clamp(max=log(100)).exp()`.
        tf32: let fp32 operands be multiplied in tf32 on CUDA even where
            `torch.backends.cuda.matmul.allow_tf32` is off.

    Returns:
        `[B, H, W, heads * d]`, contiguous.

    Raises:
        ValueError: a shape or device does not fit, or a window does not divide the map.
        TypeError: a dtype does not fit.
    """
    (qkv,) = autocast(qkv)
    cosine = isinstance(scale, Tensor)
    d = qkv.shape[-1] // (3 * heads) if heads > 0 else 1
    factor = max(d, 1) ** -0.5 if cosine or scale is None else float(scale)
    return _window_attention(qkv, heads, list(window), list(shift), table, scale if cosine else None, factor, tf32)
