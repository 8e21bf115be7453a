"""Attention maps against a formula of their own, on plain and accelerated models."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import vitfast
from tests.vitfast.test_graphs import X, assert_replays, emulation, warm  # noqa: F401
from vitfast import kernels
from vitfast.images.resize import ResizeCrop
from vitfast.maps.gradients import grad_rollout
from vitfast.maps.maps import AttentionMaps, attention_maps
from vitfast.maps.pictures import draw, overlay
from vitfast.maps.rollouts import rollout
from vitfast.proof.subjects import seed_weights

TINY = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 24, "num_heads": 3, "num_classes": 5}


def reference(**overrides) -> vitfast.VisionTransformer:
    options = {**TINY, **overrides}
    return seed_weights(vitfast.create_model("vit_tiny_patch16_224", **options), seed=1).eval()


def timm_vit(name: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    size = {"img_size": (16, 24), "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
    return seed_weights(timm.create_model(name, **{**size, **options}), seed=7).eval()


def transformers_model(name: str, head: str = "Model", **changes: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    options = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 48}
    config = getattr(transformers, f"{name}Config")(**options, **{"image_size": 32, "patch_size": 8, **changes})
    return seed_weights(getattr(transformers, f"{name}{head}")(config), seed=3).eval()


def torchvision_vit() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    size = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 3, "hidden_dim": 24, "mlp_dim": 48}
    return torchvision.models.VisionTransformer(**size, num_classes=5)


def open_clip_vit() -> nn.Module:
    transformer = pytest.importorskip("open_clip.transformer")
    size = {"image_size": 32, "patch_size": 8, "width": 24, "layers": 2, "heads": 3, "mlp_ratio": 2.0}
    return transformer.VisionTransformer(**size, ls_init_value=0.1, output_dim=5)


def _rollout_by_hand(maps: list[np.ndarray]) -> np.ndarray:
    result = np.eye(maps[0].shape[-1])
    for layer in maps:
        with_residual = 0.5 * layer + 0.5 * np.eye(layer.shape[-1])
        result = (with_residual / with_residual.sum(-1, keepdims=True)) @ result
    return result


def _weighted(probabilities: list[Tensor], gradients: Any) -> list[np.ndarray]:
    return [np.maximum((p.detach() * g).mean(1).numpy(), 0.0) for p, g in zip(probabilities, gradients, strict=True)]


def _flow_by_hand(weighted: list[np.ndarray], prefix: int, grid: tuple[int, int]) -> np.ndarray:
    images = range(len(weighted[0]))
    flows = [_rollout_by_hand([layer[image] for layer in weighted])[0, prefix:].reshape(grid) for image in images]
    return np.stack(flows)


@dataclass(frozen=True)
class Case:
    """A model, and how its own probabilities are had: `record` returns these and its logits."""

    build: Callable[[], nn.Module]
    record: Callable[[nn.Module, Tensor], tuple[Sequence[Tensor], Tensor]]
    prefix: int
    class_token: bool = True
    size: tuple[int, int] = (32, 48)
    tolerance: float = 1e-9


def by_softmax(model: nn.Module, pixels: Tensor) -> tuple[Sequence[Tensor], Tensor]:
    """Attention written out in the place of torch's."""
    seen: list[Tensor] = []

    def written_out(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
        logits = torch.einsum("bhnd,bhmd->bhnm", q, k) * (scale or q.shape[-1] ** -0.5)
        logits = logits if attn_mask is None else logits + attn_mask
        seen.append(torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True))
        return seen[-1] @ v

    # with gradients, as torch's fast path calls no softmax of Python's
    with mock.patch.object(F, "scaled_dot_product_attention", written_out):
        return seen, model(pixels)


def by_timm(model: Any, pixels: Tensor) -> tuple[Sequence[Tensor], Tensor]:
    """Its unfused path hands its probabilities to a dropout."""
    seen: list[Tensor] = []
    handles = []
    for block in model.blocks:
        block.attn.fused_attn = False
        handles.append(block.attn.attn_drop.register_forward_pre_hook(lambda _, args: seen.append(args[0])))
    logits = model(pixels)
    for block, handle in zip(model.blocks, handles, strict=True):
        handle.remove()
        block.attn.fused_attn = True
    return seen, logits


