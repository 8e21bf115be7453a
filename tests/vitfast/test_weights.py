"""Checkpoint files: what timm saves loads with timm's numbers, and what does not fit leaves the model alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from tests._close import assert_close
from vitfast.reference.vit import VisionTransformer
from vitfast.reference.weights.load import load_weights

SMALL = {"img_size": 64, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model.eval()


def timm_model(**options) -> TimmVisionTransformer:
    return filled(TimmVisionTransformer(**{**SMALL, **options}))


def ours(**options) -> VisionTransformer:
    return filled(VisionTransformer(**{**SMALL, **options}), seed=1)


def saved(tensors, path):
    if path.suffix == ".safetensors":
        save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    return path


def assert_holds(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    own = model.state_dict()
    assert own.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(own[name], tensor), name


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
def test_a_file_gives_timms_numbers(tmp_path, suffix: str) -> None:
    peer = timm_model(init_values=0.1, reg_tokens=2)
    model = ours(init_values=0.1, reg_tokens=2)
    path = saved(peer.state_dict(), tmp_path / f"model{suffix}")
    assert load_weights(model, str(path)) is model
    assert_holds(model, peer.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        baseline = peer(x)
        assert_close(model(x), peer.double()(x.double()), baseline)


WRAPPINGS = {
    "model": lambda t: {"model": t, "epoch": 3},
    "state_dict": lambda t: {"state_dict": t, "arch": "vit", "optimizer": {"lr": 0.1}},
    "module": lambda t: {f"module.{name}": v for name, v in t.items()},
    "compiled_ddp": lambda t: {f"module._orig_mod.{name}": v for name, v in t.items()},
    "all": lambda t: {"model": {"state_dict": {f"module.{name}": v for name, v in t.items()}}},
    "ordered": lambda t: {"model": torch.nn.Module.state_dict(timm_model())},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_training_checkpoints_are_unwrapped(tmp_path, wrapping: str) -> None:
    tensors, model = timm_model().state_dict(), ours()
    load_weights(model, saved(WRAPPINGS[wrapping](tensors), tmp_path / "checkpoint.pth"))
    assert_holds(model, tensors)


def test_deit3_layer_scale_names(tmp_path) -> None:
    tensors, model = (
        timm_model(init_values=0.1, no_embed_class=True).state_dict(),
        ours(init_values=0.1, no_embed_class=True),
    )
    renamed = {n.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t for n, t in tensors.items()}
    assert renamed.keys() != tensors.keys()
    load_weights(model, saved({"model": renamed}, tmp_path / "deit3.pth"))
    assert_holds(model, tensors)


def test_parameters_keep_the_models_dtype(tmp_path) -> None:
    tensors, model = timm_model().state_dict(), ours().to(torch.bfloat16)
    load_weights(model, saved(tensors, tmp_path / "model.pth"))
    assert_holds(model, {name: t.to(torch.bfloat16) for name, t in tensors.items()})


# -------------------------------------------------------------------------------------------------- resizing


@pytest.mark.parametrize("img_size", [(96, 48), (32, 32), (32, 128)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize(
    "options",
    [{}, {"reg_tokens": 3}, {"reg_tokens": 3, "no_embed_class": True}, {"class_token": False, "global_pool": "avg"}],
    ids=["class_token", "registers", "no_embed_class", "no_prefix"],
)
def test_positions_are_resized_as_timm_does(tmp_path, options: dict, img_size: tuple[int, int]) -> None:
    tensors = timm_model(**options).state_dict()
    model, peer = ours(**options, img_size=img_size), timm_model(**options, img_size=img_size)
    load_weights(model, saved(tensors, tmp_path / "model.safetensors"), source_grid=(4, 4))
    # told the old grid, timm resizes 4x4 to 2x8 too, though the token count agrees
    peer.pretrained_cfg = {"input_size": (3, 64, 64), "fixed_input_size": True}
    peer.load_state_dict(checkpoint_filter_fn(dict(tensors), peer))
    assert not torch.equal(peer.pos_embed, tensors["pos_embed"])
    assert_holds(model, peer.state_dict())


def test_loading_at_another_size_equals_calling_at_it(tmp_path) -> None:
    source = timm_model()
    native, moved = ours(), ours(img_size=(96, 48))
    for model in (native, moved):
        load_weights(model, saved(source.state_dict(), tmp_path / "model.pth"))
    x = torch.randn(2, 3, 96, 48)
    assert torch.equal(native(x), moved(x))


def test_a_checkpoint_of_a_grid_that_is_not_square(tmp_path) -> None:
    source = ours(img_size=(32, 80))
    path = saved(source.state_dict(), tmp_path / "wide.pth")
    # the model's own grid needs no telling
    same = load_weights(ours(img_size=(32, 80)), path)
    assert_holds(same, source.state_dict())
    with pytest.raises(ValueError, match=r"pos_embed.* 11 positions.*no square grid; pass source_grid"):
        load_weights(ours(), path)
    with pytest.raises(ValueError, match=r"source_grid=\(2, 4\) with 1 prefix tokens makes 9"):
        load_weights(ours(), path, source_grid=(2, 4))
    model = load_weights(ours(), path, source_grid=(2, 5))
    assert torch.equal(model.pos_embed, source.pos_embed_for((4, 4)))


def test_half_precision_positions_are_resized_in_fp32(tmp_path) -> None:
    source = timm_model().to(torch.bfloat16)
    model = load_weights(ours(img_size=96).to(torch.bfloat16), saved(source.state_dict(), tmp_path / "half.pth"))
    patches = source.pos_embed[:, 1:].float().reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=(6, 6), mode="bicubic", antialias=True).permute(0, 2, 3, 1)
    assert torch.equal(model.pos_embed[:, 1:], patches.reshape(1, 36, 24).to(torch.bfloat16))


@pytest.mark.parametrize(
    ("kind", "at"),
    [
        ("learn", "stem"),
        ("learn", "every_layer"),
        ("learn_2d", "stem"),
        ("learn_2d", "every_layer"),
        ("relative", "stem"),
    ],
)
def test_every_position_variant_moves_to_another_grid(tmp_path, kind: str, at: str) -> None:
    options = {"pos_embed": kind, "pos_embed_at": at, "reg_tokens": 1}
    source, model = ours(**options), ours(**options, img_size=(96, 80))
    load_weights(model, saved(source.state_dict(), tmp_path / "model.pth"))
    x = torch.randn(2, 3, 96, 80)
    with torch.no_grad():
        # resizing rows and columns apart is resizing the grid, up to rounding; everything else is bit for bit
        truth = source.double()(x.double())
        source.float()
        assert_close(model(x), truth, source(x))


# ------------------------------------------------------------------------------------------------------ heads


def test_another_class_count_is_an_error_or_skipped(tmp_path) -> None:
    tensors = timm_model(num_classes=9).state_dict()
    path, model = saved(tensors, tmp_path / "model.pth"), ours()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="has 9 classes and the model has 5; build the model with num_classes=9"):
        load_weights(model, path)
    assert_holds(model, before)
    load_weights(model, path, skip_head=True)
    heads = {name: before[name] for name in ("head.weight", "head.bias")}
    assert_holds(model, {**tensors, **heads})


def test_skipping_the_head_works_both_ways(tmp_path) -> None:
    headless = timm_model(num_classes=0).state_dict()
    model = load_weights(ours(), saved(headless, tmp_path / "headless.pth"), skip_head=True)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, headless["blocks.1.mlp.fc1.weight"])
    pretrained = ours(representation_size=8)
    model = ours(num_classes=0)
    load_weights(model, saved(pretrained.state_dict(), tmp_path / "pretrained.pth"), skip_head=True)
    assert torch.equal(model.pos_embed, pretrained.pos_embed)


# ----------------------------------------------------------------------------------------------------- errors


def written(path, content: bytes):
    path.write_bytes(content)
    return path


def truncated(path, count: int):
    saved(timm_model().state_dict(), path)
    return written(path, path.read_bytes()[:count])


BROKEN = {
    "empty.pth": (lambda p: written(p, b""), "is empty"),
    "empty.safetensors": (lambda p: written(p, b""), "is empty"),
    "noise.pth": (lambda p: written(p, b"not a checkpoint at all"), "no readable torch checkpoint"),
    "noise.bin": (lambda p: written(p, bytes(range(256)) * 9), "no readable torch checkpoint"),
    "noise.safetensors": (lambda p: written(p, b"\xff" * 64), "no readable safetensors file"),
    "cut.pth": (lambda p: truncated(p, 9000), "no readable torch checkpoint"),
    "cut.safetensors": (lambda p: truncated(p, 9000), "no readable safetensors file"),
    "object.pth": (lambda p: saved({"model": ours()}, p), "no readable torch checkpoint"),
    "list.pth": (lambda p: saved([torch.ones(2)], p), "holds no state dict"),
    "nothing.pth": (lambda p: saved({}, p), "holds no state dict"),
    "values.pth": (lambda p: saved({"lr": 0.1, "weight": torch.ones(2)}, p), "holds no state dict"),
    "model.ckpt2": (lambda p: written(p, b"x"), r"suffix '.ckpt2'; accepted are .safetensors, .pth, .pt, .bin"),
    "resnet.pth": (lambda p: saved({"conv1.weight": torch.ones(2)}, p), r"no known format.*conv1\.weight.*timm"),
    "part.pth": (
        lambda p: saved({n: t for n, t in timm_model().state_dict().items() if n != "norm.bias"}, p),
        r"missing: norm\.bias; unexpected: none",
    ),
    "extra.pth": (
        lambda p: saved(timm_model(init_values=1.0).state_dict(), p),
        r"missing: none; unexpected: blocks\.0\.ls1\.gamma, blocks\.0\.ls2\.gamma",
    ),
    "wide.pth": (lambda p: saved(timm_model(embed_dim=48).state_dict(), p), r"has shape .*; the model's is"),
    "patch.pth": (
        lambda p: saved(timm_model(patch_size=32, img_size=128).state_dict(), p),
        r"patch_embed.proj.weight .* has shape \(24, 3, 32, 32\); the model's is \(24, 3, 16, 16\)",
    ),
    "registers.pth": (lambda p: saved(timm_model(reg_tokens=1).state_dict(), p), r"18 positions.*1 prefix tokens"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit_leaves_the_model_alone(tmp_path, name: str) -> None:
    make, message = BROKEN[name]
    path, model = make(tmp_path / name), ours()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as raised:
        load_weights(model, path)
    assert "\n" not in str(raised.value)
    assert name in str(raised.value) or name == "registers.pth"
    assert_holds(model, before)


def test_missing_file_and_meta_model(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no weights file .*gone\.pth"):
        load_weights(ours(), tmp_path / "gone.pth")
    path = saved(timm_model().state_dict(), tmp_path / "model.pth")
    with torch.device("meta"):
        model = VisionTransformer(**SMALL)
    with pytest.raises(ValueError, match="meta device"):
        load_weights(model, path)
