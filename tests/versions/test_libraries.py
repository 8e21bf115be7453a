"""One model of each family, with the releases that are installed; `make versions` runs this with other ones in front.

What is asked for is that outputs and gradients are the plain model's, and that nothing stays plain in silence.
"""

from __future__ import annotations

import copy
from collections import Counter

import pytest
from torch import Tensor, nn

import vitfast
from tests.vitfast._architectures import ARCHITECTURES, Architecture, timm_swin
from tests.vitfast._models import assert_same, images, randomise

ALL = ("attention", "mlp", "block")

# with maps that windows divide in both stages: timm pads others from 1.0.10 on
SWINS = (
    timm_swin("swin_tiny_patch4_window7_224", 7, img_size=(56, 112)),
    timm_swin("swinv2_tiny_window8_256", 8, img_size=(64, 128)),
)

# the kinds that are replaced in every block, by architecture
FAMILIES: dict[str, dict[str, tuple[str, ...]]] = {
    "timm": {
        "vit_base_patch16_224": ALL,
        "deit_tiny_distilled_patch16_224": ALL,
        "deit3_small_patch16_224": ALL,
        "beit_base_patch16_224": ALL,
        "eva_giant_patch14_224": ALL,
        # a gated MLP, which the report names
        "eva02_tiny_patch14_224": ("attention", "block"),
        "swin_tiny_patch4_window7_224": ALL,
        "swinv2_tiny_window8_256": ALL,
    },
    "transformers": {
        "ViTModel": ALL,
        "DeiTModel": ALL,
        "BeitModel": ALL,
        "CLIPVisionModel": ALL,
        "SiglipVisionModel": ALL,
        "Dinov2Model": ALL,
        "Dinov2WithRegistersModel": ALL,
        # its layer computes the attention
        "SwinModel": ("mlp", "block"),
    },
    "torchvision": {"vit_b_16": ALL, "swin_t": ALL},
    "open_clip": {"ViT-B-32, visual": ALL},
}


def families(library: str) -> pytest.MarkDecorator:
    """Parametrise a test by the architectures of a library and what is replaced in each."""
    kinds = FAMILIES[library]
    # a later one of the same name stands for an earlier one
    found = {a.name: a for a in (*ARCHITECTURES, *SWINS) if a.library == library and a.name in kinds}
    chosen = [pytest.param(a, kinds[name], id=name) for name, a in found.items()]
    assert len(chosen) == len(kinds), f"{library}: not every name of FAMILIES is in ARCHITECTURES"
    return pytest.mark.parametrize(("architecture", "kinds"), chosen)


def check(architecture: Architecture, kinds: tuple[str, ...]) -> None:
    """Hold an accelerated model to the plain one, and its report to what is replaced in every block."""
    plain = architecture.build()
    for name, parameter in plain.named_parameters():
        # a bias of the keys has no gradient but rounding
        parameter.requires_grad_(not name.endswith(("k_proj.bias", "key.bias")))
    fused = vitfast.accelerate(copy.deepcopy(plain))
    report = vitfast.report(fused)
    replaced = Counter(row.kind for row in report.replaced)
    kept = {row.kind for row in report.kept}
    blocks = 4 if "swin" in architecture.name.lower() else 2
    plain_still = {kind: replaced[kind] for kind in kinds if replaced[kind] < blocks}
    assert not plain_still, f"replaced in {blocks} blocks: {plain_still}"
    assert kept == {"mlp"} - {*kinds}, report.kept
    assert_same(plain, fused, images(2, 3, *architecture.size), architecture.calls[0])


@families("timm")
def test_timm(architecture: Architecture, kinds: tuple[str, ...]) -> None:
    check(architecture, kinds)


@families("transformers")
def test_transformers(architecture: Architecture, kinds: tuple[str, ...]) -> None:
    check(architecture, kinds)


@families("torchvision")
def test_torchvision(architecture: Architecture, kinds: tuple[str, ...]) -> None:
    check(architecture, kinds)


@families("open_clip")
def test_open_clip(architecture: Architecture, kinds: tuple[str, ...]) -> None:
    check(architecture, kinds)


class TorchBlock(nn.Module):
    """A block of torch's own modules, as people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(48), nn.LayerNorm(48)
        self.attn = nn.MultiheadAttention(48, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


def test_torch() -> None:
    plain = randomise(nn.Sequential(TorchBlock(), TorchBlock())).eval()
    fused = vitfast.accelerate(copy.deepcopy(plain))
    assert Counter(row.kind for row in vitfast.report(fused).replaced) == {"layer_norm": 4, "attention": 2, "mlp": 2}
    assert_same(plain, fused, images(2, 13, 48))
