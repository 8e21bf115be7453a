"""Transformers' models, plain and accelerated: outputs of every type, captured outputs, masks, and what users do."""

from __future__ import annotations

import copy
import io
import types
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    BeitConfig,
    BeitModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    ViTMSNConfig,
    ViTMSNModel,
)
from transformers.models.vit import modeling_vit

import vitfast
from tests._close import assert_close
from tests.vitfast._models import (
    HF_TEXT,
    HF_TINY,
    V4,
    assert_equal,
    assert_same,
    check,
    forward,
    fused_names,
    images,
    kept_reasons,
    randomise,
    run,
)
from vitfast import kernels, layers
from vitfast.adapters.transformers.attention import TransformersAttention
from vitfast.adapters.transformers.layers import TransformersLayer
from vitfast.layers import KINDS
from vitfast.layers.block import _statistics


def build(kind: type[nn.Module], config: type, **changes: Any) -> nn.Module:
    return randomise(kind(config(**{**HF_TINY, **changes}))).eval()


MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "ViT": (ViTModel, ViTConfig, {}),
    "ViT classifier": (ViTForImageClassification, ViTConfig, {"num_labels": 7}),
    "ViT without qkv bias": (ViTModel, ViTConfig, {"qkv_bias": False}),
    "ViT, tanh": (ViTModel, ViTConfig, {"hidden_act": "gelu_new"}),
    "ViT, SiLU": (ViTModel, ViTConfig, {"hidden_act": "silu"}),
    "ViT-MSN": (ViTMSNModel, ViTMSNConfig, {}),
    "DeiT": (DeiTModel, DeiTConfig, {}),
    "DeiT with teacher": (DeiTForImageClassificationWithTeacher, DeiTConfig, {"num_labels": 7}),
    "BEiT, absolute": (BeitModel, BeitConfig, {"use_absolute_position_embeddings": True}),
    "BEiT": (BeitModel, BeitConfig, {"use_relative_position_bias": True}),
    "BEiT, shared": (BeitModel, BeitConfig, {"use_shared_relative_position_bias": True}),
    "BEiT, no scale": (BeitModel, BeitConfig, {"use_relative_position_bias": True, "layer_scale_init_value": 0.0}),
    "CLIP": (CLIPVisionModel, CLIPVisionConfig, {}),
    "SigLIP": (SiglipVisionModel, SiglipVisionConfig, {}),
    "DINOv2": (Dinov2Model, Dinov2Config, {"mlp_ratio": 2, "layerscale_value": 0.3}),
    "DINOv2, SwiGLU": (Dinov2Model, Dinov2Config, {"mlp_ratio": 2, "use_swiglu_ffn": True}),
    "DINOv2, registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig, {"mlp_ratio": 2}),
}


def make(name: str, **changes: Any) -> nn.Module:
    kind, config, options = MODELS[name]
    return build(kind, config, **options, **changes)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name):
    check(lambda: make(name), images(2, 3, 32, 32))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_replaced(name):
    names = fused_names(vitfast.accelerate(make(name)))
    kinds = set(names.values())
    # version 4's BEiT writes its attention out in two classes of its own
    assert any("Attention" in kind for kind in kinds) or (V4 and "BEiT" in name), kinds
    assert V4 or any("Embeddings" in kind for kind in kinds), kinds
    if not V4:
        assert any(kind.endswith("Layer") for kind in kinds), kinds
    assert any("MLP" in kind or "Intermediate" in kind for kind in kinds) == (
        "SwiGLU" not in name and "SiLU" not in name
    )


@pytest.mark.parametrize("name", MODELS)
def test_output_types(name):
    plain = make(name)
    fused = vitfast.accelerate(copy.deepcopy(plain))
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        for options in ({}, {"return_dict": False}, {"output_hidden_states": True}):
            expected, actual = plain(x, **options), fused(x, **options)
            assert type(actual) is type(expected)
            if isinstance(expected, tuple):
                assert len(actual) == len(expected)
            else:
                assert list(actual) == list(expected)
            assert_close_trees(actual, expected)


