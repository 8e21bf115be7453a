"""Patch embedding with everything that stands between the pixels and the first block.

    tokens[:, :T]  = prefix                                   (+ its rows of pos_embed)
    tokens[:, T+n] = weight . patch n of (pixels * scale + shift) + bias + its row of pos_embed

pixels are `[B, C, H, W]`, float or uint8, NCHW or channels_last; weight is `[D, C, P, Q]` (as the `nn.Conv2d` of stride
P x Q keeps it), prefix `[T, D]` (class, distillation, register tokens), tokens `[B, T + N, D]`, N = (H / P) * (W / Q).
scale and shift are per channel and may be left out; 1 / (255 std) and -mean / std make them normalise uint8 pixels.

Fused: the patches are gathered by the GEMM's own address arithmetic (implicit GEMM, no im2col copy); uint8 pixels are
converted, scaled and shifted between load and dot, in fp32 and rounded once to the operands' dtype; bias and position
embedding are added to the fp32 accumulator; the program that holds an image's first patch writes the prefix rows of
its columns.

255, mean and std fold into one multiply-add per pixel, and no further: folded into weight and bias, the products of raw
pixels and the new bias cancel. Against float64, on images near the mean, that cost fp32 8 times the tests' limit, and
bf16 and fp16 all of it even with the bias in fp32; the multiply-add stays below 0.6 of it, as division by std does.

K runs over (C, P, Q) for NCHW and over (P, Q, C) for channels_last, so that neighbouring k are neighbouring pixels.

FLOPs: 2*B*N*D*C*P*Q. Bytes: B*C*H*W of the pixels' size, D*C*P*Q*e weights, B*(T+N)*D*e tokens; uint8 pixels are a
quarter of fp32 ones. ViT-B/16 at 224, batch 256, bf16: 59 GFLOP; 77 MB of bf16 pixels (38.5 of uint8) and 77 MB of
tokens.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words" (arXiv 2010.11929), equation 1.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._config import Key, arch, early, lookup
from ._launch import launch
from ._op import autocast, check_same_dtype, check_shape, check_tensors, dense, dot_precision, kernel_op
from ._triton import add_dot, cdiv, tl, triton, wait_for_previous


def normalize_ref(pixels: Tensor, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`pixels * scale + shift` in fp32 (float64 for float64 weights), rounded to `dtype`."""
    if scale is None and shift is None:
        return pixels.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    x = pixels.to(wide)
    if scale is not None:
        x = x * scale.to(wide)[:, None, None]
    if shift is not None:
        x = x + shift.to(wide)[:, None, None]
    return x.to(dtype)


def patch_embed_ref(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prefix: Tensor | None,
    pos_embed: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    tf32: bool,
) -> Tensor:
    """The same function in torch's own calls. `tf32` chooses a kernel's arithmetic and has no meaning here."""
    x = normalize_ref(pixels, scale, shift, weight.dtype)
    x = F.conv2d(x, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    n = x.shape[1]
    if pos_embed is not None and pos_embed.shape[0] == n:
        x = x + pos_embed
    if prefix is not None:
        x = torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1)
    if pos_embed is not None and pos_embed.shape[0] != n:
        x = x + pos_embed
    return x.contiguous()


