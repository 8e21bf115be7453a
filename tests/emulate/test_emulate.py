"""Compiled kernels on an emulated GPU: their numbers under adversarial timing, and what orders their accesses."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import vitfast
import vitfast.kernels as kernels
from tests._close import assert_close
from tests.emulate._device import Device, EmulationError, emulated
from tests.kernels._cases import CASES, reference
from tests.kernels._data import Case, Data
from vitfast.layers import backends

pytestmark = pytest.mark.compile_only

GEMM: Any = sys.modules["vitfast.kernels.gemm"]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SEEDS = range(3)


def outputs(function: Callable[..., Any], arguments: dict[str, Any], dtype: torch.dtype | None = None) -> list[Any]:
    """Of a call, with what is floating point cast to a dtype."""
    cast = {
        name: value.to(dtype) if dtype and isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    with torch.no_grad():
        found = function(**cast)
    return list(found) if isinstance(found, tuple) else [found]


def check(op: str, arguments: dict[str, Any], target: str = "sm_90", multiprocessors: int = 3) -> list[str]:
    """Hold an op's compiled kernels to the tolerance rule under each seed, without a report; the kernels' names."""

    def by_reference(**given: Any) -> Any:
        return reference(op, **{name: value for name, value in given.items() if name != "folded"})

    truth, baseline = outputs(by_reference, arguments, torch.float64), outputs(by_reference, arguments)
    with emulated(target, multiprocessors) as device:
        for device.seed in SEEDS:
            actual = outputs(getattr(kernels, op), arguments)
            for i, (value, exact, plain) in enumerate(zip(actual, truth, baseline, strict=True)):
                assert_close(value, exact, plain, name=f"output {i}, seed {device.seed}")
        assert not device.reports, "\n".join(device.reports[:5])
        assert device.ran
        return device.ran


def small(cases: list[Case]) -> list[Case]:
    return [case for case in cases if case.interpret and not case.real]


@pytest.mark.parametrize(
    ("case", "dtype", "target"),
    [
        pytest.param(case, dtype, target, id=f"{case}-{str(dtype)[6:]}-{target}")
        for cases in CASES.values()
        for i, case in enumerate(small(cases))
        for dtype, target in ((BF16, "sm_90"), (FP16, "sm_90"), (FP32, "sm_90"), (BF16, "sm_80"))
        if i == 0 or (dtype, target) == (BF16, "sm_90")
    ],
)
def test_numbers(case: Case, dtype: torch.dtype, target: str, poisoned: None) -> None:
    check(case.op, case.arguments(dtype, "cpu"), target)


# every form of the GEMM, at sizes that leave ragged tiles and make programs walk over several
FORMS = {
    "large": GEMM.Config(128, 128, 64, 8, num_warps=8, num_stages=4, tma=True),
    "halves": GEMM.Config(128, 128, 64, 8, num_warps=8, num_stages=4, tma=True, subtile=True),
    "wide": GEMM.Config(64, 128, 128, 8, num_warps=4, num_stages=4, tma=True),
    "small": GEMM.Config(64, 64, 128, 8, num_warps=4, num_stages=4, tma=True),
    "pingpong": GEMM.Config(128, 128, 64, 16, num_warps=4, num_stages=5, tma=True, pingpong=True),
    "pointers": GEMM.Config(128, 128, 32, 8, num_warps=8, num_stages=4),
    "split": GEMM.Config(64, 64, 64, 8, num_warps=4, num_stages=3, split_k=3),
}


def gemm(op: str, dtype: torch.dtype, m: int = 300, n: int = 384, k: int = 328) -> dict[str, Any]:
    data = Data(dtype, "cpu")
    common = {"x": data(m, k), "weight": data(n, k, scale=k**-0.5), "bias": data(n)}
    if op == "norm_linear":
        norm, shift = data(k), data(k)
        folded = kernels.fold(common["weight"], common["bias"], norm, shift)
        more = {"stats": kernels.row_stats_ref(common["x"]), "norm_weight": norm, "norm_bias": shift, "eps": 1e-6}
        return {**common, **more, "activation": "gelu", "folded": folded}
    return {**common, "residual": data(m, n), "scale": data(n)}


@pytest.mark.parametrize("op", ["norm_linear", "linear_stats"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_gemm(form: str, op: str, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GEMM, "heuristic", lambda *args: FORMS[form])
    (ran,) = {name for name in check(op, gemm(op, BF16), multiprocessors=4) if name.startswith("_linear_fwd")}
    assert ("pingpong" in ran, "tma" in ran) == (FORMS[form].pingpong, FORMS[form].tma and not FORMS[form].pingpong)


@pytest.mark.parametrize("shape", [(1, 2, 197, 64), (1, 1, 257, 80), (1, 1, 300, 64)], ids=str)
def test_attention_at_vits_lengths(shape: tuple[int, ...], poisoned: None) -> None:
    data = Data(BF16, "cpu")
    check("attention", {name: data(*shape) for name in "qkv"})


def test_a_folded_model(monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    net = vitfast.create_model("vit_tiny_patch16_224", depth=2, num_classes=5).eval().bfloat16()
    pixels = torch.randn(1, 3, 224, 224).bfloat16()
    with torch.no_grad():
        truth, baseline = copy.deepcopy(net).double()(pixels.double()), net(pixels)
    vitfast.accelerate(net, frozen=True)
    takes = backends._TAKES["triton"]
    monkeypatch.setitem(backends._TAKES, "triton", type(takes)(("cuda", "cpu"), takes.dtypes, 256))
    with emulated() as device:
        for device.seed in SEEDS:
            with torch.inference_mode():
                assert_close(net(pixels), truth, baseline, name=f"logits, seed {device.seed}")
        assert not device.reports, "\n".join(device.reports[:5])
        assert {"_patch_embed_fwd_kernel", "_attention_resident_kernel", "_layer_norm_fwd_kernel"} <= set(device.ran)


# faults, each a change of one line of PTX: what it changes, to what, and whether every such change does harm
FAULTS: dict[str, tuple[str, Callable[[re.Match[str]], str], bool]] = {
    "a product is awaited one group too late": (
        r"(wgmma\.wait_group\S*\s+)(\d+);",
        lambda m: f"{m[1]}{int(m[2]) + 1};",
        False,
    ),
    "no fence before a product": (r"wgmma\.fence\S*;", lambda m: "", False),
    "a copy is awaited one group too late": (
        r"(cp\.async\.wait_group\s+)(\d+);",
        lambda m: f"{m[1]}{int(m[2]) + 1};",
        False,
    ),
    "a barrier is missing": (r"(bar|barrier)\.(cta\.)?sync\S*\s[^;]*;", lambda m: "", False),
    "the proxy is not fenced": (r"fence\.proxy\.async[^;]*;", lambda m: "", False),
    "half of the bytes are expected": (
        r"(mbarrier\.arrive\.expect_tx[^;]*, )(\d+);",
        lambda m: f"{m[1]}{int(m[2]) // 2};",
        True,
    ),
    "an arrival is missing": (r"(@%p\d+ )?mbarrier\.arrive\.shared[^;]*;", lambda m: "", True),
    "a wrong swizzle": (
        r"(xor\.b32\s+%r\d+, %r\d+, )(16|32|48|64|80|96|112);",
        lambda m: f"{m[1]}{int(m[2]) ^ 16};",
        True,
    ),
    "the other parity": (
        r"(mbarrier\.try_wait\S*\s+complete, \[%r\d+\], )(%r\d+);",
        lambda m: f"xor.b32 %r77777, {m[2]}, 1; {m[1]}%r77777;",
        True,
    ),
    "a store that nothing guards": (r"@%p\d+ (st\.global)", lambda m: m[1], False),
    "the previous kernel is not awaited": (r"griddepcontrol\.wait;", lambda m: "", True),
}
# of each program so many places of a fault
PLACES = 5


def found(device: Device, call: Callable[[], list[torch.Tensor]], good: list[torch.Tensor]) -> bool:
    """Whether a seed shows that something is wrong."""
    for device.seed in SEEDS:
        device.reports.clear()
        try:
            same = all(torch.equal(a.nan_to_num(9e9), b.nan_to_num(9e9)) for a, b in zip(call(), good, strict=True))
        except EmulationError:
            return True
        if device.reports or not same:
            return True
    return False


@pytest.mark.parametrize("program", ["small", "pingpong", "pointers", "attention"])
def test_planted_faults_are_found(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, arguments = "attention", {name: Data(BF16, "cpu")(1, 1, 100, 64) for name in "qkv"}
    if program != "attention":
        op = "linear_stats" if program == "pingpong" else "norm_linear"
        arguments = gemm(op, BF16, 200, 256, 200)
        monkeypatch.setattr(GEMM, "heuristic", lambda *args: FORMS[program])

    def call() -> list[torch.Tensor]:
        return outputs(getattr(kernels, op), arguments)

    with emulated(multiprocessors=1) as device:
        texts: dict[str, str] = {}
        device.change = lambda name, text: texts.setdefault(name, text)
        good = call()
        assert not found(device, call, good), device.reports
        (changed, text) = list(texts.items())[-1]
        kernel, lines = device.programs[text], text.split("\n")
        ran = {kernel.lines[at] - 1 for at, count in enumerate(kernel.hits()) if count}
        device.steps = 2_000_000
        tried = set()
        for fault, (pattern, to, always) in FAULTS.items():
            bare = {at: re.sub(r"//.*", "", lines[at]) for at in sorted(ran)}
            places = [at for at, line in bare.items() if re.search(pattern, line)][:PLACES]
            harmful = 0
            for at in places:
                planted = "\n".join([*lines[:at], re.sub(pattern, to, bare[at]), *lines[at + 1 :]])
                device.change = lambda name, text, planted=planted: planted if name == changed else text
                harmful += found(device, call, good)
            assert harmful == len(places) if always else harmful or not places, f"{fault}: {harmful} of {len(places)}"
            tried |= {fault} if places else set()
    assert len(tried) >= 7, tried
