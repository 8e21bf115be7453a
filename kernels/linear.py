"""Linear layer with everything a ViT does to its output in the GEMM's epilogue.

    y = residual + scale * activation(x W^T + bias)

x is `[..., K]`, weight `[N, K]` (as `nn.Linear` keeps it), bias and scale (LayerScale) `[N]`, residual and y
`[..., N]`. The accumulator is fp32; bias, activation, scale and residual are applied to it in fp32, and y is rounded
once. Activations: exact GELU (erf), GELU's tanh form, and QuickGELU `x * sigmoid(1.702 x)`.

FLOPs: 2*M*N*K. Bytes, elements of e bytes: (M*K + N*K + M*N + residual M*N) * e. Unfused, each of activation, scale
and residual reads and writes M*N*e more. For ViT-B/16's fc1 at batch 256 (M = 50432, N = 3072, K = 768, bf16) that is
238 GFLOP and 392 MB, so the GEMM is bound by compute while one unfused GELU adds 620 MB of traffic.

Two kernels, one epilogue. From sm_90 on: persistent programs, operands through tensor descriptors (TMA), the tile loop
flattened into the K loop so that the next tile's loads start before the previous epilogue ends. Elsewhere, and where a
descriptor cannot describe a tensor (rows not 16-byte aligned, exact fp32): one tile per program, `cp.async` pipeline.

Source: Hendrycks and Gimpel, "Gaussian Error Linear Units" (arXiv 1606.08415), section 2 for all three activations. The
order of tiles for L2 reuse is that of Triton's matrix multiplication tutorial.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._config import arch, lookup, sm_count
from ._op import autocast, check_same_dtype, check_shape, check_tensors, dot_precision, flatten_rows, kernel_op
from ._triton import TensorDescriptor, cdiv, tl, triton

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu")


def activate_ref(x: Tensor, activation: str) -> Tensor:
    """One of `ACTIVATIONS` in torch's own calls."""
    if activation == "none":
        return x
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def linear_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    tf32: bool,
) -> Tensor:
    """The same function in torch's own calls. `tf32` chooses a kernel's arithmetic and has no meaning here."""
    y = activate_ref(F.linear(x, weight, bias), activation)
    if scale is not None:
        y = y * scale
    # dense whatever the inputs' strides, as the kernel writes it
    return (y if residual is None else residual + y).contiguous()


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) = sigmoid(2u)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "quick_gelu":
        return x * tl.sigmoid(1.702 * x)
    else:
        return x


