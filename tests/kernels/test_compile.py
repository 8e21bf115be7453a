"""The compile lane: what every op launches is compiled for GPUs that are not there, and the machine code is read.

All real sizes are compiled for sm_80 and sm_90, a core of them and all attention sizes for the other targets. Batches
are 256 (and 1, where the size of the problem chooses another kernel); the tensors have no memory.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from triton.runtime.jit import JITFunction

import vitfast.kernels
from tests.kernels._cases import ATTENTION_QKV, CASES, RELATIVE_ATTENTION, WINDOW_ATTENTION
from tests.kernels._compiler import TARGETS, Compiled, compiling, disassemble, meta
from tests.kernels._data import FILES, OPS, Case
from tests.kernels._ranges import overflows
from tests.kernels._sass import check_uniform_registers
from vitfast.kernels import _config
from vitfast.kernels._config import Key

pytestmark = pytest.mark.compile_only

SPILL_BUDGET = 0
"""Bytes of stack a thread may use; the config that needs more must show a measured gain."""

# what multiplies fp16 and bf16 matrices, in PTX or AMD assembly
TENSOR_CORES = {
    "sm_80": r"mma\.sync",
    "sm_86": r"mma\.sync",
    "sm_89": r"mma\.sync",
    "sm_90": r"wgmma\.mma_async",
    "sm_100": r"tcgen05\.mma",
    "sm_120": r"mma\.sync",
    "gfx942": r"v_mfma_",
}
# AMD's matrix cores take fp32 as it is; only their xf32 form rounds
ROUNDS_FP32 = r"mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma_\w*xf32"
# the same in NVIDIA's machine code
TENSOR_CORES_SASS = {
    "sm_80": r"\bHMMA\.",
    "sm_86": r"\bHMMA\.",
    "sm_89": r"\bHMMA\.",
    "sm_90": r"\bHGMMA\.",
    "sm_100": r"\bUTCHMMA",
    "sm_120": r"\bHMMA\.",
}
# a load of 16 bytes by one thread: to registers, to shared memory, or a tile by the copy engine
WIDE_LOADS = (
    r"ld\.global[\w.:]*\.(v4\.b32|v2\.b64)|cp\.async\.cg\.shared\.global[^;]*, 0x10|cp\.async\.bulk\.tensor"
    r"|(buffer|global)_load_dwordx4"
)
PIPELINED_LOADS = r"cp\.async\.c[ag]\.shared|cp\.async\.bulk\.tensor"

# what runs before or after a GEMM; norm_linear in fp32 folds nothing and normalises first
WITHOUT_DOT = ("_layer_norm_fwd_kernel", "_merge_stats_kernel", "_sum_parts_kernel")


def launch(target: str, monkeypatch: pytest.MonkeyPatch, case: Case, dtype: torch.dtype, batch: int) -> list[Compiled]:
    """What a case's call launches on `target`."""
    arguments = case.arguments(dtype, "meta", batch)
    with compiling(target, monkeypatch, *FILES) as compiled:
        getattr(vitfast.kernels, case.op)(**arguments)
    assert compiled, "nothing was launched"
    return compiled


