"""The rule on two tensors, and parity of whole models: that it measures what it says and sees a wrong kernel."""

from __future__ import annotations

import copy
import math
import random
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vitfast
from vitfast import kernels
from vitfast.proof import libraries
from vitfast.proof.parity import Parity, parity
from vitfast.proof.subjects import build_model, pick_device, seed_weights
from vitfast.reference.architectures import ARCHITECTURES
from vitfast.rule import ALIKE, compare

TINY = {
    **ARCHITECTURES["vit_tiny_patch16_224"],
    "img_size": 32,
    "patch_size": 8,
    "depth": 2,
    "embed_dim": 24,
    "num_heads": 3,
    "num_classes": 5,
    "init_values": 0.1,
}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "vit_test", TINY)


def model_and_pixels(**overrides) -> tuple[vitfast.VisionTransformer, torch.Tensor]:
    model = seed_weights(vitfast.create_model("vit_test", **overrides), seed=3)
    return model.eval(), torch.randn(3, 3, 32, 32)


def row(found: Parity, name: str):
    return next(r for r in found.modules if r.module == name)


def test_compare_counts_errors_as_the_rule_says() -> None:
    truth = torch.tensor([3.0, -4.0, 0.0, 0.0], dtype=torch.float64)
    baseline = (truth + torch.tensor([0.5, 0.0, 0.0, 0.0])).float()
    actual = (truth + torch.tensor([0.0, 0.0, 0.0, -1.0])).float()
    found = compare(actual, truth, baseline)
    eps = torch.finfo(torch.float32).eps
    assert (found.worst, found.baseline_worst) == (1.0, 0.5)
    assert (found.rms, found.baseline_rms) == (0.5, 0.25)
    assert found.worst_limit == pytest.approx(2 * 0.5 + 4 * eps, rel=1e-12)
    assert found.rms_limit == pytest.approx(2 * 0.25 + 2.5 * eps, rel=1e-12)
    assert found.relative == pytest.approx(1.0 / 5.0)
    assert found.baseline_relative == pytest.approx(0.5 / 5.0)
    assert found.cosine == pytest.approx(25.0 / (5.0 * math.sqrt(26.0)))
    # exactly twice torch's error is still allowed, by the ulp's width
    assert found.ok
    assert found.share == pytest.approx(1.0, abs=1e-6)
    assert not compare(actual * 1.01, truth, baseline).ok


def test_compare_refuses_nan_and_mixed_tensors() -> None:
    truth = torch.ones(3, dtype=torch.float64)
    found = compare(torch.tensor([1.0, math.nan, 1.0]), truth, torch.ones(3))
    assert not found.ok
    assert math.isnan(found.share)
    with pytest.raises(ValueError, match="expected one shape"):
        compare(torch.ones(2), truth, torch.ones(3))
    with pytest.raises(ValueError, match="expected one dtype"):
        compare(torch.ones(3, dtype=torch.half), truth, torch.ones(3))


def test_noise_is_not_like_truth_however_large_torchs_error_is() -> None:
    truth, noise = torch.randn(1000, dtype=torch.float64), torch.randn(2, 1000)
    assert compare(noise[0], truth, noise[1]).ok
    found = compare(noise[0], truth, noise[1], least_cosine=ALIKE)
    assert not found.ok
    assert found.share == math.inf
    # small and zero results have a direction of their own
    assert compare(truth.float() * 1e-12, truth * 1e-12, truth.float() * 1e-12, least_cosine=ALIKE).ok
    nothing = torch.zeros(3)
    assert compare(nothing, nothing.double(), nothing, least_cosine=ALIKE).cosine == 1.0


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_every_replaced_module_has_a_row_and_keeps_the_rule(precision: str) -> None:
    model, pixels = model_and_pixels(qk_norm=True)
    found = parity(model, pixels, precision)
    assert found.ok, str(found)
    replaced = vitfast.report(vitfast.accelerate(copy.deepcopy(model))).replaced
    assert sorted((r.module, r.kind, r.original, r.fused) for r in found.modules) == sorted(
        (r.module, r.kind, r.original, r.fused) for r in replaced
    )
    assert sum(count for count, _ in found.groups()) == len(replaced)
    assert found.top1 is not None
    assert found.top1.images == 3


