"""torchvision's Swin and Swin V2, plain and accelerated."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)

import vitfast
from tests.vitfast._models import assert_same, forward, fused_names, images, kept_reasons, randomise, run
from vitfast import kernels
from vitfast.adapters.torchvision import swin as adapter


def swin(version: int = 1, **changes) -> nn.Module:
    """Maps of 8 x 8 and 4 x 4 tokens for images of 32 x 32, windows of 4 x 2, shifted in every second block."""
    options = {"patch_size": [4, 4], "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 2]}
    options |= {"stochastic_depth_prob": 0.0, "num_classes": 7}
    if version == 2:
        options |= {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
    model = randomise(SwinTransformer(**{**options, **changes})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("logit_scale"):
            # around what training starts from; the last head's is cut off
            parameter.data += 2.3
            parameter.data[-1] = 5.0
    return model


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", [(32, 32), (32, 64), (16, 16), (40, 36)], ids=str)
def test_outputs_and_gradients(version, size):
    plain = swin(version)
    fused = vitfast.accelerate(copy.deepcopy(plain))
    x = images(2, 3, *size)
    assert_same(plain, fused, x, grad=False)
    # a small map's gradients are sums of few terms, and their rounding is chance: in float64 there is next to none
    expected, actual = (run(copy.deepcopy(m).double(), forward, x.double()) for m in (plain, fused))
    assert actual.keys() == expected.keys()
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    names = list(fused_names(fused).values())
    assert names.count("FusedTorchvisionWindows" + "V2" * (version == 2)) == 4
    assert names.count("FusedTorchvisionSwinBlock") == (4 if version == 1 else 0)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("option", ["dropout", "attention_dropout", "stochastic_depth_prob"])
def test_dropout(version, option):
    plain = swin(version, **{option: 0.4})
    fused = vitfast.accelerate(copy.deepcopy(plain))
    x = images(2, 3, 32, 32)
    for model in (plain, fused):
        model.train()
    torch.manual_seed(3)
    expected = plain.double()(x.double())
    torch.manual_seed(3)
    torch.testing.assert_close(fused.double()(x.double()), expected, rtol=1e-9, atol=1e-9)


def test_the_map_goes_into_the_kernel_as_it_lies(monkeypatch):
    calls = []
    inner = kernels.window_attention

    def note(qkv, heads, window, shift, *args, **kwargs):
        calls.append((tuple(qkv.shape[1:3]), window, shift))
        return inner(qkv, heads, window, shift, *args, **kwargs)

    monkeypatch.setattr(kernels, "window_attention", note)
    fused = vitfast.accelerate(swin())
    fused(images(1, 3, 32, 32))
    # the second stage's map is one window high
    shifts = [((8, 8), (0, 0)), ((8, 8), (2, 1)), ((4, 4), (0, 0)), ((4, 4), (0, 1))]
    assert calls == [(size, (4, 2), shift) for size, shift in shifts]
    calls.clear()
    # a map that windows do not divide is padded by torchvision
    fused(images(1, 3, 36, 36))
    assert calls == []


def test_weights_are_read_as_torchvision_reads_them():
    """torchvision calls neither projection: what stands in their place counts by its weights alone."""
    plain = swin()
    fused = vitfast.accelerate(copy.deepcopy(plain))
    for model in (plain, fused):
        model.features[1][0].attn.qkv.register_forward_hook(lambda *_: 1 / 0)
        nn.utils.parametrizations.weight_norm(model.features[1][1].attn.qkv)
    assert_same(plain, fused, images(1, 3, 32, 32), grad=False)


@pytest.mark.parametrize("version", [1, 2])
def test_copies_hooks_graphs_and_features(version):
    plain = swin(version)
    fused = vitfast.accelerate(copy.deepcopy(plain))
    x = images(1, 3, 32, 32)
    expected = plain(x)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    for again in (copy.deepcopy(fused), torch.load(file, weights_only=False)):
        torch.testing.assert_close(again(x), expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
    nodes = ["features.1", "features.3"]
    with torch.no_grad():
        taken, wanted = (create_feature_extractor(copy.deepcopy(m), nodes)(x) for m in (fused, plain))
    for node in nodes:
        torch.testing.assert_close(taken[node], wanted[node], rtol=1e-4, atol=1e-4)
    seen = []
    fused.features[1][0].attn.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    hooked = []
    plain.features[1][0].attn.register_forward_hook(lambda module, args, out: hooked.append((args[0], out)))
    fused(x), plain(x)
    for actual, wanted in zip(seen[0], hooked[0], strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="attends within windows"):
        vitfast.attention_maps(fused, x)


def test_what_is_left_alone_is_reported():
    reasons = set(kept_reasons(vitfast.accelerate(swin(2))).values())
    assert reasons == {"norms between branch and residual: parts are replaced"}
    fused = vitfast.accelerate(swin(dropout=0.1), attention="sdpa")
    notes = {row.note for row in vitfast.report(fused).replaced if row.kind == "attention"}
    assert notes == {
        "attention='sdpa' knows no windows: the original forward runs; "
        "dropout 0.1: the original forward runs in training"
    }
    plain = swin()
    assert_same(plain, vitfast.accelerate(copy.deepcopy(plain), attention="sdpa"), images(1, 3, 32, 32), grad=False)


@pytest.mark.interpret
@pytest.mark.parametrize("version", [1, 2])
def test_in_the_kernel(version, monkeypatch):
    plain = swin(version)
    fused = vitfast.accelerate(copy.deepcopy(plain), frozen=True)
    x = images(1, 3, 32, 32)
    tables = []
    inner = kernels.window_attention

    def note(qkv, heads, window, shift, table, *args, **kwargs):
        tables.append((table.stride(0), table.data_ptr()))
        return inner(qkv, heads, window, shift, table, *args, **kwargs)

    monkeypatch.setattr(kernels, "window_attention", note)
    # each head's column in one piece, made once
    for _ in range(2):
        with torch.no_grad():
            fused(x)
    assert tables[:4] == tables[4:]
    assert {stride for stride, _ in tables} == {1}
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)
        for model in (plain, fused):
            for parameter in model.parameters():
                parameter.mul_(0.9)
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)
    assert isinstance(fused.features[1][0].attn, adapter.FusedTorchvisionWindows)
