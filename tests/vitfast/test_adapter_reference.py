"""The reference model, plain and accelerated: every option, outputs and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import vitfast
from tests.vitfast._models import TINY, assert_same, check, fused_names, images, kept_reasons, reference

OPTIONS = {
    "class token": {},
    "average pool": {"global_pool": "avg", "class_token": False},
    "average pool, class token": {"global_pool": "avg"},
    "map pool": {"global_pool": "map", "class_token": False},
    "no pool": {"global_pool": "", "num_classes": 0},
    "registers": {"reg_tokens": 3},
    "registers, no_embed_class": {"reg_tokens": 3, "no_embed_class": True},
    "registers, no class token": {"reg_tokens": 2, "class_token": False, "global_pool": "avg"},
    "distilled": {"distilled": True},
    "distilled, registers": {"distilled": True, "reg_tokens": 2},
    "distilled, no_embed_class": {"distilled": True, "no_embed_class": True},
    "positions none": {"pos_embed": "none"},
    "positions none, no prefix": {"pos_embed": "none", "class_token": False, "global_pool": "avg"},
    "positions 2d": {"pos_embed": "learn_2d"},
    "positions 2d, no_embed_class": {"pos_embed": "learn_2d", "no_embed_class": True, "reg_tokens": 1},
    "positions relative": {"pos_embed": "relative"},
    "positions relative, qk-norm": {"pos_embed": "relative", "qk_norm": True},
    "positions every layer": {"pos_embed_at": "every_layer"},
    "positions every layer, 2d": {"pos_embed_at": "every_layer", "pos_embed": "learn_2d"},
    "positions every layer, shared": {"pos_embed_at": "every_layer_shared", "no_embed_class": True},
    "LayerScale": {"init_values": 0.1},
    "pre-norm": {"pre_norm": True, "norm_eps": 1e-5},
    "qk-norm": {"qk_norm": True},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "SwiGLU": {"mlp_layer": "swiglu", "mlp_ratio": 5.0},
    "SwiGLU, LayerScale": {"mlp_layer": "swiglu", "init_values": 0.1},
    "GELU tanh": {"act_layer": "gelu_tanh"},
    "QuickGELU": {"act_layer": "quick_gelu"},
    "pre-training head": {"representation_size": 20},
    "fc_norm": {"fc_norm": True},
    "one channel": {"in_chans": 1},
    "non-square patch": {"patch_size": (4, 8), "img_size": (12, 32)},
    "one head": {"num_heads": 1},
    "one patch": {"img_size": 8},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_outputs_and_gradients(option):
    changes = {**TINY, **OPTIONS[option]}
    size = changes["img_size"]
    size = (size, size) if isinstance(size, int) else size
    check(reference, images(2, changes.get("in_chans", 3), *size), **OPTIONS[option])


@pytest.mark.parametrize("positions", ["learn", "learn_2d", "relative"])
@pytest.mark.parametrize("size", [(16, 40), (48, 32)], ids=["16x40", "48x32"])
def test_other_image_sizes(positions, size):
    check(reference, images(2, 3, *size), pos_embed=positions, reg_tokens=1)


DROPOUTS = {
    "pos_drop": {"pos_drop_rate": 0.3},
    "proj_drop": {"proj_drop_rate": 0.3},
    "attn_drop": {"attn_drop_rate": 0.3},
    "drop_path": {"drop_path_rate": 0.5},
    "head dropout": {"drop_rate": 0.3},
    "all": {"pos_drop_rate": 0.1, "proj_drop_rate": 0.2, "attn_drop_rate": 0.2, "drop_path_rate": 0.4},
    "SwiGLU, LayerScale": {"proj_drop_rate": 0.2, "drop_path_rate": 0.4, "mlp_layer": "swiglu", "init_values": 0.2},
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("option", DROPOUTS)
def test_dropout_draws_the_same_random_numbers(option, train):
    fused = check(reference, images(4, 3, 24, 32), train=train, **DROPOUTS[option])
    if train:
        # the rate is at work: another seed gives another result
        x = images(4, 3, 24, 32)
        fused.train()
        torch.manual_seed(0)
        first = fused(x)
        torch.manual_seed(1)
        assert not torch.equal(first, fused(x))


def test_distilled_training_gives_both_heads():
    def distilled(**changes):
        model = reference(distilled=True, **changes)
        model.set_distilled_training(True)
        return model

    fused = check(distilled, images(2, 3, 24, 32), train=True)
    assert isinstance(fused.train()(images(2, 3, 24, 32)), tuple)


CALLS = {
    "forward_features": lambda model, x: model.forward_features(x),
    "forward_head, pre_logits": lambda model, x: model.forward_head(model.forward_features(x), pre_logits=True),
    "forward_intermediates": lambda model, x: model.forward_intermediates(x, norm=True, return_prefix_tokens=True),
    "forward_intermediates, stop early": lambda model, x: model.forward_intermediates(x, [0], stop_early=True),
    "forward_intermediates, dict": lambda model, x: model.forward_intermediates(x, output_dict=True, output_fmt="NLC"),
    "get_intermediate_layers": lambda model, x: model.get_intermediate_layers(x, 2, reshape=True, norm=True),
}


@pytest.mark.parametrize("call", CALLS)
def test_feature_interfaces(call):
    # "" keeps every token, so that no gradient is missing
    check(reference, images(2, 3, 24, 32), CALLS[call], reg_tokens=1, init_values=0.3)


@pytest.mark.parametrize("positions", ["stem", "every_layer"])
def test_gradient_checkpointing(positions):
    plain = reference(pos_embed_at=positions, drop_path_rate=0.3)
    fused = vitfast.accelerate(copy.deepcopy(plain))
    fused.set_grad_checkpointing(True)
    assert_same(plain, fused, images(4, 3, 24, 32), train=True)


def test_channels_last_pixels_and_weights():
    plain = reference()
    fused = vitfast.accelerate(copy.deepcopy(plain)).to(memory_format=torch.channels_last)
    x = images(2, 3, 24, 32).to(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x))


def test_every_part_of_the_model_is_replaced():
    fused = vitfast.accelerate(reference(init_values=0.1, qk_norm=True))
    names = fused_names(fused)
    assert names[""] == "FusedReferenceVisionTransformer"
    assert names["patch_embed"] == "FusedReferencePatchEmbed"
    for i in range(2):
        assert names[f"blocks.{i}"] == "FusedReferenceBlock"
        assert names[f"blocks.{i}.attn"] == "FusedReferenceAttention"
        assert names[f"blocks.{i}.mlp"] == "FusedReferenceMlp"
        for norm in ("norm1", "norm2", "attn.q_norm", "attn.k_norm"):
            assert names[f"blocks.{i}.{norm}"] == "FusedLayerNorm"
    assert names["norm"] == "FusedLayerNorm"
    assert not vitfast.report(fused).kept


def test_map_pool_keeps_its_attention_and_says_so():
    fused = vitfast.accelerate(reference(global_pool="map", class_token=False))
    assert "one query" in kept_reasons(fused)["attn_pool"]
    assert fused_names(fused)["attn_pool.mlp"] == "FusedReferenceMlp"
    assert fused_names(fused)["attn_pool.norm"] == "FusedLayerNorm"


def test_gated_mlp_is_declined_and_its_block_says_so():
    fused = vitfast.accelerate(reference(mlp_layer="swiglu"))
    assert "gated" in kept_reasons(fused)["blocks.0.mlp"]
    rows = {row.module: row for row in vitfast.report(fused).replaced}
    assert "mlp is a GluMlp" in rows["blocks.1"].note


def test_wide_heads_are_declined():
    model = reference(embed_dim=520, num_heads=2, depth=1)
    fused = vitfast.accelerate(copy.deepcopy(model))
    assert kept_reasons(fused)["blocks.0.attn"] == "head dim 260; the kernel takes up to 256"
    assert_same(model, fused, images(1, 3, 24, 32), grad=False)


@pytest.mark.parametrize("kind", ["patch_embed", "layer_norm", "attention", "mlp", "block"])
def test_a_changed_subclass_is_declined(kind):
    # a user's own forward must go on being called, whichever class it refines
    model = reference()
    victims = {
        "patch_embed": model.patch_embed,
        "layer_norm": model.blocks[0].norm1,
        "attention": model.blocks[0].attn,
        "mlp": model.blocks[0].mlp,
        "block": model.blocks[0],
    }
    victim = victims[kind]
    original = type(victim)

    class Doubled(original):
        def forward(self, x):
            return 2.0 * super().forward(x)

    victim.__class__ = Doubled
    plain = copy.deepcopy(model)
    fused = vitfast.accelerate(model)
    assert type(victim) is Doubled
    name = next(name for name, module in fused.named_modules() if module is victim)
    assert kept_reasons(fused)[name].startswith("computes something else than Fused")
    assert_same(plain, fused, images(2, 3, 24, 32))


ERRORS = {
    "height not divisible": (2, 3, 20, 32),
    "width not divisible": (2, 3, 24, 30),
    "four channels": (2, 4, 24, 32),
    "no batch dimension": (3, 24, 32),
    "five dimensions": (2, 3, 1, 24, 32),
}


@pytest.mark.parametrize("only", [None, ("patch_embed",)], ids=["all", "patch_embed"])
@pytest.mark.parametrize("case", ERRORS)
def test_wrong_images_get_the_models_own_error(case, only):
    plain = reference()
    fused = vitfast.accelerate(copy.deepcopy(plain), only=only)
    for call in (lambda m, x: m(x), lambda m, x: m.patch_embed(x)):
        with pytest.raises(Exception) as expected:
            call(plain, images(*ERRORS[case]))
        with pytest.raises(Exception) as got:
            call(fused, images(*ERRORS[case]))
        assert type(got.value) is type(expected.value)
        assert str(got.value) == str(expected.value)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=["uint8", "int64"])
def test_integer_pixels_get_torchs_own_error(dtype):
    plain = reference()
    fused = vitfast.accelerate(copy.deepcopy(plain))
    x = torch.ones(1, 3, 24, 32, dtype=dtype)
    with pytest.raises(RuntimeError) as expected:
        plain(x)
    with pytest.raises(RuntimeError) as got:
        fused(x)
    assert str(got.value) == str(expected.value)


def test_reset_classifier_after_accelerate():
    plain = reference()
    fused = vitfast.accelerate(copy.deepcopy(plain))
    for model in (plain, fused):
        model.reset_classifier(5, "avg")
        nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(2))
    assert_same(plain, fused, images(2, 3, 24, 32))
