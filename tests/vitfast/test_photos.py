"""preprocess of images as people have them, and the part that a model sees."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from tests.vitfast._images import MODES, picture, tensor
from vitfast.images.photo import load_image
from vitfast.images.resize import ResizeCrop
from vitfast.images.spec import ImageSpec, image_spec
from vitfast.images.transforms import preprocess
from vitfast.images.view import seen_part

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
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
    config = data.resolve_data_config({"input_size": (3, 8, 8), "crop_mode": "border"})
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


def test_photographs_for_people_are_upright_and_on_white(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    shown = Image.new("RGBA", (30, 20), "red")
    shown.paste((0, 0, 0, 0), (0, 0, 30, 10))
    shown.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    loaded = np.asarray(load_image(tmp_path / "turned.png"))
    assert loaded.shape == (20, 30, 3)
    assert (loaded[:10] == 255).all() and (loaded[10:] == (255, 0, 0)).all()
    for mode in MODES[1:]:
        file = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        picture(50, 40).convert(mode).save(file)
        wanted = np.asarray(picture(50, 40).convert(mode).convert("RGB"))
        assert (np.asarray(load_image(file)) == wanted).all(), mode


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
