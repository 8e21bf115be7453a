"""Precision policies: which dtype each part of a model has.

Every policy accumulates in fp32, takes LayerNorm statistics and softmax in fp32 and resizes position embeddings in
fp32; the kernels hold to that whatever they are given. What a policy chooses is the dtype of weights and activations,
and whether fp32 products may run in tf32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """One policy.

    Attributes:
        name: as `accelerate(precision=...)` takes it.
        dtype: of weights and activations.
        tf32: fp32 products run in tf32 on CUDA (10 mantissa bits in the operands, fp32 accumulation).
    """

    name: str
    dtype: torch.dtype
    tf32: bool = False


PRECISIONS = {
    policy.name: policy
    for policy in (
        Precision("fp32", torch.float32),
        Precision("tf32", torch.float32, tf32=True),
        Precision("bf16", torch.bfloat16),
        Precision("fp16", torch.float16),
    )
}


def get_precision(name: str) -> Precision:
    """The policy of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in PRECISIONS:
        raise ValueError(f"precision {name!r}; expected one of {', '.join(PRECISIONS)}")
    return PRECISIONS[name]
