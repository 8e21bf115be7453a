"""image_spec and preprocess against the libraries' own transforms."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import vitfast
from tests.vitfast._images import MODES, SIZES, picture, tensor
from vitfast.images.resize import ResizeCrop
from vitfast.images.spec import ImageSpec, image_spec
from vitfast.images.transforms import preprocess
from vitfast.reference.architectures import create_model, list_models

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def assert_pixels(ours: Tensor, theirs: Tensor, spec: ImageSpec) -> None:
    """Their normalised floats are our bytes: half a step of a byte tells two of them apart."""
    assert ours.dtype == torch.uint8
    assert ours.shape == theirs.shape
    torch.testing.assert_close(spec.normalised(ours), theirs.float(), rtol=0, atol=1e-3 / 255 / max(spec.std))


# the libraries


TIMM = {
    "center": {"input_size": (3, 224, 224), "crop_pct": 0.9},
    "center-all": {"input_size": (3, 112, 112), "crop_pct": 1.0, "interpolation": "bilinear"},
    "center-odd": {"input_size": (3, 97, 97), "crop_pct": 0.875, "interpolation": "lanczos"},
    "center-oblong": {"input_size": (3, 120, 200), "crop_pct": 0.9},
    "squash": {"input_size": (3, 160, 160), "crop_pct": 0.95, "crop_mode": "squash"},
    "squash-oblong": {"input_size": (3, 96, 161), "crop_pct": 1.0, "crop_mode": "squash"},
    "border": {"input_size": (3, 160, 160), "crop_pct": 0.9, "crop_mode": "border"},
    "border-oblong": {"input_size": (3, 120, 201), "crop_pct": 1.0, "crop_mode": "border"},
}


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    data = pytest.importorskip("timm.data")
    config = data.resolve_data_config(TIMM[name])
    transform = data.create_transform(**config, is_training=False)
    spec = image_spec(config)
    assert (spec.size, spec.mean, spec.std) == (config["input_size"][1:], config["mean"], config["std"])
    images = [picture(*size) for size in SIZES]
    assert_pixels(preprocess(images, transform), torch.stack([transform(image) for image in images]), spec)
    # timm's own bytes; of tensors it makes nothing else, and neither lanczos nor borders
    transform = data.create_transform(**config, is_training=False, normalize=False)
    wanted = torch.stack([transform(image) for image in images])
    assert torch.equal(preprocess(images, spec), wanted)
    crop = None
    if config["crop_mode"] != "border":
        # what the reference model uses is the same without timm
        crop = ResizeCrop(spec.size, config["crop_pct"], config["crop_mode"], config["interpolation"])
        assert torch.equal(preprocess(images, dataclasses.replace(spec, transform=crop)), wanted)
    if crop is not None and config["interpolation"] != "lanczos":
        wanted = torch.stack([transform(tensor(image)) for image in images])
        for each in (spec, dataclasses.replace(spec, transform=crop)):
            assert torch.equal(preprocess([tensor(image) for image in images], each), wanted)


def test_timm_models_bring_their_own() -> None:
    timm = pytest.importorskip("timm")
    for name in ("vit_tiny_patch16_384.augreg_in21k_ft_in1k", "vit_medium_patch16_gap_384.sw_in12k_ft_in1k"):
        model = timm.create_model(name, depth=1)
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
        for source in (model, vitfast.accelerate(copy.deepcopy(model)), model.pretrained_cfg):
            assert_pixels(preprocess(picture(500, 400), source), transform(picture(500, 400))[None], image_spec(model))


def test_transformers_processor_of_timm_models() -> None:
    transformers, data = pytest.importorskip("transformers"), pytest.importorskip("timm.data")
    config = data.resolve_data_config(TIMM["squash"])
    processor = transformers.TimmWrapperImageProcessor(config, architecture="vit_tiny_patch16_224")
    theirs = processor(picture(97, 61), return_tensors="pt")["pixel_values"]
    assert_pixels(preprocess(picture(97, 61), processor), theirs, image_spec(processor))


def test_named_models_want_what_timm_says() -> None:
    timm = pytest.importorskip("timm")
    for name in list_models():
        config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        with torch.device("meta"):
            model = create_model(name)
        crop = ResizeCrop(config["input_size"][1:], config["crop_pct"], config["crop_mode"], config["interpolation"])
        assert image_spec(model) == ImageSpec(crop.size, config["mean"], config["std"], crop), name
        # and timm reads it from our model as from its own
        assert timm.data.resolve_model_data_config(model) == config, name
    with torch.device("meta"):
        oblong = create_model("vit_tiny_patch16_224", img_size=(96, 160))
    assert image_spec(oblong).size == (96, 160)


@pytest.mark.parametrize("name", ["IMAGENET1K_V1", "IMAGENET1K_SWAG_E2E_V1"])
def test_torchvision(name: str) -> None:
    weights = pytest.importorskip("torchvision.models").ViT_B_16_Weights[name]
    transform = weights.transforms()
    spec = image_spec(transform)
    images = [picture(*size) for size in SIZES]
    assert_pixels(preprocess(images, weights), torch.stack([transform(image) for image in images]), spec)
    theirs = torch.stack([transform(tensor(image)) for image in images])
    assert_pixels(preprocess([tensor(image) for image in images], weights), theirs, spec)


def test_torchvision_s_second_generation() -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2")
    steps = [v2.ToImage(), v2.Resize(40), v2.CenterCrop(32), v2.ToDtype(torch.float32, scale=True)]
    transform = v2.Compose([*steps, v2.Normalize(*IMAGENET)])
    spec = image_spec(transform)
    assert (spec.mean, spec.std) == IMAGENET
    assert_pixels(preprocess(picture(97, 61), spec), transform(picture(97, 61))[None], spec)


@pytest.mark.parametrize("size", [96, (60, 100)], ids=["square", "oblong"])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_open_clip(mode: str, size: Any) -> None:
    transform = pytest.importorskip("open_clip.transform").image_transform(size, is_train=False, resize_mode=mode)
    spec = image_spec(transform)
    # it resizes pictures in the mode that they have
    images = [picture(*each).convert(kind) for each, kind in zip(SIZES, MODES, strict=True)]
    assert_pixels(preprocess(images, spec), torch.stack([transform(image) for image in images]), spec)


def test_open_clip_models_bring_their_own() -> None:
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 9, "width": 64, "heads": 1, "layers": 1}
    model = open_clip.CLIP(16, vision, text)
    config = {"size": 32, "mode": "RGB", "mean": IMAGENET[0], "std": IMAGENET[1], "interpolation": "bicubic"}
    open_clip.model.set_model_preprocess_cfg(model, {**config, "resize_mode": "squash", "fill_color": 0})
    transform = open_clip.image_transform(32, False, *IMAGENET, resize_mode="squash")
    for source in (model, model.visual):
        assert_pixels(preprocess(picture(97, 61), source), transform(picture(97, 61))[None], image_spec(source))


HUGGING_FACE: dict[str, dict[str, Any]] = {
    "ViT": {},
    "ViT-384": {"size": {"height": 384, "width": 384}},
    "ViT-oblong": {"size": {"height": 96, "width": 160}},
    "ViT-other-range": {"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0},
    "ViT-bytes": {"do_rescale": False, "do_normalize": False},
    "DeiT": {},
    "Beit": {},
    "CLIP": {},
    "CLIP-odd": {"size": {"shortest_edge": 223}, "crop_size": {"height": 240, "width": 181}},
    "Siglip": {},
    "Bit": {"size": {"shortest_edge": 256}, "image_mean": IMAGENET[0], "image_std": IMAGENET[1]},  # as DINOv2's
    "Bit-no-resize": {"do_resize": False, "crop_size": {"height": 201, "width": 128}},
    "Bit-no-normalize": {"do_normalize": False},
}


@pytest.mark.parametrize("backend", ["", "Pil"])
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_transformers(name: str, backend: str) -> None:
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, f"{name.split('-')[0]}ImageProcessor{backend}")(**HUGGING_FACE[name])
    spec = image_spec(processor)
    images = [picture(*size) for size in SIZES]
    for given in (images, [np.array(image) for image in images], [tensor(image) for image in images]):
        theirs = processor(given, return_tensors="pt", input_data_format=None)["pixel_values"]
        assert_pixels(preprocess(given, processor), theirs, spec)


def test_transformers_lays_transparency_on_white_where_the_processor_does(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    image = picture(300, 260, "RGBA")
    image.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 300, dtype=np.uint8), (260, 1))))
    processor = transformers.CLIPImageProcessor()
    spec = image_spec(processor)
    assert_pixels(preprocess(image, spec), processor(image, return_tensors="pt")["pixel_values"], spec)
    # a file is opened as `transformers.image_utils.load_image` does
    image.save(tmp_path / "alpha.png")
    loaded = transformers.image_utils.load_image(str(tmp_path / "alpha.png"))
    theirs = processor(loaded, return_tensors="pt")["pixel_values"]
    assert_pixels(preprocess(tmp_path / "alpha.png", spec), theirs, spec)


def test_a_processor_of_several_kinds_of_input() -> None:
    transformers = pytest.importorskip("transformers")

    class Processor:
        image_processor = transformers.SiglipImageProcessor()

    assert image_spec(Processor()) == image_spec(Processor.image_processor)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("DINOv3ViT", {}, "does not end in .* of uint8 pixels"),  # it resizes floats
        ("EfficientNet", {}, "does not make pixels of one image"),
        ("CLIP", {"do_center_crop": False}, "makes images of different sizes"),
        ("ViT", {"do_resize": False}, "makes images of different sizes"),
        ("VideoMAE", {}, r"makes no \[3, H, W\]"),
        ("ViT", {"image_mean": None}, "does not normalise by one mean"),
    ],
)
def test_what_cannot_be_done_exactly_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    processor = getattr(pytest.importorskip("transformers"), f"{name}ImageProcessor")(**options)
    if "image_mean" in options:
        processor.image_mean = None
    with pytest.raises(ValueError, match=f"{name}ImageProcessor {message}"):
        image_spec(processor)


def test_a_transform_that_sees_floats_is_refused() -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    erasing = [transforms.Resize((32, 32)), transforms.ToTensor(), transforms.RandomErasing(p=1.0)]
    with pytest.raises(ValueError, match=r"the transform Compose.* does not make pixels of one image"):
        image_spec(transforms.Compose(erasing))


CONFIG = {"input_size": (3, 8, 8), "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"}


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (nn.Linear(2, 2), TypeError, "a Linear does not say how it wants its images"),
        (vitfast.VisionTransformer, TypeError, "does not say"),
        ({**CONFIG, "input_size": (1, 8, 8)}, ValueError, "accepted are 3 channels"),
    ],
    ids=["module", "class", "channels"],
)
def test_wrong_sources_are_named(source, error, message) -> None:
    pytest.importorskip("timm")
    with pytest.raises(error, match=message):
        image_spec(source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_mode": "random"}, "crop_mode is 'random'; accepted are 'center'"),
        ({"interpolation": "random"}, "interpolation is 'random'; accepted are 'nearest'"),
        ({"crop_pct": 1.5}, r"crop_pct is 1\.5; accepted is above 0"),
    ],
    ids=["mode", "interpolation", "share"],
)
def test_wrong_crops_are_named(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        ResizeCrop((8, 8), **options)
    with pytest.raises(ValueError, match=r"std is \(0\.5,\); accepted are three numbers"):
        ImageSpec((8, 8), (0.5,) * 3, (0.5,), ResizeCrop((8, 8)))