def test_output_errors_are_those_of_the_rounded_weights() -> None:
    model, pixels = model_and_pixels()
    found = parity(model, pixels, "bf16")
    with torch.inference_mode():
        rounded = copy.deepcopy(model).bfloat16()
        baseline = rounded(pixels.bfloat16())
        truth = copy.deepcopy(rounded).double()(pixels.bfloat16().double())
        actual = vitfast.accelerate(copy.deepcopy(rounded))(pixels.bfloat16())
    assert found.output == compare(actual, truth, baseline, least_cosine=ALIKE)
    assert found.top1 is not None
    assert found.top1.accelerated == int((actual.argmax(-1) == truth.argmax(-1)).sum())
    assert found.top1.plain == int((baseline.argmax(-1) == truth.argmax(-1)).sum())


def test_a_module_is_judged_on_the_plain_models_input() -> None:
    model, pixels = model_and_pixels()
    found = parity(model, pixels, "fp16")
    half = copy.deepcopy(model).half()
    seen = {}
    half.blocks[1].mlp.register_forward_hook(lambda _, args, out: seen.update(x=args[0], out=out))
    with torch.inference_mode():
        half(pixels.half())
        truth = copy.deepcopy(half.blocks[1].mlp).double()
        truth._forward_hooks.clear()
        exact = truth(seen["x"].double())
        fused = vitfast.accelerate(copy.deepcopy(half)).blocks[1].mlp
        fused._forward_hooks.clear()
        expected = compare(fused(seen["x"]), exact, seen["out"], least_cosine=ALIKE)
    assert row(found, "blocks.1.mlp").comparison == expected


def test_a_wrong_kernel_breaks_the_rows_that_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pixels = model_and_pixels()
    right = kernels.attention_qkv
    monkeypatch.setattr(kernels, "attention_qkv", lambda *args, **kwargs: right(*args, **kwargs) * 1.001)
    found = parity(model, pixels)
    assert not found.ok
    assert not found.output.ok
    assert {r.module for r in found.broken} == {"blocks.0.attn", "blocks.1.attn", "blocks.0", "blocks.1"}
    assert "the rule is broken" in found.verdict
    assert "blocks.0.attn" in found.verdict
    assert "BROKEN" in str(found)


def test_a_wrong_prefix_breaks_the_embedding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pixels = model_and_pixels(reg_tokens=2)
    # with a wrong kernel it would not be replaced
    assert parity(model, pixels).ok
    right = kernels.patch_embed

    def wrong(images, weight, bias=None, prefix=None, pos_embed=None, *args, **kwargs):
        return right(images, weight, bias, None if prefix is None else prefix * 1.01, pos_embed, *args, **kwargs)

    monkeypatch.setattr(kernels, "patch_embed", wrong)
    found = parity(model, pixels)
    assert [r.module for r in found.broken] == [""]
    assert "(model)" in found.verdict


class Drawing(nn.Module):
    """Adds random numbers in evaluation; `draw` takes the tokens and a generator that the module holds."""

    def __init__(self, draw) -> None:
        super().__init__()
        self.draw = draw
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.draw(x, self.generator)


