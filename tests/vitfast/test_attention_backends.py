"""`accelerate(attention=...)`: each backend gets what it expects, and refuses what it does not take."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import BeitConfig, BeitModel, SwinConfig, SwinModel

import vitfast
from tests._close import assert_close
from tests.vitfast._models import BUILDERS, assert_same, fused_names, images, randomise, reference
from vitfast import kernels
from vitfast.kernels import _config
from vitfast.kernels._config import Key
from vitfast.layers import FusedAttention
from vitfast.layers import backends as attention_backends
from vitfast.layers.backends import BACKENDS, attention, attention_qkv

X = (2, 3, 24, 32)
INSTALLABLE = ("flash_attn", "xformers")
V4 = transformers.__version__.startswith("4.")
EXTRAS = {"flash_attn": r"vitfast\[flash-attn\]", "xformers": r"vitfast\[xformers\]"}


def timm_beit() -> nn.Module:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 7}
    return randomise(timm.create_model("beit_base_patch16_224", **options)).eval()


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Of `[B, N, H, d]`, as both libraries have it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT * scale
    probabilities = (scores if bias is None else scores + bias).softmax(-1)
    return (probabilities @ v).transpose(1, 2).contiguous()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """flash_attn and xformers that compute with torch, on CPU, with the arguments of each call to them."""
    heard: list[dict[str, Any]] = []

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        heard.append({"q": q, "k": k, "v": v, "scale": softmax_scale})
        assert dropout_p == 0.0 and not causal
        return softmax_attention(q, k, v, None, softmax_scale)

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
        heard.append({"q": query, "k": key, "v": value, "scale": scale, "bias": attn_bias})
        assert p == 0.0
        return softmax_attention(query, key, value, attn_bias, scale)

    flash_attn, xformers, ops = ModuleType("flash_attn"), ModuleType("xformers"), ModuleType("xformers.ops")
    vars(flash_attn)["flash_attn_func"] = flash_attn_func
    vars(ops)["memory_efficient_attention"] = memory_efficient_attention
    vars(xformers)["ops"] = ops
    for module in (flash_attn, xformers, ops):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in INSTALLABLE:
        # the fakes need no GPU
        takes = replace(attention_backends._TAKES[name], devices=("cpu",))
        monkeypatch.setitem(attention_backends._TAKES, name, takes)
    return heard


def heads(s: int = 13, n: int = 13, d: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as a packed projection gives them: `[B, H, N, d]`, not contiguous."""
    q = images(2, n, 3, d, seed=1).to(dtype).transpose(1, 2)
    k, v = images(2, s, 2, 3, d, seed=2).to(dtype).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


@pytest.mark.parametrize("backend", ["auto", "sdpa", "flash_attn", "xformers"])
@pytest.mark.parametrize("n", [13, 1], ids=["self", "one query"])
def test_every_backend_computes_the_same(backend: str, n: int, calls) -> None:
    dtype = torch.bfloat16
    q, k, v = heads(n=n, dtype=dtype)
    out = attention(q, k, v, 0.3, backend=backend)
    assert out.shape == q.shape
    # merging the heads is a view
    merged = out.transpose(1, 2).flatten(2)
    assert merged.data_ptr() == out.data_ptr()
    truth = softmax_attention(*(x.double().transpose(1, 2) for x in (q, k, v)), None, 0.3).transpose(1, 2)
    baseline = F.scaled_dot_product_attention(q, k, v, scale=0.3)
    assert_close(out, truth, baseline)
    for call in calls:
        assert call["scale"] == 0.3
        assert [tuple(call[name].shape) for name in "qkv"] == [(2, n, 3, 16), (2, 13, 3, 16), (2, 13, 3, 16)]
        assert all(call[name].stride(-1) == 1 for name in "qkv")
    assert len(calls) == (backend in INSTALLABLE)


