"""open_clip's vision towers, plain and accelerated, and the text towers that share their blocks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import vitfast
from tests._close import assert_close
from tests.vitfast import _contracts
from tests.vitfast._models import assert_same, check, fused_names, images, kept_reasons, randomise, run
from vitfast.layers import FusedBlock

open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
transformer = pytest.importorskip("open_clip.transformer")

X = (2, 3, 24, 32)
# 3 x 4 patches, head width 12
TINY = {
    "image_size": (24, 32),
    "patch_size": 8,
    "width": 48,
    "layers": 2,
    "heads": 4,
    "mlp_ratio": 2.0,
    "output_dim": 7,
}


def tower(**changes) -> nn.Module:
    return randomise(transformer.VisionTransformer(**{**TINY, **changes})).eval()


OPTIONS = {
    "plain": {},
    "LayerScale": {"ls_init_value": 0.3},
    "QuickGELU": {"act_layer": transformer.QuickGELU},
    "SiLU": {"act_layer": nn.SiLU},
    "average pool": {"pool_type": "avg"},
    "no pool": {"pool_type": "none"},
    "output tokens": {"output_tokens": True},
    "norm after pooling": {"final_ln_after_pool": True},
    "no norm before": {"no_ln_pre": True},
    "sines": {"pos_embed_type": "sin_cos_2d", "image_size": 24},
    "attentional pool": {"attentional_pool": True, "attn_pooler_heads": 1, "attn_pooler_queries": 4},
    "patch dropout": {"patch_dropout": 0.5},
    "qk_norm": {"qk_norm": True},
    "every custom option": {"scale_heads": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_outputs_and_gradients(option):
    size = OPTIONS[option].get("image_size")
    check(tower, images(4, 3, size, size) if size else images(4, *X[1:]), **OPTIONS[option])


def test_every_part_of_the_tower_is_replaced():
    fused = vitfast.accelerate(tower(ls_init_value=0.1, act_layer=transformer.QuickGELU))
    names = fused_names(fused)
    assert names[""] == "FusedOpenClipVisionTransformer"
    assert names["ln_pre"] == names["ln_post"] == "FusedOpenClipLayerNorm"
    for i in range(2):
        block = f"transformer.resblocks.{i}"
        assert names[block] == "FusedOpenClipBlock"
        assert names[f"{block}.attn"] == "FusedMultiheadAttention"
        assert names[f"{block}.mlp"] == "FusedSequential"
        assert names[f"{block}.ln_1"] == names[f"{block}.ln_2"] == "FusedOpenClipLayerNorm"
    report = vitfast.report(fused)
    assert not report.kept and not any(row.note for row in report.replaced)


def test_custom_blocks_are_declined_by_name():
    kept = kept_reasons(vitfast.accelerate(tower(qk_norm=True)))
    assert kept["transformer.resblocks.0"] == "not the plain pre-norm block"
    assert kept["transformer.resblocks.0.attn"].startswith("open_clip's own attention")


def test_an_activation_without_an_epilogue_is_reported():
    fused = vitfast.accelerate(tower(act_layer=nn.SiLU))
    note = next(row.note for row in vitfast.report(fused).replaced if row.module == "transformer.resblocks.0")
    assert note == "mlp is a Sequential: its residual is added outside it"


TAILS = {
    "class token": ({}, [1]),
    "norm after pooling": (OPTIONS["norm after pooling"], [1]),
    "LayerScale": (OPTIONS["LayerScale"], [1]),
    "output tokens": (OPTIONS["output tokens"], []),
    "average pool": (OPTIONS["average pool"], []),
    "attentional pool": (OPTIONS["attentional pool"], []),
}


@pytest.mark.parametrize("case", TAILS)
def test_the_last_block_computes_what_is_pooled(case, monkeypatch):
    changes, expected = TAILS[case]
    kept = []
    prefix = FusedBlock.fused_prefix
    monkeypatch.setattr(FusedBlock, "fused_prefix", lambda self, x, n, plan: kept.append(n) or prefix(self, x, n, plan))
    plain = tower(**changes)
    fused = vitfast.accelerate(copy.deepcopy(plain))
    assert_same(plain, fused, images(4, *X[1:]), grad=False)
    assert kept == expected
    fused.set_grad_checkpointing()
    fused.train()(images(*X))
    fused.eval()(images(*X))
    assert kept == expected


CALLS = {
    "intermediates": lambda model, x: model.forward_intermediates(x),
    "intermediates, last, tokens": lambda model, x: model.forward_intermediates(
        x, 1, normalize_intermediates=True, output_fmt="NLC", output_extra_tokens=True
    ),
    "intermediates, stop early": lambda model, x: model.forward_intermediates(
        x, [0], stop_early=True, intermediates_only=True
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_intermediates(call):
    check(tower, images(*X), CALLS[call], ls_init_value=0.3)


def test_pruning_and_locking_after_accelerate():
    plain = tower()
    fused = vitfast.accelerate(copy.deepcopy(plain))
    for model in (plain, fused):
        model.lock(unlocked_groups=2)
    assert_same(plain, fused, images(*X))
    for model in (plain, fused):
        model.requires_grad_(True)
        model.prune_intermediate_layers([0])
    assert len(fused.transformer.resblocks) == 1
    assert_same(plain, fused, images(*X))


def test_gradient_checkpointing_and_patch_dropout():
    plain = tower(ls_init_value=0.3, patch_dropout=0.5)
    plain.set_grad_checkpointing()
    _contracts.check_training(plain, images(4, *X[1:]))


def test_hooks():
    _contracts.check_hooks(tower(ls_init_value=0.3), images(*X))


def test_copies_pickles_and_state_dicts():
    _contracts.check_copies(tower(ls_init_value=0.3, act_layer=transformer.QuickGELU), images(*X))


def test_compiles_in_one_graph():
    _contracts.check_compile(tower(ls_init_value=0.3, act_layer=transformer.QuickGELU), images(*X))


def test_memory_layouts():
    _contracts.check_layouts(tower(), images(*X))


def test_wrong_images_get_open_clips_own_error():
    _contracts.check_errors(tower(), images(2, 3, 32, 32), images(2, 4, 24, 32), images(3, 24, 32))
    # the convolution leaves a rest out, and so long as the number of patches is right that is no error
    plain = tower()
    with torch.no_grad():
        x = images(2, 3, 26, 33)
        torch.testing.assert_close(vitfast.accelerate(copy.deepcopy(plain))(x), plain(x), rtol=1e-4, atol=1e-4)
        x = images(2, 3, 16, 48)
        torch.testing.assert_close(vitfast.accelerate(copy.deepcopy(plain))(x), plain(x), rtol=1e-4, atol=1e-4)


def test_uint8_pixels():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    x = torch.randint(0, 256, X, dtype=torch.uint8)
    normal = (x / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    fused = vitfast.accelerate(tower(), normalize=(mean, std))
    with torch.no_grad():
        torch.testing.assert_close(fused(x), tower()(normal), rtol=1e-4, atol=1e-4)


# --- dtypes


def _mixed(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """As open_clip's precision "bf16" and "fp16" do: norms stay in fp32."""
    for module in model.modules():
        if not isinstance(module, nn.LayerNorm):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_16_bits_with_norms_in_fp32(dtype):
    plain = _mixed(tower(norm_layer=transformer.LayerNormFp32), dtype)
    fused = vitfast.accelerate(copy.deepcopy(plain))
    assert fused_names(fused)["ln_pre"] == "FusedOpenClipLayerNormFp32"
    exact = tower().double()
    exact.load_state_dict(plain.state_dict())
    x = images(*X, dtype=dtype)
    with torch.no_grad():
        assert_close(fused(x), exact(x.double()), plain(x))


