"""lookup: the committed file for a device, else the heuristic."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.kernels._cases import module
from vitfast.kernels import _config

CPU = torch.device("cpu")
DEVICE = "NVIDIA H100 80GB HBM3"


@dataclass(frozen=True)
class Config:
    block: int
    warps: int = 4


def fallback() -> Config:
    return Config(1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of configs, and a device with a name."""
    monkeypatch.setattr(_config, "_FOLDER", tmp_path)
    monkeypatch.setattr(_config, "_device_name", lambda device: DEVICE)
    _config.table.cache_clear()
    (tmp_path / "op").mkdir()
    yield tmp_path
    _config.table.cache_clear()


def write(folder: Path, content: object) -> None:
    (folder / "op" / "NVIDIA_H100_80GB_HBM3.json").write_text(json.dumps(content))


def test_committed_entry(folder: Path) -> None:
    write(folder, {"device": DEVICE, "configs": {"m=1,float16": {"block": 64, "warps": 8}}})
    assert _config.lookup("op", "m=1,float16", CPU, Config, fallback) == Config(64, 8)
    assert _config.lookup("op", "m=2,float16", CPU, Config, fallback) == Config(1)
    assert _config.lookup("another", "m=1,float16", CPU, Config, fallback) == Config(1)


def test_no_file_and_no_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _config.lookup("op", "m=1", CPU, Config, fallback) == Config(1)
    write(folder, {"device": DEVICE, "configs": {"m=1": {"block": 64}}})
    monkeypatch.setattr(_config, "_device_name", lambda device: None)
    assert _config.lookup("op", "m=1", CPU, Config, fallback) == Config(1)


@pytest.mark.parametrize(
    "content",
    [{"device": "another", "configs": {}}, {"configs": {}}, {"device": DEVICE}, {"device": DEVICE, "configs": [1]}],
    ids=["another-device", "no-device", "no-configs", "list"],
)
def test_file_of_another_form_is_an_error(folder: Path, content: object) -> None:
    write(folder, content)
    with pytest.raises(
        ValueError, match=rf"NVIDIA_H100_80GB_HBM3\.json: expected an object with 'device' = '{DEVICE}'"
    ):
        _config.lookup("op", "m=1", CPU, Config, fallback)


def test_file_that_is_no_object_is_an_error(folder: Path) -> None:
    write(folder, [1, 2])
    with pytest.raises(ValueError, match=r"NVIDIA_H100_80GB_HBM3\.json"):
        _config.lookup("op", "m=1", CPU, Config, fallback)


def test_file_that_is_not_json_is_an_error(folder: Path) -> None:
    (folder / "op" / "NVIDIA_H100_80GB_HBM3.json").write_text("{")
    with pytest.raises(ValueError, match=r"NVIDIA_H100_80GB_HBM3\.json"):
        _config.lookup("op", "m=1", CPU, Config, fallback)


def test_unknown_field_is_an_error(folder: Path) -> None:
    write(folder, {"device": DEVICE, "configs": {"m=1": {"block": 64, "wraps": 8}}})
    with pytest.raises(TypeError, match="wraps"):
        _config.lookup("op", "m=1", CPU, Config, fallback)


def test_committed_files_are_of_this_form() -> None:
    root = Path(_config.__file__).parent / "configs"
    for path in root.glob("*/*.json"):
        device = json.loads(path.read_text())["device"]
        assert path.stem == device.replace(" ", "_")
        config = module(path.parent.name.removeprefix("add_")).Config
        for entry in _config.table(path.parent.name, device).values():
            config(**entry)


def test_interpreter_counts_as_two_multiprocessors_of_sm_80() -> None:
    assert (_config.arch(CPU), _config.sm_count(CPU)) == (80, 2)


@pytest.mark.parametrize("rows", [1, 3, 197, 50432])
@pytest.mark.parametrize("width", [1, 67, 192, 768, 1280, 16384])
def test_layer_norm_heuristic(rows: int, width: int) -> None:
    heuristic = module("layer_norm").heuristic
    config = heuristic(rows, width, torch.float16, 90)
    assert config == heuristic(rows, width, torch.float16, 80)
    for size in (config.block_m, config.num_warps):
        assert size >= 1 and size & (size - 1) == 0, config
    assert config.num_warps <= 16
