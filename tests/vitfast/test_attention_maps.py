"""Attention maps against a formula of their own, on plain and accelerated models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import vitfast
from vitfast import kernels
from vitfast.attention_maps import AttentionMaps, attention_maps, overlay, rollout
from vitfast.parity import seed_weights

TINY = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
VARIANTS = {
    "class token": {},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "registers, qk norm": {"reg_tokens": 4, "qk_norm": True, "no_embed_class": True},
    "distilled, LayerScale": {"distilled": True, "init_values": 0.1},
    "relative positions": {"pos_embed": "relative"},
}


def reference(**overrides) -> vitfast.VisionTransformer:
    options = {**TINY, **overrides}
    return seed_weights(vitfast.create_model("vit_tiny_patch16_224", **options), seed=1).eval()


class _Softmax:
    """Records what softmax returns while a model runs with attention written out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[torch.Tensor] = []

        def written_out(q, k, v, attn_mask=None, dropout_p=0.0, scale=None):
            logits = torch.einsum("bhnd,bhmd->bhnm", q, k) * scale
            logits = logits if attn_mask is None else logits + attn_mask
            self.seen.append(torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True))
            return self.seen[-1] @ v

        monkeypatch.setattr(F, "scaled_dot_product_attention", written_out)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "accelerated"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_maps_are_what_attention_used(variant: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = reference(**VARIANTS[variant])
    pixels = torch.randn(2, 3, 32, 48)
    with monkeypatch.context() as patch, torch.inference_mode():
        recorded = _Softmax(patch)
        model(pixels)
    maps = attention_maps(vitfast.accelerate(model) if fused else model, pixels, heads=None)
    assert len(maps) == len(recorded.seen) == 3
    for ours, theirs in zip(maps, recorded.seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert maps.grid == (4, 6)
    assert maps.num_prefix_tokens == model.num_prefix_tokens
    assert maps.has_class_token == model.has_class_token


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "accelerated"])
def test_maps_of_timm_are_what_its_own_softmax_gave(fused: bool) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=(32, 48), patch_size=8, depth=2, qk_norm=True, reg_tokens=2, num_classes=5
    )
    seed_weights(model, seed=2).eval()
    pixels = torch.randn(2, 3, 32, 48)
    seen = []
    handles = []
    for block in model.blocks:
        block.attn.fused_attn = False
        # timm's unfused path hands its probabilities to this dropout
        handles.append(block.attn.attn_drop.register_forward_pre_hook(lambda _, args: seen.append(args[0])))
    with torch.inference_mode():
        model(pixels)
    for handle in handles:
        handle.remove()
    for block in model.blocks:
        block.attn.fused_attn = True
    maps = attention_maps(vitfast.accelerate(model) if fused else model, pixels, heads=None)
    for ours, theirs in zip(maps, seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert (maps.grid, maps.num_prefix_tokens, maps.has_class_token) == ((4, 6), 3, True)


def test_the_fused_path_stays_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vitfast.accelerate(reference())
    calls: list[bool] = []
    linear = kernels.linear

    def counting(x, weight, bias=None, activation="none", residual=None, scale=None, tf32=False):
        calls.append(residual is not None)
        return linear(x, weight, bias, activation, residual, scale, tf32)

    monkeypatch.setattr(kernels, "linear", counting)
    attention_maps(model, torch.randn(1, 3, 32, 32))
    # attention's projection and the MLP's second layer of every block keep the residual in their epilogue
    assert sum(calls) == 2 * TINY["depth"]


def test_heads_and_layers_choose() -> None:
    model, pixels = reference(), torch.randn(1, 3, 32, 32)
    every = attention_maps(model, pixels, heads=None)
    assert every.layers == (0, 1, 2)
    last = attention_maps(model, pixels, layers=[-1, 0], heads="max")
    assert last.layers == (2, 0)
    torch.testing.assert_close(last[0], every[2].amax(1))
    torch.testing.assert_close(last[1], every[0].amax(1))
    torch.testing.assert_close(attention_maps(model, pixels, heads="mean")[1], every[1].mean(1))
    torch.testing.assert_close(attention_maps(model, pixels, heads="min")[1], every[1].amin(1))
    torch.testing.assert_close(every[0].sum(-1), torch.ones(1, 3, 17))


def test_hooks_are_gone_even_when_the_model_raises() -> None:
    model = vitfast.accelerate(reference())
    with pytest.raises(ValueError, match="height"):
        attention_maps(model, torch.randn(1, 3, 33, 32))
    attention_maps(model, torch.randn(1, 3, 32, 32))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"heads": "median"}, "heads='median'"), ({"layers": [3]}, "from -3 to 2")],
    ids=["heads", "layers"],
)
def test_wrong_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_maps(reference(), torch.randn(1, 3, 32, 32), **options)


