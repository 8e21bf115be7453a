"""What is tuned: the first blocks of an accelerated model on one batch, and the rule that its tokens are held to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vitfast
from vitfast.clock import timing as measure
from vitfast.kernels import _config
from vitfast.kernels._config import Key
from vitfast.layers import KINDS
from vitfast.proof.subjects import seed_weights
from vitfast.rule import compare

from ..workloads.base import DTYPES, MODELS
from .candidates import Entry

OPS = ("linear", "attention", "layer_norm", "add_layer_norm", "row_stats", "patch_embed")
"""In the order in which they are tuned: by their share of a ViT's time."""


@dataclass(frozen=True)
class Job:
    """What every process of a run has to build alike."""

    model: str
    batch: int
    dtype: str
    device: str
    depth: int
    fold: bool


def blocks_past_cache(model: str, batch: int, dtype: str, device: torch.device) -> int:
    """As many blocks as it takes for weights and activations to pass the last-level cache twice; 1 on CPU."""
    if device.type != "cuda":
        return 1
    with torch.device("meta"):
        plain: Any = vitfast.create_model(model, **MODELS.get(model, {}))
    block = plain.blocks[0]
    tokens = batch * (plain.num_prefix_tokens + plain.patch_embed.num_patches)
    elements = sum(parameter.numel() for parameter in block.parameters())
    # the block's input, qkv, heads, two residual streams, two norms and the hidden activation
    elements += tokens * (8 * plain.embed_dim + block.mlp.fc1.out_features)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(len(plain.blocks), math.ceil(2 * cache / (elements * DTYPES[dtype].itemsize))))


class Subject:
    """The first blocks of an accelerated model on one batch, from pixels to normed tokens."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.device = torch.device(job.device)
        dtype = DTYPES[job.dtype]
        options = {**MODELS.get(job.model, {}), "depth": job.depth}
        self.plain: Any = seed_weights(vitfast.create_model(job.model, **options)).eval().to(self.device, dtype)
        self.model: Any = seed_weights(vitfast.create_model(job.model, **options)).eval().to(self.device)
        kinds = [kind for kind in KINDS if job.fold or kind != "fold"]
        vitfast.accelerate(self.model, precision=job.dtype, only=kinds, frozen=True)
        generator = torch.Generator(device=self.device).manual_seed(1)
        size = (job.batch, 3, *self.plain.patch_embed.img_size)
        self.pixels = torch.randn(size, generator=generator, device=self.device).to(dtype)
        self._pool: Any = None

    @torch.inference_mode()
    def run(self, entries: Mapping[Key, Entry] | None = None) -> Tensor:
        """Tokens `[B, N, D]`, with these entries in the place of what the launches would look up."""
        with ExitStack() as stack:
            for key, entry in (entries or {}).items():
                stack.enter_context(_config.override(key, entry))
            tokens: Tensor = self.model.forward_features(self.pixels)
            return tokens

    def launches(self) -> dict[Key, Any]:
        """What one pass looks up and the configs it gets, in `OPS`' order."""
        with _config.listen() as heard:
            self.run()
        found = {key: config for key, config in heard.items() if key.op in OPS}
        return dict(sorted(found.items(), key=lambda item: OPS.index(item[0].op)))

    def candidate(self, entries: Mapping[Key, Entry]) -> measure.Candidate:
        """A function to time: a CUDA graph of one pass with these entries, on CPU the pass itself."""
        if self.device.type != "cuda":
            return lambda i: self.run(entries)
        graph = torch.cuda.CUDAGraph()
        # nobody reads what a graph computes and one runs at a time, so that all may write to the same memory
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            self.run(entries)
        return lambda i: graph.replay()


class Rule:
    """The parity rule for a subject's tokens: a few images against float64, all of them against the first pass."""

    def __init__(self, subject: Subject) -> None:
        batch = len(subject.pixels)
        self._few = sorted({0, batch // 2, batch - 1})
        pixels = subject.pixels[self._few]
        with torch.inference_mode():
            self._baseline = subject.plain.forward_features(pixels)
            plain = subject.plain.double()
            self._truth = plain.forward_features(pixels.double())
        del subject.plain
        self._all = subject.run().clone()
        self._limit = compare(self._all[self._few], self._truth, self._baseline).rms_limit

    def holds(self, tokens: Tensor) -> bool:
        """Whether tokens are right."""
        # each is within the rule of truth, so the two differ by no more than two limits in the root mean square
        difference = (tokens.float() - self._all.float()).square().mean().sqrt().item()
        return difference <= 2 * self._limit and compare(tokens[self._few], self._truth, self._baseline).ok
