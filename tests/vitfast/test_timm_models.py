"""`vitfast.register("timm")`: our models through timm's registry, beside timm's own of the same names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import resolve_model_data_config

import vitfast
from tests.vitfast._models import images, randomise

# small enough to build in a test, and all else as the name has it
SMALL: dict[str, Any] = {"embed_dim": 48, "depth": 3, "num_heads": 4}
NAMES = [
    "vit_base_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_base_patch16_siglip_224",
    "deit3_small_patch16_224",
]


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    vitfast.register("timm")
    # again, and beside the other
    vitfast.register("timm", "transformers")


def test_every_name_is_listed() -> None:
    ours = timm.list_models("vitfast_*")
    assert sorted(ours) == [f"vitfast_{name}" for name in vitfast.list_models() if timm.is_model(name)]
    assert len(ours) > 80
    assert all(timm.is_model(name) for name in ours)
    assert timm.list_models(module="timm_models") == ours
    # names that a star import gives are there
    module = sys.modules["vitfast.doors.timm_models"]
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("name", [name for name in vitfast.list_models() if timm.is_model(name)])
def test_the_configurations_are_timms(name: str) -> None:
    ours, theirs = (timm.models.get_pretrained_cfg(prefix + name).to_dict() for prefix in ("vitfast_", ""))
    assert ours.pop("architecture") == "vitfast_" + theirs.pop("architecture")
    if theirs["custom_load"]:
        theirs.update(custom_load=False, url="")
    assert ours == theirs
    tags = [
        [model.partition(".")[2] for model in timm.list_models(prefix + name, pretrained=True)]
        for prefix in ("vitfast_", "")
    ]
    assert tags[0] == tags[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_ours_and_computes_what_timms_does(name: str) -> None:
    theirs: Any = randomise(timm.create_model(name, num_classes=10, **SMALL)).eval()
    ours: Any = timm.create_model(f"vitfast_{name}", num_classes=10, **SMALL).eval()
    assert type(ours) is vitfast.VisionTransformer
    assert not vitfast.report(ours).replaced
    ours.load_state_dict(theirs.state_dict())
    x = images(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert resolve_model_data_config(ours) == resolve_model_data_config(theirs)
    for key in ("mean", "std", "input_size", "first_conv", "classifier", "interpolation", "crop_pct"):
        assert ours.pretrained_cfg[key] == theirs.pretrained_cfg[key]
    assert ours.default_cfg is ours.pretrained_cfg
    assert ours.num_classes == 10
    # and it can be accelerated, as any other
    with torch.no_grad():
        torch.testing.assert_close(vitfast.accelerate(ours)(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_timms_arguments() -> None:
    model: Any = timm.create_model(
        "vitfast_vit_base_patch16_224", img_size=(32, 48), in_chans=1, drop_path_rate=0.1, drop_rate=None, **SMALL
    )
    assert model.patch_embed.grid_size == (2, 3)
    assert model.patch_embed.proj.in_channels == 1
    assert model.blocks[-1].drop_path1.drop_prob == 0.1
    with pytest.raises(TypeError, match="unknown option 'dynamic_img_pad'"):
        timm.create_model("vitfast_vit_base_patch16_224", dynamic_img_pad=True)
    # the tag's own head
    assert timm.create_model("vitfast_vit_base_patch16_224.augreg_in21k", **SMALL).num_classes == 21843


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_go_through_timms_loader(name: str, tmp_path: Path) -> None:
    # of another size: the position embeddings are resized, and a head of other classes stays as it was made
    theirs: Any = randomise(timm.create_model(name, img_size=64, num_classes=10, **SMALL)).eval()
    state = theirs.state_dict()
    if name.startswith("deit3"):
        # as its authors name them
        state = {key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for key, v in state.items()}
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": state}, path)
    overlay = {"file": str(path), "num_classes": 10}

    def load(prefix: str, size: int) -> Any:
        options = {"img_size": size, "num_classes": 10, **SMALL}
        return timm.create_model(prefix + name, pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()

    for size in (64, 96):
        x = images(1, 3, size, size)
        with torch.no_grad():
            torch.testing.assert_close(load("vitfast_", size)(x), load("", size)(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(load("vitfast_", 64)(images(1, 3, 64, 64)), theirs(images(1, 3, 64, 64)))


@pytest.mark.parametrize("given", [{}, {"out_indices": (0, 2)}, {"out_indices": 2}], ids=str)
def test_features_only(given: dict[str, Any]) -> None:
    name, options = "vit_base_patch16_224", {"img_size": (32, 48), **SMALL, **given}
    theirs: Any = timm.create_model(name, features_only=True, **options)
    randomise(theirs).eval()
    ours: Any = timm.create_model(f"vitfast_{name}", features_only=True, **options).eval()
    # timm's own drops what no feature needs
    missing = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert ours.feature_info.channels() == theirs.feature_info.channels()
    assert ours.feature_info.reduction() == theirs.feature_info.reduction()
    x = images(2, 3, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_nothing_is_registered_before_it_is_asked() -> None:
    program = "import tests.conftest, timm, vitfast; assert timm.list_models('vitfast_*') == []"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vitfast.doors.timm_models")
    monkeypatch.setitem(sys.modules, "timm.models", None)
    with pytest.raises(ImportError, match=r"vitfast\[timm\]"):
        vitfast.register("timm")
