"""image_spec and preprocess against the libraries' own transforms, and images as people have them."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import vitfast
from vitfast.architectures import create_model, list_models
from vitfast.images.photo import load_image
from vitfast.images.resize import ResizeCrop
from vitfast.images.spec import ImageSpec, image_spec
from vitfast.images.transforms import preprocess
from vitfast.images.view import seen_part

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# (width, height): both orientations, larger and smaller than the crops, odd remainders, equal to a resize
SIZES = ((512, 333), (250, 399), (256, 256), (224, 224), (97, 61), (40, 150), (225, 301))
MODES = ("RGB", "L", "RGBA", "CMYK", "P", "1", "LA")


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Noise on a gradient: rounding shows in the one, aliasing in the other."""
    rng = np.random.default_rng(width * 1000 + height)
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([255 * x / width, 255 * y / height, 255 * (x + y) / (width + height)], axis=-1)
    noise = rng.integers(-40, 41, smooth.shape)
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8)).convert(mode)


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


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


# images

SPEC = ImageSpec((32, 32), *IMAGENET, ResizeCrop((32, 32)))


def test_forms_of_one_image_agree(tmp_path) -> None:
    image = picture(50, 40)
    image.save(tmp_path / "image.png")
    wanted = preprocess(image, SPEC)
    assert wanted.shape == (1, 3, 32, 32)
    assert wanted.is_contiguous(memory_format=torch.channels_last)
    forms = (np.array(image), tmp_path / "image.png", str(tmp_path / "image.png"), np.array(image)[None], iter([image]))
    for form in forms:
        assert torch.equal(preprocess(form, pickle.loads(pickle.dumps(SPEC))), wanted)
    arrays = np.stack([np.array(image), np.array(image.transpose(Image.Transpose.ROTATE_180))])
    assert torch.equal(preprocess(arrays, SPEC)[1:], preprocess(arrays[1], SPEC))
    # a strided view, as a flip makes one
    assert torch.equal(preprocess(np.array(image)[:, ::-1], SPEC), preprocess(np.array(image)[:, ::-1].copy(), SPEC))
    batch = torch.stack([tensor(image)] * 2)
    assert torch.equal(preprocess(batch, SPEC)[:1], preprocess(tensor(image), SPEC))
    assert preprocess([], SPEC).shape == (0, 3, 32, 32)
    assert preprocess([image], SPEC, device="meta").device.type == "meta"


@pytest.mark.parametrize("mode", MODES[1:])
def test_files_of_every_mode_are_converted_to_rgb(mode, tmp_path) -> None:
    image = picture(50, 40).convert(mode)
    file = tmp_path / f"image.{'tif' if mode == 'CMYK' else 'png'}"
    image.save(file)
    wanted = preprocess(image.convert("RGB"), SPEC)
    assert torch.equal(preprocess(image, SPEC), wanted)
    assert torch.equal(preprocess(file, SPEC), wanted)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled(suffix: str, tmp_path) -> None:
    grey = np.asarray(picture(50, 40, "L"))
    deep, file = Image.fromarray(grey.astype(np.uint16) * 257), tmp_path / f"deep.{suffix}"
    deep.save(file)
    wanted = preprocess(Image.fromarray(grey), SPEC)
    for image in (deep, file, Image.open(file), load_image(file)):
        assert torch.equal(preprocess(image, SPEC), wanted)
    for values in (grey.astype(np.int32), grey.astype(np.float32)):
        with pytest.raises(ValueError, match=r"image 0 cannot be read \(pixels are .* of no known range"):
            preprocess(Image.fromarray(values), SPEC)