def assert_close_trees(actual: Any, expected: Any) -> None:
    a, e = (torch.utils._pytree.tree_leaves(tree) for tree in (actual, expected))
    assert len(a) == len(e) > 0
    for left, right in zip(a, e, strict=True):
        if isinstance(right, Tensor):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["ViT", "DeiT", "CLIP", "SigLIP", "DINOv2"])
def test_captured_outputs_stay_and_blocks_stay_fused(name):
    kind, config, options = MODELS[name]
    settings = config(**{**HF_TINY, **options})
    settings._attn_implementation = "eager"
    plain = randomise(kind(settings)).eval()
    assert plain.config._attn_implementation == "eager"
    fused = vitfast.accelerate(copy.deepcopy(plain))
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        expected, actual = (m(x, output_attentions=True, output_hidden_states=True) for m in (plain, fused))
        assert len(actual.attentions) == 2
        assert len(actual.hidden_states) == 3
        assert_close_trees(actual, expected)
        # the hooks that this left behind cost nothing once nobody asks
        attentions = [m for m in fused.modules() if isinstance(m, TransformersAttention)]
        assert attentions
        if not V4:
            assert all(m._forward_hooks for m in attentions)
        calls = []
        for m in attentions:
            m.__class__ = type("Counted", (type(m),), {"forward": lambda self, *a, **k: calls.append(1) or 0})
        if not V4:
            assert_close_trees(fused(x).last_hidden_state, expected.last_hidden_state)
            assert not calls


def test_hidden_states_of_chosen_layers():
    if V4:
        pytest.skip("version 4 knows all or none")
    plain = make("ViT")
    fused = vitfast.accelerate(copy.deepcopy(plain))
    x = images(1, 3, 32, 32)
    assert_close_trees(fused(x, output_hidden_states=[1]), plain(x, output_hidden_states=[1]))


@pytest.mark.parametrize("name", ["ViT", "CLIP", "DINOv2"])
def test_hooks_see_the_same_values(name):
    plain = make(name)
    fused = vitfast.accelerate(copy.deepcopy(plain))

    def record(model: nn.Module) -> list[Tensor]:
        seen: list[Tensor] = []
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.LayerNorm)) or "Attention" in type(module).__name__:
                module.register_forward_hook(
                    lambda m, args, kwargs, out: seen.extend(
                        t for t in (*args, *kwargs.values(), out) if isinstance(t, Tensor)
                    ),
                    with_kwargs=True,
                )
        with torch.no_grad():
            model(images(1, 3, 32, 32))
        return seen

    expected, actual = record(plain), record(fused)
    assert len(actual) == len(expected) > 20
    if V4:
        # its order is k, v, q
        expected, actual = (sorted(seen, key=lambda t: (t.shape, t.sum().item())) for seen in (expected, actual))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


TRAINING: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT, dropout": ("ViT", {"hidden_dropout_prob": 0.2}),
    "ViT, attention dropout": ("ViT", {"attention_probs_dropout_prob": 0.3}),
    "DeiT, dropout": ("DeiT", {"hidden_dropout_prob": 0.2}),
    "CLIP, attention dropout": ("CLIP", {"attention_dropout": 0.3}),
    "DINOv2, drop path": ("DINOv2", {"drop_path_rate": 0.4}),
    "BEiT, drop path": ("BEiT", {"drop_path_rate": 0.4}),
    "BEiT, dropout": ("BEiT", {"hidden_dropout_prob": 0.2}),
    "SigLIP": ("SigLIP", {}),
}


