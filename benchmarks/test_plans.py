"""Python time between two launches: how long it takes to see that plans still hold.

    pytest benchmarks/test_plans.py

A block's plan says what runs in which kernel. In each forward a watch compares what the plan was made from: hooks,
classes, modules, parameters and modes. The aim is 5 us a block, and twelve blocks under 0.1 ms.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vitfast


@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
def test_plans_of_twelve_blocks(benchmark: Any, frozen: bool) -> None:
    """One plan a block of a ViT-B's depth; the width does not matter."""
    model = vitfast.create_model("vit_tiny_patch16_224", depth=12, embed_dim=48, num_heads=3).eval()
    blocks: list[Any] = list(vitfast.accelerate(model, frozen=frozen).blocks)
    plans = [block.plan() for block in blocks]
    with torch.inference_mode():
        found = benchmark(lambda: [block.plan() for block in blocks])
    # the very records: nothing was decided again
    assert all(a is b for a, b in zip(found, plans, strict=True))