@pytest.mark.parametrize("backend", ["auto", "sdpa", "flash_attn", "xformers"])
def test_packed_projections(backend: str, calls) -> None:
    qkv = images(2, 13, 3 * 3 * 16).bfloat16()
    out = attention_qkv(qkv, 3, 0.3, backend=backend)
    q, k, v = qkv.double().view(2, 13, 3, 3, 16).unbind(2)
    truth = softmax_attention(q, k, v, None, 0.3).flatten(2)
    assert_close(out, truth, kernels.attention_qkv(qkv, 3, 0.3))
    assert out.is_contiguous()


@pytest.mark.parametrize(
    "shape", [(13, 11), (3, 13, 11), (2, 1, 13, 11), (1, 1, 1, 11), (2, 3, 13, 1)], ids=lambda shape: f"{list(shape)}"
)
@pytest.mark.parametrize("backend", ["auto", "sdpa", "xformers"])
def test_a_bias_is_broadcast_and_has_gradients(backend: str, shape: tuple[int, ...], calls) -> None:
    results = {}
    for name, dtype in ((backend, torch.float32), ("truth", torch.float64), ("sdpa", torch.float32)):
        q, k, v = heads(s=11, dtype=dtype)
        bias = images(*shape).to(dtype).requires_grad_()
        if name == "truth":
            out = softmax_attention(*(x.transpose(1, 2) for x in (q, k, v)), bias, 0.3).transpose(1, 2)
        else:
            out = attention(q, k, v, 0.3, bias, backend=name)
        out.square().sum().backward()
        results[name] = (out.detach(), bias.grad)
    for of_backend, truth, of_torch in zip(results[backend], results["truth"], results["sdpa"], strict=True):
        assert_close(of_backend, truth, of_torch)
    for call in calls:
        assert call["bias"].shape == (2, 3, 13, 11)
        # what xformers' CUTLASS kernel reads, or raises
        assert call["bias"].stride(-1) == 1
        assert all(stride % 8 == 0 for stride in call["bias"].stride()[:-1])


@pytest.mark.parametrize("backend", INSTALLABLE)
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_a_model_runs_on_a_library(backend: str, build, calls) -> None:
    # head dim 16, and relaxed to fp32 so that the gradients are compared too
    plain = build(embed_dim=64)
    takes = replace(attention_backends._TAKES[backend], dtypes=(torch.float32, torch.float64))
    attention_backends._TAKES[backend] = takes
    model = vitfast.accelerate(copy.deepcopy(plain), attention=backend)
    assert vitfast.report(model).attention == backend
    assert str(vitfast.report(model)).endswith(f"attention {backend}")
    assert_same(plain, model, images(*X), grad=False)
    assert len(calls) == 2
    with torch.inference_mode():
        model(images(*X))
    # the last block's one query too
    assert [tuple(call["q"].shape) for call in calls[2:]] == [(2, 13, 4, 16), (2, 1, 4, 16)]
    vitfast.restore(model)
    model(images(*X))
    assert len(calls) == 4
    assert not any("attention_backend" in vars(module) for module in model.modules())


def test_relative_logits_go_to_the_backend(calls) -> None:
    plain = reference(embed_dim=64, pos_embed="relative")
    model = vitfast.accelerate(copy.deepcopy(plain), attention="xformers")
    assert_close(model(images(*X)), copy.deepcopy(plain).double()(images(*X).double()), plain(images(*X)))
    assert [call["bias"].shape for call in calls] == [(2, 4, 13, 13)] * 2
    vitfast.accelerate(model, attention="flash_attn", precision="bf16")
    with pytest.raises(ValueError, match="'flash_attn' takes no bias"):
        model(images(*X).bfloat16())


def beit(implementation: str = "sdpa") -> nn.Module:
    config = BeitConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
        use_relative_position_bias=True,
    )
    config._attn_implementation = implementation
    return randomise(BeitModel(config)).eval()