@pytest.mark.parametrize("case", TRAINING)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_training(case, implementation):
    name, options = TRAINING[case]
    kind, config, more = MODELS[name]
    settings = config(**{**HF_TINY, **more, **options})
    settings._attn_implementation = implementation
    plain = randomise(kind(settings))
    fused = vitfast.accelerate(copy.deepcopy(plain))
    assert_trains_alike(plain, fused, exact=implementation == "sdpa" and not V4)


def assert_trains_alike(plain: nn.Module, fused: nn.Module, *, exact: bool) -> None:
    """The same outputs and gradients: within the rule where torch is called alike, else but for rounding to fp32."""
    if exact:
        assert_same(plain, fused, images(2, 3, 32, 32), train=True)
        return
    # eager attention has other products, and a softmax in fp32; version 4 adds the gradients of k, v, q in this order
    expected, actual = (run(m.double(), forward, images(2, 3, 32, 32).double(), train=True) for m in (plain, fused))
    assert expected.keys() == actual.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", ["ViT", "CLIP", "SigLIP", "DINOv2"])
def test_gradient_checkpointing(name):
    plain = make(name)
    fused = vitfast.accelerate(copy.deepcopy(plain))
    for model in (plain, fused):
        model.gradient_checkpointing_enable()
    assert_trains_alike(plain, fused, exact=not V4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_mask(implementation):
    if V4:
        pytest.skip("version 4's ViT takes no attention mask")
    settings = ViTConfig(**HF_TINY)
    settings._attn_implementation = implementation
    plain = randomise(ViTModel(settings)).eval()
    fused = vitfast.accelerate(copy.deepcopy(plain))
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[0, 9:] = 0
    x = images(2, 3, 32, 32)

    def masked(model, pixels):
        return model(pixels, attention_mask=mask)

    assert_same(plain, fused, x, masked)
    assert not torch.allclose(fused(x).last_hidden_state, masked(fused, x).last_hidden_state)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_mask_beside_relative_positions(shared, implementation):
    if V4:
        pytest.skip("version 4's BEiT takes no attention mask")
    plain = make("BEiT, shared" if shared else "BEiT")
    plain.set_attn_implementation(implementation)
    fused = vitfast.accelerate(copy.deepcopy(plain))
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[0, 9:] = 0
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        assert_close_trees(fused(x, attention_mask=mask), plain(x, attention_mask=mask))
        assert not torch.allclose(fused(x)[0], fused(x, attention_mask=mask)[0])


@pytest.mark.parametrize("name", ["ViT", "CLIP", "BEiT"])
def test_export(name):
    if V4:
        pytest.skip("version 4 exports through functions of its own")
    plain = make(name)
    fused = vitfast.accelerate(copy.deepcopy(plain))
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        exported = torch.export.export(fused, (x,), strict=False).module()
        assert_close_trees(exported(x).last_hidden_state, plain(x).last_hidden_state)


@pytest.mark.parametrize("name", ["ViT", "CLIP", "DINOv2"])
@pytest.mark.parametrize("asked", ["position_bias", "is_causal", "is_causal=None"])
def test_what_attention_functions_take_beside_the_mask(name, asked):
    if V4:
        pytest.skip("version 4's vision models take no arguments for their attention")
    plain = make(name)
    fused = vitfast.accelerate(copy.deepcopy(plain))
    if asked == "is_causal=None":
        for model in (plain, fused):
            for module in model.modules():
                if hasattr(module, "is_causal"):
                    module.is_causal = True
    option = {"position_bias": {"position_bias": 3 * images(1, 4, 17, 17)}, "is_causal": {"is_causal": True}}
    options = option.get(asked, {"is_causal": None})
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        expected = plain(x, **options)
        assert not torch.allclose(expected[0], make(name)(x)[0], atol=1e-2)
        assert_close_trees(fused(x, **options), expected)


def test_keys_that_heads_share():
    if V4:
        pytest.skip("written for version 5's layout")
    plain = make("ViT")
    attention = plain.layers[0].attention
    attention.k_proj, attention.v_proj = nn.Linear(48, 24), nn.Linear(48, 24)
    attention.num_key_value_groups = 2
    fused = vitfast.accelerate(copy.deepcopy(plain))
    assert_same(plain, fused, images(2, 3, 32, 32))
    assert kept_reasons(fused) == {
        "layers.0.attention": "q, k and v are [48, 24, 24] wide: no kernel shares keys and values between heads"
    }


# models that kept version 4's layout, and such whose files write the same softmax in another way
OTHERS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "Yolos": ("YolosModel", {"image_size": [32, 32], "num_detection_tokens": 3}, {"SelfAttention", "Intermediate"}),
    "DPT": ("DPTModel", {"is_hybrid": False, "backbone_out_indices": [0, 1, 1, 1]}, {"SelfAttention", "Intermediate"}),
    "VitPoseBackbone": (
        "VitPoseBackbone",
        {"image_size": [32, 32], "patch_size": [8, 8], "out_indices": [2]},
        {"SelfAttention", "MLP"},
    ),
    "AltCLIPVision": ("AltCLIPVisionModel", {}, {"Attention", "Layer"}),
    "ChineseCLIPVision": ("ChineseCLIPVisionModel", {}, {"Attention", "Layer"}),
    "LwDetrViT": ("LwDetrViTBackbone", {"window_block_indices": [0], "num_windows": 4}, {"Attention"}),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_other_layouts_and_spellings(name, implementation):
    if V4:
        pytest.skip("written for version 5's layout")
    kind, options, roles = OTHERS[name]
    config = getattr(transformers, f"{name}Config")(**{**HF_TINY, **options})
    plain = randomise(getattr(transformers, kind)(config)).eval()
    plain.set_attn_implementation(implementation)
    for key, parameter in plain.named_parameters():
        # a bias of the keys has no gradient but rounding
        parameter.requires_grad_(not key.endswith(("k_proj.bias", "key.bias")))
    fused = vitfast.accelerate(copy.deepcopy(plain))
    kinds = set(fused_names(fused).values())
    assert all(any(kind.endswith(role) for kind in kinds) for role in roles), kinds
    assert_trains_alike(plain, fused, exact=False)
    with torch.no_grad():
        options = {"output_attentions": True, "output_hidden_states": True}
        expected, actual = (m.float().eval()(images(2, 3, 32, 32), **options) for m in (plain, fused))
        assert len(actual.attentions or ()) == (2 if implementation == "eager" else 0)
        assert_close_trees(actual, expected)


@pytest.mark.parametrize("kind", ["CLIP", "SigLIP"])
def test_both_towers(kind):
    if kind == "CLIP":
        plain = CLIPModel(CLIPConfig(text_config=HF_TEXT, vision_config=HF_TINY))
    else:
        plain = SiglipModel(SiglipConfig(text_config=HF_TEXT, vision_config=HF_TINY))
    plain = randomise(plain).eval()
    fused = vitfast.accelerate(copy.deepcopy(plain))
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 90, (2, 9), generator=generator)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    if V4:
        pytest.skip("version 4 makes masks in fp32's range even for float64")
    for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
        # the text towers are causal or masked: there attention is Transformers' own
        assert_same(plain, fused, images(2, 3, 32, 32), lambda m, x, i=inputs: m(pixel_values=x, **i))


