"""preprocess against the libraries' own transforms, and uint8 pixels through accelerated models."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import vitfast
from tests._close import assert_close
from tests.vitfast._models import BUILDERS, TINY, fused_names, reference, timm_vit
from vitfast.architectures import create_model, list_models
from vitfast.images.transforms import ImageSpec, image_spec, preprocess
from vitfast.kernels import INTERPRET

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# (width, height): both orientations, larger and smaller than the crops, odd remainders, equal to a resize
SIZES = ((512, 333), (250, 399), (256, 256), (224, 224), (97, 61), (40, 150), (225, 301))


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Noise on a gradient: rounding shows in the one, aliasing in the other."""
    rng = np.random.default_rng(width * 1000 + height)
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([255 * x / width, 255 * y / height, 255 * (x + y) / (width + height)], axis=-1)
    noise = rng.integers(-40, 41, smooth.shape)
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8)).convert(mode)


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalised(pixels: Tensor, spec: ImageSpec) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (spec.mean, spec.std))
    return (pixels.float() / 255 - mean) / std


def assert_pixels(ours: Tensor, theirs: Tensor, spec: ImageSpec) -> None:
    """Their normalised floats are our bytes: half a step of a byte tells two of them apart."""
    assert ours.dtype == torch.uint8
    assert ours.shape == theirs.shape
    step = 1 / 255 / max(spec.std)
    torch.testing.assert_close(normalised(ours, spec), theirs.float(), rtol=0, atol=1e-3 * step)


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
    images = [picture(*size) for size in SIZES]
    assert_pixels(preprocess(images, config), torch.stack([transform(image) for image in images]), spec)
    # timm's own bytes; of tensors it makes nothing else, and neither lanczos nor borders
    transform = data.create_transform(**config, is_training=False, normalize=False)
    assert torch.equal(preprocess(images, spec), torch.stack([transform(image) for image in images]))
    if spec.interpolation != "lanczos" and spec.fit != "contain":
        theirs = torch.stack([transform(tensor(image)) for image in images])
        assert torch.equal(preprocess([tensor(image) for image in images], spec), theirs)


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
        assert image_spec(model) == image_spec(config), name
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


HUGGING_FACE = {
    "ViT": {},
    "ViT-384": {"size": {"height": 384, "width": 384}},
    "ViT-oblong": {"size": {"height": 96, "width": 160}},
    "DeiT": {},
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
    theirs = processor(image, return_tensors="pt")["pixel_values"]
    assert_pixels(preprocess(image, processor), theirs, image_spec(processor))
    # a file is opened as `transformers.image_utils.load_image` does
    image.save(tmp_path / "alpha.png")
    loaded = transformers.image_utils.load_image(str(tmp_path / "alpha.png"))
    theirs = processor(loaded, return_tensors="pt")["pixel_values"]
    assert_pixels(preprocess(tmp_path / "alpha.png", processor), theirs, image_spec(processor))


def test_a_processor_of_several_kinds_of_input() -> None:
    transformers = pytest.importorskip("transformers")

    class Processor:
        image_processor = transformers.SiglipImageProcessor()

    assert image_spec(Processor()) == image_spec(Processor.image_processor)


@pytest.mark.parametrize("resample", [3, Image.Resampling.BICUBIC, "torchvision"], ids=str)
def test_transformers_interpolation_by_any_name(resample) -> None:
    transformers = pytest.importorskip("transformers")
    if resample == "torchvision":
        resample = pytest.importorskip("torchvision.transforms").InterpolationMode.BICUBIC
    assert image_spec(transformers.ViTImageProcessor(resample=resample)).interpolation == "bicubic"


def test_what_cannot_be_done_exactly_is_refused() -> None:
    transformers = pytest.importorskip("transformers")
    for processor, message in (
        (transformers.BeitImageProcessor(), "has a .* of its own"),
        (transformers.ViTImageProcessor(do_rescale=False), "does not divide pixels by 255"),
        (transformers.ViTImageProcessor(rescale_factor=1 / 127.5), "does not divide pixels by 255"),
        (transformers.ViTImageProcessor(do_pad=True), "pads images"),
        (transformers.ViTImageProcessor(do_resize=False), "no center crop"),
        (transformers.CLIPImageProcessor(do_center_crop=False), "no center crop"),
        (transformers.CLIPImageProcessor(size={"shortest_edge": 9, "longest_edge": 12}), "has size"),
        (transformers.ViTImageProcessor(resample=Image.Resampling.LANCZOS), "resizes by lanczos"),
    ):
        with pytest.raises(ValueError, match=message):
            image_spec(processor)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (nn.Linear(2, 2), TypeError, "a Linear does not say how it wants its images"),
        (vitfast.VisionTransformer, TypeError, "does not say"),
        ({"input_size": (3, 8, 8)}, ValueError, "without crop_mode, crop_pct, interpolation, mean, std"),
        (("input_size", (1, 8, 8)), ValueError, "accepted are 3 channels"),
        (("crop_mode", "random"), ValueError, "crop_mode is 'random'; accepted are 'center'"),
        (("interpolation", "random"), ValueError, "interpolation is 'random'; accepted are 'nearest'"),
        (("std", (0.5,)), ValueError, r"std is \(0\.5,\); accepted are three numbers"),
    ],
)
def test_wrong_sources_are_named(source, error, message) -> None:
    if isinstance(source, tuple):
        whole = {"input_size": (3, 8, 8), "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"}
        source = {**whole, "mean": IMAGENET[0], "std": IMAGENET[1], source[0]: source[1]}
    with pytest.raises(error, match=message):
        image_spec(source)