def by_transformers(model: Any, pixels: Tensor) -> tuple[Sequence[Tensor], Tensor]:
    """Its eager attention, whose softmax is in fp32, whatever the model is in."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    output = eager(pixels, output_attentions=True)
    return output.attentions, by_first(output)


def by_first(output: Any) -> Tensor:
    """Logits of a record, or its class tokens."""
    return output[0] if output[0].ndim == 2 else output[0][:, 0]


def hugging_face(name: str, prefix: int, head: str = "ForImageClassification", **options: Any) -> Case:
    size = (32, 48) if "Dino" in name else (32, 32)
    labels = {"num_labels": 5} if head == "ForImageClassification" else {}
    build = functools.partial(transformers_model, name, head, **labels, **options)
    return Case(build, by_transformers, prefix, name != "SiglipVision", size, 1e-4)


def timm_case(prefix: int, *args: Any, **options: Any) -> Case:
    return Case(functools.partial(timm_vit, *args, **options), by_timm, prefix, size=(16, 24))


CASES = {
    "reference": Case(reference, by_softmax, 1),
    "no class token": Case(lambda: reference(class_token=False, global_pool="avg"), by_softmax, 0, False),
    "registers, qk norm": Case(lambda: reference(reg_tokens=4, qk_norm=True, no_embed_class=True), by_softmax, 5),
    "distilled, LayerScale": Case(lambda: reference(distilled=True, init_values=0.1), by_softmax, 2),
    "relative positions": Case(lambda: reference(pos_embed="relative"), by_softmax, 1),
    "timm": timm_case(3, qk_norm=True, reg_tokens=2),
    "BEiT": timm_case(1, "beit_base_patch16_224", init_values=0.1),
    "BEiT, shared bias": timm_case(
        1, "beit_base_patch16_224", use_rel_pos_bias=False, use_shared_rel_pos_bias=True
    ),
    "EVA-02": timm_case(1, "eva02_tiny_patch14_224"),
    "EVA-02, separate": timm_case(1, "eva02_base_patch14_224", qkv_fused=False, scale_attn_inner=True),
    "rotary ViT": timm_case(3, "vit_small_patch16_rope_224", num_reg_tokens=2),
    "torchvision": Case(torchvision_vit, by_softmax, 1, size=(32, 32)),
    "open_clip": Case(open_clip_vit, by_softmax, 1, size=(32, 32)),
    "Transformers ViT": hugging_face("ViT", 1),
    "DeiT": hugging_face("DeiT", 2),
    "CLIP": hugging_face("CLIPVision", 1, "Model"),
    "SigLIP": hugging_face("SiglipVision", 0, "Model"),
    "DINOv2": hugging_face("Dinov2", 1),
    "DINOv2, registers": hugging_face("Dinov2WithRegisters", 5),
    "Transformers BEiT": hugging_face("Beit", 1, use_relative_position_bias=True),
    "Transformers BEiT, shared bias": hugging_face("Beit", 1, use_shared_relative_position_bias=True),
}


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
    expected = [_rollout_by_hand([w[i] for w in _weighted(seen, gradients)]) for i in range(2)]
    expected = [f[0, case.prefix :] if case.class_token else f.mean(0) for f in expected]
    rtol = 10 * case.tolerance
    np.testing.assert_allclose(flow.flatten(1).numpy(), np.stack(expected), rtol=rtol, atol=rtol * 1e-5)
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
    expected = [_rollout_by_hand([w[i] for w in _weighted(seen, gradients)]).mean(0).reshape(2, 3) for i in range(2)]
    model = vitfast.accelerate(model) if fused else model
    maps = attention_maps(model, pixels, heads=None)
    assert (maps.layers, maps.grid, maps.num_prefix_tokens) == ((0, 1), (2, 3), 0)
    for ours, theirs in zip(maps, seen, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(attention_maps(model, pixels, layers=[-1], heads=None)[0], maps[1])
    with pytest.raises(ValueError, match="from -2 to 1"):
        attention_maps(model, pixels, layers=[2])
    np.testing.assert_allclose(grad_rollout(model, pixels, 5).numpy(), np.stack(expected), rtol=1e-8, atol=1e-14)


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


def _random_maps(heads: int, seed: int) -> AttentionMaps:
    generator = torch.Generator().manual_seed(seed)
    layers = [(3 * torch.randn(2, heads, 8, 8, generator=generator)).softmax(-1).double() for _ in range(4)]
    # class token, register, 2 x 3 patches
    return AttentionMaps(tuple(layers), (0, 1, 2, 3), (2, 3), 2, True)


def test_rollout_as_vit_keras() -> None:
    maps = _random_maps(3, seed=4)
    flow = rollout(maps, method="vit_keras")
    for image in range(2):
        product = np.eye(8)
        for layer in maps:
            with_residual = layer[image].numpy().mean(0) + np.eye(8)
            product = (with_residual / with_residual.sum((0, 1))) @ product
        mask = product[0, 2:].reshape(2, 3)
        np.testing.assert_allclose(flow[image].numpy(), mask / mask.max(), rtol=1e-12)
    # averaged heads: the scale is all that differs
    paper = rollout(maps)
    torch.testing.assert_close(flow, paper / paper.amax((1, 2), keepdim=True))


def test_whole_matrix_normalisation_does_not_underflow() -> None:
    # 577^24 is far outside fp32
    layer = torch.full((1, 577, 577), 1 / 577)
    layer[:, :, 300] += 0.5
    maps = AttentionMaps((layer,) * 24, tuple(range(24)), (24, 24), 1, True)
    flow = rollout(maps, method="vit_keras")[0]
    assert flow.argmax() == 299
    assert flow.min() > 0


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
def test_rollout_as_vit_explain(fusion: str) -> None:
    kept = _random_maps(3, seed=5)
    fused = {
        "mean": lambda x: x.mean(1),
        "max": lambda x: x.max(1).values,
        "min": lambda x: x.min(1).values,
    }[fusion]
    maps = AttentionMaps(tuple(fused(layer) for layer in kept), kept.layers, kept.grid, 2, True)
    flow = rollout(maps, method="vit_explain", discard_ratio=0.8)
    for image in range(2):
        product = np.eye(8)
        for layer in maps:
            flat = layer[image].numpy().flatten()
            dropped = [i for i in np.argsort(flat)[: int(64 * 0.8)] if i != 0]
            flat[dropped] = 0
            with_residual = (flat.reshape(8, 8) + np.eye(8)) / 2
            product = (with_residual / with_residual.sum(-1)) @ product
        mask = product[0, 2:].reshape(2, 3)
        np.testing.assert_allclose(flow[image].numpy(), mask / mask.max(), rtol=1e-12)


def test_the_class_tokens_weight_on_itself_is_not_discarded() -> None:
    layer = torch.tensor([[0.01, 0.39, 0.3, 0.3], [0.1, 0.3, 0.3, 0.3], [0.2, 0.2, 0.3, 0.3], [0.1, 0.3, 0.3, 0.3]])
    maps = AttentionMaps((layer[None].double(),) * 2, (0, 1), (1, 3), 1, True)
    everything = rollout(maps, method="vit_explain")
    # 0.01 is the smallest and stays; a second one goes
    torch.testing.assert_close(rollout(maps, method="vit_explain", discard_ratio=1 / 16), everything)
    assert not torch.allclose(rollout(maps, method="vit_explain", discard_ratio=2 / 16), everything)


def test_nothing_left_to_see_is_nothing_seen() -> None:
    maps = AttentionMaps((torch.eye(4)[None],), (0,), (1, 3), 1, True)
    assert rollout(maps, method="vit_explain").eq(0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "chefer"}, "method='chefer'; expected one of abnar, vit_keras, vit_explain"),
        ({"method": "vit_keras", "discard_ratio": 0.5}, "'vit_keras' discards nothing"),
        ({"method": "vit_explain"}, "there is none; accepted is 'abnar'"),
    ],
    ids=["method", "ratio", "class token"],
)
def test_wrong_rollouts_are_named(options: dict, message: str) -> None:
    maps = attention_maps(reference(class_token=False, global_pool="avg"), torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match=message):
        rollout(maps, **options)


def test_gradient_rollout_as_vit_explain() -> None:
    model, pixels = reference(), torch.randn(1, 3, 32, 32)
    ours = grad_rollout(model, pixels, 3, method="vit_explain", discard_ratio=0.9)
    assert ours.max() == 1.0
    assert not torch.allclose(ours, grad_rollout(model, pixels, 3, method="vit_explain"))


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "accelerated"])
def test_gradient_rollout_needs_no_gradients_of_others(fused: bool) -> None:
    model, pixels = reference(), torch.randn(1, 3, 32, 32)
    expected = grad_rollout(model, pixels, 2)
    model.requires_grad_(False)
    model = vitfast.accelerate(model) if fused else model
    torch.testing.assert_close(grad_rollout(model, pixels, 2), expected)
    with torch.inference_mode():
        torch.testing.assert_close(grad_rollout(model, pixels.clone(), torch.tensor([2])), expected)
    torch.testing.assert_close(grad_rollout(model, pixels, lambda logits: logits[:, 2]), expected)
    best = int(model(pixels).argmax())
    torch.testing.assert_close(grad_rollout(model, pixels), grad_rollout(model, pixels, best))


class _Lora(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.change = base, nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.change(x)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "accelerated"])
def test_lora_counts_or_is_refused(fused: bool) -> None:
    pixels = torch.randn(1, 3, 32, 32)
    model = transformers_model("ViT", "ForImageClassification", num_labels=5)
    for layer in model.vit.layers if hasattr(model.vit, "layers") else model.vit.encoder.layer:
        attention = layer.attention if hasattr(layer.attention, "v_proj") else layer.attention.attention
        name = "v_proj" if hasattr(attention, "v_proj") else "value"
        setattr(attention, name, _Lora(getattr(attention, name)))
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    output = eager(pixels, output_attentions=True)
    gradients = torch.autograd.grad(output.logits[0, 1], output.attentions)
    expected = _flow_by_hand(_weighted([a.double() for a in output.attentions], gradients), 1, (4, 4))
    flow = grad_rollout(vitfast.accelerate(model) if fused else model, pixels, 1)
    np.testing.assert_allclose(flow.numpy(), expected, rtol=1e-3, atol=1e-8)

    packed = vitfast.accelerate(reference()) if fused else reference()
    packed.blocks[1].attn.qkv = _Lora(packed.blocks[1].attn.qkv)
    assert len(attention_maps(packed, pixels)) == 3
    with pytest.raises(ValueError, match=r"values of blocks\.1\.attn .* \(qkv is a _Lora: called as a module\)"):
        grad_rollout(packed, pixels, 1)


def test_gradient_rollout_under_activation_checkpointing() -> None:
    model, pixels = reference(), torch.randn(1, 3, 32, 32)
    expected = grad_rollout(model, pixels, 2)

    class Checkpointed(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=False)

    for i in range(3):
        model.blocks[i] = Checkpointed(model.blocks[i])
    torch.testing.assert_close(grad_rollout(model, pixels, 2), expected)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (5, "target=5; expected one class or 1, from 0 to 4"),
        (-1, "target=-1"),
        ([1, 2], r"target=\[1, 2\]"),
        (0.5, r"target=0\.5"),
        (lambda logits: logits, r"target returned a tensor \[1, 5\]"),
    ],
    ids=["class", "negative", "two for one image", "no index", "function"],
)
def test_wrong_targets_are_named(target: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grad_rollout(reference(), torch.randn(1, 3, 32, 32), target)


def test_a_model_without_logits_needs_a_function() -> None:
    model, pixels = transformers_model("ViT"), torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"tensor \[1, 17, 24\]; expected logits"):
        grad_rollout(model, pixels)
    text = torch.randn(24)
    flow = grad_rollout(model, pixels, lambda output: output.last_hidden_state[:, 0] @ text)
    assert flow.shape == (1, 4, 4)
    assert flow.std() > 0


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


def test_overlay_shows_the_part_that_the_model_saw() -> None:
    # 36 of 40 rows, in the middle of an image twice as wide as high
    spec = vitfast.ImageSpec((36, 36), (0.5,) * 3, (0.5,) * 3, ResizeCrop((36, 36), 0.9))
    photo = Image.new("RGB", (800, 400), "black")
    photo.paste("white", (220, 20, 400, 380))
    left = np.array([[1.0, 0.0]]).repeat(2, 0)
    with pytest.raises(ValueError, match="image has 800 x 400 pixels and the map 4 x 4 patches"):
        overlay(photo, np.eye(4))
    # the whole of the white half, and nothing else, lies under the bright half of the map
    for picture in (overlay(photo, left, spec, alpha=0.0), overlay(photo, left, spec)):
        assert np.abs(np.subtract(picture.size, (360, 360))).max() <= 1
        seen = np.asarray(picture).astype(int).sum(-1)
        assert seen[:, :80].min() > seen[:, 280:].max() + 100
    pixels = vitfast.preprocess(photo, spec)[0]
    assert (np.asarray(overlay(pixels, np.eye(4), alpha=0.0)) == pixels.permute(1, 2, 0).numpy()).all()


def test_overlay_of_a_constant_map_and_of_nonsense() -> None:
    image = Image.new("RGB", (8, 8), (255, 255, 255))
    assert len(np.unique(np.asarray(overlay(image, np.full((2, 2), 7.0))).reshape(-1, 3), axis=0)) == 1
    with pytest.raises(ValueError, match="finite"):
        overlay(image, np.array([[np.nan, 1.0]]))
    with pytest.raises(ValueError, match=r"\[4\]"):
        overlay(image, np.zeros(4))


def test_draw_shows_the_image_every_map_and_the_rollout() -> None:
    # class token, register, 2 x 3 patches; each map is bright in one place
    layers = torch.zeros(2, 1, 2, 8, 8)
    for layer, head, patch in ((0, 0, 0), (0, 1, 5), (1, 0, 2), (1, 1, 3)):
        layers[layer, 0, head, 0, 2 + patch] = 1.0
    maps = AttentionMaps(tuple(layers), (4, 7), (2, 3), 2, True)
    flow = torch.zeros(1, 2, 3)
    flow[0, 0, 1] = 1.0
    view = Image.new("RGB", (90, 60), "blue")
    pixels = np.asarray(draw(view, maps, flow)).astype(int)
    # 224 x 149 each, in three columns
    assert pixels.shape == (2 * 175 + 6, 3 * 230 + 6, 3)
    bright = [None, (0, 0), (1, 2), (0, 2), (1, 0), (0, 1)]
    for i, patch in enumerate(bright):
        x, y = 6 + i % 3 * 230, 6 + i // 3 * 175
        assert pixels[y : y + 20, x : x + 100].min() < 128, "no label"
        panel = pixels[y + 20 : y + 169, x : x + 224]
        if patch is None:
            assert (panel == (0, 0, 255)).all()
        else:
            red = panel[..., 0].reshape(-1)
            row, column = divmod(int(red.argmax()), 224)
            assert (row * 2 // 149, column * 3 // 224) == patch
    assert np.asarray(draw(view, AttentionMaps(maps[:1], (4,), (2, 3), 2, True))).shape == (2 * 175 + 6, 2 * 230 + 6, 3)


def test_draw_takes_rows_of_the_class_token_and_models_without_one() -> None:
    view = Image.new("RGB", (60, 60), "blue")
    model, pixels = reference(), torch.randn(1, 3, 32, 32)
    whole, rows = (
        np.asarray(draw(view, attention_maps(model, pixels, rows=rows))).astype(int) for rows in ("all", "cls")
    )
    np.testing.assert_allclose(whole, rows, atol=1)
    maps = attention_maps(reference(class_token=False, global_pool="avg"), pixels)
    torch.testing.assert_close(maps.seen(maps[0]), maps[0].mean(1).reshape(1, 4, 4))