def test_a_model_without_known_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="Sequential has no attention"):
        attention_maps(nn.Sequential(nn.Linear(3, 3)), torch.randn(1, 3, 8, 8))


def _rollout_by_hand(maps: list[np.ndarray]) -> np.ndarray:
    result = np.eye(maps[0].shape[-1])
    for layer in maps:
        with_residual = 0.5 * layer + 0.5 * np.eye(layer.shape[-1])
        result = (with_residual / with_residual.sum(-1, keepdims=True)) @ result
    return result


@pytest.mark.parametrize("heads", ["mean", None])
def test_rollout_is_the_product_of_the_layers(heads: str | None) -> None:
    model, pixels = reference(reg_tokens=2), torch.randn(2, 3, 32, 16)
    maps = attention_maps(model, pixels, heads=heads)
    flow = rollout(maps)
    assert flow.dtype == torch.float64
    for image in range(2):
        means = [m[image].double().numpy() for m in maps]
        means = means if heads else [m.mean(0) for m in means]
        expected = _rollout_by_hand(means)[0, 3:].reshape(4, 2)
        np.testing.assert_allclose(flow[image].numpy(), expected, rtol=1e-10)


def test_rollout_without_class_token_averages_the_patches() -> None:
    maps = attention_maps(reference(class_token=False, global_pool="avg"), torch.randn(1, 3, 32, 32))
    expected = _rollout_by_hand([m[0].double().numpy() for m in maps]).mean(0).reshape(4, 4)
    np.testing.assert_allclose(rollout(maps)[0].numpy(), expected, rtol=1e-10)


def test_discard_ratio_drops_the_smallest_weights_of_a_row() -> None:
    row = torch.tensor([0.1, 0.5, 0.15, 0.25])
    maps = AttentionMaps((row.repeat(4, 1)[None],), (0,), (1, 3), 1, True)
    # two of four go: 0.5 and 0.25 stay, and with the identity the row sums to 1.75
    expected = torch.tensor([[[0.5, 0.0, 0.25]]], dtype=torch.float64) / 1.75
    torch.testing.assert_close(rollout(maps, discard_ratio=0.5), expected)
    with pytest.raises(ValueError, match=r"discard_ratio=1\.0"):
        rollout(maps, discard_ratio=1.0)


def test_overlay_brightens_where_the_map_is_high() -> None:
    image = Image.new("L", (60, 40), 128)
    values = torch.zeros(4, 6)
    values[0, 0] = 3.0
    picture = np.asarray(overlay(image, values, alpha=1.0)).astype(int)
    assert picture.shape == (40, 60, 3)
    # brightest colour in the middle of the first patch, darkest far away
    assert picture[3, 3].sum() > 600
    assert picture[30, 50].sum() < 100
    untouched = np.asarray(overlay(image, values, alpha=0.0))
    assert (untouched == 128).all()


def test_overlay_of_a_constant_map_and_of_nonsense() -> None:
    image = Image.new("RGB", (8, 8), (255, 255, 255))
    assert len(np.unique(np.asarray(overlay(image, np.full((2, 2), 7.0))).reshape(-1, 3), axis=0)) == 1
    with pytest.raises(ValueError, match="finite"):
        overlay(image, np.array([[np.nan, 1.0]]))
    with pytest.raises(ValueError, match=r"\[4\]"):
        overlay(image, np.zeros(4))
