"""Attention maps against the probabilities of the models' own attention, plain and accelerated."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import vitfast
from tests.vitfast._maps import (
    CASES,
    TINY,
    by_first,
    by_transformers,
    flow_by_hand,
    reference,
    transformers_model,
    weighted_by_hand,
)
from tests.vitfast.test_graphs import X, assert_replays, emulation, warm  # noqa: F401
from vitfast import kernels
from vitfast.maps.gradients import grad_rollout
from vitfast.maps.maps import attention_maps
from vitfast.maps.rollouts import rollout
from vitfast.proof.subjects import seed_weights


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "accelerated"])
@pytest.mark.parametrize("name", CASES)
def test_maps_and_gradient_rollout_are_of_the_model_s_own_probabilities(name: str, fused: bool) -> None:
    case = CASES[name]
    model = seed_weights(case.build(), seed=3).eval().double()
    pixels = torch.randn(2, 3, *case.size, dtype=torch.float64)
    seen, logits = case.record(model, pixels)
    gradients = torch.autograd.grad(logits[0, 2] + logits[1, 0], seen)
    grid = (case.size[0] // 8, case.size[1] // 8)

    model = vitfast.accelerate(model) if fused else model
    maps = attention_maps(model, pixels, heads=None)
    assert (len(maps), maps.grid) == (len(seen), grid)
    assert (maps.num_prefix_tokens, maps.has_class_token) == (case.prefix, case.class_token)
    for ours, theirs in zip(maps, seen, strict=True):
        torch.testing.assert_close(ours, theirs.detach().to(ours.dtype), rtol=case.tolerance, atol=case.tolerance / 100)
    if case.class_token:
        rows = attention_maps(model, pixels, heads=None, rows="cls")
        for layer, row in zip(maps, rows, strict=True):
            torch.testing.assert_close(row, layer[..., 0, :])
            torch.testing.assert_close(rows.seen(row), maps.seen(layer))

    explained: Any = [2, 0]
    if case.record is by_transformers:
        # outputs are records, whose first entry may be tokens
        explained = lambda output: by_first(output)[[0, 1], [2, 0]]  # noqa: E731
    flow = grad_rollout(model, pixels, explained)
    expected = flow_by_hand(weighted_by_hand(seen, gradients), case.prefix, grid, case.class_token)
    rtol = 10 * case.tolerance
    np.testing.assert_allclose(flow.numpy(), expected, rtol=rtol, atol=rtol * 1e-5)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_windows_have_no_map_of_all_tokens() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=32, window_size=4, depths=(1, 1), num_classes=0)
    for call in (attention_maps, grad_rollout):
        with pytest.raises(ValueError, match=r"attends within windows|no attention modules"):
            call(vitfast.accelerate(model), torch.randn(1, 3, 32, 32))


class _Hand(nn.Module):
    """A ViT as people write it, around torch's own attention, with a pooling one in front of it and one behind."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.conv = nn.Conv2d(3, 24, 8, 8)
        self.context = nn.MultiheadAttention(24, 2, batch_first=batch_first)
        self.norms = nn.ModuleList(nn.LayerNorm(24) for _ in range(2))
        self.attentions = nn.ModuleList(nn.MultiheadAttention(24, 3, batch_first=batch_first) for _ in range(2))
        # keys of another width than the queries
        self.pool = nn.MultiheadAttention(8, 2, kdim=24, vdim=24, batch_first=batch_first)
        self.probe = nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv(pixels).flatten(2).transpose(1, 2)
        probe = self.probe.expand(len(x), -1, -1)
        if not self.batch_first:
            x, probe = x.transpose(0, 1), probe.transpose(0, 1)
        x = self.context(x, 2 * x, x, need_weights=False)[0] + x
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            normed = norm(x)
            # eval mode and weights: torch writes its softmax out
            x = x + attention(normed, normed, normed, need_weights=True)[0]
        out = self.pool(probe, x, x)[0]
        return out[:, 0] if self.batch_first else out[0]


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "accelerated"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "tokens first"])
def test_torchs_attention_counts_where_it_attends_to_its_own_tokens(
    batch_first: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = seed_weights(_Hand(batch_first), seed=6).eval().double()
    pixels = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    seen: list[Tensor] = []
    softmax = F.softmax
    with monkeypatch.context() as patch:
        patch.setattr(F, "softmax", lambda x, dim: seen.append(softmax(x, dim)) or seen[-1])
        logits = model(pixels)
    # the last one's pools, and the first pooling one writes none out
    *seen, _ = seen
    assert len(seen) == 2
    gradients = torch.autograd.grad(logits[:, 5].sum(), seen)
    seen, gradients = ([x.detach().unflatten(0, (2, 3)) for x in each] for each in (seen, gradients))
    expected = flow_by_hand(weighted_by_hand(seen, gradients), 0, (2, 3), class_token=False)
    model = vitfast.accelerate(model) if fused else model
    maps = attention_maps(model, pixels, heads=None)
    assert (maps.layers, maps.grid, maps.num_prefix_tokens) == ((0, 1), (2, 3), 0)
    for ours, theirs in zip(maps, seen, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(attention_maps(model, pixels, layers=[-1], heads=None)[0], maps[1])
    with pytest.raises(ValueError, match="from -2 to 1"):
        attention_maps(model, pixels, layers=[2])
    np.testing.assert_allclose(grad_rollout(model, pixels, 5).numpy(), expected, rtol=1e-8, atol=1e-14)


def test_pooling_alone_is_refused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = nn.MultiheadAttention(24, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(x[:, :1], x, x)[0]

    for call in (attention_maps, grad_rollout):
        with pytest.raises(ValueError, match="pool attends to other tokens than its own"):
            call(Model(), torch.randn(2, 5, 24))


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "accelerated"])
def test_masks_of_transformers_count(fused: bool) -> None:
    if pytest.importorskip("transformers").__version__.startswith("4."):
        pytest.skip("version 4's ViT takes no attention mask")
    model, pixels = transformers_model("ViT"), torch.randn(2, 3, 32, 32)
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[0, 9:] = 0

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Any:
            return self.model(x, attention_mask=mask)

    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    theirs = eager(pixels, attention_mask=mask, output_attentions=True).attentions
    model = vitfast.accelerate(model) if fused else model
    for ours, expected in zip(attention_maps(Masked(), pixels, heads=None), theirs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
        assert ours[0, :, :, 9:].eq(0).all()
    rows = attention_maps(Masked(), pixels, heads=None, rows="cls")
    torch.testing.assert_close(rows[0], theirs[0][:, :, 0], rtol=1e-4, atol=1e-6)


def test_tokens_behind_the_patches_are_refused() -> None:
    model = reference()
    # YOLOS's
    model.detection_tokens = nn.Parameter(torch.zeros(1, 5, 24))
    with pytest.raises(ValueError, match="VisionTransformer has tokens behind its patches"):
        attention_maps(model, torch.randn(1, 3, 32, 32))


class _LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_the_class_tokens_row_needs_no_matrix() -> None:
    model, pixels = reference(), torch.randn(1, 3, 32, 1024)
    tokens, matrix = 513, 3 * 513**2
    with _LargestTensor() as rows:
        attention_maps(model, pixels, heads=None, rows="cls")
    # the MLP's hidden layer and one image are the largest
    assert rows.numel <= 4 * 24 * tokens + pixels.numel()
    with _LargestTensor() as whole:
        attention_maps(model, pixels, heads=None)
    assert whole.numel == matrix


def test_rows_of_the_class_token_need_one() -> None:
    with pytest.raises(ValueError, match="SiglipVisionModel has no class token; accepted is rows='all'"):
        attention_maps(transformers_model("SiglipVision"), torch.randn(1, 3, 32, 32), rows="cls")
    with pytest.raises(ValueError, match="rows='cls'; expected rows='all'"):
        rollout(attention_maps(reference(), torch.randn(1, 3, 32, 32), rows="cls"))


@pytest.mark.parametrize("kind", ["padded", "several convolutions", "overlapping"])
def test_the_grid_is_the_stems_own(kind: str) -> None:
    timm = pytest.importorskip("timm")
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3, "dynamic_img_size": True}
    size, grid = (32, 32), (4, 4)
    if kind == "padded":
        options |= {"dynamic_img_pad": True}
        size, grid = (27, 45), (4, 6)
    elif kind == "several convolutions":
        stem = nn.Sequential(nn.Conv2d(3, 6, 3, 4, 1), nn.Conv2d(6, 12, 2, 2))
        options |= {"embed_layer": lambda **kw: timm.layers.HybridEmbed(stem, **kw), "patch_size": 1}
        options |= {"dynamic_img_size": False}
    model = timm.models.vision_transformer.VisionTransformer(**options)
    if kind == "overlapping":
        # what dense feature extractors do, and resize the position embedding to what comes out
        model.patch_embed.proj.stride = (4, 4)
        model.pos_embed, grid = None, (7, 7)
    maps = attention_maps(model.eval(), torch.randn(1, 3, *size))
    assert (maps.grid, maps.num_prefix_tokens) == (grid, 1)


def test_a_model_without_a_known_grid_is_refused() -> None:
    blocks = nn.Sequential(nn.Flatten(2), nn.Linear(64, 24), *reference().blocks)
    with pytest.raises(ValueError, match="no convolution from 3 channels to tokens of width 24"):
        attention_maps(blocks, torch.randn(1, 3, 8, 8))


def test_a_layer_that_is_not_known_is_not_left_out_of_the_count() -> None:
    model = reference()
    model.blocks[1].attn.forward = lambda x: x
    with pytest.raises(ValueError, match=r"blocks\.1\.attn: forward is replaced"):
        attention_maps(model, torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "accelerated"])
