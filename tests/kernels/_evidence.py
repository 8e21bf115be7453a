"""The machine code of what ViT-B/16 launches in bf16 on an H100: registers, spills, shared memory, instructions.

    python -m tests.kernels._evidence    # compile; write evidence.json and the tables of docs/kernels.md

No GPU is asked. Configs are those that a launch on `DEVICE` would take: the committed ones, else the heuristics'.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

import vitfast.kernels
from tests.kernels._compiler import compiling, disassemble, meta
from tests.kernels._data import FILES
from vitfast.kernels import _config

TARGET = "sm_90"
DEVICE = "NVIDIA H100 80GB HBM3"
"""The H100 with 132 multiprocessors, as CUDA names it and so the files in kernels/configs."""

BATCHES = (256, 1)

HERE = Path(__file__).parent
RECORD = HERE / "evidence.json"
PAGE = HERE.parents[1] / "docs" / "kernels.md"

Row = dict[str, Any]


def calls(batch: int) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """`(label, op, arguments)` of what the accelerated model launches for its stem, a block and its norms."""
    n, d, hidden, patch, side, heads = 197, 768, 3072, 16, 224, 12

    def tensor(*shape: int) -> Tensor:
        return meta(*shape, dtype=torch.bfloat16)

    def linear(out: int, wide: int) -> dict[str, Tensor]:
        return {"weight": tensor(out, wide), "bias": tensor(out)}

    x = tensor(batch, n, d)
    vectors = {"weight": tensor(d), "bias": tensor(d)}
    stem = {"weight": tensor(d, 3, patch, patch), "bias": tensor(d), "prefix": tensor(1, d), "pos_embed": tensor(n, d)}
    yield "patch_embed", "patch_embed", {"pixels": tensor(batch, 3, side, side), **stem}
    raw = meta(batch, 3, side, side, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    affine = {name: meta(3, dtype=torch.float32) for name in ("scale", "shift")}
    yield "patch_embed, uint8", "patch_embed", {"pixels": raw, **affine, **stem}
    stats = meta(2, batch, n, -(-d // 64), dtype=torch.float32)
    norm = {"stats": stats, "norm_weight": tensor(d), "norm_bias": tensor(d), "eps": 1e-6}
    yield "row_stats", "row_stats", {"x": x}
    yield "qkv", "norm_linear", {"x": x, **norm, **linear(3 * d, d)}
    yield "attention", "attention_qkv", {"qkv": tensor(batch, n, 3 * d), "heads": heads}
    yield "proj", "linear_stats", {"x": x, "residual": x, **linear(d, d)}
    yield "fc1", "norm_linear", {"x": x, **norm, **linear(hidden, d), "activation": "gelu"}
    yield "fc2", "linear_stats", {"x": tensor(batch, n, hidden), "residual": x, **linear(d, hidden)}
    yield "layer_norm", "layer_norm", {"x": x, **vectors}
    yield "add_layer_norm", "add_layer_norm", {"x": x, "residual": x, **vectors}


_OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([\w.]*)", re.MULTILINE)
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@functools.cache
def opcodes(cubin: bytes) -> list[tuple[str, frozenset[str]]]:
    """Every instruction of a kernel: its name and its modifiers."""
    found = [(name, frozenset(rest.split("."))) for name, rest in _OPCODE.findall(disassemble(cubin))]
    assert found and found[-1][0] == "NOP", "cuobjdump's listing has another form than is read here"
    return [(name, modifiers) for name, modifiers in found if name != "NOP"]


def _widest(code: list[tuple[str, frozenset[str]]], *names: str) -> int:
    widths = [next((_WIDTHS[m] for m in modifiers if m in _WIDTHS), 4) for name, modifiers in code if name in names]
    return max(widths, default=0)


def row(op: str, arguments: dict[str, Any]) -> Row:
    """What a call launches on `DEVICE`; of torch's own routine only its config.

    `tuned`: a committed entry chose the config. `spills`: bytes of local memory a thread. `shared`: bytes a program.
    `hgmma`, `utmaldg`, `ldgsts`: instructions in the code, tensor-core products, tiles loaded by the copy engine, and
    asynchronous copies by threads. `load`, `store`: widest access to global memory by a thread, in bytes; 0 where the
    copy engine does all of them.
    """
    with pytest.MonkeyPatch.context() as patch:
        # committed configs of `DEVICE` serve the launch, and no user's own
        patch.setattr(_config, "_device_name", lambda device: DEVICE)
        patch.setattr(_config, "user_folder", lambda: _config._FOLDER)
        _config.forget()
        with compiling(TARGET, patch, *FILES) as compiled, _config.listen() as heard, torch.inference_mode():
            getattr(vitfast.kernels, op)(**arguments)
        ((key, config),) = heard.items()
        tuned = _config.nearest(key, _config.table(key.op, DEVICE)) is not None
    _config.forget()
    chosen = {"key": str(key), "tuned": tuned, "config": dataclasses.asdict(config)}
    if not compiled:
        return chosen
    # a small one that merges statistics goes before the ping-pong kernel
    *_, kernel = compiled
    code = opcodes(kernel.cubin)
    count = Counter(name for name, _ in code)
    return {
        **chosen,
        "kernel": kernel.name,
        "registers": kernel.registers,
        "spills": kernel.spills,
        "shared": kernel.shared,
        **{name: count[name.upper()] for name in ("hgmma", "utmaldg", "ldgsts")},
        "load": _widest(code, "LDG", "LDGSTS"),
        "store": _widest(code, "STG"),
    }


def collect() -> dict[str, Any]:
    """The record of this source tree under this Triton."""
    rows = {str(batch): {label: row(op, arguments) for label, op, arguments in calls(batch)} for batch in BATCHES}
    return {"triton": triton.__version__, "batches": rows}


def load() -> dict[str, Any]:
    """The committed record."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