def test_llava_tower():
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**HF_TINY), text_config=text, image_token_index=98, vision_feature_layer=-1
    )
    plain = randomise(LlavaForConditionalGeneration(config)).eval()
    fused = vitfast.accelerate(copy.deepcopy(plain))
    names = fused_names(fused)
    assert ("FusedCLIPAttention" if V4 else "FusedCLIPEncoderLayer") in names.values()
    # the language model's gated MLPs are no part of it
    assert kept_reasons(fused) == {}
    ids = torch.tensor([[3] + [98] * 16 + [4, 5]])
    x = images(1, 3, 32, 32)
    with torch.no_grad():
        expected, actual = (m(input_ids=ids, pixel_values=x).logits for m in (plain, fused))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["ViT", "DeiT", "CLIP", "SigLIP", "DINOv2", "DINOv2, registers"])
@pytest.mark.parametrize("size", [(48, 48), (32, 64)], ids=str)
def test_position_embeddings_are_resized_as_transformers_does(name, size):
    plain = make(name)
    fused = vitfast.accelerate(copy.deepcopy(plain))
    x = images(2, 3, *size)
    if "DINOv2" in name:
        assert_same(plain, fused, x, grad=False)
        return
    assert_same(plain, fused, x, lambda m, p: m(p, interpolate_pos_encoding=True), grad=False)
    for model in (plain, fused):
        with pytest.raises((ValueError, RuntimeError)) as error:
            model(x)
        if model is plain:
            expected = str(error.value)
        else:
            assert str(error.value) == expected


