"""A captured forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .cuda import Captured


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout that the static input has for such tensors: the kernels read both in place."""
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


class Graph:
    """A captured forward, for batches of one size."""

    def __init__(self, captured: Captured, keep: Any) -> None:
        self.static, self.replay = captured.static, captured.replay
        leaves, spec = tree_flatten(captured.outputs)
        self.leaves: list[Any] = leaves
        self.spec: TreeSpec = spec
        for leaf in leaves:
            # anything else could hold the static memory, and would change with the next replay
            if not isinstance(leaf, Tensor | int | float | str | None):
                raise TypeError(f"the model returns a {type(leaf).__name__}, which is not known to torch.utils._pytree")
        # whose memory the capture read: plans, attributes
        self.keep = keep

    def __call__(self, x: Tensor) -> Any:
        """The outputs for a batch of the size that was captured, in memory of their own."""
        self.static.copy_(x)
        self.replay()
        copies = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return tree_unflatten(copies, self.spec)
