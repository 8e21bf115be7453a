"""Features of chosen blocks, under timm's name and DINO's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .options import one_of
from .parts import PatchEmbed


class Features(nn.Module):
    """What a Vision Transformer gives besides its last features. A base class of it."""

    patch_embed: PatchEmbed
    blocks: nn.Sequential
    norm: nn.Module
    num_prefix_tokens: int
    # (images, depth, blocks to take) to the output of so many blocks, and the outputs of those taken
    _encode: Callable[[Tensor, int, Sequence[int]], tuple[Tensor, list[Tensor]]]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Features of chosen blocks, with timm's arguments and results.

        Args:
            x: Images `[B, C, H, W]`.
            indices: `None` for all blocks, an int for the last so many, or block indices (negative ones count
                from the end).
            return_prefix_tokens: Also return the prefix tokens `[B, T, D]` of each block.
            norm: Apply the final norm to the intermediates.
            stop_early: Skip the blocks after the last one wanted (the final features then come from that one).
            output_fmt: "NCHW" for `[B, D, rows, cols]` or "NLC" for `[B, N, D]`.
            intermediates_only: Leave out the final features.
            output_dict: Return a dict with `image_intermediates`, `image_intermediates_prefix`, `image_features`.

        Returns:
            (final features, intermediates), the intermediates alone, or the dict. Intermediates are in block
            order; with `return_prefix_tokens` each is a pair (patches, prefix).
        """
        one_of("output_fmt", output_fmt, ("NCHW", "NLC"))
        depth = len(self.blocks)
        wanted = range(depth) if indices is None else indices
        if isinstance(wanted, int):
            if not 1 <= wanted <= depth:
                raise ValueError(f"indices is {wanted}; accepted are counts from 1 to {depth}")
            wanted = range(depth - wanted, depth)
        if not wanted or not all(-depth <= i < depth for i in wanted):
            raise ValueError(f"indices are {list(wanted)}; accepted are block indices from {-depth} to {depth - 1}")
        take = [i % depth for i in wanted]

        final, taken = self._encode(x, max(take) + 1 if stop_early else depth, take)
        if norm:
            taken = [self.norm(y) for y in taken]
        prefix = [y[:, : self.num_prefix_tokens] for y in taken]
        patches = [y[:, self.num_prefix_tokens :] for y in taken]
        if output_fmt == "NCHW":
            grid = self.patch_embed.grid(x.shape[2], x.shape[3])
            patches = [y.unflatten(1, grid).permute(0, 3, 1, 2).contiguous() for y in patches]

        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": patches}
            if with_prefix:
                result["image_intermediates_prefix"] = prefix
            if not intermediates_only:
                result["image_features"] = self.norm(final)
            return result
        outputs: list[Any] = list(zip(patches, prefix, strict=True)) if with_prefix else patches
        return outputs if intermediates_only else (self.norm(final), outputs)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Any]:
        """`forward_intermediates` under DINO's name: the last `n` blocks (or those listed), as `[B, N, D]`.

        With `reshape` they are `[B, D, rows, cols]`; `return_prefix_tokens` and `norm` as there.
        """
        output_fmt = "NCHW" if reshape else "NLC"
        return self.forward_intermediates(
            x, n, return_prefix_tokens, norm, output_fmt=output_fmt, intermediates_only=True
        )