@pytest.mark.parametrize("backend", ["sdpa", "xformers"])
@pytest.mark.parametrize("build", [beit, timm_beit], ids=["transformers", "timm"])
def test_tables_of_relative_positions_go_to_the_backend_as_a_bias(backend: str, build, calls, monkeypatch) -> None:
    if build is beit and V4:
        pytest.skip("version 4's BEiT has classes for attention of its own")
    plain = build()
    model = vitfast.accelerate(copy.deepcopy(plain), attention=backend)
    takes = replace(attention_backends._TAKES["xformers"], dtypes=(torch.float32, torch.float64))
    monkeypatch.setitem(attention_backends._TAKES, "xformers", takes)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("our kernel was launched")

    monkeypatch.setattr(kernels, "relative_attention", refuse)
    assert_same(plain, model, images(2, 3, 32, 32), grad=False)
    assert [call["bias"].shape for call in calls] == [(2, 4, 17, 17)] * (2 if backend == "xformers" else 0)
    vitfast.accelerate(model, attention="flash_attn", precision="bf16")
    with pytest.raises(ValueError, match="'flash_attn' takes no bias"):
        model(images(2, 3, 32, 32).bfloat16())


def swin() -> nn.Module:
    config = SwinConfig(embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4, image_size=32, patch_size=2)
    return randomise(SwinModel(config)).eval()


def timm_swin() -> nn.Module:
    options = {
        "embed_dim": 32,
        "depths": (2, 2),
        "num_heads": (2, 4),
        "window_size": 4,
        "img_size": 32,
        "patch_size": 2,
    }
    return randomise(timm.create_model("swin_tiny_patch4_window7_224", **options)).eval()


@pytest.mark.parametrize("build", [swin, timm_swin], ids=["transformers", "timm"])
def test_windows_are_the_originals_under_another_backend(build, monkeypatch: pytest.MonkeyPatch) -> None:
    if build is swin and V4:
        pytest.skip("version 4's Swin is left alone")
    plain = build()
    model = vitfast.accelerate(copy.deepcopy(plain), attention="sdpa")
    launches: list[int] = []
    original = kernels.window_attention
    monkeypatch.setattr(kernels, "window_attention", lambda *a, **k: launches.append(1) or original(*a, **k))
    assert_same(plain, model, images(2, 3, 32, 32), grad=False)
    assert launches == []
    assert "attention='sdpa' knows no windows: the original forward runs" in str(vitfast.report(model))
    vitfast.accelerate(model, attention="auto")
    model(images(2, 3, 32, 32))
    assert launches == [1] * 4
    assert "knows no windows" not in str(vitfast.report(model))


def test_autocast_casts_for_the_library(calls) -> None:
    model = vitfast.accelerate(reference(embed_dim=64), attention="flash_attn")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert model(images(*X)).isfinite().all()
    assert {call["q"].dtype for call in calls} == {torch.bfloat16}
    q, k, v = heads()
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q, k, v, 0.3, backend="flash_attn").dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["sdpa", *INSTALLABLE])
def test_a_further_call_keeps_the_backend_or_changes_it(backend: str, calls) -> None:
    model = reference(embed_dim=64)
    vitfast.accelerate(model, attention=backend, only=())
    vitfast.accelerate(model, only={"attention"})
    chosen = [m.attention_backend for m in model.modules() if isinstance(m, FusedAttention)]
    assert chosen == [backend, backend]
    copied = copy.deepcopy(model)
    vitfast.accelerate(model, attention="auto")
    assert vitfast.report(model).attention == "auto"
    assert {m.attention_backend for m in model.modules() if isinstance(m, FusedAttention)} == {"auto"}
    assert vitfast.report(copied).attention == backend


def test_sdpa_is_compiled_whole() -> None:
    model = vitfast.accelerate(reference(), attention="sdpa")
    with torch.no_grad():
        expected = model(images(*X))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images(*X))
    torch.testing.assert_close(compiled, expected)


def test_a_missing_library_is_said_before_anything_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in INSTALLABLE:
        monkeypatch.setitem(sys.modules, backend, None)
        model = reference()
        with pytest.raises(ImportError, match=EXTRAS[backend]):
            vitfast.accelerate(model, attention=backend)
        assert fused_names(model) == {}


def test_a_library_that_is_gone_when_the_model_runs(calls, monkeypatch: pytest.MonkeyPatch) -> None:
    model = vitfast.accelerate(reference(embed_dim=64), attention="flash_attn", precision="bf16")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ImportError, match=EXTRAS["flash_attn"]):
        model(images(*X).bfloat16())


