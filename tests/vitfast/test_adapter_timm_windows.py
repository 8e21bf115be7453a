"""timm's Swin and Swin-V2, plain and accelerated: windows of every shape, outputs and gradients."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitfast
from tests.vitfast._models import assert_equal, fused_names, hook_all, images, kept_reasons, timm_swin
from vitfast import kernels


@pytest.fixture
def calls(monkeypatch) -> list[tuple[Any, ...]]:
    """(map's sides, window, shift) of each call of the kernel."""
    found: list[tuple[Any, ...]] = []
    original = kernels.window_attention

    def counted(qkv: Tensor, heads: int, window: Any, shift: Any, *args: Any, **kwargs: Any) -> Tensor:
        found.append((tuple(qkv.shape[1:3]), window, shift))
        return original(qkv, heads, window, shift, *args, **kwargs)

    monkeypatch.setattr(kernels, "window_attention", counted)
    return found


@pytest.fixture(params=[1, 2], ids=["v1", "v2"])
def version(request) -> int:
    return request.param


def pair(**changes: Any) -> tuple[nn.Module, nn.Module]:
    plain = timm_swin(**changes)
    return plain, vitfast.accelerate(copy.deepcopy(plain))


def check(x: Tensor, *, train: bool = False, **changes: Any) -> nn.Module:
    """Compare a model and its accelerated copy; this is what comes back."""
    plain, fused = pair(**changes)
    assert_equal(plain, fused, x, train=train)
    again = vitfast.restore(copy.deepcopy(fused))
    assert [type(m) for m in again.modules()] == [type(m) for m in plain.modules()]
    return fused


# options, and how many of the four blocks' attention the kernel computes: windows of a map that is padded are timm's,
# and each is a map to the kernel if nothing is masked
OPTIONS: dict[str, tuple[dict[str, Any], int]] = {
    "shifted": ({}, 4),
    "one window high": ({"window_size": (6, 4)}, 4),
    "whole map": ({"window_size": (6, 8)}, 4),
    "larger than the map": ({"window_size": 16}, 4),
    "a window per stage": ({"window_size": ((2, 4), (3, 1))}, 4),
    "padded": ({"window_size": (4, 4)}, 3),
    "padded at last": ({"window_size": (2, 4)}, 3),
    "always partitioned": ({"always_partition": True}, 4),
    "always partitioned, padded": ({"always_partition": True, "window_size": (6, 4)}, 3),
    "any image size": ({"strict_img_size": False}, 4),
    "no biases": ({"qkv_bias": False}, 4),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_outputs_and_gradients(option, version, calls):
    changes, taken = OPTIONS[option]
    fused = check(images(2, 3, 24, 32), version=version, **changes)
    calls.clear()
    fused(images(1, 3, 24, 32))
    assert len(calls) == taken
    for sides, window, shift in calls:
        assert all(0 <= s < w <= side for s, w, side in zip(shift, window, sides, strict=True))
    suffix = "V2" if version == 2 else ""
    names = fused_names(fused)
    assert names["layers.1.blocks.1"] == f"FusedTimmSwin{suffix}Block"
    assert names["layers.1.blocks.1.attn"] == f"FusedTimmWindowAttention{suffix}"
    assert names["patch_embed"] == "FusedTimmPatchEmbed"


def test_wider_heads(calls):
    check(images(2, 3, 24, 32), head_dim=20)
    assert calls


def test_windows_of_another_size_in_pretraining():
    check(images(2, 3, 24, 32), version=2, pretrained_window_sizes=(4, 3))


def test_biases_of_the_second_version_added_apart():
    plain = timm_swin(version=2)
    for module in plain.modules():
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True
    assert_equal(plain, vitfast.accelerate(copy.deepcopy(plain)), images(2, 3, 24, 32))


DROPOUTS = {
    "drop_path": {"drop_path_rate": 0.5},
    "proj_drop": {"proj_drop_rate": 0.3},
    "attn_drop": {"attn_drop_rate": 0.3},
    "drop": {"drop_rate": 0.3},
    "all": {"drop_path_rate": 0.3, "proj_drop_rate": 0.2, "attn_drop_rate": 0.2},
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("option", DROPOUTS)
def test_dropout(option, version, train, calls):
    x = images(4, 3, 24, 32)
    fused = check(x, train=train, version=version, **DROPOUTS[option])
    calls.clear()
    fused.train(train)(x)
    # dropped branches are the kernel's too
    assert len(calls) == (4 if not train or option in ("drop_path", "drop") else 0)


@pytest.mark.parametrize("size", [(24, 32), (48, 24), (12, 40), (20, 28)], ids=str)
def test_any_image_size(version, size):
    check(images(2, 3, *size), version=version, strict_img_size=False)


def test_set_input_size(version, calls):
    plain, fused = pair(version=version)
    for size, window in (((48, 32), (3, 4)), ((24, 24), (2, 3)), ((24, 24), None), ((24, 40), (5, 5))):
        for model in (plain, fused):
            model.set_input_size(img_size=size, window_size=window)
        calls.clear()
        assert_equal(plain, fused, images(2, 3, *size))
        assert {window for _, window, _ in calls} <= {block.window_size for block in _blocks(fused)}
        assert len(calls) >= 3
    for model in (plain, fused):
        model.set_input_size(img_size=(24, 32), window_size=(3, 2), always_partition=True)
    assert_equal(plain, fused, images(2, 3, 24, 32))


def _blocks(model: Any) -> list[Any]:
    return [block for stage in model.layers for block in stage.blocks]


def test_a_map_that_timms_mask_does_not_fit(version, calls):
    plain, fused = (model.layers[0].blocks for model in pair(version=version))
    x = images(2, 6, 16, 24)
    torch.testing.assert_close(fused[0](x), plain[0](x), rtol=1e-4, atol=1e-4)
    assert len(calls) == 1
    # timm's mask of a map half as wide is taken in turns
    torch.testing.assert_close(fused[1](x), plain[1](x), rtol=1e-4, atol=1e-4)
    for block in (plain[1], fused[1]):
        with pytest.raises(RuntimeError, match="invalid for input of size"):
            block(x[:1, :, :4])
    assert len(calls) == 1


@pytest.mark.parametrize("kinds", [("attention",), ("block",), ("attention", "block")], ids=str)
def test_single_kinds(version, kinds, calls):
    plain = timm_swin(version=version)
    fused = vitfast.accelerate(copy.deepcopy(plain), only=kinds)
    assert_equal(plain, fused, images(2, 3, 24, 32))
    calls.clear()
    fused(images(1, 3, 24, 32))
    # windows that timm has cut are maps of one window; those that it shifts have a mask
    assert len(calls) == {1: 2 if kinds == ("attention",) else 0, 2: 4}[len(kinds)]


@pytest.mark.parametrize("where", ["attn", "softmax", "attn_drop", "qkv", "proj", "proj_drop"])
def test_a_hook_inside_takes_effect(version, where, calls):
    plain, fused = pair(version=version)
    for model in (plain, fused):
        for name, module in model.named_modules():
            if name.rpartition(".")[2] == where:
                module.register_forward_hook(lambda m, args, out: 1.5 * out)
    assert_equal(plain, fused, images(2, 3, 24, 32))
    calls.clear()
    fused(images(1, 3, 24, 32))
    # unshifted windows that are called as a module are the kernel's again
    assert len(calls) == (2 if where == "attn" else 0)
    assert f"{where} has hooks" in str(vitfast.report(fused))


def test_in_inference_on_a_cpu_timm_cuts_the_windows(calls):
    plain, fused = pair()
    x = images(1, 3, 24, 32)
    # the proof's
    calls.clear()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)
    assert not calls
    fused(x)
    assert len(calls) == 4


def test_a_hook_on_the_table_takes_effect():
    plain, fused = pair(version=2)
    for model in (plain, fused):
        model.layers[0].blocks[1].attn.cpb_mlp.register_forward_hook(lambda m, args, out: 1.5 * out)
    assert_equal(plain, fused, images(2, 3, 24, 32))


def test_a_method_replaced_on_a_block_takes_effect(version):
    plain, fused = pair(version=version)
    for model in (plain, fused):
        block = model.layers[0].blocks[1]
        block._attn = MethodType(lambda block, x: 2.0 * type(block)._attn(block, x), block)
    assert_equal(plain, fused, images(2, 3, 24, 32))
    assert "_attn is replaced on this object" in str(vitfast.report(fused))


def test_what_is_left_alone_is_reported(version):
    fused = vitfast.accelerate(timm_swin(version=version, window_size=(2, 4)))
    notes = {row.module: row.note for row in vitfast.report(fused).replaced}
    assert notes["layers.0.blocks.1"] == ""
    assert notes["layers.1.blocks.0"] == "maps of 3x4 are padded to windows of 2x4: timm's own windows"
    assert not kept_reasons(fused)
    dropping = vitfast.accelerate(timm_swin(version=version, attn_drop_rate=0.2, proj_drop_rate=0.1))
    notes = {row.module: row.note for row in vitfast.report(dropping).replaced}
    assert "attention dropout 0.2: the original forward runs in training" in notes["layers.0.blocks.1.attn"]
    assert "dropout of windows 0.1: the original forward runs in training" in notes["layers.0.blocks.1.attn"]


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_another_attention_runs_timms_own(version, backend, calls):
    plain = timm_swin(version=version)
    fused = vitfast.accelerate(copy.deepcopy(plain), attention=backend)
    x = images(2, 3, 24, 32)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)
    assert len(calls) == (4 if backend == "auto" else 0)
    assert ("attention='sdpa' knows no windows" in str(vitfast.report(fused))) == (backend == "sdpa")


def test_there_are_no_attention_maps(version):
    for model in pair(version=version):
        with pytest.raises(ValueError, match=r"within windows|with a mask"):
            vitfast.attention_maps(model, images(1, 3, 24, 32))
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_wrong_shapes_get_timms_own_error(version):
    plain, fused = pair(version=version)
    for shape in ((2, 3, 24, 40), (2, 4, 24, 32)):
        with pytest.raises(Exception) as expected:
            plain(images(*shape))
        with pytest.raises(type(expected.value)) as got:
            fused(images(*shape))
        assert str(got.value) == str(expected.value)


@pytest.mark.parametrize("where", ["mlp", "fc1", "norm1", "norm2", "drop_path1", "cpb_mlp"])
def test_hooks_outside_the_attention_see_what_timm_shows_them(version, where, calls):
    # the MLP sees tokens, the attention maps
    seen = []
    for model in pair(version=version):
        every = hook_all(model)
        for name, module in model.named_modules():
            if name.rpartition(".")[2] != where:
                module._forward_hooks.clear()
                module._forward_hooks_with_kwargs.clear()
        # without gradients timm cuts the windows itself on a CPU
        model(images(2, 3, 24, 32))
        seen.append([(name, args, out) for name, args, _, out in every])
    assert len(calls) == 4, "such hooks leave the kernel where it is"
    assert [name for name, *_ in seen[1]] == [name for name, *_ in seen[0]]
    assert len(seen[0]) == (0 if where == "cpb_mlp" and version == 1 else 4)
    for (_, *actual), (_, *expected) in zip(seen[1], seen[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
