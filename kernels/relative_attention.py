"""Attention with BEiT's relative position bias, read from its table inside attention's kernel.

    o = softmax(scale * q k^T + table[index]) v

q, k, v and o are those of `attention.py`, whose kernel this is; table is `[(2h-1)*(2w-1) + 3, H]` for a grid of h x w
patches and a class token. A row of the table is an offset between two patches, so that an element of the bias costs
one subtraction and one load, and the `[H, N, N]` bias never stands in memory: of e-byte elements the table has
H*((2h-1)*(2w-1) + 3)*e bytes, the bias H*N*N*e to write, and to read for every image.

Source: Bao et al., "BEiT" (arXiv 2106.08254), in the order of timm/models/beit.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._op import autocast, check_same_dtype, check_shape, check_tensors, kernel_op
from .attention import attention_gradients, attention_ref, check_heads, launch_attention, score_scale


def relative_index(height: int, width: int, prefix: int, device: torch.device) -> Tensor:
    """`[N, N]`: the row of BEiT's table that a query (dim 0) and a key (dim 1) of a grid of patches read.

    Args:
        height, width: patches, numbered row by row.
        prefix: 1 with a class token in front of the patches, else 0.
        device: of the result.
    """
    rows = (2 * height - 1) * (2 * width - 1)
    patch = torch.arange(height * width, device=device)
    # where a patch would stand in a grid of rows 2 * width - 1 long: differences there are rows of the table
    place = patch + patch // width * (width - 1)
    index = place[:, None] - place + rows // 2
    if prefix:
        index = F.pad(index, (1, 0, 1, 0), value=rows + 1)
        index[0] = rows
        index[0, 0] = rows + 2
    return index


def relative_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, height: int, width: int, scale: float, tf32: bool
) -> Tensor:
    """`[B, N, H, d]` in torch's own calls, with the bias in memory."""
    n = q.shape[2]
    index = relative_index(height, width, n - height * width, table.device)
    # a row's gradient sums hundreds of terms, and CUDA would round each sum to the table's dtype
    wide = table.float() if table.dtype in (torch.float16, torch.bfloat16) else table
    # torch's fast CPU kernel takes a mask of four dimensions, not of three
    bias = wide.t().index_select(1, index.view(-1)).view(1, -1, n, n).to(q.dtype)
    return attention_ref(q, k, v, bias, scale, tf32)


def _check_relative_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, height: int, width: int, scale: float, tf32: bool
) -> None:
    op = "relative_attention"
    check_tensors(op, q=q, k=k, v=v, table=table)
    _, h, n, s = check_heads(op, q, k, v)
    check_same_dtype(op, q=q, table=table)
    prefix = n - height * width
    if height < 1 or width < 1 or prefix not in (0, 1) or n != s:
        raise ValueError(
            f"{op}: {n} queries and {s} keys for a grid of {height} x {width} patches; expected one of each for every"
            " patch, with or without a class token in front"
        )
    check_shape(op, "table", table, (2 * height - 1) * (2 * width - 1) + 3 * prefix, h)


@kernel_op("vitfast::relative_attention", reference=relative_attention_ref, check=_check_relative_attention)
def _relative_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, height: int, width: int, scale: float, tf32: bool
) -> Tensor:
    def library() -> Tensor:
        return relative_attention_ref(q, k, v, table, height, width, scale, tf32)

    return launch_attention(q, k, v, table, scale, tf32, library=library, grid=(height, width))


def _relative_attention_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.height, ctx.width, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors)


def _relative_attention_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    def reference(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return relative_attention_ref(q, k, v, table, ctx.height, ctx.width, ctx.scale, False)

    return *attention_gradients(ctx, grad, ctx.needs_input_grad[:4], reference), None, None, None, None


_relative_attention.op.register_autograd(_relative_attention_backward, setup_context=_relative_attention_setup)


def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    grid: tuple[int, int],
    scale: float | None = None,
    tf32: bool = False,
) -> Tensor:
    """`attention` among the patches of an image, its bias read from BEiT's table of relative positions.

    A query at row and column (y, x) and a key at (y', x') read row `(y - y' + h - 1) * (2w - 1) + (x - x' + w - 1)` of
    the table. With a class token three rows follow: from it to a patch, from a patch to it, and to itself.

    Args:
        q: `[B, H, N, d]`, fp16, bf16 or fp32 (float64 on CPU), any strides, d from 1 to 256. The tokens are h * w
            patches row by row, or a class token and these.
        k: `[B, H, N, d]` in q's dtype.
        v: `[B, H, N, d]` in q's dtype.
        table: `[(2h-1) * (2w-1), H]`, with a class token `[(2h-1) * (2w-1) + 3, H]`, in q's dtype, any strides. The
            kernel reads one head's column at a time, which is fastest where it is contiguous (`table.t()` is).
        grid: `(h, w)`.
        scale: of the scores; default `d ** -0.5`.
        tf32: as in `attention`.

    Returns:
        `[B, H, N, d]`, a view of contiguous `[B, N, H, d]`, as `attention` returns it.

    Raises:
        ValueError: a shape or device does not fit, or N is not that of the grid.
        TypeError: a dtype does not fit.
    """
    q, k, v, table = autocast(q, k, v, table)
    height, width = grid
    out = _relative_attention(q, k, v, table, height, width, score_scale(scale, q.shape[-1]), tf32)
    return out.transpose(1, 2)