def plan() -> list[Any]:
    """`(case, target, dtype, batch)` of this lane."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    chosen: dict[tuple[str, str, torch.dtype, int], Case] = {}

    def add(cases: list[Case], target: str, dtype: torch.dtype, batch: int) -> None:
        chosen.update({(str(case), target, dtype, batch): case for case in cases})

    every = [case for op in OPS for case in CASES[op]]
    real = [case for case in every if case.real]
    core = [case for case in real if case.core]
    for target in ("sm_80", "sm_90"):
        add(real, target, bf16, 256)
        # one image gives a GEMM too few tiles for a large GPU, and so another config
        add([case for case in real if case.op in ("linear", "patch_embed")], target, bf16, 1)
        add([case for case in real if case.core or case.op == "attention_qkv"], target, fp32, 256)
        add(core, target, fp16, 256)
        # one image leaves nothing to share a bias with
        add([case for case in core if case.op == "window_attention"], target, bf16, 1)
    # layouts whose loads are not aligned, and the least sizes
    odd = ("ragged", "offset", "crop", "cut", "broadcast", "1x1", "D1", "prefix9", "bias-")
    add([case for case in every if not case.real and any(word in case.name for word in odd)], "sm_90", bf16, 2)
    for target in ("sm_86", "sm_89", "sm_100", "sm_120", "gfx942"):
        add(core, target, bf16, 256)
        add(core, target, fp32, 256)
        add([case for case in core if case.op == "linear"], target, fp16, 256)
    # registers are tightest in attention
    for target in ("sm_86", "sm_100", "sm_120"):
        add([case for case in (*ATTENTION_QKV, *RELATIVE_ATTENTION) if case.real], target, bf16, 256)
    for target in ("sm_86", "sm_89", "sm_100", "sm_120", "gfx942"):
        add([case for case in WINDOW_ATTENTION if case.real], target, bf16, 256)
    return [
        pytest.param(case, target, dtype, batch, id=f"{name}-{target}-{str(dtype)[6:]}-batch{batch}")
        for (name, target, dtype, batch), case in chosen.items()
    ]


def check_shared(kernel: Compiled, target: str) -> None:
    limit = TARGETS[target][1]
    assert kernel.shared <= limit, f"{kernel.name}: {kernel.shared} bytes of shared memory; {target} has {limit}"


def check_resources(kernel: Compiled, target: str) -> None:
    check_shared(kernel, target)
    assert kernel.spills <= SPILL_BUDGET, (
        f"{kernel.name}: {kernel.spills} bytes of stack a thread ({kernel.registers} registers); allowed {SPILL_BUDGET}"
    )


def check_wait(kernel: Compiled, target: str) -> None:
    """Where a kernel may be launched before the previous one has ended, it waits for that before it touches memory."""
    early = target in ("sm_90", "sm_100", "sm_120")
    assert kernel.arguments["EARLY"] == early, f"{kernel.name} on {target}"
    if early:
        touches = re.search(r"\b(ld|st|atom|red)\.[\w:.]*global|\bcp\.async\.(ca|cg|bulk)", kernel.assembly)
        waits = kernel.assembly.find("griddepcontrol.wait")
        assert touches is not None and 0 < waits < touches.start(), f"{kernel.name} on {target} does not wait"


def check_tensor_cores(kernel: Compiled, target: str, dtype: torch.dtype) -> None:
    """fp16 and bf16 dots run on the tensor cores, exact fp32 ones must not."""
    if dtype == torch.float32:
        found = re.search(ROUNDS_FP32, kernel.assembly)
        assert found is None, f"{kernel.name} on {target}: exact fp32 in {found and found[0]}"
        multiplies = re.search(r"fma\.rn(\.ftz)?\.f32|v_mfma_f32_\w+_f32", kernel.assembly)
        assert multiplies is not None, f"{kernel.name} on {target}: no fused multiply-add in fp32"
        return
    wanted = TENSOR_CORES[target]
    if target in ("sm_90", "sm_100") and kernel.arguments.get("BLOCK_M", 64) < 64:
        # 64 rows are the least that the asynchronous instructions take
        wanted = TENSOR_CORES["sm_80"]
    found = re.search(wanted, kernel.assembly)
    assert found is not None, f"{kernel.name} on {target}: no {wanted}"


@pytest.mark.parametrize(("case", "target", "dtype", "batch"), plan())
def test_compiles(case: Case, target: str, dtype: torch.dtype, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in launch(target, monkeypatch, case, dtype, batch):
        if target == "sm_90":
            check_uniform_registers(kernel)
        check_wait(kernel, target)
        if kernel.name in WITHOUT_DOT:
            check_resources(kernel, target)
            continue
        if case.dot:
            check_tensor_cores(kernel, target, dtype)
        if case.real:
            check_resources(kernel, target)
            wide = re.search(WIDE_LOADS, kernel.assembly)
            assert wide is not None, f"{kernel.name} on {target}: no 16-byte load"
        else:
            # one address for each element of an unaligned view may not fit the registers
            check_shared(kernel, target)


def case_named(op: str, name: str) -> Case:
    return next(case for case in CASES[op] if case.name == name)


@pytest.mark.parametrize("target", [name for name in TARGETS if name.startswith("sm_")])
def test_machine_code_multiplies_on_tensor_cores(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (kernel,) = launch(target, monkeypatch, case_named("linear", "ViT-B-fc1"), torch.bfloat16, 256)
    sass = disassemble(kernel.cubin)
    assert re.search(TENSOR_CORES_SASS[target], sass) is not None, f"{kernel.name}: no {TENSOR_CORES_SASS[target]}"
    # the copy engine where there is one, else 16 bytes a thread straight to shared memory
    loads = r"\bUTMALDG" if target in ("sm_90", "sm_100", "sm_120") else r"\bLDGSTS\.E\.BYPASS(\.LTC128B)?\.128"
    assert re.search(loads, sass) is not None, f"{kernel.name}: no {loads}"


@pytest.mark.parametrize(
    ("op", "name"), [("linear", "ViT-B-fc1"), ("attention_qkv", "ViT-B-384"), ("patch_embed", "ViT-B-16")]
)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_loads_run_ahead_of_the_dots(op: str, name: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (kernel,) = launch(target, monkeypatch, case_named(op, name), torch.bfloat16, 256)
    pipelined = re.search(PIPELINED_LOADS, kernel.assembly)
    assert pipelined is not None, f"{kernel.name} on {target}: no asynchronous load"


@pytest.mark.parametrize(
    ("target", "kernel_name"),
    [
        ("sm_80", "_linear_fwd_kernel"),
        ("sm_89", "_linear_fwd_kernel"),
        ("sm_90", "_linear_fwd_pingpong_kernel"),
        ("sm_100", "_linear_fwd_tma_kernel"),
        ("sm_120", "_linear_fwd_tma_kernel"),
        ("gfx942", "_linear_fwd_kernel"),
    ],
)
def test_descriptor_kernel_where_there_is_a_copy_engine(
    target: str, kernel_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (kernel,) = launch(target, monkeypatch, case_named("linear", "ViT-B-fc2"), torch.bfloat16, 256)
    assert kernel.name == kernel_name
    if kernel_name != "_linear_fwd_kernel":
        # persistent: a program for each multiprocessor, whatever the batch
        assert kernel.programs == kernel.arguments["n_programs"] < 200
    (kernel,) = launch(target, monkeypatch, case_named("linear", "head-1001"), torch.bfloat16, 256)
    assert kernel.name == "_linear_fwd_kernel", "a descriptor needs rows of a multiple of 16 bytes"


@pytest.mark.parametrize("how", ["argument", "torch's switch", "nothing"])
@pytest.mark.parametrize(
    ("op", "name"), [("linear", "ViT-B-fc1"), ("attention_qkv", "ViT-B"), ("patch_embed", "ViT-B-16")]
)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_tf32_only_where_it_is_allowed(
    op: str, name: str, target: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_named(op, name)
    arguments = case.arguments(torch.float32, "meta", 256)
    if how == "argument":
        arguments["tf32"] = True
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = how == "torch's switch"
    try:
        with compiling(target, monkeypatch, *FILES) as compiled:
            getattr(vitfast.kernels, op)(**arguments)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    (kernel,) = compiled
    check_resources(kernel, target)
    if how == "nothing":
        return check_tensor_cores(kernel, target, torch.float32)
    found = re.search(r"(mma\.sync|wgmma\.mma_async)\S*\.tf32", kernel.assembly)
    assert found is not None, f"{kernel.name} on {target}: no tf32"


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("op", ["linear", "patch_embed"])
def test_exact_fp32_adds_sums_instead_of_one_long_chain(op: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ((64, 3072), (768, 3072)) if op == "linear" else ((2, 3, 64, 64), (768, 3, 16, 16))
    x, weight = (meta(*size, dtype=torch.float32) for size in sizes)
    with compiling(target, monkeypatch, *FILES) as compiled:
        getattr(vitfast.kernels, op)(x, weight)
    (kernel,) = compiled
    products = len(re.findall(r"\bfma\.rn\.f32\b", kernel.assembly))
    sums = len(re.findall(r"\badd(\.rn)?\.f32\b", kernel.assembly))
    # a chain has no addition at all
    assert 0 < products <= 128 * sums, f"{products} products and {sums} sums"


# sizes past 2^31 elements


def _huge(op: str) -> dict[str, Any]:
    bf16 = torch.bfloat16
    if op in ("layer_norm", "add_layer_norm"):
        x = meta(3_000_000, 1024, dtype=bf16)
        arguments = {"x": x, "weight": meta(1024, dtype=bf16), "bias": meta(1024, dtype=bf16)}
        return arguments if op == "layer_norm" else {**arguments, "residual": x, "scale": meta(1024, dtype=bf16)}
    if op == "linear":
        x = meta(3_000_000, 1024, dtype=bf16)
        return {"x": x, "weight": meta(1024, 1024, dtype=bf16), "bias": meta(1024, dtype=bf16), "residual": x}
    if op in ("row_stats", "linear_stats", "norm_linear"):
        x, w, vector = meta(3_000_000, 1024, dtype=bf16), meta(1024, 1024, dtype=bf16), meta(1024, dtype=bf16)
        if op == "row_stats":
            return {"x": x}
        if op == "linear_stats":
            return {"x": x, "weight": w, "bias": vector, "residual": x}
        stats = meta(2, 3_000_000, 16, dtype=torch.float32)
        norm = {"norm_weight": vector, "norm_bias": vector, "eps": 1e-6}
        return {"x": x, "stats": stats, **norm, "weight": w, "bias": vector}
    if op in ("attention", "attention_lse"):
        q, k, v = (meta(4096, 1370, 16, 64, dtype=bf16).transpose(1, 2) for _ in range(3))
        return {"q": q, "k": k, "v": v, "bias": meta(4096, 16, 1370, 1370, dtype=bf16)}
    if op == "attention_qkv":
        return {"qkv": meta(4096, 1370, 3 * 16 * 72, dtype=bf16), "heads": 16}
    if op == "relative_attention":
        q, k, v = (meta(4096, 1025, 16, 64, dtype=bf16).transpose(1, 2) for _ in range(3))
        # a column of a table that all layers of many models share: its rows are far apart
        table = meta(63 * 63 + 3, 1 << 20, dtype=bf16)[:, :16]
        return {"q": q, "k": k, "v": v, "table": table, "grid": (32, 32)}
    if op == "window_attention":
        qkv = meta(8192, 64, 64, 3 * 4 * 32, dtype=bf16)
        table = meta(31 * 31, 1 << 22, dtype=bf16)[:, :4]
        return {"qkv": qkv, "heads": 4, "window": (16, 16), "shift": (8, 8), "table": table}
    assert op == "patch_embed", op
    return {
        "pixels": meta(16384, 3, 224, 224, dtype=bf16),
        "weight": meta(768, 3, 16, 16, dtype=bf16),
        "bias": meta(768, dtype=bf16),
        "prefix": meta(1, 768, dtype=bf16),
        "pos_embed": meta(197, 768, dtype=bf16),
    }


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("op", [op for op in OPS if op != "mlp"])
def test_offsets_past_32_bits(op: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = _huge(op)
    assert max(t.numel() for t in arguments.values() if isinstance(t, torch.Tensor)) > 2**31
    with compiling(target, monkeypatch, *FILES) as compiled:
        getattr(vitfast.kernels, op)(**arguments)
    assert compiled
    for kernel in compiled:
        assert overflows(kernel.ttir, kernel.arguments, kernel.programs) == []


# committed configs

# part of a device's name, and what to compile for
_DEVICES = {
    "A100": "sm_80",
    "A10": "sm_86",
    "RTX 30": "sm_86",
    "L40": "sm_89",
    "L4": "sm_89",
    "RTX 40": "sm_89",
    "H100": "sm_90",
    "H200": "sm_90",
    "B200": "sm_100",
    "RTX 50": "sm_120",
    "MI300": "gfx942",
}


def _committed() -> list[Any]:
    return [
        pytest.param(device, key, entry, id=f"{device}-{key}")
        for path in sorted(_config._FOLDER.glob("*/*.json"))
        for device in [json.loads(path.read_text())["device"]]
        for key, entry in _config.read(_config._FOLDER, path.parent.name, device).items()
    ]


def _call(key: Key) -> tuple[str, dict[str, Any]]:
    """A public function and arguments whose launch has this key."""
    op, dtype, flags = key.op, key.dtype, key.flags
    sizes = [size for _, size in key.sizes]
    if op in ("layer_norm", "add_layer_norm", "row_stats"):
        x, w = meta(*sizes, dtype=dtype), meta(sizes[1], dtype=dtype)
        more = {"layer_norm": {"weight": w, "bias": w}, "row_stats": {}}
        return op, {"x": x, **more.get(op, {"weight": w, "bias": w, "residual": x})}
    if op == "linear":
        m, n, k = sizes
        # rows one element longer have no descriptor
        x = meta(m, k + 1, dtype=dtype)[:, :k] if "pointers" in flags else meta(m, k, dtype=dtype)
        arguments = {"x": x, "weight": meta(n, k, dtype=dtype), "bias": meta(n, dtype=dtype)}
        if "norm" in flags:
            stats, w = meta(2, m, -(-k // 64), dtype=torch.float32), meta(k, dtype=dtype)
            return "norm_linear", {**arguments, "stats": stats, "norm_weight": w, "norm_bias": w, "eps": 1e-6}
        residual = meta(m, n, dtype=torch.float32 if "float32 out" in flags else dtype)
        arguments |= {"residual": residual, "scale": meta(n, dtype=dtype)}
        return ("linear_stats" if "stats" in flags else op), arguments
    if op == "attention":
        n, s, d = sizes
        q, k = (meta(2, rows, 4, d, dtype=dtype).transpose(1, 2) for rows in (n, s))
        if "table" in flags:
            # any grid of so many patches: the key does not tell them apart
            table = meta(2 * n - 1, 4, dtype=dtype)
            return "relative_attention", {"q": q, "k": k, "v": k, "table": table, "grid": (1, n)}
        return op, {"q": q, "k": k, "v": k, "bias": meta(n, s, dtype=dtype) if "bias" in flags else None}
    if op == "window_attention":
        windows, wh, ww, d = sizes
        scale = meta(1, dtype=torch.float32) if "cosine" in flags else None
        table = meta((2 * wh - 1) * (2 * ww - 1), 1, dtype=dtype)
        qkv = meta(windows, wh, ww, 3 * d, dtype=dtype)
        call = {"qkv": qkv, "heads": 1, "window": (wh, ww), "shift": (wh // 2, ww // 2), "table": table}
        return op, {**call, "scale": scale}
    assert op == "patch_embed", op
    patches, width, k = sizes
    side = round((k / 3) ** 0.5)
    weight = meta(width, 3, side, side, dtype=dtype)
    pixels = meta(1, 3, side, side * patches, dtype=dtype)
    return op, {"pixels": pixels, "weight": weight, "bias": meta(width, dtype=dtype)}


@pytest.mark.parametrize(("device", "key", "entry"), _committed())
def test_committed_config(device: str, key: Key, entry: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    target = next(target for part, target in _DEVICES.items() if part in device)
    if entry.get("library"):
        pytest.skip("torch's own GEMM: nothing of ours is compiled")
    function, arguments = _call(key)
    with _config.override(key, entry), compiling(target, monkeypatch, *FILES) as compiled, _config.listen() as heard:
        getattr(vitfast.kernels, function)(**arguments)
    assert list(heard) == [key]
    kernel, *_ = compiled
    check_resources(kernel, target)
    if key.op in ("linear", "attention", "window_attention", "patch_embed"):
        check_tensor_cores(kernel, target, key.dtype)


@pytest.mark.parametrize(
    ("op", "text"),
    [
        ("layer_norm", "rows=50432,width=768,bfloat16"),
        ("add_layer_norm", "rows=50432,width=768,bfloat16"),
        ("linear", "m=50432,n=768,k=3072,bfloat16"),
        ("linear", "m=50432,n=768,k=3072,bfloat16,float32 out,pointers"),
        ("linear", "m=50432,n=768,k=3072,bfloat16,stats"),
        ("linear", "m=50432,n=2304,k=768,bfloat16,norm"),
        ("row_stats", "rows=50432,width=768,bfloat16"),
        ("attention", "n=197,s=197,d=64,float16,bias"),
        ("attention", "n=197,s=197,d=64,bfloat16,bias,table"),
        ("window_attention", "windows=49152,height=7,width=7,d=32,bfloat16"),
        ("window_attention", "windows=16384,height=16,width=16,d=32,float16,cosine"),
        ("patch_embed", "patches=50176,width=768,k=768,bfloat16"),
    ],
)
def test_the_text_of_a_launch_s_key(op: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # what users' files and committed ones are written in
    function, arguments = _call(Key.parse(op, text))
    with compiling("sm_90", monkeypatch, *FILES), _config.listen() as heard, monkeypatch.context() as patch:
        patch.setattr(JITFunction, "__getitem__", lambda kernel, grid: lambda **arguments: None)
        getattr(vitfast.kernels, function)(**arguments)
    assert [(key.op, key.text) for key in heard] == [(op, text)]
