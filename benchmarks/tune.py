"""Tuning: the tile sizes of every launch of a model, measured where they run.

    result = tune("vit_base_patch16_224", batch=256, dtype="bf16", device=torch.device("cuda"), budget_s=300)

A kernel alone finds its inputs where a loop left them and has the memory system for itself, so its best tiles are not
a model's. Here the whole of embedding, blocks and norm is one CUDA graph per candidate, in which only the op under test
differs, and the graphs are timed against each other, interleaved. As many blocks stand in a row as it takes to pass
the last-level cache. One launch after the other gets its share of the budget: candidates are held to the parity rule,
then halved by their times until two are left, and the best replaces the present config only if their p20..p80 do not
overlap. A candidate that does not compile, or is wrong, is counted and left out.

What is tuned are the fields of each op's `Config`: tiles, warps, stages, parts of K, for `linear` from sm_90 on the
descriptor or the pointer kernel, and torch's own GEMM or attention where an op can go there. A folded LayerNorm has no
such route, so a model is tuned twice: with its norms folded into the GEMMs, and with them by themselves.

Entries go to `<out>/<op>/<device>.json`, by default to the user's own folder (`vitfast.kernels._config.user_folder`),
beside one file with all of the evidence if `report` names it. `unpack` lays such a file out as committed configs.
Nothing here runs by itself: no import and no forward tunes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vitfast
from vitfast.clock import machine
from vitfast.clock import timing as measure
from vitfast.kernels import INTERPRET, _config
from vitfast.kernels._triton import cdiv, next_power_of_2
from vitfast.kernels.attention import split_head_dim
from vitfast.kernels.linear import STATS_WIDTH
from vitfast.layers import KINDS
from vitfast.parity import compare, fp32_products, seed_weights

from .runner.results import write_json
from .workloads.base import DTYPES, MODELS

SCHEMA = 1

Entry = dict[str, Any]

OPS = ("linear", "attention", "layer_norm", "add_layer_norm", "row_stats", "patch_embed")
"""In the order in which they are tuned: by their share of a ViT's time."""

WGMMA = (90, 100)
"""Architectures whose matrix instructions read their operands from shared memory: they leave registers to results."""

BARRIERS = 1024
"""Bytes of shared memory that are left to what no estimate counts."""


@dataclass(frozen=True)
class Launch:
    """What a lookup's key says.

    Attributes:
        op: folder name of its configs.
        key: as the op's file writes it.
        sizes: by name, "m", "n", "k" for linear.
        dtype: of the operands.
        flags: what else the key says, such as "pointers".
    """

    op: str
    key: str
    sizes: Mapping[str, int] = field(hash=False)
    dtype: torch.dtype
    flags: frozenset[str]

    @classmethod
    def of(cls, op: str, key: str) -> Launch:
        """Read a key.

        Raises:
            ValueError: no tuned op has such a key.
        """
        sizes = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", key)}
        words = [word for word in key.split(",") if "=" not in word]
        dtype = getattr(torch, words[0], None) if words else None
        if op not in OPS or not sizes or not isinstance(dtype, torch.dtype):
            raise ValueError(
                f"{op!r} with key {key!r}; expected one of {', '.join(OPS)} with sizes and a dtype, such as"
                " 'm=50432,n=768,k=768,bfloat16'"
            )
        return cls(op, key, sizes, dtype, frozenset(words[1:]))


# candidates: pure functions of a launch and a device's limits


def candidates(launch: Launch, *, arch: int, shared: int, sms: int) -> list[Entry]:
    """Entries worth measuring, the likelier ones first, for a budget that does not reach the last.

    What cannot fit is left out by estimates of shared memory and registers. They are rough: a candidate that they let
    through may still fail to compile.

    Args:
        launch: which op, sizes and dtype.
        arch: 10 * major + minor of the compute capability, as `vitfast.kernels._config.arch` gives it.
        shared: bytes of shared memory that a block may use.
        sms: number of multiprocessors.
    """
    make = {"linear": _linear, "attention": _attention, "patch_embed": _patch_embed}.get(launch.op, _layer_norm)
    return make(launch, arch, shared, sms)


def refinements(launch: Launch, entry: Mapping[str, Any]) -> list[Entry]:
    """Variants of a tile that won, in what does not depend on it: how tiles are ordered for L2."""
    if launch.op != "linear" or entry.get("library"):
        return []
    return [{**entry, "group_m": group} for group in (1, 4, 16) if group != entry["group_m"]]