# images

SPEC = ImageSpec((32, 32), (36, 36), "shortest", "bicubic", *IMAGENET)


def test_forms_of_one_image_agree(tmp_path) -> None:
    image = picture(50, 40)
    image.save(tmp_path / "image.png")
    wanted = preprocess(image, SPEC)
    assert wanted.shape == (1, 3, 32, 32)
    assert wanted.is_contiguous(memory_format=torch.channels_last)
    forms = (np.array(image), tmp_path / "image.png", str(tmp_path / "image.png"), np.array(image)[None], iter([image]))
    for form in forms:
        assert torch.equal(preprocess(form, SPEC), wanted)
    arrays = np.stack([np.array(image), np.array(image.transpose(Image.Transpose.ROTATE_180))])
    assert torch.equal(preprocess(arrays, SPEC)[1:], preprocess(arrays[1], SPEC))
    # a strided view, as a flip makes one
    assert torch.equal(preprocess(np.array(image)[:, ::-1], SPEC), preprocess(np.array(image)[:, ::-1].copy(), SPEC))
    batch = torch.stack([tensor(image)] * 2)
    assert torch.equal(preprocess(batch, SPEC)[:1], preprocess(tensor(image), SPEC))
    assert preprocess([], SPEC).shape == (0, 3, 32, 32)
    assert preprocess([image], SPEC, device="meta").device.type == "meta"


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1", "LA"])
def test_files_of_every_mode_are_converted_to_rgb(mode, tmp_path) -> None:
    image = picture(50, 40).convert(mode)
    file = tmp_path / f"image.{'tif' if mode == 'CMYK' else 'png'}"
    image.save(file)
    wanted = preprocess(image.convert("RGB"), SPEC)
    assert torch.equal(preprocess(image, SPEC), wanted)
    assert torch.equal(preprocess(file, SPEC), wanted)


def test_files_are_turned_where_the_library_turns_them(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = picture(60, 40)
    lying.save(tmp_path / "lying.png", exif=exif)
    upright = lying.transpose(Image.Transpose.ROTATE_270)
    # timm and torchvision open files with `convert("RGB")` alone, Transformers' load_image turns them first
    for library, wanted in (("timm", lying), ("transformers", upright), ("transformers-pil", upright)):
        spec = dataclasses.replace(SPEC, library=library)
        assert torch.equal(preprocess(tmp_path / "lying.png", spec), preprocess(wanted, spec)), library


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
    with pytest.raises(ValueError, match="not resized by lanczos"):
        preprocess(tensor(picture(9, 9)), dataclasses.replace(SPEC, interpolation="lanczos"))


@pytest.mark.parametrize("kind", ["text", "truncated", "empty", "folder"])
def test_a_broken_file_is_named(kind, tmp_path) -> None:
    file = tmp_path / "odd.jpg"
    if kind == "folder":
        file.mkdir()
    else:
        picture(64, 64).save(file)
        file.write_bytes({"text": b"no picture", "truncated": file.read_bytes()[:700], "empty": b""}[kind])
    with pytest.raises(ValueError, match=r"image file '.*odd\.jpg' cannot be read \(.*\); accepted is JPEG") as caught:
        preprocess([picture(9, 9), file], SPEC)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        preprocess(tmp_path / "none.png", SPEC)


# uint8 pixels in an accelerated model

reference_lane = pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1 replaces the reference on CPU")


def bytes_of(batch: int = 3, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, *TINY["img_size"]), dtype=torch.uint8, generator=generator)


