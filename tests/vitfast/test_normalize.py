"""`accelerate(normalize=...)`: uint8 pixels through accelerated models."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import vitfast
from tests._close import assert_close
from tests.vitfast._models import BUILDERS, TINY, fused_names, reference, timm_vit
from vitfast.kernels import INTERPRET
from vitfast.reference.architectures import create_model

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

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
    spec = vitfast.image_spec(model)
    assert (spec.mean, spec.std) == IMAGENET
    noise = np.random.default_rng(0).integers(0, 256, (2, 50, 40, 3), dtype=np.uint8)
    pixels = vitfast.preprocess([Image.fromarray(image) for image in noise], spec)
    with torch.no_grad():
        baseline = model(normalise(pixels, torch.float32))
        truth = copy.deepcopy(model).double()(normalise(pixels, torch.float64))
        actual = vitfast.accelerate(model, normalize=(spec.mean, spec.std))(pixels)
    assert_close(actual, truth, baseline)
