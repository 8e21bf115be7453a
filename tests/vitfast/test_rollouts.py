"""Rollouts against formulas of their own, and the gradient rollout's inputs."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vitfast
from tests.vitfast._maps import flow_by_hand, reference, transformers_model, weighted_by_hand
from vitfast.maps.gradients import grad_rollout
from vitfast.maps.maps import AttentionMaps, attention_maps
from vitfast.maps.rollouts import rollout


@pytest.mark.parametrize("heads", ["mean", None])
@pytest.mark.parametrize("class_token", [True, False])
def test_rollout_is_the_product_of_the_layers(class_token: bool, heads: str | None) -> None:
    model = reference(reg_tokens=2, **({} if class_token else {"class_token": False, "global_pool": "avg"}))
    maps = attention_maps(model, torch.randn(2, 3, 32, 16), heads=heads)
    flow = rollout(maps)
    assert flow.dtype == torch.float64
    means = [(layer if heads else layer.double().mean(1)).double().numpy() for layer in maps]
    expected = flow_by_hand(means, 2 + class_token, (4, 2), class_token)
    np.testing.assert_allclose(flow.numpy(), expected, rtol=1e-10)


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
    expected = flow_by_hand(weighted_by_hand([a.double() for a in output.attentions], gradients), 1, (4, 4))
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