def normalise(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    mean, std = (torch.tensor(values, dtype=dtype)[:, None, None] for values in IMAGENET)
    return (pixels.to(dtype) / 255 - mean) / std


@pytest.mark.parametrize("layout", ["NCHW", "channels_last", "NHWC"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", BUILDERS)
def test_bytes_give_what_normalised_floats_give(name: str, precision: str, layout: str) -> None:
    plain = BUILDERS[name]()
    pixels = bytes_of()
    given = pixels
    if layout == "channels_last":
        given = pixels.contiguous(memory_format=torch.channels_last)
    elif layout == "NHWC":
        given = pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    fused = vitfast.accelerate(copy.deepcopy(plain), precision=precision, normalize=IMAGENET)
    dtype = next(fused.parameters()).dtype
    with torch.no_grad():
        actual = fused(given)
        plain.to(dtype)
        baseline = plain(normalise(pixels, torch.float32).to(dtype))
        truth = plain.double()(normalise(pixels, torch.float64))
        assert_close(actual, truth, baseline)
        # floats mean what they did
        floats = normalise(pixels, torch.float32).to(dtype)
        assert torch.equal(fused(floats), vitfast.accelerate(BUILDERS[name]().to(dtype))(floats))


@pytest.mark.parametrize("name", BUILDERS)
def test_bytes_train(name: str) -> None:
    plain = BUILDERS[name]()
    pixels = bytes_of()
    fused = vitfast.accelerate(copy.deepcopy(plain), normalize=IMAGENET)
    exact = copy.deepcopy(plain).double()
    fused(pixels).square().sum().backward()
    plain(normalise(pixels, torch.float32)).square().sum().backward()
    exact(normalise(pixels, torch.float64)).square().sum().backward()
    for actual, baseline, truth in zip(*(list(m.parameters()) for m in (fused, plain, exact)), strict=True):
        assert_close(actual.grad, truth.grad, baseline.grad)


@pytest.mark.parametrize("name", BUILDERS)
def test_features_of_bytes_come_through_every_door(name: str) -> None:
    fused = vitfast.accelerate(BUILDERS[name](), normalize=IMAGENET)
    floats = normalise(bytes_of(), torch.float32)
    with torch.no_grad():
        for call in (
            lambda x: fused.forward_features(x),
            lambda x: fused.forward_intermediates(x, 1, intermediates_only=True)[0],
            lambda x: fused.patch_embed(x),
        ):
            torch.testing.assert_close(call(bytes_of()), call(floats), rtol=1e-4, atol=1e-4)
        # a hook on the stem makes the model call it
        seen = []
        handle = fused.patch_embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
        torch.testing.assert_close(fused(bytes_of()), fused(floats), rtol=1e-4, atol=1e-4)
        handle.remove()
        assert seen == [torch.uint8, torch.float32]


@pytest.mark.parametrize("name", BUILDERS)
def test_without_normalize_bytes_are_refused_in_the_original_s_words(name: str) -> None:
    plain = BUILDERS[name]()
    with pytest.raises(RuntimeError) as theirs:
        plain(bytes_of())
    fused = vitfast.accelerate(copy.deepcopy(plain), normalize=IMAGENET)
    fused(bytes_of())
    for model in (vitfast.accelerate(copy.deepcopy(plain)), vitfast.restore(fused)):
        with pytest.raises(RuntimeError) as ours:
            model(bytes_of())
        assert str(ours.value) == str(theirs.value)
    # nothing of it is left
    assert [n for n, _ in fused.named_buffers()] == [n for n, _ in plain.named_buffers()]
    assert fused.state_dict().keys() == plain.state_dict().keys()


def test_mean_and_std_stay_exact_and_outside_the_state_dict() -> None:
    plain = reference()
    fused = vitfast.accelerate(copy.deepcopy(plain), normalize=IMAGENET)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        wanted = fused(bytes_of())
        for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), copy.deepcopy(fused).bfloat16().float()):
            other.load_state_dict(plain.state_dict())
            assert torch.equal(other(bytes_of()), wanted)
    assert all(buffer.is_meta for buffer in copy.deepcopy(fused).to("meta").buffers())
    # a further call replaces the numbers, one without them keeps them
    again = vitfast.accelerate(vitfast.accelerate(fused), normalize=((0.5,) * 3, (0.5,) * 3))
    with torch.no_grad():
        assert torch.equal(again(bytes_of()), vitfast.accelerate(plain, normalize=((0.5,) * 3, (0.5,) * 3))(bytes_of()))


@reference_lane
@pytest.mark.parametrize("name", BUILDERS)
def test_bytes_compile_to_one_graph(name: str) -> None:
    torch._dynamo.reset()
    fused = vitfast.accelerate(BUILDERS[name](), normalize=IMAGENET)
    with torch.no_grad():
        wanted = fused(bytes_of())
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(bytes_of()), wanted)
        exported = torch.export.export(fused, (bytes_of(),)).module()
        torch.testing.assert_close(exported(bytes_of()), wanted)