@triton.jit
def _epilogue(acc, bias_ptr, scale_ptr, residual_ptr, rows, cols, M, N, stride_rm, ACTIVATION: tl.constexpr):
    # acc: [BLOCK_M, BLOCK_N] fp32; the activation stands between bias and scale
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    acc = _activate(acc, ACTIVATION)
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        acc += tl.load(residual_ptr + rows[:, None] * stride_rm + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    return acc


@triton.jit
def _tile_ids(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    # walk GROUP_M rows of tiles down before the next column, so that neighbours share operands in L2
    group = tile // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return first_m + within % group_m, within // group_m


@triton.jit
def _linear_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    scale_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    stride_rm,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile_m, tile_n = _tile_ids(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    # rows and columns past the end read row 0: cheaper than a mask, and the store drops what they give
    x_ptrs = x_ptr + tl.where(rows < M, rows, 0)[:, None] * stride_xm + ks[None, :]  # [BLOCK_M, BLOCK_K]
    w_ptrs = weight_ptr + tl.where(cols < N, cols, 0)[None, :] * stride_wn + ks[:, None]  # [BLOCK_K, BLOCK_N]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        left = K - k * BLOCK_K
        x = tl.load(x_ptrs, mask=(ks < left)[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=(ks < left)[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    y = _epilogue(acc, bias_ptr, scale_ptr, residual_ptr, rows, cols, M, N, stride_rm, ACTIVATION)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    tl.store(y_ptr + rows[:, None] * N + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _linear_fwd_tma_kernel(
    x_desc,
    weight_desc,
    y_desc,
    bias_ptr,
    residual_ptr,
    scale_ptr,
    M,
    N,
    K,
    stride_rm,
    n_programs,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILE: tl.constexpr,
):
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    first = tl.program_id(0)
    # the epilogue counts its tiles itself: with that the flattened loop has no edge from prologue to epilogue
    done = first
    for tile in tl.range(first, tiles_m * tiles_n, n_programs, flatten=True):
        tile_m, tile_n = _tile_ids(tile, tiles_m, tiles_n, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, tl.cdiv(K, BLOCK_K)):
            x = x_desc.load([tile_m * BLOCK_M, k * BLOCK_K])  # [BLOCK_M, BLOCK_K]
            w = weight_desc.load([tile_n * BLOCK_N, k * BLOCK_K])  # [BLOCK_N, BLOCK_K]
            acc = tl.dot(x, w.T, acc, input_precision=PRECISION)

        tile_m, tile_n = _tile_ids(done, tiles_m, tiles_n, GROUP_M)
        done += n_programs
        rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        if SUBTILE:
            # half a tile at a time: half the registers and half the shared memory of the store
            halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            left, right = tl.split(halves)
            col = tile_n * BLOCK_N
            cols = col.to(tl.int64) + tl.arange(0, BLOCK_N // 2)
            y = _epilogue(left, bias_ptr, scale_ptr, residual_ptr, rows, cols, M, N, stride_rm, ACTIVATION)
            y_desc.store([tile_m * BLOCK_M, col], y.to(y_desc.dtype))
            cols += BLOCK_N // 2
            y = _epilogue(right, bias_ptr, scale_ptr, residual_ptr, rows, cols, M, N, stride_rm, ACTIVATION)
            y_desc.store([tile_m * BLOCK_M, col + BLOCK_N // 2], y.to(y_desc.dtype))
        else:
            cols = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
            y = _epilogue(acc, bias_ptr, scale_ptr, residual_ptr, rows, cols, M, N, stride_rm, ACTIVATION)
            y_desc.store([tile_m * BLOCK_M, tile_n * BLOCK_N], y.to(y_desc.dtype))


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch parameters of one GEMM.

    Attributes:
        tma: the persistent descriptor kernel instead of the pointer kernel.
        subtile: store the tile in two halves (descriptor kernel only).
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    tma: bool = False
    subtile: bool = False


def heuristic(
    m: int, n: int, k: int, dtype: torch.dtype, out_dtype: torch.dtype, arch: int, tma: bool, sms: int
) -> Config:
    """Tiles from the shape alone: the largest that still give every multiprocessor one.

    Args:
        m, n, k: the GEMM's sizes.
        dtype: of the operands; exact fp32 runs outside the tensor cores and keeps small tiles.
        out_dtype: of the output, whose tile passes through shared memory in the descriptor kernel.
        arch: 10 * major + minor of the compute capability.
        tma: the operands can be described to the copy engine.
        sms: number of multiprocessors.
    """
    large = cdiv(m, 128) * cdiv(n, 128) >= sms
    if dtype == torch.float32:
        if tma and arch != 120:
            return Config(128, 128, 32, 8, num_warps=8, num_stages=3, tma=True)
        return Config(64, 64, 32, 8, num_warps=4, num_stages=3)
    if tma and large:
        # a tile of fp32 output takes twice the shared memory: store it in halves
        wide = out_dtype == torch.float32
        if arch == 90 and not wide and cdiv(m, 128) * cdiv(n, 256) >= 2 * sms:
            return Config(128, 256, 64, 8, num_warps=8, num_stages=3, tma=True, subtile=True)
        # sm_120 has the copy engine, but 99 KiB of shared memory for a block instead of 227
        if arch == 120:
            return Config(128, 128, 32, 8, num_warps=8, num_stages=3, tma=True, subtile=wide)
        return Config(128, 128, 64, 8, num_warps=8, num_stages=4, tma=True, subtile=wide)
    if tma:
        return Config(64, 64, 64, 8, num_warps=4, num_stages=3 if arch == 120 else 5, tma=True)
    if large:
        return Config(128, 128, 32, 8, num_warps=8, num_stages=4 if arch in (80, 90, 100) else 3)
    return Config(64, 64, 64, 8, num_warps=4, num_stages=3)


def _check_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    tf32: bool,
) -> None:
    check_tensors("linear", x=x, weight=weight, bias=bias, residual=residual, scale=scale)
    check_same_dtype("linear", x=x, weight=weight, bias=bias)
    if activation not in ACTIVATIONS:
        raise ValueError(f"linear: activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    shape, weight_shape = x.shape, weight.shape
    if not shape or len(weight_shape) != 2 or shape[-1] != weight_shape[1]:
        raise ValueError(
            f"linear: 'x' has shape {list(shape)} and 'weight' {list(weight_shape)}; expected [..., K] and [N, K]"
        )
    check_shape("linear", "bias", bias, weight_shape[0])
    check_shape("linear", "scale", scale, weight_shape[0])
    if residual is not None:
        check_shape("linear", "residual", residual, *shape[:-1], weight_shape[0])


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


@kernel_op("vitfast::linear", reference=linear_ref, check=_check_linear)
def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    tf32: bool,
) -> Tensor:
    (n, k), shape = weight.shape, x.shape[:-1]
    y = torch.empty((*shape, n), dtype=_output_dtype(x, residual, scale), device=x.device)
    if y.numel() == 0:
        return y
    x, y2d, weight = flatten_rows(x), y.view(-1, n), flatten_rows(weight)
    residual = None if residual is None else flatten_rows(residual)
    bias = None if bias is None else bias.contiguous()
    scale = None if scale is None else scale.contiguous()
    m, sms, precision = x.shape[0], sm_count(x.device), dot_precision(x.dtype, tf32)
    capability = arch(x.device)
    # exact fp32 has no tensor-core form, so the pointer kernel serves it everywhere
    on_tensor_cores = x.dtype != torch.float32 or precision == "tf32"
    tma = capability >= 90 and k > 0 and on_tensor_cores and _describable(x, weight, y2d)
    config = lookup(
        "linear",
        f"m={m},n={n},k={k},{str(x.dtype)[6:]}"
        + ("" if y.dtype == x.dtype else f",{str(y.dtype)[6:]} out")
        + ("" if tma else ",pointers"),
        x.device,
        Config,
        lambda: heuristic(m, n, k, x.dtype, y.dtype, capability, tma, sms),
    )
    tiles = cdiv(m, config.block_m) * cdiv(n, config.block_n)
    stride_rm = 0 if residual is None else residual.stride(0)
    common = {
        "ACTIVATION": activation,
        "PRECISION": precision,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    if config.tma:
        programs = min(sms, tiles)
        store_n = config.block_n // 2 if config.subtile else config.block_n
        _linear_fwd_tma_kernel[(programs,)](
            TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]),
            TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k]),
            TensorDescriptor.from_tensor(y2d, [config.block_m, store_n]),
            bias,
            residual,
            scale,
            m,
            n,
            k,
            stride_rm,
            programs,
            SUBTILE=config.subtile,
            **common,
        )
    else:
        _linear_fwd_kernel[(tiles,)](
            x, weight, bias, residual, scale, y2d, m, n, k, x.stride(0), weight.stride(0), stride_rm, **common
        )
    return y


def _activation_backward(dy: Tensor, z: Tensor, activation: str) -> Tensor:
    if activation == "quick_gelu":
        gate = torch.sigmoid(1.702 * z)
        return dy * (gate + 1.702 * z * gate * (1.0 - gate))
    return torch.ops.aten.gelu_backward(dy, z, approximate="tanh" if activation == "gelu_tanh" else "none")


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, activation, residual, scale, _ = inputs
    ctx.save_for_backward(x, weight, bias, scale)
    ctx.activation = activation
    ctx.residual_dtype = None if residual is None else residual.dtype


def _linear_backward(ctx: Any, dy) -> tuple[Any, ...]:
    x, weight, bias, scale = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, _, _, needs_scale, _ = ctx.needs_input_grad
    dresidual = None if ctx.residual_dtype is None else dy.to(ctx.residual_dtype)
    dscale = None
    dz = dy if scale is None else dy * scale
    if ctx.activation != "none" or needs_scale:
        # one GEMM again instead of keeping the widest activation of the network
        z = F.linear(x, weight, bias)
        if needs_scale:
            dscale = (dy * activate_ref(z, ctx.activation)).flatten(0, -2).sum(0).to(scale.dtype)
        if ctx.activation != "none":
            dz = _activation_backward(dz.to(z.dtype), z, ctx.activation)
    dz = dz.to(x.dtype)
    dz2d = dz.flatten(0, -2) if dz.dim() > 1 else dz[None]
    dx = dz @ weight if needs_x else None
    dweight = dz2d.t() @ (x.flatten(0, -2) if x.dim() > 1 else x[None]) if needs_weight else None
    dbias = dz2d.sum(0) if needs_bias else None
    return dx, dweight, dbias, None, dresidual, dscale, None


_linear.op.register_autograd(_linear_backward, setup_context=_linear_setup)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    tf32: bool = False,
) -> Tensor:
    """`residual + scale * activation(x @ weight.T + bias)` in one GEMM.

    Args:
        x: `[..., K]`, fp16, bf16 or fp32 (float64 on CPU), any strides.
        weight: `[N, K]` in x's dtype.
        bias: `[N]` in x's dtype, or None.
        activation: `"none"`, `"gelu"` (erf), `"gelu_tanh"` or `"quick_gelu"`.
        residual: `[..., N]`, added last; may be of wider dtype than x.
        scale: `[N]` (LayerScale), multiplied in after the activation.
        tf32: let fp32 operands be multiplied in tf32 on CUDA even where
            `torch.backends.cuda.matmul.allow_tf32` is off.

    Returns:
        `[..., N]`, contiguous, in the dtype that torch promotes the expression to. Under autocast x, weight and bias
        are cast as `torch.nn.functional.linear`'s are.

    Raises:
        ValueError: a shape, device or activation does not fit.
        TypeError: a dtype does not fit.
    """
    x, weight, bias = autocast(x, weight, bias)
    return _linear(x, weight, bias, activation, residual, scale, tf32)