@pytest.mark.parametrize("size", [(48, 48), (32, 64)], ids=str)
@pytest.mark.parametrize("interpolates", [False, True])
def test_relative_positions_of_another_size_are_transformers_own(size, interpolates):
    plain = make("BEiT")
    fused = vitfast.accelerate(copy.deepcopy(plain))
    call = lambda m, x: m(x, interpolate_pos_encoding=interpolates)  # noqa: E731
    assert_same(plain, fused, images(2, 3, *size), call, grad=False)


def swin(**changes: Any) -> nn.Module:
    """Maps are 8 x 8, in shifted windows, and 4 x 4, which is one window."""
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4]}
    model = randomise(SwinModel(SwinConfig(**{**sizes, "window_size": 4, **changes}))).eval()
    for name, parameter in model.named_parameters():
        # a bias of the keys has no gradient but rounding
        parameter.requires_grad_("k_proj.bias" not in name)
    return model


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (32, 48), (40, 40)], ids=str)
@pytest.mark.parametrize("window", [2, 4])
def test_swin(size, window):
    plain = swin(window_size=window)
    fused = vitfast.accelerate(copy.deepcopy(plain))
    assert_equal(plain, fused, images(2, 3, *size))
    if not V4:
        assert list(fused_names(fused).values()).count("FusedSwinLayer") == 4


@pytest.mark.parametrize("changes", [{"drop_path_rate": 0.4}, {"hidden_dropout_prob": 0.2}, {}], ids=str)
def test_swin_in_training(changes):
    plain = swin(**changes)
    assert_trains_alike(plain, vitfast.accelerate(copy.deepcopy(plain)), exact=False)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_swin_outputs(implementation):
    plain = swin()
    plain.set_attn_implementation(implementation)
    fused = vitfast.accelerate(copy.deepcopy(plain))
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        options = {"output_hidden_states": True, "output_attentions": True}
        expected, actual = plain(x, **options), fused(x, **options)
        assert len(actual.hidden_states) == 3
        assert V4 or len(actual.attentions or ()) == (2 if implementation == "eager" else 0)
        assert_close_trees(actual, expected)
        assert_close_trees(fused(x, return_dict=False), plain(x, return_dict=False))
        torch._dynamo.reset()
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        assert_close_trees(compiled(x).last_hidden_state, plain(x).last_hidden_state)


def test_swin_windows_are_not_moved(monkeypatch):
    """No roll, no partition: the map's tokens go into the kernel where they stand."""
    if V4:
        pytest.skip("written for version 5's layout")
    fused = vitfast.accelerate(swin())
    shapes = []
    inner = kernels.window_attention
    note = lambda qkv, *args, **kwargs: shapes.append(qkv.shape[1:3]) or inner(qkv, *args, **kwargs)  # noqa: E731
    monkeypatch.setattr(kernels, "window_attention", note)
    fused(images(1, 3, 32, 32))
    assert shapes == [(8, 8), (8, 8), (4, 4), (4, 4)]
    # a padded map is Transformers' own, and so is a layer whose attention somebody watches
    fused(images(1, 3, 40, 40))
    assert shapes[4:] == []
    fused.encoder.layers[0].blocks[0].attention.register_forward_hook(lambda *_: None)
    fused(images(1, 3, 32, 32))
    assert len(shapes) == 4 + 3
    assert "attention has hooks or is another: the original forward runs" in str(vitfast.report(fused))


