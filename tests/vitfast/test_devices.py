"""Models on several devices: what is spread or offloaded is left alone, with the reason, and the rest is replaced.

The meta device stands for a second GPU where nothing is computed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import accelerate as hf_accelerate
import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTModel

import vitfast
from tests.vitfast._models import BUILDERS, assert_same, fused_names, images, kept_reasons, randomise

X = (2, 3, 32, 32)
TINY: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}
HOOKED = "run by a hook of Hugging Face's accelerate (device_map, offloading)"


def transformers_model(kind: Any, config: Any) -> Callable[[], nn.Module]:
    return lambda: randomise(kind(config(**TINY))).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda build=build: build(img_size=32) for name, build in BUILDERS.items()},
    "ViT": transformers_model(ViTModel, ViTConfig),
    "CLIP": transformers_model(CLIPVisionModel, CLIPVisionConfig),
}


@pytest.fixture(params=MODELS)
def model(request) -> nn.Module:
    return MODELS[request.param]()


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_blocks_on_two_devices_are_replaced_and_the_model_is_not(build) -> None:
    model = build()
    model.blocks[1].to("meta")
    vitfast.accelerate(model)
    assert kept_reasons(model) == {"": "spread over cpu and meta"}
    whole = fused_names(vitfast.accelerate(build()))
    assert fused_names(model) == {name: kind for name, kind in whole.items() if name}
    # what is on one device runs
    x = images(2, 13, 48)
    torch.testing.assert_close(model.blocks[0](x), build().blocks[0](x))
    with pytest.raises(ValueError, match=r"strict: these modules .*\(model\).*spread over cpu and meta"):
        vitfast.accelerate(vitfast.restore(model), strict=True)


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_a_block_in_two_parts_is_replaced_by_parts(build) -> None:
    model = build()
    model.blocks[0].mlp.to("meta")
    model.blocks[1].attn.proj.to("meta")
    vitfast.accelerate(model)
    reasons = kept_reasons(model)
    assert set(reasons) == {"", "blocks.0", "blocks.1", "blocks.1.attn"}
    assert set(reasons.values()) == {"spread over cpu and meta"}
    assert {"blocks.0.attn", "blocks.0.mlp", "blocks.0.norm1", "blocks.1.mlp"} <= fused_names(model).keys()


@pytest.mark.parametrize("order", ["before", "after"])
def test_offloading(order: str, model: nn.Module) -> None:
    plain = copy.deepcopy(model)
    if order == "after":
        vitfast.accelerate(model)
    # weights are lent to each module that has some of its own
    hf_accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    if order == "before":
        vitfast.accelerate(model)
        reasons = kept_reasons(model)
        assert set(reasons.values()) == {HOOKED}
        # a norm has weights of its own, an attention has none
        assert not any(kind.endswith("LayerNorm") for kind in fused_names(model).values())
        assert any(kind.endswith("Attention") for kind in fused_names(model).values())
    assert_same(plain, model, images(*X), grad=False)


@pytest.mark.parametrize("where", [["cpu", "disk"], ["disk", "cpu"]], ids=" ".join)
def test_a_device_map(where: list[str], tmp_path) -> None:
    model = BUILDERS["timm"](img_size=32)
    plain = copy.deepcopy(model)
    blocks = dict(zip(("blocks.0", "blocks.1"), where, strict=True))
    parts = {name: "cpu" for name, _ in model.named_children() if name != "blocks"}
    parts |= {"cls_token": "cpu", "pos_embed": "cpu"} | blocks
    hf_accelerate.dispatch_model(
        model, device_map=parts, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
    )
    vitfast.accelerate(model)
    assert kept_reasons(model)[""] == HOOKED
    # each module has a hook
    assert fused_names(model) == {}
    assert set(kept_reasons(model).values()) == {HOOKED}
    assert_same(plain, model, images(*X), grad=False)


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_a_device_map_behind_accelerate(build, tmp_path) -> None:
    model = build(img_size=32)
    plain = copy.deepcopy(model)
    vitfast.accelerate(model)
    names = fused_names(model)
    parts = {name: "cpu" for name, _ in model.named_children() if name != "blocks"}
    parts |= {"cls_token": "cpu", "pos_embed": "cpu", "blocks.0": "cpu", "blocks.1": "disk"}
    hf_accelerate.dispatch_model(
        model, device_map=parts, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
    )
    assert_same(plain, model, images(*X), grad=False)
    # one way back does not disturb the other
    assert fused_names(model) == names
    hf_accelerate.hooks.remove_hook_from_module(vitfast.restore(model), recurse=True)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_offloaded_weights_are_not_cast() -> None:
    model = MODELS["timm"]()
    hf_accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"precision='bf16', but weights are offloaded; load the model in torch\.bfloat16"
    ):
        vitfast.accelerate(model, precision="bf16")
    assert fused_names(model) == {}


def test_a_model_without_weights_is_cast_as_any_other() -> None:
    with torch.device("meta"):
        model = MODELS["reference"]()
    vitfast.accelerate(model, precision="bf16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert vitfast.report(model).kept == ()
