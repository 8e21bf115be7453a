"""What is worth measuring for one launch: the neighbours of the config that it has.

A step doubles or halves a tile or the warps, adds or takes away a stage or a part of K, or changes the kernel. What
cannot run is left out by the limits that the device and the kernels state; nothing here guesses whether a config is
fast, or whether it compiles. Compiling ahead and the contest find that out. What won is where the next run starts, so
that two runs reach further than one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from vitfast.kernels._config import Key, has_library
from vitfast.kernels._triton import cdiv, next_power_of_2
from vitfast.kernels.attention import RESIDENT_KEYS, key_parts, split_head_dim
from vitfast.kernels.epilogue import STATS_WIDTH

Entry = dict[str, Any]

REGISTERS = 255
"""Of a thread; its share of the fp32 accumulators has to leave some for the rest."""

FAR = 4
"""The most squared steps to a candidate: two of one field, or one of four."""

FIXED = ("group_m", "library")
"""Fields that no step changes: the order of tiles is refined afterwards, torch's own routine is one answer for all."""


def candidates(key: Key, present: Mapping[str, Any], *, arch: int, shared: int, sms: int) -> list[Entry]:
    """Entries worth measuring, the nearest to the present one first, for a budget that does not reach the last.

    Args:
        key: of the launch.
        present: its config, by the fields of the op's `Config`.
        arch: 10 * major + minor of the compute capability, as `vitfast.kernels._config.arch` gives it.
        shared: bytes of shared memory that a block may use.
        sms: number of multiprocessors.
    """
    axes = [[(name, *step) for step in _steps(name, value)] for name, value in present.items() if name not in FIXED]
    fits = {"linear": _linear_fits, "attention": _attention_fits, "patch_embed": _gemm_fits}.get(key.op, _rows_fit)
    found: list[tuple[int, int, Entry]] = []
    for point in itertools.product(*axes):
        distance = sum(steps * steps for *_, steps in point)
        if distance > FAR or (distance == 0 and not present.get("library")):
            continue
        entry = {**present, **{name: value for name, value, _ in point}}
        if "library" in entry:
            entry["library"] = False
        if fits(key, entry, arch=arch, shared=shared, sms=sms):
            # of equally near ones first those with as much work for a thread as now
            more = sum(-steps if name == "num_warps" else steps for name, _, steps in point if name in _WORK)
            found.append((distance, abs(more), entry))
    ranked = [entry for *_, entry in sorted(found, key=lambda item: item[:2])]
    torchs = [{**present, "library": True}] if has_library(key) and not present["library"] else []
    return [*torchs, *ranked]


_WORK = ("block_m", "block_n", "block_s", "num_warps")


def refinements(key: Key, entry: Mapping[str, Any]) -> list[Entry]:
    """Variants of a tile that won, in what does not depend on it: how tiles are ordered for L2."""
    if key.op != "linear" or entry.get("library"):
        return []
    return [{**entry, "group_m": group} for group in (1, 4, 16) if group != entry["group_m"]]


def _steps(name: str, value: Any) -> list[tuple[Any, int]]:
    """`(value, signed steps to it)` for a field, at most two steps away."""
    if isinstance(value, bool):
        return [(value, 0), (not value, 1)]
    if name in ("num_stages", "split_k"):
        return [(value + step, step) for step in range(-2, 3) if value + step >= 1]
    # tiles and warps are powers of two
    return [(value * 2**step if step >= 0 else value >> -step, step) for step in range(-2, 3) if value >> max(0, -step)]


def _covers(block: int, size: int, least: int = 16) -> bool:
    """Whether a tile is one that the tensor cores take, and no larger than its size asks for."""
    return least <= block <= min(256, max(64, next_power_of_2(size)))


def _gemm_fits(key: Key, entry: Entry, *, shared: int, **limits: int) -> bool:
    m, n, k = (size for _, size in key.sizes)
    block_m, block_n, block_k = entry["block_m"], entry["block_n"], entry["block_k"]
    # all stages but perhaps one are in shared memory at a time
    loads = max(1, entry["num_stages"] - 1) * (block_m + block_n) * block_k * key.dtype.itemsize
    return (
        _covers(block_m, m)
        and _covers(block_n, n)
        and _covers(block_k, k)
        and entry["num_warps"] <= 16
        and block_m * block_n < REGISTERS * 32 * entry["num_warps"]
        and loads <= shared
    )


def _linear_fits(key: Key, entry: Entry, *, arch: int, shared: int, sms: int) -> bool:
    m, n, k = (size for _, size in key.sizes)
    block_n, split_k = entry["block_n"], entry["split_k"]
    if entry["pingpong"]:
        from vitfast.kernels import pingpong

        tile = (entry["block_m"], block_n, entry["block_k"])
        return (
            arch == 90
            and key.dtype.itemsize == 2
            and not any(flag == "pointers" or flag.endswith(" out") for flag in key.flags)
            and ("stats" not in key.flags or n % STATS_WIDTH == 0)
            and entry["tma"]
            and (*tile, entry["num_warps"], split_k, entry["subtile"])
            == (pingpong.BLOCK_M, pingpong.BLOCK_N, pingpong.BLOCK_K, 4, 1, False)
            and pingpong.shared_bytes(entry["num_stages"]) <= shared
        )
    if entry["tma"]:
        kernel = arch >= 90 and "pointers" not in key.flags and split_k == 1
    else:
        # parts of K only for what would leave multiprocessors idle, and none without work
        idle = cdiv(m, entry["block_m"]) * cdiv(n, block_n) < sms
        kernel = not entry["subtile"] and (split_k == 1 or (idle and cdiv(k, entry["block_k"]) >= split_k))
    stored = block_n // 2 if entry["subtile"] else block_n
    whole = "stats" not in key.flags or stored % STATS_WIDTH == 0
    return kernel and whole and _gemm_fits(key, entry, shared=shared)


def _attention_fits(key: Key, entry: Entry, **limits: int) -> bool:
    n, s, d = (size for _, size in key.sizes)
    block_m, block_s, warps = entry["block_m"], entry["block_s"], entry["num_warps"]
    if entry["resident"]:
        width, tail = split_head_dim(d)
        keys = sum(key_parts(s))
        return (
            not key.flags
            and tail == 0
            and keys <= RESIDENT_KEYS
            # which it does not use
            and block_s == max(16, next_power_of_2(s))
            and _covers(block_m, n)
            and warps <= 16
            and block_m * (keys + width) < REGISTERS * 32 * warps
            and 2 * keys * width * key.dtype.itemsize <= limits["shared"]
        )
    # a bias has a tile of its own, as large as the scores
    scores = block_m * block_s * (2 if "bias" in key.flags else 1)
    return (
        _covers(block_m, n)
        and 16 <= block_s <= max(16, next_power_of_2(s))
        and warps <= 16
        and scores + block_m * sum(split_head_dim(d)) < REGISTERS * 32 * warps
        # one tile of all keys has no loop to stage
        and (block_s < s or entry["num_stages"] == 1)
    )


def _rows_fit(key: Key, entry: Entry, **limits: int) -> bool:
    rows, width = (size for _, size in key.sizes)
    elements, threads = entry["block_m"] * next_power_of_2(width), 32 * entry["num_warps"]
    return (
        entry["block_m"] <= next_power_of_2(max(1, rows))
        and entry["num_warps"] <= 16
        and threads <= elements < REGISTERS * threads
    )
