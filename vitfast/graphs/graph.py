"""A captured forward, and the batch sizes that it is for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .cuda import Captured


def bucket(batch: int) -> int:
    """The batch size that a batch is padded to: at most an eighth more, and none up to 16."""
    step = 1 << max(0, batch.bit_length() - 4)
    return -(-batch // step) * step


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout that the static input has for such tensors: the kernels read both in place."""
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


class Graph:
    """A captured forward, called with up to as many rows as it was captured for."""

    def __init__(self, captured: Captured, keep: Any) -> None:
        self.static, self.replay = captured.static, captured.replay
        self.size = self.static.shape[0]
        leaves, spec = tree_flatten(captured.outputs)
        self.leaves: list[Any] = leaves
        self.spec: TreeSpec = spec
        for leaf in leaves:
            # anything else could hold the static memory, and would change with the next replay
            if not isinstance(leaf, Tensor | int | float | str | None):
                raise TypeError(f"the model returns a {type(leaf).__name__}, which is not known to torch.utils._pytree")
        # whether rows can be left out; found out at the first batch that would need it
        self.independent: bool | None = None
        # attributes that the capture read may be replaced by the next one's warm-up
        self.keep = keep

    def __call__(self, x: Tensor) -> Any:
        batch = x.shape[0]
        if batch == self.size:
            self.static.copy_(x)
            self.replay()
            copies = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        else:
            self.static[:batch].copy_(x)
            self.replay()
            copies = [None if leaf is None else leaf[:batch].clone() for leaf in self.leaves]
        return tree_unflatten(copies, self.spec)

    def pads(self, x: Tensor) -> bool:
        """Whether these rows come out bit for bit the same, whatever stands in the rows behind them."""
        if x.shape[0] == self.size:
            return True
        if self.independent is None:
            per_row = all(
                leaf is None or (isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == self.size)
                for leaf in self.leaves
            )
            self.independent = per_row and self._rows_are_independent(x)
        return self.independent

    def _rows_are_independent(self, x: Tensor) -> bool:
        batch = x.shape[0]
        outcomes = []
        # large beside pixels, so that a scale taken over the batch shows too
        for padding in (100, 0):
            self.static[batch:].fill_(padding)
            self.static[:batch].copy_(x)
            self.replay()
            outcomes.append([leaf[:batch].clone() for leaf in self.leaves if leaf is not None])
        return all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))