def _waves(m: int, n: int, block_m: int, block_n: int, sms: int) -> float:
    """Relative time of a GEMM's tiles: whole waves of them, each costing its area and, a little, its edges."""
    tiles = cdiv(m, block_m) * cdiv(n, block_n)
    return cdiv(tiles, sms) * (block_m * block_n + 64.0 * (block_m + block_n))


def _accumulators(block_m: int, block_n: int, warps: int) -> float:
    """fp32 registers of a thread for one tile."""
    return block_m * block_n / (32 * warps)


def _by_turns(found: list[tuple[float, int, Entry]]) -> list[Entry]:
    """Entries by cost, two of each tile at a time: pipelines of one tile differ less than tiles do.

    Tiles of more than twice the least cost are left out.
    """
    least = min((cost for cost, _, _ in found), default=0.0)
    taken: dict[Any, int] = {}
    ranked = []
    for cost, stages, entry in sorted(found, key=lambda item: item[:2]):
        if cost <= 2 * least:
            tile = (entry["block_m"], entry["block_n"], entry.get("tma"), entry.get("split_k"))
            taken[tile] = taken.get(tile, 0) + 1
            ranked.append(((taken[tile] - 1) // 2, cost, stages, entry))
    return [entry for *_, entry in sorted(ranked, key=lambda item: item[:3])]


def _too_large(block: int, size: int) -> bool:
    """Whether a tile would be mostly padding, where a smaller one is worth having."""
    return block > max(64, next_power_of_2(size))


def _spills(block_m: int, block_n: int, row_bytes: int, warps: int) -> bool:
    """Whether a GEMM's operands, which pass through registers, spill beside its accumulators (seen on sm_80)."""
    accumulators = _accumulators(block_m, block_n, warps)
    return row_bytes > (64 if accumulators > 64 or (accumulators == 64 and block_m > block_n) else 128)


def _folds(launch: Launch) -> bool:
    return not launch.flags.isdisjoint(("norm", "stats"))


def _linear(launch: Launch, arch: int, shared: int, sms: int) -> list[Entry]:
    m, n, k = (launch.sizes[name] for name in "mnk")
    e = launch.dtype.itemsize
    out = 4 if "float32 out" in launch.flags else e
    # fp32 that has descriptors is tf32; what has none on sm_90 is exact, and on older ones may be either
    exact = launch.dtype == torch.float32 and "pointers" in launch.flags
    found: list[tuple[float, int, Entry]] = []

    def add(
        tma: bool, block_m: int, block_n: int, block_k: int, warps: int, stages: int, subtile: bool, split_k: int = 1
    ) -> None:
        loads = stages * (block_m + block_n) * block_k * e
        # both halves have memory of their own where statistics keep them apart
        store = block_m * block_n * out // (2 if subtile and not _folds(launch) else 1) if tma else 0
        if loads + store > shared - BARRIERS:
            return
        if "stats" in launch.flags and (block_n // 2 if subtile else block_n) % STATS_WIDTH:
            return
        if _too_large(block_m, m) or _too_large(block_n, n) or _too_large(block_k, k):
            return
        entry = {"block_m": block_m, "block_n": block_n, "block_k": block_k, "group_m": 8}
        entry |= {"num_warps": warps, "num_stages": stages}
        entry |= {"tma": True, "subtile": subtile} if tma else {"split_k": split_k} if split_k > 1 else {}
        if not tma and not exact and arch not in WGMMA and _spills(block_m, block_n, block_k * e, warps):
            return
        # of equal waves the deeper pipeline first
        waves = _waves(m * split_k, n, block_m, block_n, sms) / split_k
        found.append((waves * (1.0 if tma else 1.1), -stages, entry))

    if arch >= 90 and "pointers" not in launch.flags:
        for block_m, block_n, warps in (
            (128, 256, 8),
            (256, 128, 8),
            (128, 128, 8),
            (128, 128, 4),
            (64, 256, 4),
            (64, 256, 8),
            (128, 64, 4),
            (128, 64, 8),
            (64, 128, 4),
            (64, 128, 8),
            (64, 64, 4),
            (64, 32, 4),
        ):
            large = _accumulators(block_m, block_n, warps) > 64
            # a row of 128 bytes is what the copy engine's swizzle wants, two of them halve the loop
            for block_k in (128 // e, 256 // e):
                for stages in (5, 4, 3):
                    for subtile in (True,) if large or out > e else (False, True) if block_n >= 128 else (False,):
                        add(True, block_m, block_n, block_k, warps, stages, subtile)
    if exact:
        for block_m, block_n, block_k, warps in (
            (64, 64, 32, 4),
            (64, 64, 16, 4),
            (64, 64, 32, 8),
            (128, 64, 16, 8),
            (64, 128, 16, 8),
            (32, 64, 32, 4),
            (64, 32, 32, 4),
            (32, 32, 32, 4),
        ):
            for stages in (3, 2):
                add(False, block_m, block_n, block_k, warps, stages, False)
    else:
        # two of 64 accumulators a thread, more of them spill; the others for few rows
        for block_m, block_n, warps in (
            (128, 128, 8),
            (64, 256, 8),
            (128, 64, 4),
            (64, 128, 4),
            (64, 64, 4),
            (64, 32, 4),
            (32, 64, 4),
            (32, 32, 4),
        ):
            tiles = cdiv(m, block_m) * cdiv(n, block_n)
            for block_k in (64 // e, 128 // e, 256 // e):
                for stages in (4, 3, 2):
                    add(False, block_m, block_n, block_k, warps, stages, False)
                    # parts of K only for what would leave multiprocessors idle, and of 8 rounds at least
                    for split_k in (2, 3, 4):
                        if tiles < sms and cdiv(k, block_k) >= 8 * split_k:
                            add(False, block_m, block_n, block_k, warps, stages, False, split_k)
    ranked = _by_turns(found)
    # one answer for all tiles, so it comes first
    return [{**ranked[0], "library": True}, *ranked] if ranked and e == 2 and not _folds(launch) else ranked


def _attention(launch: Launch, arch: int, shared: int, sms: int) -> list[Entry]:
    n, s, d = (launch.sizes[name] for name in "nsd")
    main, tail = split_head_dim(d)
    width, e = main + tail, launch.dtype.itemsize
    keys = max(16, next_power_of_2(s))
    found: list[tuple[float, Entry]] = []

    def fits(block_m: int, block_s: int, warps: int, whole: bool) -> bool:
        scores, output = _accumulators(block_m, block_s, warps), _accumulators(block_m, width, warps)
        # a bias has a tile of its own, as large as the scores
        scores *= 2 if "bias" in launch.flags else 1
        if scores < 4 or (block_s > 128 and (not whole or tail)):
            return False
        if arch in WGMMA and block_m >= 64 and warps >= 4 and e == 2:
            # nothing is carried from tile to tile where one tile holds all keys
            return scores + output <= (160 if whole and warps == 8 else 96)
        # each warp holds the keys' operands beside them; two warps were too few for a split head dim
        return scores + output + block_s * width * e / 128 < 112 and not (tail and warps < 4)

    for block_m in (16, 32, 64, 128):
        if _too_large(block_m, n):
            continue
        for block_s in (16, 32, 64, 128, 256):
            if block_s > keys:
                continue
            whole = block_s >= s
            for warps in (2, 4, 8):
                if not fits(block_m, block_s, warps, whole):
                    continue
                for stages in (1,) if whole else (1, 2, 3):
                    if (block_m + 2 * stages * block_s) * width * e > shared - BARRIERS:
                        continue
                    waste = cdiv(n, block_m) * block_m * cdiv(s, block_s) * block_s / (n * s)
                    # a large tile reads K and V less often; all keys in one tile save the rescaling
                    cost = waste * (1.0 + 32.0 / block_m + 16.0 / block_s) * (0.9 if whole else 1.0 - 0.02 * stages)
                    entry = {"block_m": block_m, "block_s": block_s, "num_warps": warps, "num_stages": stages}
                    found.append((cost, entry))
    ranked = [entry for _, entry in sorted(found, key=lambda item: item[0])]
    return [{**ranked[0], "library": True}, *ranked] if ranked else []


def _layer_norm(launch: Launch, arch: int, shared: int, sms: int) -> list[Entry]:
    tile = next_power_of_2(launch.sizes["width"])
    rows = next_power_of_2(launch.sizes["rows"])
    found: list[tuple[float, Entry]] = []
    for block_m in (1, 2, 4, 8, 16):
        for warps in (1, 2, 4, 8, 16):
            elements = _accumulators(block_m, tile, warps)
            if block_m <= rows and (4 <= elements <= 64 or (elements > 64 and warps == 16 and block_m == 1)):
                # sixteen elements a thread are two loads of 16 bytes, and many small programs hide each other's waits
                found.append((abs(math.log2(elements / 16)) + 0.1 * warps, {"block_m": block_m, "num_warps": warps}))
    return [entry for _, entry in sorted(found, key=lambda item: item[0])]


def _patch_embed(launch: Launch, arch: int, shared: int, sms: int) -> list[Entry]:
    m, n, k = (launch.sizes[name] for name in ("patches", "width", "k"))
    e = launch.dtype.itemsize
    found: list[tuple[float, int, Entry]] = []
    exact = launch.dtype == torch.float32
    tiles = ((64, 64, 4), (32, 64, 4)) if exact else ((128, 256, 8), (128, 128, 8), (128, 64, 4), (64, 128, 4))
    for block_m, block_n, warps in (*tiles, *(() if exact else ((64, 64, 4), (32, 64, 4), (64, 32, 4)))):
        for block_k in (32, 64, 128):
            for stages in (4, 3, 2):
                loads = stages * (block_m + block_n) * block_k * e
                if loads > shared - BARRIERS or _too_large(block_m, m) or _too_large(block_k, k):
                    continue
                if not exact and arch not in WGMMA and _spills(block_m, block_n, block_k * e, warps):
                    continue
                entry = {"block_m": block_m, "block_n": block_n, "block_k": block_k}
                entry |= {"num_warps": warps, "num_stages": stages}
                # every column tile gathers the pixels again
                found.append((_waves(m, n, block_m, block_n, sms) * (1 + 64 / block_n), -stages, entry))
    return _by_turns(found)


# what is tuned: a model, its launches and a clock for one candidate after the other


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
        self.device = torch.device(job.device)
        dtype = DTYPES[job.dtype]
        options = {**MODELS.get(job.model, {}), "depth": job.depth}
        self.plain: Any = seed_weights(vitfast.create_model(job.model, **options)).eval().to(self.device, dtype)
        self.model: Any = seed_weights(vitfast.create_model(job.model, **options)).eval().to(self.device)
        kinds = [kind for kind in KINDS if job.fold or kind != "fold"]
        vitfast.accelerate(self.model, precision=job.dtype, only=kinds)
        generator = torch.Generator(device=self.device).manual_seed(1)
        size = (job.batch, 3, *self.plain.patch_embed.img_size)
        self.pixels = torch.randn(size, generator=generator, device=self.device).to(dtype)
        self._pool: Any = None

    @torch.inference_mode()
    def run(self) -> Tensor:
        """Tokens `[B, N, D]`."""
        tokens: Tensor = self.model.forward_features(self.pixels)
        return tokens

    def launches(self) -> dict[Launch, Any]:
        """What one pass looks up and the configs it gets, in `OPS`' order."""
        with _config.listen() as heard:
            self.run()
        found = {Launch.of(op, key): config for (op, key), config in heard.items() if op in OPS}
        return dict(sorted(found.items(), key=lambda item: OPS.index(item[0].op)))

    def candidate(self, launch: Launch | None, entry: Entry | None) -> measure.Candidate:
        """A function to time: a CUDA graph of one pass with that entry, on CPU the pass itself.

        Args:
            launch: whose entry; None for a pass as it is.
            entry: of the launch.
        """
        if self.device.type != "cuda":
            return lambda i: self._with(launch, entry)
        graph = torch.cuda.CUDAGraph()
        # nobody reads what a graph computes and one runs at a time, so that all may write to the same memory
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            self._with(launch, entry)
        return lambda i: graph.replay()

    def _with(self, launch: Launch | None, entry: Entry | None) -> Tensor:
        if launch is None or entry is None:
            return self.run()
        with _config.override(launch.op, launch.key, entry):
            return self.run()


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


@dataclass(frozen=True)
class Tuned:
    """What became of one launch.

    Attributes:
        op, key: which.
        before: the entry it had: a tuned one, or the heuristic's.
        after: the faster entry, or None where `before` stays.
        before_ms, after_ms: of the whole pass in the deciding round, as `measure.Timing`'s fields; None where no
            candidate was left to time.
        offered: candidates there were.
        failed: that did not compile or run.
        refused: that broke the parity rule.
        skipped: that the budget did not reach.
    """

    op: str
    key: str
    before: Entry
    after: Entry | None
    before_ms: dict[str, Any] | None = None
    after_ms: dict[str, Any] | None = None
    offered: int = 0
    failed: int = 0
    refused: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class Result:
    """What became of one model, batch and dtype.

    Attributes:
        job: what was run.
        device_name: that entries are filed under.
        launches: in the order in which they were tuned.
        before_ms, after_ms: of the pass without and with all new entries, timed against each other at the end.
        kept: whether the new entries together are faster by more than the spread; only then they are written.
    """

    job: Job
    device_name: str
    launches: tuple[Tuned, ...] = ()
    before_ms: dict[str, Any] | None = None
    after_ms: dict[str, Any] | None = None
    kept: bool = False

    @property
    def entries(self) -> dict[str, dict[str, Entry]]:
        """The new entries by op and key."""
        found: dict[str, dict[str, Entry]] = {}
        for tuned in self.launches if self.kept else ():
            if tuned.after is not None:
                found.setdefault(tuned.op, {})[tuned.key] = tuned.after
        return found

    def __str__(self) -> str:
        lines = [
            f"{self.job.model} b{self.job.batch} {self.job.dtype}, {self.job.depth} blocks,"
            f" {'LayerNorms folded' if self.job.fold else 'LayerNorms by themselves'}, on {self.device_name}"
        ]
        for tuned in self.launches:
            said = f"{tuned.offered} candidates"
            for name in ("failed", "refused", "skipped"):
                if getattr(tuned, name):
                    said += f", {getattr(tuned, name)} {name}"
            if tuned.before_ms and tuned.after_ms and tuned.after is not None:
                gain = tuned.before_ms["median"] / tuned.after_ms["median"]
                said = f"{gain:.3f}x of the pass with {_short(tuned.after)} for {_short(tuned.before)}; {said}"
            else:
                said = f"stays {_short(tuned.before)}; {said}"
            lines.append(f"  {tuned.op} {tuned.key}: {said}")
        if self.before_ms and self.after_ms:
            before, after = self.before_ms["median"], self.after_ms["median"]
            lines.append(
                f"  all together: {before:.4f} ms before, {after:.4f} ms after"
                + ("" if self.kept else "; not faster, nothing is kept")
            )
        else:
            lines.append("  nothing faster was found")
        return "\n".join(lines)


def _short(entry: Mapping[str, Any]) -> str:
    if entry.get("library"):
        return "[torch's own]"
    tile = "x".join(str(value) for name, value in entry.items() if name.startswith("block"))
    rest = {name.removeprefix("num_"): value for name, value in entry.items() if not name.startswith("block")}
    return f"[{', '.join([tile, *(f'{name} {int(value)}' for name, value in rest.items())])}]"


# compiling ahead, in processes of their own


def compile_all(
    job: Job, work: Sequence[tuple[Launch, Entry]], *, workers: int, seconds: float
) -> dict[tuple[str, str], list[tuple[Entry, str]]]:
    """Compile and run each candidate once, in other processes.

    Compiling takes most of a candidate's time and one core; all kernels end up in Triton's cache on disk. And what
    would bring a process down (an illegal address, a crash of the compiler) brings down one of these.

    Args:
        job: what the processes build.
        work: the candidates, the likelier ones first.
        workers: how many processes.
        seconds: after which they are ended.

    Returns:
        For every launch the candidates that were reached, each with "ok" or what went wrong.
    """
    shares = [list(work[first::workers]) for first in range(workers)]
    found: dict[tuple[str, str], list[tuple[Entry, str]]] = {}
    running = []
    # whatever makes vitfast importable here; in a folder of its own nothing else goes by its name
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(Path(path).resolve()) for path in sys.path)}
    with tempfile.TemporaryDirectory() as folder:
        for index, share in enumerate(share for share in shares if share):
            plan, done = Path(folder) / f"{index}.json", Path(folder) / f"{index}.txt"
            items = [[launch.op, launch.key, entry] for launch, entry in share]
            plan.write_text(json.dumps({"job": asdict(job), "models": MODELS, "items": items}))
            with done.open("w") as file:
                command = [sys.executable, "-m", "vitfast.benchmarks.tune", "compile", str(plan)]
                process = subprocess.Popen(
                    command, stdout=file, stderr=subprocess.DEVNULL, cwd=folder, env=environment
                )
                running.append((process, done, share))
        deadline = time.monotonic() + seconds
        for process, _, _ in running:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for process, done, share in running:
            answers = done.read_text().splitlines()
            for (launch, entry), answer in zip(share, answers, strict=False):
                found.setdefault((launch.op, launch.key), []).append((entry, answer))
            if process.returncode > 0 or (process.returncode < 0 and time.monotonic() < deadline):
                # it went down over the one that it had begun
                for launch, entry in share[len(answers) : len(answers) + 1]:
                    note = f"the process ended with status {process.returncode}"
                    found.setdefault((launch.op, launch.key), []).append((entry, note))
    return found


def _compile(plan: Path) -> None:
    """The other side of `compile_all`: one line for each candidate on stdout, as soon as it is known."""
    content = json.loads(plan.read_text())
    MODELS.update(content["models"])
    subject = Subject(Job(**content["job"]))
    del subject.plain
    for op, key, entry in content["items"]:
        try:
            with _config.override(op, key, entry):
                subject.run()
            measure.synchronize(subject.device)
            print("ok", flush=True)
        except Exception as error:
            print(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)
            if "CUDA error" in str(error):
                # nothing runs in this process any more
                return


# the search


def contest(
    subject: Any,
    rule: Callable[[Tensor], bool],
    launch: Launch,
    present: Entry,
    entries: Sequence[Entry],
    *,
    budget_s: float,
) -> tuple[Tuned, Entry]:
    """Time entries of one launch against the present one and keep the best if it is faster by more than the spread.

    Args:
        subject: has `candidate` and `device`, see `Subject`.
        rule: whether tokens are right.
        launch: which.
        present: the entry to beat.
        entries: to try, the likelier ones first.
        budget_s: for all; at most half of it goes into preparing entries.

    Returns:
        What became of it, and the entry that is now the best.
    """
    begin = time.monotonic()
    ready: dict[str, measure.Candidate] = {"present": subject.candidate(launch, present)}
    failed = refused = skipped = 0
    for position, entry in enumerate(entries):
        if time.monotonic() - begin > budget_s / 2 and position:
            skipped = len(entries) - position
            break
        try:
            with _config.override(launch.op, launch.key, entry):
                right = rule(subject.run())
            if right:
                ready[str(position)] = subject.candidate(launch, entry)
            else:
                refused += 1
        except Exception:
            # whatever a compiler or a launch may raise; a device that is lost shows at the present entry
            failed += 1
    blank = Tuned(
        launch.op,
        launch.key,
        present,
        None,
        offered=len(entries),
        failed=failed,
        refused=refused,
        skipped=skipped,
    )
    if len(ready) == 1:
        return blank, present
    left = max(0.1, budget_s - (time.monotonic() - begin))
    alive = [name for name in ready if name != "present"]
    rounds = max(1, math.ceil(math.log2(len(alive) / 2)) + 1) if len(alive) > 2 else 1
    for number in range(rounds):
        last = number == rounds - 1
        # the deciding round gets as much as all before it
        share = left / 2 if last and rounds > 1 else left if last else left / 2 / (rounds - 1)
        names = ["present", *alive]
        timings = measure.time_interleaved(
            {name: ready[name] for name in names},
            subject.device,
            budget_s=share,
            # the interpreter's times decide nothing
            min_samples=3 if subject.device.type != "cuda" else 15 if last else 5,
        )
        alive.sort(key=lambda name: timings[name].median)
        if not last:
            for name in alive[max(2, len(alive) // 2) :]:
                del ready[name]
            alive = alive[: max(2, len(alive) // 2)]
    best, before = timings[alive[0]], timings["present"]
    blank = replace(blank, before_ms=asdict(before), after_ms=asdict(best))
    if best.p80 < before.p20:
        winner = dict(entries[int(alive[0])])
        return replace(blank, after=winner), winner
    return blank, present


def tune(
    model: str,
    *,
    batch: int,
    dtype: str,
    device: torch.device,
    budget_s: float,
    fold: bool = True,
    ops: Sequence[str] | None = None,
    out: Path | None = None,
    report: Path | None = None,
    max_candidates: int = 32,
    workers: int | None = None,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> Result:
    """Find the fastest configs for every launch of a model at one batch size and dtype on this device.

    What is tuned already in the files that launches read is the starting point, so that a second run goes on from the
    first. Attention's entries do not depend on the batch: tune the batch that matters most last.

    Args:
        model: name of an architecture, see `vitfast.list_models()`.
        batch: images a call.
        dtype: "bf16", "fp16", "tf32" or "fp32".
        device: a CUDA device; the CPU under Triton's interpreter runs the same steps, for tests.
        budget_s: seconds for all; the last steps may exceed it a little.
        fold: the launches of the model with its LayerNorms folded into the GEMMs, or those without that.
        ops: some of `OPS`; None for all that the model launches.
        out: folder that gets `<op>/<device>.json`, what is there already is kept; None for the user's own folder.
            `kernels/configs` of a checkout makes committed entries of them.
        report: a JSON file with the evidence, to which this run is added; `unpack` reads it.
        max_candidates: for one launch.
        workers: processes that compile ahead; None for one less than there are cores, at most 8.
        say: takes a line of progress.

    Returns:
        Every launch with its entries and times; `str()` gives a summary.

    Raises:
        ValueError: an unknown model, dtype or op, a CPU without the interpreter, or a damaged file of configs.
    """
    if dtype not in DTYPES:
        raise ValueError(f"precision {dtype!r}; expected one of {', '.join(DTYPES)}")
    if unknown := [op for op in ops or () if op not in OPS]:
        raise ValueError(f"op {unknown[0]!r}; expected some of {', '.join(OPS)}")
    if device.type != "cuda" and not INTERPRET:
        raise ValueError(
            f"device {str(device)!r} launches no kernels, so there is nothing to tune; expected a CUDA device"
            " (TRITON_INTERPRET=1 walks through the steps on CPU)"
        )
    begin = time.monotonic()
    job = Job(model, batch, dtype, str(device), blocks_past_cache(model, batch, dtype, device), fold)
    name = _config._device_name(device) or "interpreter"
    result = Result(job, name)
    with fp32_products(device, dtype == "tf32"), ExitStack() as accepted:
        say(f"tune: {model} b{batch} {dtype}, {job.depth} blocks")
        subject = Subject(job)
        rule = Rule(subject)
        todo = {launch: config for launch, config in subject.launches().items() if ops is None or launch.op in ops}
        offered = {}
        for launch, config in todo.items():
            entries = candidates(launch, **_limits(device))
            fresh = [entry for entry in entries if type(config)(**entry) != config]
            offered[launch] = fresh[:max_candidates]
        works = _compiled_ahead(job, offered, workers, 0.35 * budget_s, say)
        tuned: list[Tuned] = []
        for position, (launch, config) in enumerate(todo.items()):
            entries, failed, skipped = works[launch]
            waiting = [len(works[other][0]) + 1 for other in list(todo)[position:]]
            share = max(0.2, (budget_s - (time.monotonic() - begin)) * 0.95 * waiting[0] / sum(waiting))
            say(f"tune: {launch.op} {launch.key}, {len(entries)} candidates, {share:.0f} s")
            present = asdict(config)
            won, best = contest(subject, rule.holds, launch, present, entries, budget_s=0.8 * share)
            finer, best = contest(subject, rule.holds, launch, best, refinements(launch, best), budget_s=0.2 * share)
            won = replace(
                won,
                after=best if best != present else None,
                # of a gain in two steps the second one's times say both, the first one's only half
                after_ms=won.after_ms if finer.after is None else finer.after_ms,
                before_ms=won.before_ms or finer.before_ms,
                offered=len(offered[launch]) + finer.offered,
                failed=won.failed + finer.failed + failed,
                refused=won.refused + finer.refused,
                skipped=won.skipped + finer.skipped + skipped,
            )
            tuned.append(won)
            if won.after is not None:
                accepted.enter_context(_config.override(launch.op, launch.key, won.after))
        result = replace(result, launches=tuple(tuned))
        if any(won.after is not None for won in tuned):
            after = subject.candidate(None, None)
            right = rule.holds(subject.run())
            # what was accepted is undone for the pass that it is compared with
            accepted.close()
            before = subject.candidate(None, None)
            left = max(1.0, budget_s - (time.monotonic() - begin))
            if device.type != "cuda":
                after = _overridden(subject, tuned)
            timings = measure.time_interleaved({"before": before, "after": after}, device, budget_s=min(left, 10.0))
            result = replace(
                result,
                before_ms=asdict(timings["before"]),
                after_ms=asdict(timings["after"]),
                kept=right and timings["after"].p80 < timings["before"].p20,
            )
    if result.entries:
        for path in write_entries(out or _config.user_folder(), name, result.entries):
            say(f"tune: wrote {path}")
        _config.forget()
    if report is not None:
        _add_to_report(report, result, machine.environment(device))
    return result


def _overridden(subject: Subject, tuned: Sequence[Tuned]) -> measure.Candidate:
    def run(i: int) -> Tensor:
        with ExitStack() as stack:
            for won in tuned:
                if won.after is not None:
                    stack.enter_context(_config.override(won.op, won.key, won.after))
            return subject.run()

    return run


def _limits(device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        return {"arch": _config.arch(device), "shared": 99 * 1024, "sms": _config.sm_count(device)}
    # torch's stubs lack it
    shared = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin")  # noqa: B009
    return {"arch": _config.arch(device), "shared": shared, "sms": _config.sm_count(device)}


def _compiled_ahead(
    job: Job,
    offered: Mapping[Launch, list[Entry]],
    workers: int | None,
    seconds: float,
    say: Callable[[str], None],
) -> dict[Launch, tuple[list[Entry], int, int]]:
    """For every launch the entries that ran, and how many failed and were not reached."""
    if workers is None:
        workers = min(8, (os.cpu_count() or 2) - 1)
    if workers < 1:
        return {launch: (entries, 0, 0) for launch, entries in offered.items()}
    # the likeliest of every launch come first
    work = [(launch, entry) for _, launch, entry in _ranked(offered)]
    say(f"tune: compiling {len(work)} candidates in {workers} processes, {seconds:.0f} s at most")
    reached = compile_all(job, work, workers=workers, seconds=seconds)
    found = {}
    for launch, entries in offered.items():
        known = reached.get((launch.op, launch.key), [])
        # in their own order, whichever process was first
        ran = [entry for entry in entries if (entry, "ok") in known]
        bad = [(entry, said) for entry, said in known if said != "ok"]
        if bad:
            say(f"tune: {launch.op} {launch.key}: {len(bad)} candidates failed, as {_short(bad[0][0])}: {bad[0][1]}")
        found[launch] = (ran, len(bad), len(entries) - len(known))
    return found


def _ranked(offered: Mapping[Launch, list[Entry]]) -> Iterator[tuple[int, Launch, Entry]]:
    every = [(rank, launch, entry) for launch, entries in offered.items() for rank, entry in enumerate(entries)]
    yield from sorted(every, key=lambda item: item[0])


# files


def write_entries(folder: Path, device_name: str, entries: Mapping[str, Mapping[str, Entry]]) -> list[Path]:
    """Add entries to `<folder>/<op>/<device>.json`; those of other keys stay, those of the same key are replaced.

    Raises:
        ValueError: a file that is there is not of that form, or another device's.
    """
    written = []
    for op, configs in entries.items():
        path = folder / op / _config.file_name(device_name)
        merged = {**_config.read(path, device_name), **configs}
        write_json(path, {"device": device_name, "configs": dict(sorted(merged.items()))})
        written.append(path)
    return written


def read_report(path: Path) -> dict[str, Any]:
    """A report as `tune` writes it.

    Raises:
        ValueError: it is none, or one of another schema.
        FileNotFoundError: there is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a tuning report: {error}") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA or not isinstance(content.get("runs"), list) or not isinstance(content.get("configs"), dict):
        raise ValueError(f"{path}: a tuning report of schema {schema!r}; this version reads schema {SCHEMA}")
    return content


def _add_to_report(path: Path, result: Result, environment: dict[str, Any]) -> None:
    content: dict[str, Any] = {"schema": SCHEMA, "device": result.device_name, "runs": [], "configs": {}}
    if path.is_file():
        content = read_report(path)
        if content.get("device") != result.device_name:
            raise ValueError(f"{path}: a tuning report of {content.get('device')!r}; expected {result.device_name!r}")
    run = {**asdict(result), "environment": environment}
    content["runs"] = [old for old in content["runs"] if old["job"] != run["job"]] + [run]
    for op, configs in result.entries.items():
        content["configs"].setdefault(op, {}).update(configs)
    write_json(path, content)


def unpack(report: Path, folder: Path) -> list[Path]:
    """Lay a report's entries out as `<folder>/<op>/<device>.json`, such as `kernels/configs` of a checkout.

    Raises:
        ValueError: the report or a file that is there is not of its form.
        FileNotFoundError: there is no such report.
    """
    content = read_report(report)
    return write_entries(folder, content["device"], content["configs"])


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m vitfast.benchmarks.tune unpack REPORT FOLDER`; tuning itself is `vitfast tune`."""
    parser = argparse.ArgumentParser(prog="python -m vitfast.benchmarks.tune", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    unpacking = commands.add_parser("unpack", help="lay a report's entries out as files of configs")
    unpacking.add_argument("report", type=Path)
    unpacking.add_argument("folder", type=Path, help="such as kernels/configs of a checkout")
    compiling = commands.add_parser("compile", help="what `tune` starts to compile candidates ahead")
    compiling.add_argument("plan", type=Path)
    options = parser.parse_args(argv)
    if options.command == "compile":
        _compile(options.plan)
    else:
        for path in unpack(options.report, options.folder):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
