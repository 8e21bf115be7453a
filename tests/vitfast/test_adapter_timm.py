"""timm's models, plain and accelerated: every option, outputs and gradients."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention, LayerNorm, LayerNormFp32, Mlp, RmsNorm, SwiGLU, SwiGLUPacked, set_fused_attn
from timm.models import create_feature_extractor, vision_transformer
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vitfast
from tests._close import assert_close
from tests.vitfast._models import (
    assert_equal,
    assert_same,
    check,
    fused_names,
    hook_all,
    images,
    kept_reasons,
    randomise,
    timm_beit,
    timm_deit,
    timm_eva,
    timm_model,
    timm_swin,
    timm_vit,
)
from vitfast import kernels
from vitfast.layers import FusedBlock


def vit(attention: dict | None = None, **changes) -> VisionTransformer:
    """timm's model, with its attention modules built anew where arguments of theirs are given."""
    model = timm_vit(**changes)
    if attention:
        for block in model.blocks:
            block.attn = Attention(48, 4, qkv_bias=True, **attention)
        randomise(model)
    return model.eval()


OPTIONS = {
    "class token": {},
    "average pool": {"global_pool": "avg"},
    "average pool, no class token": {"global_pool": "avg", "class_token": False},
    "average pool with prefix": {"global_pool": "avg", "pool_include_prefix": True, "reg_tokens": 2},
    "avgmax pool": {"global_pool": "avgmax"},
    "map pool": {"global_pool": "map", "class_token": False},
    "prr pool": {"global_pool": "prr"},
    "no pool": {"global_pool": "", "num_classes": 0},
    "registers": {"reg_tokens": 3},
    "registers, no_embed_class": {"reg_tokens": 3, "no_embed_class": True},
    "registers, no class token": {"reg_tokens": 2, "class_token": False, "global_pool": "avg"},
    "no_embed_class": {"no_embed_class": True},
    "positions none": {"pos_embed": "none"},
    "positions none, no prefix": {"pos_embed": "none", "class_token": False, "global_pool": "avg"},
    "LayerScale": {"init_values": 0.1},
    "qk_norm": {"qk_norm": True},
    "scale_attn_norm": {"scale_attn_norm": True},
    "scale_mlp_norm": {"scale_mlp_norm": True},
    "both scale norms, LayerScale": {"scale_attn_norm": True, "scale_mlp_norm": True, "init_values": 0.1},
    "pre_norm, QuickGELU": {"pre_norm": True, "act_layer": "quick_gelu", "norm_layer": partial(LayerNorm, eps=1e-5)},
    "GELU tanh": {"act_layer": "gelu_tanh"},
    "timm's GELU": {"act_layer": timm.layers.activations.GELU},
    "SiLU": {"act_layer": "silu"},
    "fc_norm": {"fc_norm": True},
    "no final norm": {"final_norm": False},
    "embed norm": {"embed_norm_layer": LayerNorm},
    "norm without weights": {"norm_layer": partial(LayerNorm, affine=False)},
    "RmsNorm": {"norm_layer": RmsNorm},
    "LayerNormFp32": {"norm_layer": LayerNormFp32},
    "nn.LayerNorm": {"norm_layer": partial(nn.LayerNorm, eps=1e-6)},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "SwiGLU": {"mlp_layer": SwiGLU, "act_layer": nn.SiLU},
    "SwiGLU packed": {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 5.0},
    "gated attention": {"attention": {"gated": True}},
    "wide heads": {"attention": {"attn_head_dim": 20}},
    "differential attention": {"attn_layer": "diff"},
    "post-norm blocks": {"block_fn": vision_transformer.ResPostBlock, "init_values": 0.1},
    "parallel blocks": {"block_fn": vision_transformer.ParallelScalingBlock},
    "parallel things": {"block_fn": vision_transformer.ParallelThingsBlock},
    "padded images": {"dynamic_img_pad": True},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_outputs_and_gradients(option):
    check(vit, images(2, 3, 24, 32), **OPTIONS[option])


@pytest.mark.parametrize("option", ["class token", "LayerScale", "qk_norm", "scale_attn_norm"])
def test_outputs_and_gradients_without_fused_attention(option):
    x = images(2, 3, 24, 32)
    plain = timm_vit(**OPTIONS[option])
    set_fused_attn(False)
    try:
        matmul = timm_vit(**OPTIONS[option])
        dropping = timm_vit(attn_drop_rate=0.3, **OPTIONS[option])
    finally:
        set_fused_attn(True)
    fused = vitfast.accelerate(copy.deepcopy(matmul))
    assert not fused.blocks[0].attn.fused_attn
    # torch's fused attention is the baseline: the keys' biases have no gradient but rounding, and that is the method's
    assert_same(plain, fused, x)
    torch.testing.assert_close(fused(x), matmul(x))
    # with dropout at work timm's own matrix products run, and draw the same numbers
    assert_same(dropping, vitfast.accelerate(copy.deepcopy(dropping)), x, train=True)


DYNAMIC = {
    "class token": {},
    "registers, no_embed_class": {"reg_tokens": 2, "no_embed_class": True},
    "no prefix": {"class_token": False, "global_pool": "avg"},
    "positions none": {"pos_embed": "none"},
    "padded": {"dynamic_img_pad": True},
}


@pytest.mark.parametrize("size", [(24, 32), (48, 16), (32, 32), (8, 96)], ids=str)
@pytest.mark.parametrize("option", DYNAMIC)
def test_dynamic_image_size(option, size):
    check(timm_vit, images(2, 3, *size), dynamic_img_size=True, **DYNAMIC[option])


def test_dynamic_image_size_with_padding():
    check(timm_vit, images(2, 3, 27, 30), dynamic_img_size=True, dynamic_img_pad=True)


DEIT = {
    "plain": {},
    "LayerScale, dynamic size": {"init_values": 0.2, "dynamic_img_size": True},
    "dropout": {"drop_rate": 0.2, "drop_path_rate": 0.3, "pos_drop_rate": 0.2},
}


@pytest.mark.parametrize("distilled_training", [False, True], ids=["average", "tuple"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("option", DEIT)
def test_distilled(option, train, distilled_training):
    def build(**changes):
        model = timm_deit(**changes)
        model.set_distilled_training(distilled_training)
        return model

    x = images(2, 3, 24, 32)
    fused = check(build, x, train=train, **DEIT[option])
    assert fused_names(fused)[""] == "FusedTimmVisionTransformerDistilled"
    assert isinstance(fused.train(train)(x), tuple) is (train and distilled_training)


def test_distilled_dynamic_image_size():
    check(timm_deit, images(2, 3, 48, 16), dynamic_img_size=True)


DROPOUTS = {
    "patch_drop": {"patch_drop_rate": 0.4, "reg_tokens": 1},
    "pos_drop": {"pos_drop_rate": 0.3},
    "pos_drop, positions none": {"pos_drop_rate": 0.3, "pos_embed": "none"},
    "proj_drop": {"proj_drop_rate": 0.3},
    "attn_drop": {"attn_drop_rate": 0.3},
    "drop_path": {"drop_path_rate": 0.5},
    "all, LayerScale, qk_norm": {
        "patch_drop_rate": 0.3,
        "pos_drop_rate": 0.1,
        "proj_drop_rate": 0.2,
        "attn_drop_rate": 0.2,
        "drop_path_rate": 0.4,
        "drop_rate": 0.1,
        "init_values": 0.2,
        "qk_norm": True,
    },
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("option", DROPOUTS)
def test_dropout_draws_the_same_random_numbers(option, train):
    fused = check(timm_vit, images(4, 3, 24, 32), train=train, **DROPOUTS[option])
    if train and option != "pos_drop, positions none":
        x = images(4, 3, 24, 32)
        fused.train()
        torch.manual_seed(0)
        first = fused(x)
        torch.manual_seed(1)
        assert not torch.equal(first, fused(x))


@pytest.mark.parametrize("where", ["attn_drop", "drop_path1", "proj_drop", "drop1"])
def test_dropout_in_another_mode_than_its_parent(where):
    # people switch single dropouts: the fused layers must look where the original looks
    plain = timm_vit(attn_drop_rate=0.4, drop_path_rate=0.4, proj_drop_rate=0.4)
    fused = vitfast.accelerate(copy.deepcopy(plain))
    for flipped in (True, False):
        for model in (plain, fused):
            model.train(not flipped)
            for name, module in model.named_modules():
                if name.rpartition(".")[2] == where:
                    module.train(flipped)
        results = []
        for model in (plain, fused):
            torch.manual_seed(5)
            results.append(model(images(4, 3, 24, 32)))
        torch.testing.assert_close(results[1], results[0])


def _mask(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    keep = torch.rand(13, 13, generator=generator) > 0.3
    keep.fill_diagonal_(True)
    return keep if kind == "bool" else torch.randn(13, 13, generator=generator)


MASKS = {
    "bool mask": lambda model, x: model(x, attn_mask=_mask("bool")),
    "additive mask": lambda model, x: model(x, attn_mask=_mask("float").to(x.dtype)),
    "causal": lambda model, x: model(x, is_causal=True),
    "causal features": lambda model, x: model.forward_features(x, is_causal=True),
    "masked block": lambda model, x: model.blocks[0](model.norm(model.forward_features(x)), attn_mask=_mask("bool")),
    "masked attention": lambda model, x: model.blocks[1].attn(model.forward_features(x), is_causal=True),
}


@pytest.mark.parametrize("fused_attn", [True, False], ids=["sdpa", "matmul"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask, fused_attn):
    set_fused_attn(fused_attn)
    try:
        check(timm_vit, images(2, 3, 24, 32), MASKS[mask], init_values=0.3)
    finally:
        set_fused_attn(True)
    x = images(2, 3, 24, 32)
    model = vitfast.accelerate(timm_vit(init_values=0.3))
    assert not torch.allclose(model(x), model(x, attn_mask=_mask("bool"))), "the mask has no effect"


CALLS = {
    "forward_features": lambda model, x: model.forward_features(x),
    "forward_head, pre_logits": lambda model, x: model.forward_head(model.forward_features(x), pre_logits=True),
    "forward_intermediates": lambda model, x: model.forward_intermediates(x, norm=True, return_prefix_tokens=True),
    "forward_intermediates, stop early": lambda model, x: model.forward_intermediates(x, [0], stop_early=True),
    "forward_intermediates, dict": lambda model, x: model.forward_intermediates(x, output_dict=True, output_fmt="NLC"),
    "forward_intermediates, causal": lambda model, x: model.forward_intermediates(x, is_causal=True),
    "get_intermediate_layers": lambda model, x: model.get_intermediate_layers(x, 2, reshape=True, norm=True),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("call", CALLS)
def test_feature_interfaces(call, dynamic):
    check(timm_vit, images(2, 3, 24, 32), CALLS[call], reg_tokens=1, init_values=0.3, dynamic_img_size=dynamic)


def test_features_only():
    def build():
        return timm_model(
            "vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=48, features_only=True, out_indices=(0, 1)
        )

    fused = check(build, images(2, 3, 64, 64), lambda model, x: model(x))
    assert fused_names(fused)["model"] == "FusedTimmVisionTransformer"


@pytest.mark.parametrize("changes", [{}, {"attention": {"gated": True}}], ids=["plain", "gated"])
def test_gradient_checkpointing(changes):
    plain = vit(drop_path_rate=0.3, proj_drop_rate=0.2, **changes)
    fused = vitfast.accelerate(copy.deepcopy(plain))
    for model in (plain, fused):
        model.set_grad_checkpointing(True)
    assert_same(plain, fused, images(4, 3, 24, 32), train=True)


# a registered model's changes, its image's side, and what its blocks become
MODELS: dict[str, tuple[dict[str, Any], int, str]] = {
    "vit_tiny_patch16_224": ({}, 64, "Block"),
    "vit_small_patch14_dinov2": ({}, 56, "Block"),
    "vit_giant_patch14_reg4_dinov2": ({"embed_dim": 48}, 56, "Block"),
    "vit_base_patch16_clip_quickgelu_224": ({}, 64, "Block"),
    "vit_large_patch14_clip_224": ({}, 56, "Block"),
    "vit_base_patch16_siglip_224": ({}, 64, "Block"),
    "vit_base_patch16_siglip_gap_224": ({}, 64, "Block"),
    "vit_so150m_patch16_reg4_map_256": ({}, 64, "Block"),
    "vit_base_patch16_gap_224": ({}, 64, "Block"),
    "deit3_small_patch16_224": ({}, 64, "Block"),
    "deit_tiny_distilled_patch16_224": ({}, 64, "Block"),
    "flexivit_small": ({}, 64, "Block"),
    "aimv2_large_patch14_224": ({}, 56, "Block"),
    "naflexvit_base_patch16_gap": ({}, 64, "Block"),
    "vit_base_resnet26d_224": ({}, 64, "Block"),
    "vit_base_r50_s16_224": ({}, 64, "Block"),
    "vit_base_patch16_rpn_224": ({}, 64, ""),
    "vit_base_patch16_xp_224": ({}, 64, ""),
    "vit_relpos_small_patch16_224": ({}, 64, ""),
    "eva_large_patch14_196": ({}, 56, "Block"),
    "beit_base_patch16_224": ({}, 64, "BeitBlock"),
    "beitv2_base_patch16_224": ({}, 64, "BeitBlock"),
    "eva02_tiny_patch14_224": ({}, 56, "EvaBlock"),
    "eva02_base_patch16_clip_224": ({}, 64, "EvaBlock"),
    "eva02_enormous_patch14_clip_224": ({}, 56, ""),
    "eva_giant_patch14_224": ({}, 56, "EvaBlock"),
    "vit_small_patch16_rope_224": ({}, 64, "EvaBlock"),
    "vit_small_patch16_dinov3": ({}, 64, "EvaBlock"),
    "vit_pe_core_tiny_patch16_384": ({}, 64, "EvaBlock"),
    "vit_base_patch16_sapiens2": ({"num_kv_heads": 2}, 64, "EvaBlock"),
    "cait_xxs24_224": ({}, 64, ""),
    "xcit_nano_12_p16_224": ({}, 64, ""),
    "mixer_s32_224": ({}, 64, ""),
    "pit_ti_224": ({}, 64, "Block"),
    "swin_tiny_patch4_window7_224": ({}, 56, "SwinBlock"),
    "swin_base_patch4_window12_384": ({}, 96, "SwinBlock"),
    "swin_s3_tiny_224": ({"window_size": (7, 14)}, 56, "SwinBlock"),
    "swinv2_tiny_window8_256": ({}, 64, "SwinV2Block"),
    "swinv2_base_window12to16_192to256": ({"pretrained_window_sizes": (12, 6)}, 128, "SwinV2Block"),
    "swinv2_cr_tiny_224": ({}, 56, ""),
}


@pytest.mark.parametrize("name", MODELS)
def test_registered_models(name):
    # other families hold some of the same modules: those are replaced, the rest works as before
    changes, size, block = MODELS[name]
    if name.startswith("swin"):
        tiny: dict[str, Any] = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
    elif name.startswith(("mixer", "pit")):
        tiny = {}
    else:
        tiny = {"embed_dim": 64, "num_heads": 4, "depth": 2}
    plain = timm_model(name, num_classes=5, img_size=size, **{**tiny, **changes})
    fused = vitfast.accelerate(copy.deepcopy(plain))
    names = fused_names(fused)
    assert names
    assert {kind for kind in names.values() if kind.endswith("Block")} == ({f"FusedTimm{block}"} if block else set())
    assert_equal(plain, fused, images(1, 3, size, size))
    vitfast.restore(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in plain.modules()]


DECLINED_FAMILIES = {
    "vit_relpos_small_patch16_224": ("blocks.0.attn", "relative positions from a module: no kernel reads them"),
    "swinv2_cr_tiny_224": ("stages.0.blocks.0.attn", "relative positions from a module: no kernel reads them"),
    "eva02_enormous_patch14_clip_224": ("blocks.0", "not the plain pre-norm block"),
}


@pytest.mark.parametrize("name", DECLINED_FAMILIES)
def test_what_is_declined_of_registered_models(name):
    changes = {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4)} if "swin" in name else {"depth": 1}
    model = timm_model(name, **{**({} if "swin" in name else {"embed_dim": 64, "num_heads": 4}), **changes})
    module, reason = DECLINED_FAMILIES[name]
    assert kept_reasons(vitfast.accelerate(model))[module] == reason


def test_a_model_without_known_modules_stays_as_it_is():
    plain = timm_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=5)
    fused = vitfast.accelerate(copy.deepcopy(plain))
    assert [type(m) for m in fused.modules()] == [type(m) for m in plain.modules()]
    # over channels in front
    assert "LayerNorm2d  -            cannot be tried" in str(vitfast.report(fused))


def test_every_part_of_the_model_is_replaced():
    fused = vitfast.accelerate(timm_vit(init_values=0.1, qk_norm=True, scale_attn_norm=True))
    names = fused_names(fused)
    assert names[""] == "FusedTimmVisionTransformer"
    assert names["patch_embed"] == "FusedTimmPatchEmbed"
    for i in range(2):
        assert names[f"blocks.{i}"] == "FusedTimmBlock"
        assert names[f"blocks.{i}.attn"] == "FusedTimmAttention"
        assert names[f"blocks.{i}.mlp"] == "FusedTimmMlp"
        for norm in ("norm1", "norm2", "attn.q_norm", "attn.k_norm", "attn.norm"):
            assert names[f"blocks.{i}.{norm}"] == "FusedTimmLayerNorm"
    assert names["norm"] == "FusedTimmLayerNorm"
    assert not vitfast.report(fused).kept


DECLINED = {
    "gated attention": ("blocks.0.attn", "gated attention"),
    "SwiGLU": ("blocks.0.mlp", "gated MLP: no kernel has its gate in an epilogue"),
    "SwiGLU packed": ("blocks.0.mlp", "gated MLP: no kernel has its gate in an epilogue"),
    "post-norm blocks": ("blocks.0", "not the plain pre-norm block"),
    "parallel blocks": ("blocks.0", "not the plain pre-norm block"),
    "parallel things": ("blocks.0", "not the plain pre-norm block"),
    "padded images": ("patch_embed", "pads images (dynamic_img_pad)"),
    "SiLU": ("blocks.0.mlp", "activation SiLU is in no epilogue"),
    "LayerNormFp32": ("norm", "computes something else than FusedLayerNorm: other outputs in evaluation"),
    "map pool": ("attn_pool", "attention pooling has one query and is not worth a kernel"),
    "differential attention": ("blocks.0.attn", "differential attention: two softmaxes, no kernel"),
}


@pytest.mark.parametrize("option", DECLINED)
def test_what_is_declined_is_reported_and_strict_raises(option):
    name, reason = DECLINED[option]
    model = vit(**OPTIONS[option])
    with pytest.raises(ValueError, match="strict") as error:
        vitfast.accelerate(model, strict=True)
    assert f"{name} ({type(model.get_submodule(name)).__name__}): {reason}" in str(error.value)
    assert not fused_names(model), "a refused call must change nothing"
    vitfast.accelerate(model)
    assert kept_reasons(model)[name] == reason


def test_fast_norm_is_declined():
    timm.layers.set_fast_norm(True)
    try:
        model = timm_vit()
    finally:
        timm.layers.set_fast_norm(False)
    plain = copy.deepcopy(model)
    assert "fast norm" in kept_reasons(vitfast.accelerate(model))["norm"]
    assert_same(plain, model, images(2, 3, 24, 32))


def test_a_subclass_of_the_model_keeps_its_own_forward():
    class Shifted(VisionTransformer):
        def _pos_embed(self, x):
            return super()._pos_embed(x) + 1.0

    plain = timm_vit()
    plain.__class__ = Shifted
    fused = vitfast.accelerate(copy.deepcopy(plain))
    reason = "computes something else than FusedTimmVisionTransformer: other outputs in evaluation"
    assert kept_reasons(fused) == {"": reason}
    assert "blocks.0" in fused_names(fused)
    assert_same(plain, fused, images(2, 3, 24, 32))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("method", ["_pos_embed", "forward_features"])
def test_a_method_replaced_on_the_model_takes_effect(method, when):
    # ZoeDepth, MiDaS and others patch models in this way
    def patch(model):
        original = getattr(VisionTransformer, method)
        setattr(model, method, lambda x, **kwargs: 2.0 * original(model, x, **kwargs))
        return model

    x = images(2, 3, 24, 32)
    expected = patch(timm_vit())(x)
    model = timm_vit()
    model = vitfast.accelerate(patch(model)) if when == "before" else patch(vitfast.accelerate(model))
    torch.testing.assert_close(model(x), expected)
    assert method in str(vitfast.report(model))


def _strided(conv: nn.Conv2d) -> None:
    # how dense feature extractors (DINO descriptors) overlap patches
    conv.stride = (4, 4)


def _padded(conv: nn.Conv2d) -> None:
    conv.padding = (4, 4)


def _dilated(conv: nn.Conv2d) -> None:
    conv.dilation = (2, 2)


@pytest.mark.parametrize("change", [_strided, _padded, _dilated])
def test_a_convolution_changed_in_place_is_called(change):
    plain = timm_vit(pos_embed="none")
    fused = vitfast.accelerate(copy.deepcopy(plain))
    for model in (plain, fused):
        change(model.patch_embed.proj)
    assert_same(plain, fused, images(2, 3, 24, 32))
    row = next(row for row in vitfast.report(fused).replaced if row.module == "patch_embed")
    assert "called as a module" in row.note


def test_set_input_size_after_accelerate():
    plain = timm_vit(reg_tokens=1)
    fused = vitfast.accelerate(copy.deepcopy(plain))
    for model in (plain, fused):
        model.set_input_size(img_size=(16, 48))
    assert_same(plain, fused, images(2, 3, 16, 48))
    for model in (plain, fused):
        model.set_input_size(img_size=(32, 48), patch_size=(16, 16))
    assert_same(plain, fused, images(2, 3, 32, 48))


def test_reset_classifier_and_pruning_after_accelerate():
    plain = timm_vit()
    fused = vitfast.accelerate(copy.deepcopy(plain))
    for model in (plain, fused):
        torch.manual_seed(2)
        model.reset_classifier(5, "avg")
    assert_same(plain, fused, images(2, 3, 24, 32))
    for model in (plain, fused):
        model.prune_intermediate_layers(1, prune_norm=True)
    assert len(fused.blocks) == 2
    for model in (plain, fused):
        model.prune_intermediate_layers([0])
    assert len(fused.blocks) == 1
    assert_same(plain, fused, images(2, 3, 24, 32))


ERRORS = {
    "wrong size": ({}, (2, 3, 32, 32)),
    "not divisible": ({"dynamic_img_size": True}, (2, 3, 20, 32)),
    "four channels": ({}, (2, 4, 24, 32)),
    "four channels, dynamic": ({"dynamic_img_size": True}, (2, 4, 24, 32)),
    "no batch dimension": ({}, (3, 24, 32)),
}


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_images_get_timms_own_error(case):
    changes, shape = ERRORS[case]
    plain = timm_vit(**changes)
    fused = vitfast.accelerate(copy.deepcopy(plain))
    for call in (lambda m, x: m(x), lambda m, x: m.patch_embed(x)):
        with pytest.raises(Exception) as expected:
            call(plain, images(*shape))
        with pytest.raises(Exception) as got:
            call(fused, images(*shape))
        assert type(got.value) is type(expected.value)
        assert str(got.value) == str(expected.value)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=["uint8", "int64"])
def test_integer_pixels_get_torchs_own_error(dtype):
    plain = timm_vit()
    fused = vitfast.accelerate(copy.deepcopy(plain))
    x = torch.ones(1, 3, 24, 32, dtype=dtype)
    with pytest.raises(RuntimeError) as expected:
        plain(x)
    with pytest.raises(RuntimeError) as got:
        fused(x)
    assert str(got.value) == str(expected.value)


def test_an_mlp_of_convolutions_is_declined():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = Mlp(8, 16, use_conv=True)

        def forward(self, x):
            return self.mlp(x)

    plain = randomise(Net())
    fused = vitfast.accelerate(copy.deepcopy(plain))
    assert kept_reasons(fused) == {"mlp": "fc1 is a Conv2d; the kernel replaces nn.Linear"}
    assert_same(plain, fused, images(2, 8, 3, 3))


def test_a_patch_embedding_of_another_layout_is_declined():
    plain = randomise(timm.layers.PatchEmbed(32, 8, 3, 24, output_fmt="NCHW"))
    fused = vitfast.accelerate(copy.deepcopy(plain))
    assert kept_reasons(fused) == {"": "hands out NCHW; the kernel NLC or NHWC"}
    assert_same(plain, fused, images(2, 3, 32, 32))


BEIT = {
    "table": {},
    "shared": {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
    "table and shared": {"use_shared_rel_pos_bias": True},
    "no bias": {"use_rel_pos_bias": False},
    "positions, class token": {"use_abs_pos_emb": True, "global_pool": "token"},
    "no LayerScale": {"init_values": None},
    "no biases of q and v": {"qkv_bias": False},
    "biases apart": {"separate": True},
    "SwiGLU": {"swiglu_mlp": True},
    "scale_mlp": {"scale_mlp": True},
    "no pool": {"global_pool": "", "num_classes": 0},
}

BEIT_DROPOUTS = {
    "pos_drop": {"pos_drop_rate": 0.3},
    "proj_drop": {"proj_drop_rate": 0.3},
    "attn_drop": {"attn_drop_rate": 0.3},
    "drop_path": {"drop_path_rate": 0.5},
    "all, no LayerScale": {"proj_drop_rate": 0.2, "attn_drop_rate": 0.2, "drop_path_rate": 0.4, "init_values": None},
}


@pytest.mark.parametrize("option", BEIT)
def test_beit(option):
    fused = check(timm_beit, images(2, 3, 24, 32), **BEIT[option])
    assert fused_names(fused)["blocks.1"] == "FusedTimmBeitBlock"
    assert fused_names(fused)["blocks.1.attn"] == "FusedTimmBeitAttention"


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("option", BEIT_DROPOUTS)
def test_beit_dropout(option, train):
    check(timm_beit, images(4, 3, 24, 32), train=train, **BEIT_DROPOUTS[option])


def test_beit_reads_the_table_inside_the_kernel(monkeypatch):
    model = vitfast.accelerate(timm_beit())
    x = images(2, 3, 24, 32)
    expected = model(x)
    for block in model.blocks:
        monkeypatch.setattr(type(block.attn), "_get_rel_pos_bias", None)
    torch.testing.assert_close(model(x), expected)
    with torch.no_grad():
        model.blocks[0].attn.relative_position_bias_table.neg_()
    assert not torch.allclose(model(x), expected), "the table has no effect"


def test_beit_through_torchs_attention():
    plain = timm_beit()
    fused = vitfast.accelerate(copy.deepcopy(plain), attention="sdpa")
    fused.blocks[0].attn.__class__ = type("Counted", (type(fused.blocks[0].attn),), {"_summed": lambda *_: 1 / 0})
    with pytest.raises(ZeroDivisionError):
        fused(images(2, 3, 24, 32))
    assert_same(plain, vitfast.accelerate(copy.deepcopy(plain), attention="sdpa"), images(2, 3, 24, 32))


def test_beit_of_another_size():
    plain = timm_beit(use_shared_rel_pos_bias=True)
    fused = vitfast.accelerate(copy.deepcopy(plain))
    for model in (plain, fused):
        model.set_input_size(img_size=(16, 48))
    assert_same(plain, fused, images(2, 3, 16, 48))


EVA = {
    "rotated": {},
    "no rotation": {"use_rot_pos_emb": False},
    "no positions but rotation": {"use_abs_pos_emb": False},
    "mixed": {"rope_type": "mixed"},
    "dinov3": {"rope_type": "dinov3", "rope_rotate_half": True},
    "three layers": {"qkv_fused": False},
    "three layers, no biases": {"qkv_fused": False, "qkv_bias": False},
    "no biases": {"qkv_bias": False},
    "LayerScale": {"init_values": 0.3},
    "LayerScale of attention": {"init_values": 0.3, "attn_only_layer_scale": True},
    "both scale norms, SwiGLU": {"swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True},
    "GluMlp": {"swiglu_mlp": True},
    "qk_norm": {"qk_norm": True},
    "AttentionRope": {"attn_type": "rope"},
    "AttentionRope, three layers, qk_norm": {"attn_type": "rope", "qkv_fused": False, "qk_norm": True},
    "grouped queries": {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 2},
    "registers": {"num_reg_tokens": 3, "no_embed_class": True},
    "no prefix": {"class_token": False},
    "norm before, class token": {"use_pre_transformer_norm": True, "global_pool": "token"},
    "map pool": {"global_pool": "map"},
    "norm behind": {"use_post_norm": True},
}


@pytest.mark.parametrize("option", EVA)
def test_eva(option):
    fused = check(timm_eva, images(2, 3, 24, 32), **EVA[option])
    names = fused_names(fused)
    kind = "FusedTimmAttentionRope" if "AttentionRope" in option else "FusedTimmEvaAttention"
    assert names.get("blocks.1.attn") == (None if option == "grouped queries" else kind)
    assert names.get("blocks.1") == (None if option == "norm behind" else "FusedTimmEvaBlock")


DECLINED_EVA = {
    "norm behind": ("blocks.0", "not the plain pre-norm block"),
    "grouped queries": ("blocks.0.attn", "grouped-query attention: k and v have fewer heads than q"),
    "both scale norms, SwiGLU": ("blocks.0.mlp", "gated MLP: no kernel has its gate in an epilogue"),
    "map pool": ("attn_pool", "attention pooling has one query and is not worth a kernel"),
}


@pytest.mark.parametrize("option", DECLINED_EVA)
def test_what_eva_declines_is_reported(option):
    name, reason = DECLINED_EVA[option]
    assert kept_reasons(vitfast.accelerate(timm_eva(**EVA[option])))[name] == reason


def test_gated_eva_attention_is_declined():
    plain = timm_eva()
    for block in plain.blocks:
        block.attn = EvaAttention(64, 4, norm_layer=LayerNorm, gated=True)
    fused = vitfast.accelerate(copy.deepcopy(randomise(plain).eval()))
    assert kept_reasons(fused)["blocks.0.attn"] == "gated attention"
    assert_same(plain, fused, images(2, 3, 24, 32))


@pytest.mark.parametrize("option", ["rotated", "mixed"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_eva_dropout(option, train):
    rates = {"proj_drop_rate": 0.2, "drop_path_rate": 0.4, "pos_drop_rate": 0.2, "patch_drop_rate": 0.3}
    check(timm_eva, images(4, 3, 24, 32), train=train, **rates, **EVA[option])
    check(timm_eva, images(4, 3, 24, 32), train=train, attn_drop_rate=0.3, **EVA[option])


def test_eva_dynamic_image_size():
    check(timm_eva, images(2, 3, 48, 16), dynamic_img_size=True)


@pytest.mark.parametrize("mask", ["bool mask", "additive mask", "causal", "masked attention"])
def test_eva_masks(mask):
    check(timm_eva, images(2, 3, 24, 32), MASKS[mask], init_values=0.3)


MAPS = {
    "BEiT": (timm_beit, {}),
    "BEiT, both biases": (timm_beit, {"use_shared_rel_pos_bias": True}),
    "BEiT, biases apart": (timm_beit, {"separate": True}),
    "EVA": (timm_eva, {"qk_norm": True}),
    "EVA, mixed, three layers": (timm_eva, {"rope_type": "mixed", "qkv_fused": False}),
    "AttentionRope": (timm_eva, {"attn_type": "rope", "num_reg_tokens": 2}),
}


@pytest.mark.parametrize("case", MAPS)
def test_attention_maps_of_other_families(case):
    build, changes = MAPS[case]
    x = images(2, 3, 24, 32)
    plain = build(**changes)
    fused = vitfast.accelerate(copy.deepcopy(plain))
    eager = copy.deepcopy(plain)
    seen: list[Tensor] = []
    for block in eager.blocks:
        # what timm drops from are the probabilities
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    eager(x)
    for model in (plain, fused):
        maps = vitfast.attention_maps(model, x, heads=None)
        assert len(maps) == len(seen) == 2
        for actual, expected in zip(maps, seen, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_hybrids_keep_their_stem():
    fused = check(
        partial(timm_model, "vit_small_r26_s32_224"),
        images(1, 3, 64, 64),
        embed_dim=48,
        num_heads=4,
        depth=2,
        img_size=64,
        num_classes=5,
    )
    assert kept_reasons(fused)["patch_embed"] == "convolutional stem: the kernel embeds pixels"
    assert fused_names(fused)[""] == "FusedTimmVisionTransformer"
    assert fused_names(fused)["blocks.1"] == "FusedTimmBlock"


FAMILIES: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "BEiT": (timm_beit, {}),
    "BEiT, shared": (timm_beit, {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False}),
    "EVA": (timm_eva, {"scale_mlp": True, "swiglu_mlp": True}),
    "EVA, three layers": (timm_eva, {"qkv_fused": False, "init_values": 0.3}),
    "Swin": (timm_swin, {}),
    "Swin-V2": (timm_swin, {"version": 2}),
}


@pytest.fixture(params=FAMILIES)
def family(request) -> tuple[nn.Module, nn.Module]:
    build, changes = FAMILIES[request.param]
    plain = build(**changes)
    return plain, vitfast.accelerate(copy.deepcopy(plain))


FAMILY_CALLS = {
    "forward_features": lambda model, x: model.forward_features(x),
    "forward_head": lambda model, x: model.forward_head(model.forward_features(x), pre_logits=True),
    "forward_intermediates": lambda model, x: model.forward_intermediates(x, norm=True),
    "forward_intermediates, stop early": lambda model, x: model.forward_intermediates(x, [0], stop_early=True),
}


@pytest.mark.parametrize("call", FAMILY_CALLS)
def test_feature_interfaces_of_other_families(family, call):
    assert_equal(*family, images(2, 3, 24, 32), FAMILY_CALLS[call])


def test_features_only_of_other_families():
    def build(name):
        return timm_model(name, img_size=64, depth=2, embed_dim=64, num_heads=4, features_only=True, out_indices=(0, 1))

    for name in ("beit_base_patch16_224", "eva02_base_patch16_clip_224"):
        fused = check(partial(build, name), images(1, 3, 64, 64))
        assert {"FusedTimmBeitBlock", "FusedTimmEvaBlock"} & set(fused_names(fused).values())


def test_gradient_checkpointing_of_other_families(family):
    for model in family:
        model.set_grad_checkpointing(True)
    assert_equal(*family, images(4, 3, 24, 32), train=True)


def test_hooks_of_other_families_see_the_same(family):
    plain, fused = family
    expected, actual = hook_all(plain), hook_all(fused)
    with torch.no_grad():
        for model in family:
            model(images(2, 3, 24, 32))
    assert [name for name, *_ in actual] == [name for name, *_ in expected]
    assert len(actual) > 25
    for (name, *a), (_, *e) in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, msg=lambda text, name=name: f"{name}: {text}")


def test_copies_of_other_families(family):
    plain, fused = family
    x = images(2, 3, 24, 32)
    assert plain.state_dict().keys() == fused.state_dict().keys()
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert fused_names(other) == fused_names(fused)
        torch.testing.assert_close(other(x), fused(x))
    fused.load_state_dict(plain.state_dict())
    plain.load_state_dict(fused.state_dict())
    assert_equal(plain, fused, x)


def test_other_families_are_traced_by_fx(family):
    blocks = [name for name, module in family[1].named_modules() if isinstance(module, FusedBlock)]
    x = images(2, 3, 24, 32)
    expected, actual = (create_feature_extractor(model, blocks)(x) for model in family)
    assert list(actual) == blocks
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_one_graph_of_other_families(family):
    plain, fused = family
    x = images(2, 3, 24, 32)
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-4)


def test_autocast_of_other_families(family):
    x = images(2, 3, 24, 32)
    with torch.no_grad():
        exact = copy.deepcopy(family[0]).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            plain, fused = (model(x) for model in family)
    assert fused.dtype == plain.dtype
    assert (fused.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max()


FOLDING = {
    "BEiT": (timm_beit, {}, 1),
    "BEiT, shared": (timm_beit, {"use_shared_rel_pos_bias": True}, 1),
    # biases that are added behind the layer, a gate in the MLP
    "BEiT, biases apart": (timm_beit, {"separate": True}, 0),
    "EVA": (timm_eva, {}, 1),
    "EVA, three layers, both scale norms": (
        timm_eva,
        {"qkv_fused": False, "scale_mlp": True, "scale_attn_inner": True, "init_values": 0.3},
        1,
    ),
    "EVA, SwiGLU": (timm_eva, {"swiglu_mlp": True, "scale_mlp": True}, 0),
    "AttentionRope": (timm_eva, {"attn_type": "rope", "rope_type": "mixed"}, 1),
    "Swin": (timm_swin, {}, 0),
    "Swin-V2": (timm_swin, {"version": 2}, 0),
}


@pytest.mark.interpret
@pytest.mark.parametrize("case", FOLDING)
def test_what_is_derived_follows_the_weights(case, monkeypatch):
    build, changes, folds = FOLDING[case]
    plain = build(**changes).half()
    fused = vitfast.accelerate(copy.deepcopy(plain), frozen=True)
    read = []
    inner = kernels.row_stats
    monkeypatch.setattr(kernels, "row_stats", lambda x: read.append(1) or inner(x))
    x = images(1, 3, 24, 32, dtype=torch.float16)

    def compare() -> None:
        assert_close(fused(x).detach(), copy.deepcopy(plain).double()(x.double()).detach(), plain(x).detach())

    with torch.no_grad():
        compare()
        # each block hands its statistics on
        assert len(read) == folds
        for model in (plain, fused):
            for name, parameter in model.named_parameters():
                if "bias" in name or "logit_scale" in name:
                    parameter.mul_(1.25)
        compare()
        for model in (plain, fused):
            for name, buffer in model.named_buffers():
                if name.endswith("k_bias"):
                    buffer.mul_(-1.0)
        compare()
    # gradients reach what was derived from
    compare()
    loss = fused(x).square().sum()
    assert all(g is not None for g in torch.autograd.grad(loss, [p for p in fused.parameters() if p.requires_grad]))
    for data in (plain, fused):
        for name, parameter in data.named_parameters():
            if "table" in name or name.endswith(("q_bias", "logit_scale")):
                # unseen, as some optimisers write
                parameter.data.mul_(0.5)
    fused.train().eval()
    with torch.no_grad():
        compare()
    vitfast.restore(fused)
    with torch.no_grad():
        compare()