def test_masked_attention_is_refused(fused: bool) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=5).eval()
    model = vitfast.accelerate(model) if fused else model

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x, attn_mask=torch.ones(17, 17, dtype=torch.bool))

    for call in (attention_maps, grad_rollout):
        with pytest.raises(ValueError, match=r"blocks\.0\.attn is called with a mask \(attn_mask\)"):
            call(Masked(), torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "accelerated"])
def test_compiled_models_show_what_they_attend_to(fused: bool) -> None:
    model, pixels = reference(), torch.randn(2, 3, 32, 48)
    expected, expected_flow = attention_maps(model, pixels), grad_rollout(model, pixels, 1)
    model = vitfast.accelerate(model) if fused else model
    counter = CompileCounter()
    model.compile(backend=counter)
    with torch.no_grad():
        before = model(pixels)
    assert counter.frame_count == 1
    for compiled in (model, torch.compile(model, backend=counter)):
        for ours, theirs in zip(attention_maps(compiled, pixels), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(grad_rollout(compiled, pixels, 1), expected_flow)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), before)
    assert counter.frame_count == 1, "the compiled code was thrown away"


def test_graphs_stand_aside_and_come_back(emulation) -> None:  # noqa: F811
    from tests.vitfast._models import reference as odd

    plain = odd()
    model = warm(vitfast.accelerate(copy.deepcopy(plain), cuda_graph=True))
    pixels = torch.randn(X)
    for ours, theirs in zip(attention_maps(model, pixels), attention_maps(plain, pixels), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(grad_rollout(model, pixels), grad_rollout(plain, pixels))
    # the first call behind the hooks finds out that they are gone
    assert_replays(model, plain)


def test_autocast_rounds_queries_and_keys_only() -> None:
    model, pixels = reference(), torch.randn(1, 3, 32, 32)
    exact = attention_maps(model, pixels, heads=None)
    with torch.autocast("cpu", torch.bfloat16):
        maps = attention_maps(model, pixels, heads=None)
    assert maps[0].dtype == torch.float32
    # logits rounded to bf16 would leave probabilities that sum to one by 2^-9 only
    torch.testing.assert_close(maps[0].double().sum(-1), torch.ones(1, 3, 17).double(), rtol=0, atol=1e-6)
    assert len(maps[0].unique()) > len(maps[0].bfloat16().unique())
    torch.testing.assert_close(maps[0], exact[0], rtol=0.1, atol=0.02)


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
    last = attention_maps(model, pixels, layers=[-1, 0, 2], heads="max")
    assert last.layers == (2, 0, 2)
    assert last[2] is last[0]
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
    [
        ({"heads": "median"}, "heads='median'"),
        ({"layers": [3]}, "from -3 to 2"),
        ({"layers": []}, r"layers=\[\]"),
        ({"rows": "patches"}, "rows='patches'"),
    ],
    ids=["heads", "layers", "no layers", "rows"],
)
def test_wrong_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_maps(reference(), torch.randn(1, 3, 32, 32), **options)


def test_a_model_without_known_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="Sequential has no attention"):
        attention_maps(nn.Sequential(nn.Linear(3, 3)), torch.randn(1, 3, 8, 8))