def test_norms_of_fp32_compute_gradients():
    plain = tower(norm_layer=transformer.LayerNormFp32)
    assert_same(plain, vitfast.accelerate(copy.deepcopy(plain)), images(*X), truth=tower().double())


@pytest.mark.parametrize("hooked", [False, True], ids=["fused", "attention called"])
def test_the_residual_stream_stays_in_autocasts_dtype(hooked):
    plain = tower()
    fused = vitfast.accelerate(copy.deepcopy(plain))
    dtypes: dict[str, list[torch.dtype]] = {"plain": [], "fused": []}
    for name, model in (("plain", plain), ("fused", fused)):
        for block in model.transformer.resblocks:
            block.register_forward_hook(lambda m, args, out, name=name: dtypes[name].append(out.dtype))
            if hooked:
                block.attn.register_forward_hook(lambda m, args, out: None)
    x = images(*X)
    exact = tower().double()(x.double())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fused._embeds(x).dtype == plain._embeds(x).dtype == torch.bfloat16
        assert_close(fused(x), exact, plain(x))
    assert dtypes["fused"] == dtypes["plain"] == [torch.bfloat16] * 2


# --- whole models


CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 48, "layers": 2, "head_width": 12},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 48, "heads": 4, "layers": 2},
}


def tokens() -> Tensor:
    return torch.randint(1, 49, (4, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("quick", [False, True], ids=["gelu", "quick_gelu"])
def test_clip_with_a_causal_text_tower(quick):
    def build():
        return randomise(open_clip.CLIP(**CLIP, quick_gelu=quick)).eval()

    fused = check(build, images(4, 3, 32, 32), lambda model, x: model(x, tokens())[:2])
    assert fused_names(fused)["transformer.resblocks.0"] == "FusedOpenClipBlock"
    block = fused.transformer.resblocks[0]
    with torch.no_grad():
        x = images(2, 8, 48)
        y = x.clone()
        y[:, -1] += 1.0
        mask = fused.attn_mask
        torch.testing.assert_close(block(x, attn_mask=mask)[:, :-1], block(y, attn_mask=mask)[:, :-1])
        assert not torch.allclose(block(x)[:, :-1], block(y)[:, :-1]), "without the mask all tokens see the last"


def test_coca():
    vision = {**CLIP["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True}
    text = {**CLIP["text_cfg"], "embed_cls": True, "output_tokens": True}
    decoder = {"context_length": 8, "vocab_size": 50, "width": 48, "heads": 4, "layers": 2}
    plain = randomise(open_clip.CoCa(48, decoder, text, vision)).eval()
    nn.init.constant_(plain.logit_scale, 1.0)
    fused = vitfast.accelerate(copy.deepcopy(plain))

    def call(model, x):
        out = model(x, tokens())
        return out["image_features"], out["text_features"], out["logits"]

    actual, expected = run(fused, call, images(4, 3, 32, 32)), run(plain, call, images(4, 3, 32, 32))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-3, atol=1e-4 * value.abs().max().item() + 1e-6)


def test_blocks_with_other_keys():
    def build():
        return randomise(transformer.ResidualAttentionBlock(48, 4, 2.0, is_cross_attention=True)).eval()

    check(build, images(2, 5, 48), lambda model, x: model(x, x.flip(1), x.flip(1)))
    check(build, images(2, 5, 48))


def test_blocks_that_are_batch_second():
    def build():
        return randomise(transformer.ResidualAttentionBlock(48, 4, 2.0, batch_first=False)).eval()

    check(build, images(5, 2, 48))
    check(build, images(5, 2, 48), lambda model, x: model(x, attn_mask=torch.ones(5, 5).triu(1).to(x.dtype)))
    stack = transformer.Transformer(48, 2, 4, 2.0, batch_first=False)
    check(lambda: randomise(copy.deepcopy(stack)).eval(), images(2, 5, 48))


def test_a_tower_of_timm():
    vision = {"image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_proj": "linear", "timm_pool": "token"}
    plain = randomise(open_clip.CustomTextCLIP(**{**CLIP, "vision_cfg": vision})).eval()
    fused = vitfast.accelerate(copy.deepcopy(plain))
    names = fused_names(fused)
    assert names["visual.trunk"] == "FusedTimmVisionTransformer"
    assert names["visual.trunk.blocks.0"] == "FusedTimmBlock"
    x = images(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(fused.encode_image(x), plain.encode_image(x), rtol=1e-3, atol=1e-4)


def test_a_subclass_keeps_its_own_forward():
    class Shifted(transformer.VisionTransformer):
        def _embeds(self, x):
            return super()._embeds(x) + 1.0

    plain = tower()
    plain.__class__ = Shifted
    fused = vitfast.accelerate(copy.deepcopy(plain))
    reason = "computes something else than FusedOpenClipVisionTransformer: other outputs in evaluation"
    assert kept_reasons(fused) == {"": reason}
    assert_same(plain, fused, images(*X))


@pytest.mark.interpret
@pytest.mark.parametrize("option", ["plain", "LayerScale", "QuickGELU", "average pool"])
def test_kernels(option):
    changes = {**OPTIONS[option], "layers": 3}
    _contracts.check_folds(tower(**changes), images(*X), 3 if option == "average pool" else 2)