def test_a_patch_embedding_that_stays_is_an_error_and_nothing_changes() -> None:
    model = timm_vit(dynamic_img_pad=True)
    with pytest.raises(ValueError, match=r"normalize: .*\(patch_embed: pads images \(dynamic_img_pad\)\)"):
        vitfast.accelerate(model, normalize=IMAGENET)
    assert not fused_names(model)
    model = reference()
    model.patch_embed.proj.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"normalize: .*patch_embed: proj has hooks: called as a module"):
        vitfast.accelerate(model, normalize=IMAGENET)
    assert not fused_names(model)
    for found, message in ((nn.Linear(2, 2), "there is none"), (reference(), "there is none")):
        with pytest.raises(ValueError, match=message):
            vitfast.accelerate(found, normalize=IMAGENET, only={"mlp"})
    # a hook that comes later makes the layer call the convolution, which refuses bytes
    model = vitfast.accelerate(reference(), normalize=IMAGENET)
    model.patch_embed.proj.register_forward_hook(lambda *args: None)
    with pytest.raises(RuntimeError):
        model(bytes_of())


def test_models_that_cast_bytes_away_are_refused() -> None:
    transformers = pytest.importorskip("transformers")
    options = {"depth": 1, "img_size": 32}
    config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=options)
    model = transformers.TimmWrapperModel(config)
    with pytest.raises(ValueError, match="normalize: TimmWrapperModel of Transformers casts uint8 pixels"):
        vitfast.accelerate(model, normalize=IMAGENET)
    assert not fused_names(model)
    # the model inside does not
    vitfast.accelerate(model.timm_model, normalize=IMAGENET)


@pytest.mark.parametrize(
    ("normalize", "message"),
    [
        (((0.5,), (0.5,) * 3), r"mean is \(0\.5,\); expected 3 numbers"),
        (((0.5,) * 3, (0.5,) * 4), r"std is .*; expected 3 numbers"),
        (((0.5,) * 3, (0.5, 0.0, 0.5)), r"std is .*; expected positive numbers"),
        (((0.5,) * 3, (0.5, float("nan"), 0.5)), r"std is .*; expected 3 numbers"),
        (((0.5,) * 3,), r"expected \(mean, std\)"),
    ],
)
def test_wrong_numbers_are_named(normalize, message) -> None:
    model = reference()
    with pytest.raises(ValueError, match=f"normalize.*{message}"):
        vitfast.accelerate(model, normalize=normalize)
    assert not fused_names(model)


def test_from_pictures_to_logits() -> None:
    model = create_model("deit_tiny_patch16_224", depth=1, img_size=32, num_classes=5).eval()
    nn.init.normal_(model.head.weight)
    spec = image_spec(model)
    assert (spec.mean, spec.std) == IMAGENET
    pixels = preprocess([picture(50, 40), picture(40, 70)], spec)
    with torch.no_grad():
        baseline = model(normalise(pixels, torch.float32))
        truth = copy.deepcopy(model).double()(normalise(pixels, torch.float64))
        actual = vitfast.accelerate(model, normalize=(spec.mean, spec.std))(pixels)
    assert_close(actual, truth, baseline)
