"""Named configurations against timm's: the same tensors, epsilons, activations, pooling and numbers."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from tests._close import assert_close
from vitfast.reference.architectures import ARCHITECTURES, create_model, list_models

# module classes under both libraries' names
KINDS = {"GELUTanh": "GELU", "GluMlp": "GluMlp", "PatchEmbed": "PatchEmbed"}


def build(factory, name: str) -> nn.Module:
    with torch.device("meta"):
        return factory(name)


def details(model: nn.Module) -> dict[str, tuple]:
    """What a state dict does not show: epsilons, activations and their form, heads, where residuals are scaled."""
    found: dict[str, tuple] = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.LayerNorm):
            found[name] = ("LayerNorm", module.eps)
        elif name.endswith(".act"):
            tanh = kind == "GELUTanh" or getattr(module, "approximate", "none") == "tanh"
            found[name] = (KINDS.get(kind, kind), tanh)
        elif hasattr(module, "num_heads"):
            found[name] = (module.num_heads,)
        elif isinstance(module, nn.Conv2d):
            found[name] = (module.kernel_size, module.stride)
    return found


@pytest.mark.parametrize("name", list_models())
def test_configuration_is_timms(name: str) -> None:
    ours, peer = build(create_model, name), build(timm.create_model, name)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in peer.state_dict().items()}
    assert details(ours) == details(peer)
    for attribute in ("num_classes", "num_features", "global_pool", "num_prefix_tokens", "no_embed_class"):
        assert getattr(ours, attribute) == getattr(peer, attribute), attribute
    for attribute in ("img_size", "patch_size", "grid_size", "num_patches"):
        assert getattr(ours.patch_embed, attribute) == getattr(peer.patch_embed, attribute), attribute


@pytest.mark.parametrize(
    "name",
    [
        "deit3_small_patch16_224",
        "vit_base_patch16_clip_224",
        "vit_base_patch16_clip_quickgelu_224",
        "vit_base_patch32_siglip_256",
        "vit_so400m_patch14_siglip_224",
        "vit_small_patch14_reg4_dinov2",
        "vit_giant_patch14_reg4_dinov2",
        "vit_medium_patch16_gap_256",
    ],
)
def test_one_block_of_a_family_computes_what_timm_does(name: str) -> None:
    patch = ARCHITECTURES[name]["patch_size"]
    small = {"depth": 1, "img_size": 2 * patch, "num_classes": 3}
    peer = timm.create_model(name, **small).eval()
    with torch.no_grad():
        for key, p in peer.named_parameters():
            p.normal_(std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.5)
            if "norm" in key and key.endswith("weight"):
                p.add_(1.0)
    ours = create_model(name, **small).eval()
    ours.load_state_dict(peer.state_dict())
    x = torch.randn(2, 3, 2 * patch, 2 * patch)
    with torch.no_grad():
        assert_close(ours(x), copy.deepcopy(peer).double()(x.double()), peer(x))


def test_every_family_size_and_patch_of_the_paper_is_there() -> None:
    names = list_models()
    assert names == sorted(names)
    for size in ("tiny", "small", "base", "large", "huge", "so400m", "giant"):
        assert any(f"_{size}_" in name for name in names), size
    for patch in (8, 14, 16, 32):
        assert any(f"_patch{patch}_" in name for name in names), patch
    assert list_models("*dinov2") == [name for name in names if name.endswith("dinov2")]
    assert list_models("resnet*") == []


@pytest.mark.parametrize(
    ("name", "millions"), [("vit_base_patch16_224", 86), ("vit_large_patch16_224", 307), ("vit_huge_patch14_224", 632)]
)
def test_parameter_counts_are_table_1_of_the_paper(name: str, millions: int) -> None:
    # the table leaves out the classifier
    with torch.device("meta"):
        model = create_model(name, num_classes=0)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == pytest.approx(millions, abs=4)


def test_overrides_reach_the_model() -> None:
    model = create_model("vit_tiny_patch16_224", img_size=(64, 32), num_classes=5, depth=2)
    assert model.patch_embed.grid_size == (4, 2)
    assert model.pos_embed.shape == (1, 9, 192)
    assert model(torch.randn(1, 3, 64, 32)).shape == (1, 5)
    # and leave the table as it was
    assert create_model("vit_tiny_patch16_224", depth=1).num_classes == 1000
    assert "num_classes" not in ARCHITECTURES["vit_tiny_patch16_224"]


def test_unknown_names_get_suggestions() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'vit_bas_patch16_224'.*'vit_base_patch16_224'"):
        create_model("vit_bas_patch16_224")
    with pytest.raises(ValueError, match="none is close"):
        create_model("?")
    with pytest.raises(TypeError, match=r"unknown option 'img_sise'.*'img_size'"):
        create_model("vit_tiny_patch16_224", img_sise=32)


def test_weights_are_loaded(tmp_path) -> None:
    small = {"img_size": 32, "depth": 1, "num_classes": 3}
    saved = create_model("vit_tiny_patch16_224", **small)
    nn.init.normal_(saved.head.weight)
    torch.save(saved.state_dict(), tmp_path / "tiny.pth")
    loaded = create_model("vit_tiny_patch16_224", weights=tmp_path / "tiny.pth", **small)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), saved(x))