@pytest.mark.parametrize(
    ("backend", "dtype", "d", "said"),
    [
        ("flash_attn", torch.float32, 16, "takes float16, bfloat16; q has float32"),
        ("flash_attn", torch.bfloat16, 12, "multiples of 8, up to 256; this one is 12"),
        ("flash_attn", torch.bfloat16, 264, "up to 256; this one is 264"),
        ("xformers", torch.float64, 16, "q has float64"),
    ],
    ids=["dtype", "head dim", "large head dim", "double"],
)
def test_what_a_library_does_not_take(backend: str, dtype: torch.dtype, d: int, said: str, calls) -> None:
    with pytest.raises(ValueError, match=said):
        attention(*heads(d=d, dtype=dtype), 0.3, backend=backend)
    assert calls == []


@pytest.mark.skipif(kernels.INTERPRET, reason="the interpreter runs the kernel on CPU")
@pytest.mark.parametrize("backend", ["triton", "flash_attn", "xformers"])
def test_the_cpu_is_refused(backend: str) -> None:
    with pytest.raises(ValueError, match=f"{backend!r} takes tensors on cuda; q is on cpu"):
        attention(*heads(dtype=torch.bfloat16), 0.3, backend=backend)


def test_unknown_backends() -> None:
    with pytest.raises(ValueError, match=f"expected one of {', '.join(BACKENDS)}"):
        attention(*heads(), 0.3, backend="cudnn")
    model = reference()
    with pytest.raises(ValueError, match="attention='cudnn'; expected one of auto, triton"):
        vitfast.accelerate(model, attention="cudnn")
    assert fused_names(model) == {}


def test_measuring_leaves_a_chosen_backend_alone(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("VITFAST_CONFIG_DIR", str(tmp_path))
    from vitfast.swap import choose as selection

    built: list[nn.Module] = []
    # as on a GPU: launches are heard, and each has a route to choose
    monkeypatch.setattr(selection, "INTERPRET", True)
    launches = {
        Key.parse("attention", "n=13,s=13,d=8,float32"): kernels.attention,
        Key.parse("linear", "m=1,n=8,k=8,float32"): kernels.linear,
    }
    monkeypatch.setattr(selection, "_heard", lambda run: built.append(run) or launches)
    model = vitfast.accelerate(reference(), attention="sdpa", example=images(*X))
    assert built
    assert not any(figure.what.startswith("attention n=") for figure in vitfast.report(model).measured)
    count = len(built)
    vitfast.accelerate(reference(), attention="sdpa", example=images(*X))
    assert len(built) == count
    with pytest.raises(TypeError):
        # "auto" has the route measured, with a config, which these launches have not
        vitfast.accelerate(reference(), example=images(*X))


@pytest.mark.interpret
@pytest.mark.parametrize("bias", [None, (1, 3, 13, 11)], ids=["plain", "bias"])
def test_triton_runs_the_kernel_whatever_the_table_says(bias: tuple[int, ...] | None) -> None:
    q, k, v = heads(s=11)
    added = None if bias is None else images(*bias)
    key = Key.parse("attention", "n=13,s=11,d=16,float32" + ("" if bias is None else ",bias"))
    entry = {"block_m": 16, "block_s": 16, "num_warps": 4, "num_stages": 1, "library": True}
    with _config.override(key, entry), _config.listen() as heard:
        auto = attention(q, k, v, 0.3, added)
        triton = attention(q, k, v, 0.3, added, backend="triton")
    assert list(heard) == [key]
    wide = [None if x is None else x.double() for x in (q, k, v, added)]
    truth = kernels.attention_ref(*wide, 0.3, False).transpose(1, 2)
    torch_own = kernels.attention_ref(q, k, v, added, 0.3, False).transpose(1, 2)
    assert_close(triton, truth, torch_own)
    assert torch.equal(auto, torch_own)
    # another order of the same sums: the two did not take one way
    assert not torch.equal(triton, torch_own)


@pytest.mark.interpret
def test_a_model_runs_on_triton() -> None:
    plain = reference()
    model = vitfast.accelerate(copy.deepcopy(plain), attention="triton")
    assert_same(plain, model, images(*X), grad=False)