def test_masked_patches():
    plain = randomise(ViTModel(ViTConfig(**HF_TINY), use_mask_token=True)).eval()
    fused = vitfast.accelerate(copy.deepcopy(plain))
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, ::3] = True
    assert_same(plain, fused, images(2, 3, 32, 32), lambda m, x: m(x, bool_masked_pos=mask), grad=False)


@pytest.mark.parametrize("name", ["ViT", "BEiT", "CLIP", "DINOv2"])
def test_pixels_of_another_dtype(name):
    """Some models cast them, others refuse them."""
    plain = make(name).to(torch.bfloat16)
    fused = vitfast.accelerate(copy.deepcopy(plain))
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        if name == "BEiT":
            for model in (plain, fused):
                with pytest.raises(RuntimeError, match=r"Input type \(float\)"):
                    model(x)
                with torch.autocast("cpu", torch.bfloat16):
                    assert model(x).last_hidden_state.isfinite().all()
        else:
            actual, expected = (model(x).last_hidden_state for model in (fused, plain))
            torch.testing.assert_close(actual, expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["ViT classifier", "CLIP", "DINOv2"])
def test_save_pretrained(name, tmp_path):
    plain = make(name)
    fused = vitfast.accelerate(copy.deepcopy(plain))
    plain.save_pretrained(tmp_path / "plain")
    fused.save_pretrained(tmp_path / "fused")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "fused" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    again = type(plain).from_pretrained(tmp_path / "fused").eval()
    x = images(1, 3, 32, 32)
    assert_close_trees(vitfast.accelerate(again)(x), plain(x))
    assert fused.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("name", ["ViT classifier", "SigLIP", "DINOv2"])
def test_pickle_and_deepcopy(name):
    fused = vitfast.accelerate(make(name))
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    x = images(1, 3, 32, 32)
    for again in (torch.load(file, weights_only=False), copy.deepcopy(fused)):
        assert [type(m) for m in again.modules()] == [type(m) for m in fused.modules()]
        assert not {p.data_ptr() for p in again.parameters()} & {p.data_ptr() for p in fused.parameters()}
        assert_close_trees(again(x), fused(x))


