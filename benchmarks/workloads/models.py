"""Blocks, whole models, training steps and files to logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .base import DTYPES, Workload, count_flops, dimensions, draws, model_flops, reference_model
from .photos import Normalized, photo_files


def model_workloads(model: str, batch: int, dtype: str) -> Iterator[Workload]:
    size = dimensions(model)
    e = DTYPES[dtype].itemsize
    reference = reference_model(model)
    weights = sum(parameter.numel() for parameter in reference.parameters())
    pixels = batch * 3 * size["height"] * size["width"]
    logits = batch * size["classes"]
    shape = {"batch": batch, **{k: size[k] for k in ("height", "width", "tokens", "dim", "depth")}}
    flops = batch * model_flops(model)

    def draw_pixels(device: torch.device, index: int) -> dict[str, Any]:
        return {"pixels": draws(device, DTYPES[dtype], index)(batch, 3, size["height"], size["width"])}

    def draw_tokens(device: torch.device, index: int) -> dict[str, Any]:
        return {"x": draws(device, DTYPES[dtype], index)(batch, size["tokens"], size["dim"])}

    def take_files(device: torch.device, index: int) -> dict[str, Any]:
        paths = photo_files()[1]
        return {"files": [paths[(index * batch + i) % len(paths)] for i in range(batch)]}

    block = reference.blocks[0]
    block_weights = sum(parameter.numel() for parameter in block.parameters())
    tokens = batch * size["tokens"] * size["dim"]
    yield Workload(
        "block",
        model,
        "block",
        model,
        {"batch": batch, **{k: size[k] for k in ("tokens", "dim", "heads", "hidden")}},
        dtype,
        batch * count_flops(block, 1, size["tokens"], size["dim"]),
        (block_weights + 2 * tokens) * e,
        draw_tokens,
        block,
    )
    inference = (weights + pixels + logits) * e
    yield Workload("model", model, "model", model, shape, dtype, flops, inference, draw_pixels, reference)
    # AdamW reads weights and two moments and writes them; the gradients are written too
    trained = (7 * weights + pixels) * e
    yield Workload("train", model, "train", model, shape, dtype, 3 * flops, trained, draw_pixels, reference)
    # the device gets uint8 pixels
    decoded = (weights + logits) * e + pixels
    whole = Normalized(reference)
    yield Workload("end_to_end", model, "end_to_end", model, shape, dtype, flops, decoded, take_files, whole)