def test_of_an_animation_the_first_frame_counts(tmp_path) -> None:
    frames = [picture(50, 40, "P"), picture(50, 40, "P").transpose(Image.Transpose.ROTATE_180)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    wanted = preprocess(frames[0], SPEC)
    assert torch.equal(preprocess(tmp_path / "moving.gif", SPEC), wanted)
    assert torch.equal(preprocess(load_image(tmp_path / "moving.gif"), SPEC), wanted)


def test_thin_images_are_prepared_or_named() -> None:
    for size in ((1, 400), (400, 1), (1, 1)):
        assert preprocess(Image.new("RGB", size, "red"), SPEC)[0, 0].min() == 255
    with pytest.raises(ValueError, match="image 0 is 1 x 99999 pixels, so thin that 102 million pixels"):
        preprocess(Image.new("RGB", (1, 99999)), SPEC)
    # what a library's transform trips over itself
    data = pytest.importorskip("timm.data")
    config = data.resolve_data_config({**CONFIG, "crop_mode": "border"})
    with pytest.raises(ValueError, match="image 0, 1 x 90 pixels, is not prepared by ResizeKeepRatio"):
        preprocess(Image.new("RGB", (1, 90)), config)


def test_files_are_turned_where_the_library_turns_them(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = picture(60, 40)
    lying.save(tmp_path / "lying.png", exif=exif)
    # timm and torchvision open files with `convert("RGB")` alone, Transformers' load_image turns them first
    assert torch.equal(preprocess(tmp_path / "lying.png", SPEC), preprocess(lying, SPEC))
    processor = pytest.importorskip("transformers").ViTImageProcessor()
    upright = lying.transpose(Image.Transpose.ROTATE_270)
    assert torch.equal(preprocess(tmp_path / "lying.png", processor), preprocess(upright, processor))


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), ValueError, "image 1 has dtype float32; accepted is uint8"),
        (torch.zeros(3, 4, 4), ValueError, r"image 1 has dtype torch\.float32; accepted is uint8"),
        (np.zeros((4, 4, 4), np.uint8), ValueError, r"image 1 has shape \[4, 4, 4\]; accepted is \[H, W, 3\]"),
        (np.zeros((4, 4), np.uint8), ValueError, r"shape \[4, 4\]; accepted is \[H, W, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r"shape \[0, 4, 3\]"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), ValueError, r"shape \[4, 4, 3\]; accepted is \[3, H, W\]"),
        (3, TypeError, "image 1 is a int; accepted are PIL images"),
    ],
    ids=str,
)
def test_wrong_images_are_named(image, error, message) -> None:
    with pytest.raises(error, match=message):
        preprocess([picture(9, 9), image], SPEC)


def test_tensors_are_not_resized_by_what_torch_does_not_have() -> None:
    lanczos = dataclasses.replace(SPEC, transform=ResizeCrop((32, 32), interpolation="lanczos"))
    with pytest.raises(ValueError, match=r"image 0, 9 x 9 pixels, is not prepared by .* resized by lanczos"):
        preprocess(tensor(picture(9, 9)), lanczos)


def test_a_transform_of_ones_own_must_keep_its_word() -> None:
    with pytest.raises(ValueError, match=r"image 0 became torch\.uint8 \[3, 9, 9\]"):
        preprocess(picture(9, 9), dataclasses.replace(SPEC, transform=lambda image: image))


@pytest.mark.parametrize("kind", ["text", "truncated", "empty", "folder"])
def test_a_broken_file_is_named(kind, tmp_path) -> None:
    file = tmp_path / "odd.jpg"
    if kind == "folder":
        file.mkdir()
    else:
        picture(64, 64).save(file)
        file.write_bytes({"text": b"no picture", "truncated": file.read_bytes()[:700], "empty": b""}[kind])
    for source in (SPEC, dataclasses.replace(SPEC, any_mode=True), dataclasses.replace(SPEC, upright=True)):
        match = r"image file '.*odd\.jpg' cannot be read \(.*\); accepted is JPEG"
        with pytest.raises(ValueError, match=match) as caught:
            preprocess([picture(9, 9), file], source)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        preprocess(tmp_path / "none.png", SPEC)


# the part that a model sees


@pytest.mark.parametrize(
    ("mode", "size", "box"),
    [
        ("center", (800, 400), (220, 20, 580, 380)),
        ("center", (400, 800), (20, 220, 380, 580)),
        ("squash", (800, 400), (40, 20, 760, 380)),
        ("center", (30, 20), (6, 1, 24, 19)),
        ("center", (1, 40), (0, 20, 1, 21)),
    ],
)
def test_the_part_that_is_seen(mode: str, size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    image = picture(*size)
    part = seen_part(image, dataclasses.replace(SPEC, size=(36, 36), transform=ResizeCrop((36, 36), 0.9, mode)))
    wanted = image.crop(box)
    assert np.abs(np.subtract(part.size, wanted.size)).max() <= 1
    if min(size) > 1:
        found = np.asarray(part.resize(wanted.size).resize((16, 16), Image.Resampling.BOX), int)
        assert np.abs(found - np.asarray(wanted.resize((16, 16), Image.Resampling.BOX), int)).max() < 20


def test_padding_is_seen_as_black() -> None:
    transform = pytest.importorskip("open_clip.transform").image_transform(64, is_train=False, resize_mode="longest")
    part = seen_part(Image.new("RGB", (200, 100), "white"), image_spec(transform))
    assert part.size == (200, 200)
    rows = np.asarray(part)[:, 100, 0]
    assert (rows[:49] == 0).all() and (rows[51:149] == 255).all() and (rows[151:] == 0).all()