@pytest.mark.parametrize("first", ["lora", "accelerate"])
@pytest.mark.parametrize("name", ["ViT", "CLIP"])
def test_lora(name, first):
    from peft import LoraConfig, get_peft_model

    if V4 and name == "ViT":
        targets = ["query", "value"]
    else:
        targets = ["q_proj", "v_proj"]
    config = LoraConfig(r=2, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    plain = make(name)
    fused = copy.deepcopy(plain)
    torch.manual_seed(3)
    plain = get_peft_model(plain, config)
    if first == "accelerate":
        vitfast.accelerate(fused)
    torch.manual_seed(3)
    fused = get_peft_model(fused, config)
    if first == "lora":
        vitfast.accelerate(fused)
    x = images(2, 3, 32, 32)
    assert_same(plain.eval(), fused.eval(), x)
    notes = {row.note for row in vitfast.report(fused).replaced if row.kind == "attention"}
    assert notes == {"q_proj is a peft.Linear: called as a module; v_proj is a peft.Linear: called as a module"}
    merged = fused.merge_and_unload()
    assert_same(plain.merge_and_unload(), merged, x, grad=False)


def test_a_function_that_somebody_registered_is_called():
    seen = []

    def doubled(module, query, key, value, attention_mask, **kwargs):
        seen.append(module)
        out = nn.functional.scaled_dot_product_attention(query, key, value) * 2
        return out.transpose(1, 2), None

    transformers.AttentionInterface.register("doubled", doubled)
    plain = make("ViT")
    plain.set_attn_implementation("doubled")
    fused = vitfast.accelerate(copy.deepcopy(plain))
    x = images(1, 3, 32, 32)
    assert_close_trees(fused(x), plain(x))
    assert len(seen) == 4
    notes = {row.note for row in vitfast.report(fused).replaced if row.kind == "attention"}
    assert notes == {"attn_implementation 'doubled' is no known one: the original forward runs"}


def test_changed_layers_are_left_alone():
    if V4:
        pytest.skip("written for version 5's layout")

    class Scaled(modeling_vit.ViTAttention):
        def forward(self, hidden_states, *args, **kwargs):
            out, weights = super().forward(hidden_states, *args, **kwargs)
            return out * 2, weights

    plain = make("ViT")
    plain.layers[0].attention.__class__ = Scaled
    fused = vitfast.accelerate(copy.deepcopy(plain))
    assert_same(plain, fused, images(1, 3, 32, 32))
    reason = "computes something else than ViTAttention: other outputs in evaluation"
    assert kept_reasons(fused)["layers.0.attention"] == reason


def test_other_softmax_is_left_alone(monkeypatch):
    """A block stands for eager attention too: where that does something else, it stays."""
    if V4:
        pytest.skip("written for version 5's layout")

    def sharpened(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        return modeling_vit.eager_attention_forward(module, query, key, value, attention_mask, scaling * 2, dropout)

    forward = modeling_vit.ViTAttention.forward
    elsewhere = types.FunctionType(
        forward.__code__, {**forward.__globals__, "eager_attention_forward": sharpened}, "forward", forward.__defaults__
    )
    kind = type("ViTAttention", (modeling_vit.ViTAttention,), {"forward": elsewhere})
    kind.__module__ = "transformers.models.elsewhere"
    model = make("ViT")
    model.layers[1].attention.__class__ = kind
    assert kept_reasons(vitfast.accelerate(model)) == {
        "layers.1": "computes something else than ViTLayer: other outputs in evaluation"
    }


def test_spread_over_devices():
    """accelerate's hooks put a forward of their own on each module: those are left alone, and say so."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    plain = make("ViT")
    fused = copy.deepcopy(plain)
    layer = fused.layers[0] if not V4 else fused.encoder.layer[0]
    add_hook_to_module(layer.layernorm_before, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    vitfast.accelerate(fused)
    assert "run by a hook of Hugging Face's accelerate (device_map, offloading)" in kept_reasons(fused).values()
    assert_same(plain, fused, images(1, 3, 32, 32), grad=False)


@pytest.mark.parametrize("name", ["ViT classifier", "DeiT", "CLIP", "SigLIP", "DINOv2", "DINOv2, registers"])
def test_compile_in_one_graph(name):
    fused = vitfast.accelerate(make(name))
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        expected = fused(x)
        torch._dynamo.reset()
        actual = torch.compile(fused, fullgraph=True, backend="aot_eager")(x)
    assert_close_trees(actual, expected)


def test_shared_weights_and_restore_after_training():
    model = vitfast.accelerate(make("ViT classifier"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(images(2, 3, 32, 32), labels=torch.tensor([1, 2])).loss.backward()
    optimizer.step()
    x = images(1, 3, 32, 32)
    expected = model.eval()(x).logits
    restored = vitfast.restore(model)
    assert type(restored.vit) is ViTModel
    torch.testing.assert_close(restored(x).logits, expected, rtol=1e-4, atol=1e-4)
    assert any(not torch.equal(p, before[name]) for name, p in restored.named_parameters())


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["ViT", "BEiT", "Swin"])
def test_what_is_derived_is_made_anew_when_training_ends(name):
    plain = swin() if name == "Swin" else make(name)
    fused = vitfast.accelerate(copy.deepcopy(plain), frozen=True)
    x = images(1, 3, 32, 32)
    with torch.no_grad():
        assert_close_trees(fused(x).last_hidden_state, plain(x).last_hidden_state)
        blocks = [module for module in fused.modules() if isinstance(module, layers.FusedBlock)]
        assert all(block.plan().attn.packed is not None for block in blocks)
        for model in (plain, fused):
            model.train()
            for parameter in model.parameters():
                # unseen by versions
                parameter.data.mul_(1.2)
            model.eval()
        assert_close_trees(fused(x).last_hidden_state, plain(x).last_hidden_state)


@pytest.mark.interpret
def test_windows_and_relative_positions_in_the_kernels():
    for plain, size in ((swin(), 32), (make("BEiT"), 32)):
        fused = vitfast.accelerate(copy.deepcopy(plain))
        x = images(1, 3, size, size)
        with torch.no_grad():
            assert_close_trees(fused(x).last_hidden_state, plain(x).last_hidden_state)


@pytest.mark.interpret
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["ViT", "CLIP", "DINOv2"])
def test_norms_are_folded_and_statistics_handed_on(name, mode, monkeypatch):
    plain = make(name).half()
    fused = vitfast.accelerate(copy.deepcopy(plain), frozen=True)
    read = []
    inner = kernels.row_stats
    monkeypatch.setattr(kernels, "row_stats", lambda x: read.append(x.shape) or inner(x))
    x = images(1, 3, 32, 32, dtype=torch.float16)

    def compare() -> None:
        with torch.no_grad():
            truth = copy.deepcopy(plain).double()(x.double()).last_hidden_state
            expected = plain(x).last_hidden_state
        with mode():
            assert_close(fused(x).last_hidden_state, truth, expected)

    compare()
    # inference tensors have no versions, so each block reads for itself
    assert len(read) == (1 if mode is torch.no_grad else 2)
    # tokens that change between two blocks have other statistics
    blocks = [module for module in fused.modules() if isinstance(module, TransformersLayer)]

    def double(module: nn.Module, args: tuple[Any, ...]) -> None:
        args[0].mul_(2)

    blocks[1].register_forward_pre_hook(double)
    original = [plain.get_submodule(name) for name, m in fused.named_modules() if m is blocks[1]]
    original[0].register_forward_pre_hook(double)
    compare()
    with torch.no_grad():
        # a watched block is computed unfolded, what it looks at is there
        tokens = blocks[0](images(1, 5, 48, dtype=torch.float16), None)
        assert len(_statistics) == 1
        assert tokens in _statistics
        blocks[1]._forward_pre_hooks.clear()
        tokens.mul_(3)
        torch.testing.assert_close(blocks[1](tokens, None), blocks[1](tokens.clone(), None), rtol=0.01, atol=0.01)
    del tokens
    assert not len(_statistics)


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["ViT", "ViT without qkv bias", "CLIP", "DINOv2"])
def test_one_gemm_for_queries_keys_and_values(name, monkeypatch):
    plain = make(name)
    fused = vitfast.accelerate(copy.deepcopy(plain), only=set(KINDS) - {"fold"}, frozen=True)
    packed = []
    inner = kernels.attention_qkv
    monkeypatch.setattr(kernels, "attention_qkv", lambda qkv, *a, **k: packed.append(qkv.shape) or inner(qkv, *a, **k))
    x = images(1, 3, 32, 32)
    with torch.no_grad():
        assert_close_trees(fused(x), plain(x))
        assert packed == [(1, 17, 144)] * 2
        # weights that change are seen
        for model in (plain, fused):
            for parameter in model.parameters():
                parameter.mul_(1.25)
        assert_close_trees(fused(x), plain(x))
    # in training each layer is its own
    packed.clear()
    fused(x)
    assert not packed
