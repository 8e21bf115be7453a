"""A model around blocks: statistics that one block hands to the next, and tokens that nobody reads."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from .base import FusedLayer, Plan
from .block import FusedBlock
from .guards import deriving, hooked, is_plain
from .patch_embed import FusedPatchEmbed


class FusedModel(FusedLayer):
    """A model around blocks that stand in `self.blocks`.

    Attributes:
        tail: where only pooled class tokens are asked for, the last block computes those alone.
    """

    kind = "model"
    serves: ClassVar = ("patch_embed", "fold", "tail")
    tail: bool = False
    blocks: Any
    norm: Any

    def make_plan(self, derive: bool = False) -> Plan:
        """A model decides little, once a forward; its blocks have plans of their own."""
        return Plan("", ())

    def plan(self) -> Plan:
        """Made in each call, of which there is one in a forward."""
        return self.make_plan()

    def pooled_tokens(self) -> int | None:
        """How many leading tokens the head reads, or None where it may read all."""
        raise NotImplementedError

    def prefix_length(self) -> int | None:
        """`pooled_tokens`, where the last block may leave the others out."""
        # in training dropout draws for every token
        count = self.pooled_tokens() if self.tail and not self.training else None
        blocks = self.blocks
        if count is None or not self.straight() or not len(blocks) or hooked(self.norm):
            return None
        if any(name in vars(self) for name in ("forward_features", "forward_head", "pool")):
            # somebody put a function of their own in the place of a step
            return None
        last = blocks[-1]
        return count if isinstance(last, FusedBlock) and last.plan().prefix else None

    def encode(self, x: Tensor, prefix: int | None = None) -> Tensor:
        """All blocks: `[B, N, D]` to `[B, N, D]`, or to `[B, prefix, D]`."""
        folds = deriving(x) and self.straight()
        if prefix is None and not folds:
            return self.run_blocks(x)
        stats = None
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            if i == last and prefix is not None:
                return block.fused_prefix(x, prefix, block.plan())
            plan = block.plan() if folds and isinstance(block, FusedBlock) else None
            if plan is not None and plan.folded is not None and x.dtype is plan.folded[0].weight.dtype:
                x, stats = block.folded_attention(x, stats, plan)
                # nobody reads them behind the last block, and the tail normalises for itself
                x, stats = block.folded_mlp(x, stats, plan, i < last - (prefix is not None))
            else:
                x, stats = block(x), None
        return x

    def straight(self) -> bool:
        """Whether `run_blocks` runs the blocks one after another and nothing else."""
        return is_plain(self.blocks, nn.Sequential)

    def run_blocks(self, x: Tensor) -> Tensor:
        """All blocks as the original runs them: `[B, N, D]` to `[B, N, D]`."""
        return self.blocks(x)


class FusedStemModel(FusedModel, FusedPatchEmbed):
    """A model that embeds patches by a convolution of its own, without a module around it.

    Attributes:
        stem: the kernel embeds the patches, prefix tokens and position embeddings with them.
    """

    stem: bool = False

    def embeds(self, pixels: Tensor) -> bool:
        """Whether the kernel computes what the original would of these pixels."""
        # who asks for bytes asks for the kernel
        return (self.stem or "pixel_affine" in self._buffers) and super().embeds(pixels)
