"""What the compiler makes for an H100 of what ViT-B/16 and ViT-L/16 launch in bf16, and what that work costs at least.

    python -m tests.kernels._evidence            # compile; write evidence.json and the tables of docs/kernels.md
    python -m tests.kernels._evidence --check    # write nothing; exit status 1 if one of the two is out of date

No GPU is asked. Configs are those that a launch on `DEVICE` would take: the committed ones, else the heuristics'.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

import vitfast
import vitfast.kernels
from tests.kernels._cases import FILES, module
from tests.kernels._compiler import MULTIPROCESSORS, Compiled, compiling, disassemble, meta
from vitfast.benchmarks.workloads import base as registry
from vitfast.benchmarks.workloads import table
from vitfast.kernels import _config
from vitfast.layers import FusedModel

TARGET = "sm_90"
SMS = MULTIPROCESSORS[TARGET]
DEVICE = "NVIDIA H100 80GB HBM3"
"""The H100 with 132 multiprocessors, as CUDA names it and so the files in kernels/configs."""

MODELS = {"vit_base_patch16_224": "ViT-B/16", "vit_large_patch16_224": "ViT-L/16"}
BATCHES = (256, 1)
E = 2
"""Bytes of a bf16 element."""

STATS_WIDTH = module("linear").STATS_WIDTH

TFLOP_S, TB_S = 800.0, 3.0
"""Assumed, not measured: what others published for large bf16 GEMMs and for streaming kernels on an H100 SXM."""
CLOCK_GHZ = 1.7
"""Assumed, for what is bound by instructions; the H100 SXM's boost clock is 1.98, under load it is lower."""

HERE = Path(__file__).parent
RECORD = HERE / "evidence.json"
PAGE = HERE.parents[1] / "docs" / "kernels.md"


@dataclass(frozen=True)
class Work:
    """What a call has to do, whoever does it.

    Attributes:
        flops: of the call.
        bytes: that it must read and write at least, weights included.
    """

    flops: float
    bytes: float

    @property
    def floor_us(self) -> float:
        """Microseconds at the assumed rates."""
        return 1e6 * max(self.flops / (TFLOP_S * 1e12), self.bytes / (TB_S * 1e12))

    @property
    def bound(self) -> str:
        return "FLOPs" if self.flops / TFLOP_S > self.bytes / TB_S else "bytes"


@dataclass(frozen=True)
class Machine:
    """What was compiled for it.

    Attributes:
        kernel: name of the Triton function.
        tuned: the config comes from kernels/configs, not from the heuristic.
        config: the fields of the op's `Config`.
        threads: of a program.
        registers, spills: a thread's; spills in bytes of local memory.
        shared: bytes a program uses.
        blocks: programs that one multiprocessor holds at a time.
        programs: that are launched.
        tiles: of the output, times the parts of K.
        hgmma, utmaldg, ldgsts: instructions in the code: tensor-core products, tiles loaded by the copy engine,
            asynchronous copies by threads.
        load, store: widest access to global memory by one thread, in bytes; 0 where the copy engine does all of them.
    """

    kernel: str
    tuned: bool
    config: dict[str, Any]
    threads: int
    registers: int
    spills: int
    shared: int
    blocks: int
    programs: int
    tiles: int
    hgmma: int
    utmaldg: int
    ldgsts: int
    load: int
    store: int

    @property
    def slots(self) -> int:
        """Programs that run at a time: of a persistent kernel one a multiprocessor, as it is launched."""
        return SMS if "tma" in self.kernel else SMS * self.blocks


@dataclass(frozen=True)
class Row:
    """One kind of launch; `machine` is None where the committed config leaves it to torch's own routine."""

    op: str
    work: Work
    machine: Machine | None


