"""Other libraries' models by name, as the commands take them."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
)

import vitfast
from tests.vitfast._models import fused_names, randomise
from vitfast.cli.main import main
from vitfast.proof.libraries import build, has_weights, image_shape, library_of, tower
from vitfast.proof.parity import parity
from vitfast.proof.subjects import build_model

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("timm:vit_tiny_patch16_224", "timm"),
        ("vit_tiny_patch16_224", "timm"),
        ("torchvision:vit_b_16", "torchvision"),
        ("open_clip:ViT-B-16", "open_clip"),
        ("google/vit-base-patch16-224", "transformers"),
        ("transformers:anything", "transformers"),
        ("no_such_model", None),
    ],
)
def test_whose_a_name_is(name, library):
    assert library_of(name) == library


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("timm:test_vit", (3, 160, 160)),
        ("timm:swin_tiny_patch4_window7_224", (3, 224, 224)),
        ("torchvision:vit_b_16", (3, 224, 224)),
        ("torchvision:swin_t", (3, 224, 224)),
        ("open_clip:ViT-B-16", (3, 224, 224)),
    ],
)
def test_models_say_their_image_size(name, shape):
    with torch.device("meta"):
        model = build(name)
    assert image_shape(tower(model)) == shape


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:vit_tiny_patch99", "timm has no model 'vit_tiny_patch99'"),
        ("torchvision:vit_b_17", "torchvision has no model 'vit_b_17'"),
        ("open_clip:ViT-Q", "open_clip has no model 'ViT-Q'"),
        ("/no/such/folder:x", "is no model of timm, torchvision, open_clip, transformers"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        build(name)


def test_a_folder_that_transformers_wrote(tmp_path, capsys):
    model = randomise(ViTForImageClassification(ViTConfig(**SIZES, num_labels=5))).eval()
    model.save_pretrained(tmp_path / "whole")
    model.config.save_pretrained(tmp_path / "config")
    whole, config = str(tmp_path / "whole"), str(tmp_path / "config")
    assert has_weights(whole)
    assert not has_weights(config)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(build_model(whole)(x).logits, model(x).logits)
        # random, but seeded
        torch.testing.assert_close(*(build_model(config)(x).logits for _ in range(2)))
    assert parity(build_model(whole), x).ok
    assert main(["parity", whole]) == 0
    assert f"weights of {whole}, fp32" in capsys.readouterr().out
    with pytest.raises(ValueError, match="a file is read for vitfast's and timm's models"):
        build_model(whole, tmp_path / "whole" / "model.safetensors")


def test_another_image_size(tmp_path):
    SiglipVisionConfig(**SIZES).save_pretrained(tmp_path)
    assert type(build(str(tmp_path), 64)) is SiglipVisionModel
    assert image_shape(build(str(tmp_path), 64)) == (3, 64, 64)


def test_the_tower_of_a_model_of_two(tmp_path):
    model = randomise(CLIPModel(CLIPConfig(text_config=TEXT, vision_config=SIZES))).eval()
    model.save_pretrained(tmp_path)
    built = vitfast.accelerate(build_model(str(tmp_path)))
    assert image_shape(built) == (3, 32, 32)
    assert "CLIPVisionEmbeddings" in fused_names(built).values()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model.vision_model(pixel_values=x).last_hidden_state
        torch.testing.assert_close(built(x).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is no folder with a model of Transformers"):
        build(str(tmp_path))
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(ValueError, match="is no folder with a model of Transformers"):
        build(str(tmp_path))