DRAWS = {
    "dropout": lambda x, _: F.dropout(x, 0.5, True),
    "normal noise, other numbers in float64": lambda x, _: x + torch.randn_like(x),
    "uniform noise of the default dtype": lambda x, _: x * torch.rand(x.shape[:2])[..., None].to(x.dtype),
    "dropout as on a GPU": lambda x, _: torch.native_dropout(x, 0.5, True)[0],
    "a shuffle": lambda x, _: x[:, torch.randperm(x.shape[1])],
    "attention dropout": lambda x, _: x + F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "a generator of the module": lambda x, own: x + torch.randn(x.shape, generator=own, dtype=x.dtype),
    "numpy": lambda x, _: x + torch.from_numpy(np.random.standard_normal(x.shape)).to(x.dtype),
    "python": lambda x, _: x * random.random(),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("draw", DRAWS.values(), ids=list(DRAWS))
def test_a_model_that_draws_gets_the_same_numbers_every_time(draw, precision, monkeypatch) -> None:
    model, pixels = model_and_pixels()
    model.pos_drop = Drawing(draw)
    # inside a replaced module too
    model.blocks[1].norm2 = nn.Sequential(model.blocks[1].norm2, Drawing(draw))
    states = [torch.get_rng_state(), model.pos_drop.generator.get_state()]
    others = random.getstate(), np.random.get_state()[1].tolist()
    found = parity(model, pixels, precision)
    assert found.ok, str(found)
    assert found.output.cosine > 0.99
    after = [torch.get_rng_state(), model.pos_drop.generator.get_state()]
    assert all(map(torch.equal, after, states))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == others

    if draw is DRAWS["a generator of the module"]:
        # each generator asks for a proof of its own, which a wrong kernel fails
        return
    right = kernels.attention_qkv
    monkeypatch.setattr(kernels, "attention_qkv", lambda *args, **kwargs: right(*args, **kwargs) * 1.2)
    found = parity(model, pixels, precision)
    assert not found.output.ok
    assert {"blocks.0.attn", "blocks.1.attn", "blocks.0"} <= {r.module for r in found.broken}


def test_a_masked_autoencoder_is_judged_under_one_mask(monkeypatch) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    model = seed_weights(transformers.ViTMAEModel(transformers.ViTMAEConfig(**sizes, image_size=64, patch_size=16)))
    found = parity(model.eval(), torch.randn(2, 3, 64, 64))
    assert found.ok, str(found)
    assert found.output.cosine > 0.999
    right = kernels.linear
    monkeypatch.setattr(kernels, "linear", lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    assert not parity(model, torch.randn(2, 3, 64, 64)).output.ok


def test_numbers_that_float64_cannot_have_are_an_error() -> None:
    model, pixels = model_and_pixels()
    model.pos_drop = Drawing(lambda x, _: torch.normal(x, x.abs()))
    with pytest.raises(ValueError, match="random numbers inside aten::normal"):
        parity(model, pixels)
    model.pos_drop = Drawing(lambda x, _: x + torch.rand(2 if x.dtype == torch.float64 else 1).sum())
    with pytest.raises(ValueError, match=r"other random numbers in float64 \(aten::rand \[2\], not aten::rand \[1\]\)"):
        parity(model, pixels)
    model.pos_drop = Drawing(lambda x, _: x if x.dtype == torch.float64 else x + torch.rand(1))
    with pytest.raises(ValueError, match=r"other random numbers in float64 \(0 draws, not 1\)"):
        parity(model, pixels)


def test_nan_is_never_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pixels = model_and_pixels()
    right = kernels.layer_norm
    monkeypatch.setattr(kernels, "layer_norm", lambda *args: right(*args) * math.nan)
    found = parity(model, pixels)
    assert not found.ok
    assert "nan" in str(found)
    assert not next(r for _, r in found.groups() if r.kind == "layer_norm").comparison.ok


def test_the_model_stays_as_it_was() -> None:
    model, pixels = model_and_pixels()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = parity(model, pixels, "bf16")
    assert model.training
    assert not vitfast.report(model).replaced
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    # of an accelerated model the plain one is made first
    again = parity(vitfast.accelerate(model, precision="fp16"), pixels, "bf16")
    assert again.output == plain.output
    assert vitfast.report(model).precision == "fp16"


def test_only_and_models_without_classes() -> None:
    model, pixels = model_and_pixels(num_classes=0)
    found = parity(model, pixels, only={"mlp", "patch_embed"})
    assert {r.kind for r in found.modules} == {"mlp", "patch_embed", "model"}
    assert row(found, "").comparison.ok
    assert found.top1 is None
    assert "top-1" not in str(found)


def test_an_output_of_zeros_says_that_it_proves_nothing() -> None:
    # the head of a new model
    found = parity(vitfast.create_model("vit_test").eval(), torch.randn(1, 3, 32, 32))
    assert found.ok
    assert "output: zero whatever the modules do" in str(found)
    assert "top-1" not in str(found)


def test_nothing_to_replace_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing in this Linear can be replaced"):
        parity(nn.Linear(4, 4), torch.randn(2, 4))
    with pytest.raises(ValueError, match="precision 'fp8'"):
        parity(nn.Linear(4, 4), torch.randn(2, 4), "fp8")


def test_seeded_weights_leave_nothing_trivial() -> None:
    model, pixels = model_and_pixels()
    for name, parameter in model.named_parameters():
        assert parameter.std() > 0.01, name
    twin = seed_weights(vitfast.create_model("vit_test"), seed=3).eval()
    other = seed_weights(vitfast.create_model("vit_test"), seed=4).eval()
    with torch.inference_mode():
        assert torch.equal(model(pixels), twin(pixels))
        assert not torch.allclose(model(pixels), other(pixels))
        # logits of a size at which an error would show
        assert 0.3 < model(pixels).std() < 10.0
    weight = seed_weights(nn.Linear(400, 300)).weight
    assert weight.std().item() == pytest.approx(400**-0.5, rel=0.02)


def test_build_model_reads_weights(tmp_path) -> None:
    model, pixels = model_and_pixels()
    torch.save(model.state_dict(), tmp_path / "tiny.pth")
    built = build_model("vit_test", tmp_path / "tiny.pth")
    assert not built.training
    with torch.inference_mode():
        assert torch.equal(built(pixels), model(pixels))
    # the seeded ones are those of a model made the plain way
    expected = seed_weights(vitfast.create_model("vit_test"), seed=6).state_dict()
    for name, tensor in build_model("vit_test", seed=6).state_dict().items():
        assert torch.equal(tensor, expected.pop(name)), name
    assert not expected
    assert build_model("vit_test", img_size=64).patch_embed.grid_size == (8, 8)


def test_build_model_makes_timms_models(tmp_path) -> None:
    timm = pytest.importorskip("timm")
    built = build_model("timm:vit_tiny_patch16_224", img_size=64)
    assert isinstance(built, timm.models.vision_transformer.VisionTransformer)
    found = parity(built, torch.randn(1, 3, 64, 64))
    assert found.ok, str(found)
    assert row(found, "").original == "VisionTransformer"
    # not ours, so timm's even without the prefix
    assert type(build_model("test_vit")).__module__.startswith("timm.")
    torch.save(built.state_dict(), tmp_path / "timm.pth")
    again = build_model("timm:vit_tiny_patch16_224", tmp_path / "timm.pth", img_size=64)
    assert torch.equal(again.head.weight, built.head.weight)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        build_model("timm:vit_tiny_patch16_224", "nowhere.pth")
    with pytest.raises(ValueError, match="timm has no model 'vit_tiny_patch99'"):
        build_model("timm:vit_tiny_patch99")


def test_build_model_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r'pip install "vitfast\[timm\]"'):
        build_model("timm:vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="close matches: 'vit_tiny_patch16_224'"):
        build_model("vit_tiny_patch16_22")


def test_timm_that_does_not_import_is_told_from_one_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(libraries.importlib, "import_module", broken)
    with pytest.raises(ImportError, match="does not import: operator"):
        build_model("timm:vit_tiny_patch16_224")


@pytest.mark.parametrize("name", ["tpu", "meta", "cuda:99", "cpu:x"])
def test_devices_that_are_not_there_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        pick_device(name)
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_parity_on_cuda_leaves_tf32_settings(precision: str) -> None:
    model, pixels = model_and_pixels()
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    found = parity(model.cuda(), pixels.cuda(), precision)
    assert found.ok, str(found)
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before
