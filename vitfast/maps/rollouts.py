"""Attention rollout, as the paper and two libraries compute it."""

from __future__ import annotations

import torch
from torch import Tensor

from .maps import AttentionMaps

METHODS = ("abnar", "vit_keras", "vit_explain")


@torch.no_grad()
def rollout(maps: AttentionMaps, *, method: str = "abnar", discard_ratio: float = 0.0) -> Tensor:
    """Attention rollout: how much of each patch reaches the class token through all layers.

    Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (arXiv 2005.00928), section 3: heads are averaged,
    the residual connection counts as an identity of equal weight, and the layers' matrices are multiplied,

        A_l = rownorm(W_l + I),    R = A_L ... A_2 A_1.

    The result is R's row of the class token, at the patches. Two libraries compute it in ways of their own, which can
    be had by name:

    - "abnar": the paper's. A model without a class token gives the mean over its patches' rows.
    - "vit_keras", as `vit_keras.visualize.attention_map`: each W_l + I is divided by the sum of the whole matrix, and
      the result by its largest value. Of averaged heads this is "abnar" but for its scale. The products shrink by
      N a layer, which underflows in fp32 and does not in fp64, which everything here is computed in.
    - "vit_explain", as jacobgil's `vit-explain`: `discard_ratio` is a share of the whole matrix's weights, and never
      takes the one of the class token on itself; column j, not row j, is divided by the sum of row j (the same where
      rows sum to one); the result is divided by its largest value. Its choice of heads is `attention_maps(heads=...)`.

    Args:
        maps: of all layers, first to last, as `attention_maps` returns them; kept heads are averaged.
        method: "abnar", "vit_keras" or "vit_explain".
        discard_ratio: share of the weights, the smallest ones, that count as zero: of each row's for "abnar", of the
            matrix's for "vit_explain"; 0 <= ratio < 1.

    Returns:
        `[B, rows, cols]` float64, not negative. For "abnar" it would sum to one with the prefix tokens' part, for the
        others the largest value is one.

    Raises:
        ValueError: there is no map, only the class token's row of it, or no class token for a method that needs one;
            `method` or `discard_ratio` is out of range.
    """
    check_rollout(method, discard_ratio)
    if len(maps) == 0:
        raise ValueError("rollout needs the map of at least one layer")
    if maps.rows != "all":
        raise ValueError(f"rollout multiplies whole maps, and these have rows={maps.rows!r}; expected rows='all'")
    if method != "abnar" and not maps.has_class_token:
        raise ValueError(f"method={method!r} reads the class token's row, and there is none; accepted is 'abnar'")
    identity = torch.eye(maps[0].shape[-1], dtype=torch.float64, device=maps[0].device)
    result = identity
    for layer in maps:
        weights = layer.double().mean(dim=1) if layer.ndim == 4 else layer.double()  # [B, N, N]
        weights = _discard(weights, method, discard_ratio) + identity
        if method == "vit_keras":
            weights = weights / weights.sum(dim=(-2, -1), keepdim=True)
        else:
            weights = weights / weights.sum(dim=-1).unsqueeze(-1 if method == "abnar" else -2)
        result = weights @ result
    flow = maps.seen(result)
    if method == "abnar":
        return flow
    # where everything was discarded, nothing is seen
    return flow / flow.amax(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


def check_rollout(method: str, discard_ratio: float) -> None:
    """Raise a `ValueError` for options that `rollout` does not have."""
    if method not in METHODS:
        raise ValueError(f"method={method!r}; expected one of {', '.join(METHODS)}")
    if not 0.0 <= discard_ratio < 1.0:
        raise ValueError(f"discard_ratio={discard_ratio}; expected 0 <= discard_ratio < 1")
    if discard_ratio and method == "vit_keras":
        raise ValueError(f"discard_ratio={discard_ratio}, but method='vit_keras' discards nothing; expected 0")


def _discard(weights: Tensor, method: str, ratio: float) -> Tensor:
    """Weights `[B, N, N]` with the smallest ones set to zero."""
    among = weights if method == "abnar" else weights.flatten(1)
    count = int(among.shape[-1] * ratio)
    if not count:
        return weights
    smallest = among.topk(count, dim=-1, largest=False).indices
    kept = among.scatter(-1, smallest, 0.0).view_as(weights)
    if method == "vit_explain":
        kept[:, 0, 0] = weights[:, 0, 0]
    return kept