@triton.jit(do_not_specialize=["n_patches_total"])
def _patch_embed_fwd_kernel(
    pixels_ptr,
    weight_ptr,
    bias_ptr,
    prefix_ptr,
    pos_ptr,
    scale_ptr,
    shift_ptr,
    tokens_ptr,
    n_patches_total,
    N,
    D,
    grid_w,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    T: tl.constexpr,
    POS_PREFIX: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SECOND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_previous(EARLY)
    K: tl.constexpr = C * P * Q
    tiles_n = tl.cdiv(D, BLOCK_N)
    # the column tiles of one row tile are neighbours: they read the same pixels
    tile_m = tl.program_id(0) // tiles_n
    tile_n = tl.program_id(0) % tiles_n
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < n_patches_total
    col_mask = cols < D
    batch = rows // N
    patch = (rows % N).to(tl.int32)
    # first pixel of each patch
    grid_y = (patch // grid_w).to(tl.int64)
    grid_x = (patch % grid_w).to(tl.int64)
    corner = batch * stride_b + grid_y * P * stride_h + grid_x * Q * stride_w
    # pixels that are converted come to the dot in registers. On tensor cores they must be its second operand, which the
    # compiler puts into shared memory: a first operand in registers is overwritten while Hopper's asynchronous dot
    # reads it (triton-lang/triton issue 9433)
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SECOND else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_mask = k < K
        if CHANNELS_LAST:
            c = k % C
            # a patch's row is one run of Q * C elements; said like this, the compiler sees it and loads it wide
            offset = (k // (C * Q)).to(tl.int64) * stride_h + k % (C * Q)
        else:
            q = k % Q
            p = (k // Q) % P
            c = k // (P * Q)
            offset = c.to(tl.int64) * stride_c + p.to(tl.int64) * stride_h + q.to(tl.int64) * stride_w
        x = tl.load(
            pixels_ptr + corner[:, None] + offset[None, :], mask=row_mask[:, None] & k_mask[None, :], other=0
        )  # [BLOCK_M, BLOCK_K]
        if scale_ptr is not None or shift_ptr is not None:
            x = x.to(tl.float32)
            if scale_ptr is not None:
                x *= tl.load(scale_ptr + c, mask=k_mask, other=0.0).to(tl.float32)[None, :]
            if shift_ptr is not None:
                x += tl.load(shift_ptr + c, mask=k_mask, other=0.0).to(tl.float32)[None, :]
        x = x.to(weight_ptr.dtype.element_ty)
        # weights lie in k's own order; past the last k they are zero, whatever normalising made of the pixels there
        w_mask = col_mask[:, None] & k_mask[None, :]
        # [BLOCK_N, BLOCK_K]
        w = tl.load(weight_ptr + cols.to(tl.int64)[:, None] * K + k[None, :], mask=w_mask, other=0.0)
        if SECOND:
            acc = add_dot(w, x.T, acc, PRECISION)
        else:
            acc = add_dot(x, w.T, acc, PRECISION)

    if SECOND:
        acc = acc.T
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    mask = row_mask[:, None] & col_mask[None, :]
    if pos_ptr is not None:
        pos_rows = patch.to(tl.int64) + (T if POS_PREFIX else 0)
        acc += tl.load(pos_ptr + pos_rows[:, None] * D + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    image = tokens_ptr + batch * (N + T) * D
    dtype = tokens_ptr.dtype.element_ty
    tl.store(image[:, None] + ((patch + T).to(tl.int64) * D)[:, None] + cols[None, :], acc.to(dtype), mask=mask)

    # images that start in this tile get their prefix rows from it
    if T > 0:
        first = (patch == 0) & row_mask
        for t in tl.static_range(T):
            token = tl.load(prefix_ptr + t * D + cols, mask=col_mask, other=0.0).to(tl.float32)
            if POS_PREFIX:
                token += tl.load(pos_ptr + t * D + cols, mask=col_mask, other=0.0).to(tl.float32)
            rows_of_token = tl.broadcast_to(token.to(dtype)[None, :], (BLOCK_M, BLOCK_N))
            tl.store(image[:, None] + t * D + cols[None, :], rows_of_token, mask=first[:, None] & col_mask[None, :])


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch parameters of the implicit GEMM."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@functools.lru_cache(maxsize=4096)
def heuristic(patches: int, width: int, k: int, dtype: torch.dtype, arch: int) -> Config:
    """Wide column tiles, since each of them gathers the same pixels again.

    Args:
        patches: B * N.
        width: D.
        k: C * P * Q.
        dtype: of the weights.
        arch: 10 * major + minor of the compute capability.
    """
    if dtype == torch.float32:
        # triton 3.7 takes an fp32 operand that was converted from fewer bits to sm_100's tensor cores, exact or not,
        # in tiles of 64 rows or more
        return Config(32 if arch == 100 else 64, 64, 32, num_warps=4, num_stages=3)
    if cdiv(patches, 128) * cdiv(width, 128) >= 108:
        if arch == 90:
            # three programs a multiprocessor; measured on an H200 for ViT-B/16 at batch 256: 220 us, with converted
            # pixels 391, where tiles of 128 x 128 on 8 warps took 264 and 404
            return Config(64, 128, 64, num_warps=4, num_stages=3)
        return Config(128, 128, 64 if arch == 100 else 32, num_warps=8, num_stages=3)
    return Config(64, 64, 64, num_warps=4, num_stages=3)


def _check_patch_embed(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prefix: Tensor | None,
    pos_embed: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    tf32: bool,
) -> None:
    op = "patch_embed"
    check_tensors(op, weight=weight, bias=bias, prefix=prefix, pos_embed=pos_embed, scale=scale, shift=shift)
    check_same_dtype(op, weight=weight, bias=bias)
    if pixels.dtype != torch.uint8 and not pixels.is_floating_point():
        raise TypeError(f"{op}: 'pixels' has dtype {pixels.dtype}; expected uint8 or floating point")
    if pixels.device != weight.device:
        raise ValueError(
            f"{op}: 'pixels' is on {pixels.device}, but 'weight' is on {weight.device}; expected one device"
        )
    if pixels.dim() != 4 or weight.dim() != 4 or pixels.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{op}: 'pixels' has shape {list(pixels.shape)} and 'weight' {list(weight.shape)};"
            " expected [B, C, H, W] and [D, C, P, Q]"
        )
    (width, channels, p, q), (height, image_width) = weight.shape, pixels.shape[2:]
    if height < p or image_width < q or height % p or image_width % q:
        raise ValueError(
            f"{op}: image of {height} x {image_width} pixels;"
            f" expected a height divisible by {p} and a width divisible by {q}"
        )
    check_shape(op, "bias", bias, width)
    check_shape(op, "scale", scale, channels)
    check_shape(op, "shift", shift, channels)
    t = 0
    if prefix is not None:
        if prefix.dim() != 2 or prefix.shape[1] != width:
            raise ValueError(f"{op}: 'prefix' has shape {list(prefix.shape)}; expected [T, {width}]")
        t = prefix.shape[0]
    if pos_embed is not None:
        n = (height // p) * (image_width // q)
        if pos_embed.dim() != 2 or pos_embed.shape[1] != width or pos_embed.shape[0] not in (n, n + t):
            raise ValueError(
                f"{op}: 'pos_embed' has shape {list(pos_embed.shape)}; expected [{n}, {width}]"
                + (f" or, with the prefix, [{n + t}, {width}]" if t else "")
            )


def _output_dtype(weight: Tensor, prefix: Tensor | None, pos_embed: Tensor | None) -> torch.dtype:
    dtype = weight.dtype
    for added in (prefix, pos_embed):
        dtype = dtype if added is None else torch.promote_types(dtype, added.dtype)
    return dtype


def _is_channels_last(x: Tensor) -> bool:
    # without a gap between pixels: channels cut out of wider ones take the general order
    return x.stride(1) == 1 and x.stride(3) == x.shape[1] > 1


@kernel_op("vitfast::patch_embed", reference=patch_embed_ref, check=_check_patch_embed)
def _patch_embed(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prefix: Tensor | None,
    pos_embed: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    tf32: bool,
) -> Tensor:
    d, c, p, q = weight.shape
    b, grid_h, grid_w = pixels.shape[0], pixels.shape[2] // p, pixels.shape[3] // q
    n, t = grid_h * grid_w, 0 if prefix is None else prefix.shape[0]
    tokens = torch.empty((b, t + n, d), dtype=_output_dtype(weight, prefix, pos_embed), device=pixels.device)
    if tokens.numel() == 0:
        return tokens
    channels_last = _is_channels_last(pixels)
    # the kernel reads weights in the order in which it walks k; free where the model itself is channels_last
    layout = torch.channels_last if channels_last else torch.contiguous_format
    stride_b, stride_c, stride_h, stride_w = pixels.stride()
    converted = pixels.dtype != weight.dtype or scale is not None or shift is not None
    flags = ("converted",) if converted else ()
    precision = dot_precision(weight.dtype, tf32)
    config = lookup(
        Key("patch_embed", (("patches", b * n), ("width", d), ("k", c * p * q)), weight.dtype, flags),
        pixels.device,
        Config,
        lambda: heuristic(b * n, d, c * p * q, weight.dtype, arch(pixels.device)),
    )
    launch(
        _patch_embed_fwd_kernel,
        (cdiv(b * n, config.block_m) * cdiv(d, config.block_n),),
        pixels_ptr=pixels,
        weight_ptr=weight.contiguous(memory_format=layout),
        bias_ptr=dense(bias),
        prefix_ptr=dense(prefix),
        pos_ptr=dense(pos_embed),
        scale_ptr=dense(scale),
        shift_ptr=dense(shift),
        tokens_ptr=tokens,
        n_patches_total=b * n,
        N=n,
        D=d,
        grid_w=grid_w,
        stride_b=stride_b,
        stride_c=stride_c,
        stride_h=stride_h,
        stride_w=stride_w,
        C=c,
        P=p,
        Q=q,
        T=t,
        POS_PREFIX=pos_embed is not None and pos_embed.shape[0] == t + n,
        CHANNELS_LAST=channels_last,
        SECOND=converted and (weight.dtype != torch.float32 or precision == "tf32"),
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        EARLY=early(pixels.device),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return tokens


def _patch_embed_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pixels, weight, bias, prefix, pos_embed, scale, shift, _ = inputs
    ctx.save_for_backward(pixels, weight, bias, scale, shift)
    ctx.prefix = None if prefix is None else (prefix.shape[0], prefix.dtype)
    ctx.pos = None if pos_embed is None else (pos_embed.shape[0], pos_embed.dtype)


def _patch_embed_backward(ctx: Any, grad) -> tuple[Any, ...]:
    pixels, weight, bias, scale, shift = ctx.saved_tensors
    p, q = weight.shape[2:]
    t, prefix_dtype = ctx.prefix or (0, None)
    dprefix = dpos = None
    if ctx.prefix is not None or ctx.pos is not None:
        summed = grad.sum(0)
        if ctx.prefix is not None:
            dprefix = summed[:t].to(prefix_dtype)
        if ctx.pos is not None:
            rows, pos_dtype = ctx.pos
            dpos = summed[summed.shape[0] - rows :].to(pos_dtype)
    grid = (pixels.shape[2] // p, pixels.shape[3] // q)
    patches = grad[:, t:].transpose(1, 2)
    dconv = patches.reshape(*patches.shape[:2], *grid).to(weight.dtype)
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[2]]
    dpixels, dweight, dbias = torch.ops.aten.convolution_backward(
        dconv,
        normalize_ref(pixels, scale, shift, weight.dtype),
        weight,
        None if bias is None else bias.shape,
        [p, q],
        [0, 0],
        [1, 1],
        False,
        [0, 0],
        1,
        wanted,
    )
    if dpixels is not None:
        dpixels = dpixels if scale is None else dpixels * scale.to(dpixels.dtype)[:, None, None]
        dpixels = dpixels.to(pixels.dtype)
    return dpixels, dweight, dbias, dprefix, dpos, None, None, None


_patch_embed.op.register_autograd(_patch_embed_backward, setup_context=_patch_embed_setup)


def patch_embed(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    prefix: Tensor | None = None,
    pos_embed: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    tf32: bool = False,
) -> Tensor:
    """Tokens of the first block from pixels, in one GEMM.

    Args:
        pixels: `[B, C, H, W]`, uint8 (0 to 255) or floating point, NCHW or channels_last, H divisible by P and W by Q.
        weight: `[D, C, P, Q]`, fp16, bf16 or fp32 (float64 on CPU).
        bias: `[D]` in the weight's dtype, or None.
        prefix: `[T, D]`, tokens that go in front of the patches of every image, or None.
        pos_embed: `[N, D]` for the patches or `[T + N, D]` for all tokens, or None.
        scale: `[C]`, multiplies the pixels in fp32, or None.
        shift: `[C]`, added to them, or None. Neither scale nor shift gets a gradient.
        tf32: let fp32 operands be multiplied in tf32 on CUDA even where
            `torch.backends.cuda.matmul.allow_tf32` is off.

    Returns:
        `[B, T + N, D]`, contiguous, in the dtype that torch promotes weight, prefix and pos_embed to. Floating-point
        pixels are cast to the weight's dtype. Under autocast weight and bias are cast as a convolution's are.

    Raises:
        ValueError: a shape or device does not fit, or the image is not divisible into patches.
        TypeError: a dtype does not fit.
    """
    weight, bias = autocast(weight, bias)
    return _patch_embed(pixels, weight, bias, prefix, pos_embed, scale, shift, tf32)
