"""timm's benchmark CSV files of a run."""

from __future__ import annotations

import csv
import functools
import io
import re
from typing import Any

import torch
from torch import nn

from ..runner.results import Row, Run
from ..workloads.base import MODELS
from .rows import device_slug


@functools.cache
def model_sizes(model: str) -> tuple[float | None, float | None]:
    """Millions of parameters, and of activations of one image as fvcore counts them for timm: the elements that
    linear layers, convolutions and attention's products put out. None for a model that this version does not know."""
    from vitfast import create_model

    try:
        with torch.device("meta"):
            net: Any = create_model(model, **MODELS.get(model, {}))
    except ValueError:
        return None, None
    patches, tokens = net.patch_embed.num_patches, net.num_prefix_tokens + net.patch_embed.num_patches
    activations = patches * net.embed_dim + net.num_classes
    for block in net.blocks:
        linears = sum(m.out_features for m in block.modules() if isinstance(m, nn.Linear))
        activations += tokens * (linears + net.embed_dim) + block.attn.num_heads * tokens * tokens
    return sum(p.numel() for p in net.parameters()) / 1e6, activations / 1e6


def _rounded(value: float | None, digits: int) -> str:
    return "" if value is None else str(round(value, digits))


def timm_csvs(run: Run) -> dict[str, str]:
    """timm's benchmark CSV files, one per candidate, precision and kind, as `{file name: text}`.

    Columns, rounding, order (fastest first) and file names are those of `results/benchmark-*.csv` in timm's
    repository, so that the two can be joined on `model` and image size. timm has one batch a model, this has a line
    per measured batch. What to know before comparing: timm's step time has a synchronisation in each step, this is a
    median without; GMACs here are torch's count (matrix products, convolutions, attention), a percent or less below
    fvcore's; a training step's optimiser is AdamW here, and there SGD with momentum if not told otherwise. Rows that
    were not timed have no line.
    """
    files: dict[tuple[str, str, str], list[Row]] = {}
    for row in run.rows:
        kind = {"model": "infer", "train": "train"}.get(row.layer)
        if kind is not None and row.ms is not None and "batch" in row.shape:
            files.setdefault((kind, row.dtype, row.candidate), []).append(row)
    return {_timm_name(run.environment, *key): _timm_csv(key[0], rows) for key, rows in files.items()}


def _timm_name(environment: dict[str, Any], kind: str, dtype: str, candidate: str) -> str:
    versions = environment.get("versions") or {}
    torch_version = re.sub(r"[^0-9]", "", str(versions.get("torch") or "").split("+")[0])
    cuda = environment.get("cuda")
    where = device_slug(environment)
    platform = f"cu{str(cuda).replace('.', '')}" if cuda else str(environment.get("kind", "cpu"))
    name = re.sub(r"[^a-z0-9]+", "-", candidate.lower()).strip("-")
    return f"benchmark-{kind}-{dtype}-nchw-pt{torch_version}-{platform}-{where}-{name}.csv"


def _timm_csv(kind: str, rows: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    speed = ("samples_per_sec", "step_time", "batch_size")
    if kind == "infer":
        names = ("img_size", *speed)
        writer.writerow(["model", *(f"infer_{n}" for n in names), "param_count", "infer_gmacs", "infer_macts"])
    else:
        writer.writerow(["model", *(f"train_{n}" for n in (*speed, "img_size")), "param_count"])
    for row in sorted(rows, key=lambda row: -(row.images_per_s or 0.0)):
        parameters, activations = model_sizes(row.workload)
        measured = [_rounded(row.images_per_s, 2), _rounded(row.ms, 3), str(row.shape["batch"])]
        size = str(row.shape.get("width", ""))
        if kind == "infer":
            macs = _rounded(row.flops / row.shape["batch"] / 2e9, 2)
            line = [size, *measured, _rounded(parameters, 2), macs, _rounded(activations, 2)]
        else:
            line = [*measured, size, _rounded(parameters, 2)]
        writer.writerow([row.workload, *line])
    return text.getvalue()