def dump(record: dict[str, Any]) -> str:
    """A record as its file's text, a launch on a line, so that a change shows as one."""
    batches = [
        f' "{batch}": {{\n'
        + ",\n".join(f"  {json.dumps(label)}: {json.dumps(one)}" for label, one in rows.items())
        + "\n }"
        for batch, rows in record["batches"].items()
    ]
    return f'{{"triton": "{record["triton"]}", "batches": {{\n' + ",\n".join(batches) + "\n}}\n"


def _tile(c: dict[str, Any]) -> str:
    if set(c) == {"block_m", "num_warps"}:
        return f"{c['block_m']} row{'s' if c['block_m'] > 1 else ''}"
    if "block_s" in c:
        keys = "all keys, resident" if c["resident"] else f"{c['block_s']} keys"
        return f"{c['block_m']} x {keys}"
    text = f"{c['block_m']} x {c['block_n']} x {c['block_k']}"
    text += ", ping-pong" if c.get("pingpong") else ", TMA" if c.get("tma") else ""
    text += ", halves" if c.get("subtile") else ""
    return text + (f", K in {c['split_k']}" if c.get("split_k", 1) > 1 else "")


def tables(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    header = (
        "launch", "tile", "warps", "stages", "registers", "spills", "shared KB", "HGMMA", "UTMALDG", "LDGSTS", "load",
        "store",
    )  # fmt: skip
    parts = [f"By Triton {record['triton']}."]
    for batch, rows in record["batches"].items():
        lines: list[Sequence[Any]] = [header, ["---", "---", *["---:"] * (len(header) - 2)]]
        for label, r in rows.items():
            c = r["config"]
            if "kernel" not in r:
                lines.append((label, "torch's own", *("" for _ in header[2:])))
                continue
            line = (
                label, _tile(c) + (" (tuned)" if r["tuned"] else ""), c["num_warps"], c.get("num_stages", "-"),
                r["registers"], r["spills"], f"{r['shared'] / 1024:.1f}", r["hgmma"], r["utmaldg"], r["ldgsts"],
                r["load"], r["store"],
            )  # fmt: skip
            lines.append(line)
        table = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
        parts.append(f"ViT-B/16, batch {batch}:\n\n{table}")
    return "\n\n".join(parts)


BEGIN, END = "<!-- machine: generated -->\n", "<!-- machine: end -->"


def page(text: str, record: dict[str, Any]) -> str:
    """The page with its tables made from a record; what is written by hand stays."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{tables(record)}\n\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Write record and page."""
    record = collect()
    RECORD.write_text(dump(record), encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), record), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