def blocks_per_multiprocessor(threads: int, registers: int, shared: int) -> int:
    """Programs that a multiprocessor of compute capability 9.0 holds.

    Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", column 9.0 (64 warps, 32
    blocks, 64 K registers, 228 KB of shared memory), and the 1 KB a block that the system reserves ("Shared Memory" of
    that capability). Granularity as in the toolkit's cuda_occupancy.h: registers by 256 a warp in each of four
    partitions, shared memory by 128 bytes.
    """
    warps = -(-threads // 32)
    a_warp = -(-registers * 32 // 256) * 256
    by_registers = 65536 // 4 // a_warp * 4 // warps
    by_shared = 228 * 1024 // (-(-(shared + 1024) // 128) * 128)
    return min(32, 64 // warps, by_registers, by_shared)


# what is compiled


@functools.cache
def plain_model(name: str) -> Any:
    """The reference model without memory."""
    with torch.device("meta"):
        return vitfast.create_model(name).eval()


def workloads(name: str, batch: int) -> dict[str, registry.Workload]:
    """The registry's kernel workloads of a model in bf16, by the kernel's name."""
    with pytest.MonkeyPatch.context() as patch:
        # sizes are all that is asked of it here
        patch.setattr(registry, "reference_model", plain_model)
        found = table.workloads(("kernel",), (name,), (batch,), ("bf16",))
    return {workload.name.partition("/")[0]: workload for workload in found}


def sizes(name: str) -> dict[str, int]:
    """The registry's sizes of a model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "reference_model", plain_model)
        return registry.dimensions(name)


def calls(name: str, batch: int) -> Iterator[tuple[str, str, Work, dict[str, Any]]]:
    """`(label, op, work, arguments)` of what the accelerated model launches for a block, its stem and its norms."""
    known, size = workloads(name, batch), sizes(name)
    n, d, hidden, image = size["tokens"], size["dim"], size["hidden"], (size["height"], size["width"])
    rows, groups = batch * n, -(-d // STATS_WIDTH)

    def tensor(*shape: int) -> Tensor:
        return meta(*shape, dtype=torch.bfloat16)

    def linear(out: int, wide: int) -> dict[str, Tensor]:
        return {"weight": tensor(out, wide), "bias": tensor(out)}

    def work(key: str, more: float = 0.0) -> Work:
        return Work(known[key].flops, float(known[key].bytes + more))

    x = tensor(batch, n, d)
    vectors = {"weight": tensor(d), "bias": tensor(d)}
    stem = {
        "weight": tensor(d, 3, size["patch"], size["patch"]),
        "bias": tensor(d),
        "prefix": tensor(n - known["patch_embed"].shape["patches"], d),
        "pos_embed": tensor(n, d),
    }
    yield "patch_embed", "patch_embed", work("patch_embed"), {"pixels": tensor(batch, 3, *image), **stem}
    pixels = batch * 3 * image[0] * image[1]
    raw = torch.empty(batch, 3, *image, dtype=torch.uint8, device="meta").contiguous(memory_format=torch.channels_last)
    affine = {key: meta(3, dtype=torch.float32) for key in ("scale", "shift")}
    yield (
        "patch_embed, uint8",
        "patch_embed",
        work("patch_embed", pixels - E * pixels),
        {"pixels": raw, **affine, **stem},
    )
    # what the folded norms read and write beside the registry's GEMMs: two fp32 a group, two a column
    stats = 8.0 * rows * groups
    norm = {
        "stats": meta(2, batch, n, groups, dtype=torch.float32),
        "norm_weight": tensor(d),
        "norm_bias": tensor(d),
        "eps": 1e-6,
    }
    yield "row_stats", "row_stats", Work(5.0 * rows * d, E * rows * d + stats), {"x": x}
    yield "qkv", "norm_linear", work("linear.qkv", stats + 8 * 3 * d), {"x": x, **norm, **linear(3 * d, d)}
    yield "attention", "attention_qkv", work("attention"), {"qkv": tensor(batch, n, 3 * d), "heads": size["heads"]}
    yield "proj", "linear_stats", work("linear.proj", stats), {"x": x, "residual": x, **linear(d, d)}
    fc1 = {"x": x, **norm, **linear(hidden, d), "activation": "gelu"}
    yield "fc1", "norm_linear", work("linear.fc1", stats + 8 * hidden), fc1
    fc2 = {"x": tensor(batch, n, hidden), "residual": x, **linear(d, hidden)}
    yield "fc2", "linear_stats", work("linear.fc2", stats), fc2
    yield "layer_norm", "layer_norm", work("layer_norm"), {"x": x, **vectors}
    yield "add_layer_norm", "add_layer_norm", work("add_layer_norm"), {"x": x, "residual": x, **vectors}


@contextmanager
def _as_on_device(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Committed configs of `DEVICE` serve the launches inside, and no user's own."""
    patch.setattr(_config, "_device_name", lambda device: DEVICE)
    patch.setattr(_config, "user_folder", lambda: _config._FOLDER)
    _config.forget()
    try:
        yield
    finally:
        _config.forget()


def compile_call(op: str, arguments: dict[str, Any]) -> tuple[Compiled | None, bool, Any]:
    """`(what is launched, whether a committed entry chose its config, the config)` of one call on `DEVICE`."""
    with (
        pytest.MonkeyPatch.context() as patch,
        _as_on_device(patch),
        compiling(TARGET, patch, *FILES) as compiled,
        _config.listen() as heard,
        torch.inference_mode(),
    ):
        getattr(vitfast.kernels, op)(**arguments)
        (((file, key), config),) = heard.items()
        tuned = _config.nearest(key, _config.table(file, DEVICE)) is not None
    (kernel,) = compiled or (None,)
    return kernel, tuned, config


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


def machine(op: str, arguments: dict[str, Any]) -> Machine | None:
    """What a call launches on `DEVICE`; None where that is torch's own routine."""
    kernel, tuned, config = compile_call(op, arguments)
    if kernel is None:
        return None
    threads = re.search(r"\.reqntid\s+(\d+)", kernel.assembly)
    assert threads is not None, f"{kernel.name}: no .reqntid in the PTX"
    code = opcodes(kernel.cubin)
    count = Counter(name for name, _ in code)
    tiles = kernel.programs
    if "tma" in kernel.name:
        a = kernel.arguments
        tiles = -(-a["M"] // a["BLOCK_M"]) * -(-a["N"] // a["BLOCK_N"])
    return Machine(
        kernel.name,
        tuned,
        dataclasses.asdict(config),
        int(threads[1]),
        kernel.registers,
        kernel.spills,
        kernel.shared,
        blocks_per_multiprocessor(int(threads[1]), kernel.registers, kernel.shared),
        kernel.programs,
        tiles,
        count["HGMMA"],
        count["UTMALDG"],
        count["LDGSTS"],
        _widest(code, "LDG", "LDGSTS"),
        _widest(code, "STG"),
    )


def rows(name: str, batch: int) -> dict[str, Row]:
    """The rows of one model and batch, by label."""
    return {label: Row(op, work, machine(op, arguments)) for label, op, work, arguments in calls(name, batch)}


def gelu_instructions() -> dict[str, float]:
    """Instructions that one GELU takes in fc1's code: by the polynomial of 16-bit outputs, and by fp32 outputs' erf.

    For the second one fc1 gets a residual in fp32, with the activation and without. Each evaluation has one exp2,
    so the number of those is how often the code was laid out.
    """
    rows, d, hidden = 256 * 197, 768, 3072
    x, w, b = (meta(*shape, dtype=torch.bfloat16) for shape in ((rows, d), (hidden, d), (hidden,)))
    found = {}
    for form, residual in (("polynomial", None), ("erf", meta(rows, hidden, dtype=torch.float32))):
        counts = {}
        for activation in ("none", "gelu"):
            with pytest.MonkeyPatch.context() as patch, compiling(TARGET, patch, *FILES) as compiled, torch.no_grad():
                vitfast.kernels.linear(x, w, b, activation, residual)
            code = opcodes(compiled[0].cubin)
            counts[activation] = len(code), sum(name == "MUFU" and "EX2" in modifiers for name, modifiers in code)
        evaluations = counts["gelu"][1] - counts["none"][1]
        found[form] = round((counts["gelu"][0] - counts["none"][0]) / evaluations, 1)
    return found


def micro_tiles() -> dict[str, dict[str, list[int]]]:
    """`[block_m, block_n, split_k]` that the heuristic gives ViT-B/16's GEMMs at batches that 256 might be cut into."""
    size = sizes("vit_base_patch16_224")
    found: dict[str, dict[str, list[int]]] = {}
    for batch in (256, 64, 32, 16, 8):
        for name, (n, k) in gemms(size).items():
            m, bf16 = batch * size["tokens"], torch.bfloat16
            c = module("linear").heuristic(m, n, k, bf16, bf16, 90, True, SMS)
            found.setdefault(str(batch), {})[name] = [c.block_m, c.block_n, c.split_k]
    return found


# what a forward launches


class _Launching(TorchDispatchMode):
    """Counts torch's operators that run a kernel: they write, or return memory of their own."""

    # allocation alone; and attention's output on CUDA lies as [B, N, H, d], so merging its heads copies nothing
    FREE = ("empty", "reshape")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))

        def memory(values: Any) -> set[int]:
            return {t.untyped_storage()._cdata for t in tree_leaves(values) if isinstance(t, Tensor)}

        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        if func.overloadpacket.__name__ not in self.FREE and (writes or memory(out) - memory((args, kwargs))):
            self.count += 1
        return out


FORMS: dict[str, set[str] | None] = {
    "modules": {"patch_embed", "layer_norm", "attention", "mlp", "block"},
    "fold": {"patch_embed", "layer_norm", "attention", "mlp", "block", "fold"},
    "all": None,
}
"""Rungs of `accelerate(only=...)`; None switches everything on."""


@contextmanager
def counting() -> Iterator[list[str]]:
    """Launches inside are those of `DEVICE`, and neither compiled nor run; the list fills with their kernels' names."""
    launched: list[str] = []

    def launch(kernel: JITFunction, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: launched.append(kernel.fn.__name__)

    with pytest.MonkeyPatch.context() as patch, _as_on_device(patch), compiling(TARGET, patch, *FILES):
        patch.setattr(JITFunction, "__getitem__", launch)
        # it asks for a CUDA tensor
        patch.setattr(FusedModel, "_may_fold", lambda self, x: True)
        yield launched


def forward(name: str, batch: int, form: str) -> tuple[int, int, dict[tuple[str, str], Any]]:
    """`(Triton launches, torch's operators that launch, lookups)` of one forward on `DEVICE`; form "plain": torch's."""
    with torch.device("meta"):
        model = vitfast.create_model(name).eval().to(torch.bfloat16)
    pixels = meta(batch, 3, *model.patch_embed.img_size, dtype=torch.bfloat16)
    if form != "plain":
        vitfast.accelerate(model, only=FORMS[form])
    with counting() as launched:
        # folded weights are derived in the first forward
        with torch.no_grad():
            model(pixels)
        launched.clear()
        # inference mode shows composite operators whole, as CUDA has one kernel for each of them
        with torch.inference_mode(), _Launching() as ops, _config.listen() as heard:
            model(pixels)
    return len(launched), ops.count, heard


def launches(name: str, batch: int) -> dict[str, list[int]]:
    """`[Triton launches, torch's]` of a forward, by form."""
    return {form: list(forward(name, batch, form)[:2]) for form in ("plain", *FORMS)}


# the record


def collect() -> dict[str, Any]:
    """The record of this source tree under this Triton."""
    models = {
        name: {
            "sizes": sizes(name),
            "batches": {
                str(batch): {
                    "launches": launches(name, batch),
                    "rows": {label: dataclasses.asdict(row) for label, row in rows(name, batch).items()},
                }
                for batch in BATCHES
            },
        }
        for name in MODELS
    }
    return {"triton": triton.__version__, "models": models, "gelu": gelu_instructions(), "micro": micro_tiles()}


def load() -> dict[str, Any]:
    """The committed record."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


def dump(record: dict[str, Any]) -> str:
    """A record as its file's text: a row's parts on a line each, so that a change shows as one."""
    text = json.dumps(record, indent=1)
    return re.sub(r"\{[^{}]*(\{[^{}]*\})?[^{}]*\}", _one_line, text) + "\n"


def _one_line(found: re.Match[str]) -> str:
    return re.sub(r"(?<=[\[{]) | (?=[\]}])", "", re.sub(r"\s*\n\s*", " ", found[0]))


def every_row(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of a record by model, batch and label."""
    return {
        f"{MODELS[name]} b{batch} {label}": row
        for name, model in record["models"].items()
        for batch, content in model["batches"].items()
        for label, row in content["rows"].items()
    }


def regressions(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What must not happen to a row under any Triton, a sentence each."""
    was, now = before["machine"], after["machine"]
    if was is None or now is None:
        return []
    found = []
    if now["spills"] > was["spills"]:
        found.append(f"spills {now['spills']} bytes a thread, were {was['spills']}")
    if now["blocks"] < was["blocks"]:
        found.append(f"{now['blocks']} programs a multiprocessor, were {was['blocks']}")
    for name in ("hgmma", "utmaldg"):
        if was[name] and not now[name]:
            found.append(f"no {name.upper()}, were {was[name]}")
    return found


def differences(before: Any, after: Any, at: str = "") -> list[str]:
    """Every leaf in which two records differ, by its path."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            line
            for key in (*before, *(key for key in after if key not in before))
            for line in differences(before.get(key), after.get(key), f"{at}/{key}")
        ]
    return [] if before == after else [f"{at}: {before} in the record, {after} now"]


# the page


def gemm(m: int, n: int, k: int, residual: bool = False) -> Work:
    """A linear layer's work, as the registry has it."""
    return Work(2.0 * m * n * k, E * (m * k + n * k + (2 if residual else 1) * m * n))


def chains(size: dict[str, int], batch: int) -> dict[str, list[tuple[str, float, float, Work]]]:
    """`(kernel, read, written, work)` of a block's kernels in four forms.

    What is read and written is in units of one activation tensor, N x D elements for each image, without weights.
    """
    n, d = size["tokens"], size["dim"]
    rows, h = batch * n, size["hidden"] / size["dim"]
    # two fp32 for each group of columns
    s = 8.0 / (STATS_WIDTH * E)
    weights = {name: out * wide for name, (out, wide) in gemms(size).items()}
    flops = {key: 2.0 * rows * value for key, value in weights.items()} | {"attention": 4.0 * rows * n * d}

    def op(kernel: str, read: float, written: float) -> tuple[str, float, float, Work]:
        moved = E * ((read + written) * rows * d + weights.get(kernel, 0))
        return kernel, read, written, Work(flops.get(kernel, 0.0), moved)

    core = op("attention", 3, 1)
    return {
        "separate": [
            op("norm1", 1, 1), op("qkv", 1, 3), core, op("proj", 1, 1), op("add1", 2, 1),
            op("norm2", 1, 1), op("fc1", 1, h), op("GELU", h, h), op("fc2", h, 1), op("add2", 2, 1),
        ],
        "add + norm": [
            op("norm1", 2, 2), op("qkv", 1, 3), core, op("proj", 1, 1),
            op("norm2", 2, 2), op("fc1", 1, h), op("fc2", h, 1),
        ],
        "epilogues": [
            op("norm1", 1, 1), op("qkv", 1, 3), core, op("proj", 2, 1),
            op("norm2", 1, 1), op("fc1", 1, h), op("fc2", h + 1, 1),
        ],
        "folded": [
            op("qkv", 1 + s, 3), core, op("proj", 2, 1 + s),
            op("fc1", 1 + s, h), op("fc2", h + 1, 1 + s),
        ],
    }  # fmt: skip


def gemms(size: dict[str, int]) -> dict[str, tuple[int, int]]:
    """`(N, K)` of a block's GEMMs."""
    d, hidden = size["dim"], size["hidden"]
    return {"qkv": (3 * d, d), "proj": (d, d), "fc1": (hidden, d), "fc2": (d, hidden)}


def tail_chain(size: dict[str, int], batch: int) -> list[tuple[str, Work]]:
    """The last block's kernels where only the class token is asked for."""
    n, d, hidden = size["tokens"], size["dim"], size["hidden"]
    rows = batch * n
    return [
        ("norm1", Work(0.0, 2.0 * E * rows * d)),
        ("q", gemm(batch, d, d)),
        ("k and v", gemm(rows, 2 * d, d)),
        ("attention", Work(4.0 * rows * d, E * (2.0 * rows * d + 2 * batch * d))),
        ("proj", gemm(batch, d, d, residual=True)),
        ("norm2", Work(0.0, 2.0 * E * batch * d)),
        ("fc1", gemm(batch, hidden, d)),
        ("fc2", gemm(batch, d, hidden, residual=True)),
    ]


def total(works: Sequence[Work]) -> tuple[Work, float]:
    """`(sum, sum of the floors)`: kernels that follow one another do not share their floors."""
    return Work(sum(w.flops for w in works), sum(w.bytes for w in works)), sum(w.floor_us for w in works)


def _table(header: Sequence[str], lines: Sequence[Sequence[Any]], texts: int = 1) -> str:
    """A Markdown table whose first columns are text and whose others are numbers."""
    rule = ["---"] * texts + ["---:"] * (len(header) - texts)
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (header, rule, *lines))


def _number(value: float) -> str:
    """Three digits that mean something."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


def _work(row: dict[str, Any]) -> Work:
    return Work(**row["work"])


def _tile(config: dict[str, Any]) -> str:
    c = config
    if set(c) == {"block_m", "num_warps"}:
        return f"{c['block_m']} row{'s' if c['block_m'] > 1 else ''}"
    if "block_s" in c:
        return f"{c['block_m']} x {c['block_s']} keys"
    text = f"{c['block_m']} x {c['block_n']} x {c['block_k']}"
    text += ", TMA" if c.get("tma") else ""
    text += ", halves" if c.get("subtile") else ""
    return text + (f", K in {c['split_k']}" if c.get("split_k", 1) > 1 else "")


def _each(record: dict[str, Any]) -> Iterator[tuple[str, dict[str, int], int, dict[str, Any]]]:
    for name, model in record["models"].items():
        for batch, content in model["batches"].items():
            yield MODELS[name], model["sizes"], int(batch), content


def _machine_tables(record: dict[str, Any]) -> str:
    header = (
        "launch", "tile", "warps", "stages", "registers", "spills", "shared KB", "programs an SM",
        "HGMMA", "UTMALDG", "LDGSTS", "load", "store",
    )  # fmt: skip
    parts = [f"By Triton {record['triton']}."]
    for model, _, batch, content in _each(record):
        lines = []
        for label, row in content["rows"].items():
            m = row["machine"]
            if m is None:
                lines.append((label, "torch's own", *("" for _ in header[2:])))
                continue
            c = m["config"]
            line = (
                label, _tile(c) + (" (tuned)" if m["tuned"] else ""), c["num_warps"], c.get("num_stages", "-"),
                m["registers"], m["spills"], f"{m['shared'] / 1024:.1f}", m["blocks"],
                m["hgmma"], m["utmaldg"], m["ldgsts"], m["load"], m["store"],
            )  # fmt: skip
            lines.append(line)
        parts.append(f"{model}, batch {batch}:\n\n{_table(header, lines, 2)}")
    return "\n\n".join(parts)


def _work_tables(record: dict[str, Any]) -> str:
    header = ("launch", "bound by", "GFLOP", "MB", "FLOP/byte", "floor us", "tiles", "at a time", "waves", "last wave")
    parts = []
    for model, _, batch, content in _each(record):
        lines = []
        for label, row in content["rows"].items():
            work = _work(row)
            waves: tuple[Any, ...] = ("",) * 4
            if row["machine"] is not None:
                m = Machine(**row["machine"])
                last = (m.tiles % m.slots or m.slots) / m.slots
                waves = (m.tiles, m.slots, f"{m.tiles / m.slots:.2f}", f"{last:.0%}")
            numbers = (work.flops / 1e9, work.bytes / 1e6, work.flops / work.bytes, work.floor_us)
            lines.append((label, work.bound, *map(_number, numbers), *waves))
        parts.append(f"{model}, batch {batch}:\n\n{_table(header, lines, 2)}")
    return "\n\n".join(parts)


def _traffic_table(record: dict[str, Any]) -> str:
    size = record["models"]["vit_base_patch16_224"]["sizes"]
    forms = chains(size, 256)
    units = {form: {kernel: read + written for kernel, read, written, _ in chain} for form, chain in forms.items()}
    lines = [(kernel, *(f"{units[form].get(kernel, 0):g}" for form in forms)) for kernel in units["separate"]]
    lines.append(("**units**", *(f"**{sum(units[form].values()):g}**" for form in forms)))
    sums = {form: total([work for *_, work in chain]) for form, chain in forms.items()}
    lines.append(("with weights, MB", *(_number(work.bytes / 1e6) for work, _ in sums.values())))
    lines.append(("those bytes alone, us", *(_number(work.bytes / TB_S / 1e6) for work, _ in sums.values())))
    lines.append(("FLOPs alone, us", *(_number(work.flops / TFLOP_S / 1e6) for work, _ in sums.values())))
    lines.append(("sum of the kernels' floors, us", *(_number(floor) for _, floor in sums.values())))
    lines.append(("kernels", *(len(chain) for chain in forms.values())))
    return _table(("kernel", *forms), lines)


def forwards(size: dict[str, int], batch: int, stem: Work, stats: Work) -> dict[str, tuple[Work, float]]:
    """`total` of a whole forward by form: torch's modules, `accelerate` without folding, with it, with the tail too."""
    rows, d, classes = batch * size["tokens"], size["dim"], size["classes"]
    unit = E * rows * d
    forms = chains(size, batch)
    block = {form: [work for *_, work in chain] for form, chain in forms.items()}
    head = gemm(batch, classes, d)
    norm, class_norm = Work(0.0, 2.0 * unit), Work(0.0, 2.0 * E * batch * d)
    depth = size["depth"]
    # the convolution by itself, then prefix and position embedding, one read and one write each
    apart = [Work(stem.flops, stem.bytes), Work(0.0, 2.0 * unit), Work(0.0, 2.0 * unit)]
    last = [work for _, work in tail_chain(size, batch)]
    return {
        "plain": total([*apart, *depth * block["separate"], norm, head]),
        "modules": total([stem, *depth * block["epilogues"], norm, head]),
        "fold": total([stem, stats, *depth * block["folded"], norm, head]),
        "all": total([stem, stats, *(depth - 1) * block["folded"], *last, class_norm, head]),
    }


def _forward_table(record: dict[str, Any]) -> str:
    names = {"plain": "plain modules", "modules": "fused", "fold": "fused, folded", "all": "fused, folded, tail"}
    lines = []
    for model, size, batch, content in _each(record):
        rows = content["rows"]
        sums = forwards(size, batch, _work(rows["patch_embed"]), _work(rows["row_stats"]))
        for form, (work, floor) in sums.items():
            ours, torchs = content["launches"][form]
            line = (
                f"{model}, batch {batch}", names[form], ours, torchs, ours + torchs, _number(work.flops / 1e9),
                _number(work.bytes / 1e6), _number(floor), _number(floor / (ours + torchs)),
            )  # fmt: skip
            lines.append(line)
    header = ("", "form", "Triton", "torch", "launches", "GFLOP", "MB", "sum of floors us", "us a launch")
    return _table(header, lines, 2)


def _gelu_table(record: dict[str, Any]) -> str:
    base = record["models"]["vit_base_patch16_224"]
    size, fc1 = base["sizes"], _work(base["batches"]["256"]["rows"]["fc1"])
    elements = 256 * size["tokens"] * size["hidden"]
    lines = []
    for form, count in record["gelu"].items():
        issue = elements * count / (128 * SMS * CLOCK_GHZ * 1e3)
        special = elements / (16 * SMS * CLOCK_GHZ * 1e3)
        lines.append((form, count, _number(issue), _number(special), f"{max(issue, special) / fc1.floor_us:.0%}"))
    return _table(("form", "instructions", "us to issue", "us for exp2", "of fc1's floor"), lines)


def _split_table(record: dict[str, Any]) -> str:
    lines = []
    for model, size, batch, content in _each(record):
        m = content["rows"]["fc2"]["machine"]
        if batch != 1 or m is None:
            continue
        c, k = m["config"], size["hidden"]
        tiles = m["tiles"] // c["split_k"]
        for parts in dict.fromkeys((1, c["split_k"])):
            rounds = -(-k // (c["block_k"] * parts))
            a_program = E * (c["block_m"] + c["block_n"]) * c["block_k"] * rounds
            partials = 0 if parts == 1 else 2 * 4 * parts * tiles * c["block_m"] * c["block_n"]
            numbers = (a_program / 1e3, a_program / (64 * CLOCK_GHZ * 1e3), partials / 1e6)
            lines.append((f"{model}, {parts}", tiles * parts, rounds, *map(_number, numbers)))
    header = ("parts", "programs", "rounds of K", "KB a program", "us at 64 bytes a clock", "MB of partial sums")
    return _table(header, lines)


def _attention_table(record: dict[str, Any]) -> str:
    lines = []
    for model, size, batch, content in _each(record):
        row = content["rows"]["attention"]
        m = row["machine"]
        if m is None:
            continue
        work, n, heads, d = _work(row), size["tokens"], size["heads"], size["dim"]
        queries = -(-n // m["config"]["block_m"]) * m["config"]["block_m"]
        keys = -(-n // m["config"]["block_s"]) * m["config"]["block_s"]
        computed = 4.0 * batch * queries * keys * d
        exps = batch * heads * queries * keys / (16 * SMS * CLOCK_GHZ * 1e3)
        scores = 4.0 * batch * heads * n * n * E
        line = (
            f"{model}, batch {batch}", m["programs"], _number(work.bytes / 1e6), _number(work.floor_us),
            _number(work.flops / 1e9), _number(computed / 1e9), _number(computed / TFLOP_S / 1e6),
            _number(exps), _number(scores / 1e6),
        )  # fmt: skip
        lines.append(line)
    header = (
        "", "programs", "MB", "floor us", "GFLOP asked", "GFLOP computed", "us for those", "us for exp2",
        "MB of scores, unfused",
    )  # fmt: skip
    return _table(header, lines)


def _tail_table(record: dict[str, Any]) -> str:
    lines = []
    for model, size, batch, _ in _each(record):
        whole, whole_floor = total([work for *_, work in chains(size, batch)["folded"]])
        tail, tail_floor = total([work for _, work in tail_chain(size, batch)])
        numbers = (whole.flops / 1e9, tail.flops / 1e9, whole.bytes / 1e6, tail.bytes / 1e6, whole_floor, tail_floor)
        saved = (f"{1 - tail.flops / whole.flops:.1%}", *map(_number, numbers))
        lines.append((f"{model}, batch {batch}", *saved, f"{whole_floor - tail_floor:.1f}"))
    header = (
        "", "FLOPs saved", "GFLOP whole", "tail", "MB whole", "tail", "floor us whole", "tail", "us saved",
    )  # fmt: skip
    return _table(header, lines)


def _pixels_table(record: dict[str, Any]) -> str:
    lines = []
    for model, size, batch, content in _each(record):
        if model != "ViT-B/16":
            # but for the width of the tokens the same again
            continue
        pixels = batch * 3 * size["height"] * size["width"]
        row = _work(content["rows"]["patch_embed"])
        for name, width in (("fp32", 4), ("bf16", 2), ("uint8", 1)):
            work = Work(row.flops, row.bytes + (width - E) * pixels)
            # one pass over the bytes that writes the normalised pixels
            before = 0.0 if width == 1 else (1 + width) * pixels
            numbers = (width * pixels / 1e6, width * pixels / 50e3, before / TB_S / 1e6, work.bytes / 1e6)
            text = (_number(value) if value else "0" for value in (*numbers, work.floor_us))
            lines.append((f"{name}, batch {batch}", *text))
    header = ("pixels", "MB", "us over the link", "us to make them of bytes", "kernel MB", "kernel floor us")
    return _table(header, lines)


def _micro_table(record: dict[str, Any]) -> str:
    size = record["models"]["vit_base_patch16_224"]["sizes"]
    n, d, hidden, depth = size["tokens"], size["dim"], size["hidden"], size["depth"]
    weights = E * (4 * d * d + 2 * d * hidden)
    attention = dict((kernel, work) for kernel, _, _, work in chains(size, 256)["folded"])["attention"]
    lines = []
    for batch in map(int, record["micro"]):
        parts, rows = 256 // batch, batch * n
        unit = E * rows * d
        # fc2's moment: the stream, the hidden activation and fc2's output
        live = unit * (2 + hidden / d) + weights
        waves_us = 0.0
        for gemm_name, (out, wide) in gemms(size).items():
            block_m, block_n, split_k = record["micro"][str(batch)][gemm_name]
            tiles = -(-rows // block_m) * -(-out // block_n) * split_k
            # every wave takes as long as full tiles on all multiprocessors
            tile_flops = 2.0 * block_m * block_n * wide / split_k
            waves_us += parts * -(-tiles // SMS) * tile_flops * SMS / TFLOP_S / 1e6
        fits = live < 50e6
        moved = parts * (2 * unit + weights) if fits else None
        inner = attention.flops / TFLOP_S / 1e6 if fits else attention.floor_us
        line = (
            batch, f"{live / 1e6:.1f}", "yes" if fits else "no",
            "-" if moved is None else f"{moved / (E * 256 * n * d):.1f}",
            _number(waves_us), _number(inner), _number(waves_us + inner), parts * 5 * depth,
        )  # fmt: skip
        lines.append(line)
    header = (
        "micro-batch", "live MB", "in 50 MB of L2", "units from memory", "GEMMs in whole waves, us", "attention, us",
        "block, us", "launches of 12 blocks",
    )  # fmt: skip
    return _table(header, lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "machine": _machine_tables,
    "work": _work_tables,
    "traffic": _traffic_table,
    "forward": _forward_table,
    "split": _split_table,
    "gelu": _gelu_table,
    "attention": _attention_table,
    "tail": _tail_table,
    "pixels": _pixels_table,
    "micro": _micro_table,
}
"""What stands between `<!-- NAME: generated -->` and `<!-- NAME: end -->` of the page."""


def page(text: str, record: dict[str, Any]) -> str:
    """The page with its tables made from a record; what is written by hand stays."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name}: generated -->\n", f"<!-- {name}: end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{PAGE.name}: expected one {begin.strip()} and one {end}")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{make(record)}\n\n{end}{rest.split(end)[1]}"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Write record and page, or only say what is out of date."""
    description = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tests.kernels._evidence", description=description)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if something is out of date")
    options = parser.parse_args(argv)
    record = json.loads(json.dumps(collect()))
    old = load() if RECORD.is_file() else record
    for line in differences(old, record):
        print(line)
    rows = every_row(record)
    for label, row in every_row(old).items():
        for sentence in regressions(row, rows[label]) if label in rows else ():
            print(f"WORSE: {label}: {sentence}")
    wanted = {RECORD: dump(record), PAGE: page(PAGE.read_text(encoding="utf-8"), record)}
    changed = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in changed:
        print(path)
        if not options.check:
            path.write_text(wanted[path], encoding="utf-8")
    return 1 if options.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
