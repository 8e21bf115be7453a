"""lookup: the user's file for a device, then the committed one, the nearest shape in them, else the heuristic."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.kernels._data import module
from vitfast.kernels import _config
from vitfast.kernels._config import Key

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
    """An empty folder of configs, an empty one of the user's, and a device with a name."""
    monkeypatch.setattr(_config, "_FOLDER", tmp_path / "package")
    monkeypatch.setenv("VITFAST_CONFIG_DIR", str(tmp_path / "user"))
    monkeypatch.setattr(_config, "_device_name", lambda device: DEVICE)
    _config.forget()
    yield tmp_path / "package"
    _config.forget()


def write(folder: Path, content: object, op: str = "op") -> Path:
    path = folder / op / "NVIDIA_H100_80GB_HBM3.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    _config.forget()
    return path


def entries(**configs: object) -> dict[str, object]:
    return {"device": DEVICE, "configs": configs}


def block_of(key: str, op: str = "op") -> int:
    return lookup(key, op).block


def lookup(key: str, op: str = "op") -> Config:
    return _config.lookup(Key.parse(op, key), CPU, Config, fallback)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("m=7,n=8,k=9,float16", Key("op", (("m", 7), ("n", 8), ("k", 9)), torch.float16)),
        (
            "m=7,n=8,k=9,bfloat16,float32 out,pointers",
            Key("op", (("m", 7), ("n", 8), ("k", 9)), torch.bfloat16, ("float32 out", "pointers")),
        ),
        ("rows=0,width=768,float32", Key("op", (("rows", 0), ("width", 768)), torch.float32)),
    ],
)
def test_a_key_is_its_text(text: str, key: Key) -> None:
    assert Key.parse("op", text) == key
    assert key.text == text
    assert str(key) == f"op {text}"


@pytest.mark.parametrize("text", ["", "float16", "m=1,", "m=1,whatever", "m=x,float16", "m=-1,float16", "m=1,float16,"])
def test_what_is_no_key_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=rf"key '{text}' of op; expected sizes and a dtype, such as 'm=50432,"):
        Key.parse("op", text)


def test_committed_entry(folder: Path) -> None:
    write(folder, {"device": DEVICE, "configs": {"m=1,float16": {"block": 64, "warps": 8}}})
    assert lookup("m=1,float16") == Config(64, 8)
    assert lookup("m=9,float16") == Config(1)
    assert lookup("m=1,float16", "another") == Config(1)


def test_no_file_and_no_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lookup("m=1,float16") == Config(1)
    write(folder, {"device": DEVICE, "configs": {"m=1,float16": {"block": 64}}})
    monkeypatch.setattr(_config, "_device_name", lambda device: None)
    assert lookup("m=1,float16") == Config(1)


@pytest.mark.parametrize(
    "content",
    [
        {"device": "another", "configs": {}},
        {"configs": {}},
        {"device": DEVICE},
        {"device": DEVICE, "configs": [1]},
        {"device": DEVICE, "configs": {"m=1,float16": 64}},
        {"device": DEVICE, "configs": {"m=1": {"block": 64}}},
    ],
    ids=["another-device", "no-device", "no-configs", "list", "entry-no-object", "no-key"],
)
def test_file_of_another_form_is_an_error(folder: Path, content: object) -> None:
    write(folder, content)
    with pytest.raises(
        ValueError, match=rf"NVIDIA_H100_80GB_HBM3\.json: expected an object with 'device' = '{DEVICE}'"
    ):
        lookup("m=1,float16")


def test_file_that_is_no_object_is_an_error(folder: Path) -> None:
    write(folder, [1, 2])
    with pytest.raises(ValueError, match=r"NVIDIA_H100_80GB_HBM3\.json"):
        lookup("m=1,float16")


def test_file_that_is_not_json_is_an_error(folder: Path) -> None:
    write(folder, {}).write_text("{")
    with pytest.raises(ValueError, match=r"NVIDIA_H100_80GB_HBM3\.json"):
        lookup("m=1,float16")


def test_unknown_field_is_an_error(folder: Path) -> None:
    write(folder, {"device": DEVICE, "configs": {"m=1,float16": {"block": 64, "wraps": 8}}})
    with pytest.raises(ValueError, match=r"package.*NVIDIA_H100_80GB_HBM3\.json: the entry 'm=1,float16'.*wraps"):
        lookup("m=1,float16")


def test_the_users_entries_win(folder: Path) -> None:
    keys = ["n=197,s=197,d=64,float16", "n=257,s=257,d=64,float16", "n=577,s=577,d=64,float16"]
    write(folder, entries(**{keys[0]: {"block": 16}, keys[1]: {"block": 32}}))
    write(folder.parent / "user", entries(**{keys[1]: {"block": 64}, keys[2]: {"block": 128}}))
    assert [block_of(key) for key in keys] == [16, 64, 128]


def test_a_damaged_file_of_the_users_is_named(folder: Path) -> None:
    write(folder.parent / "user", {}).write_text("[")
    with pytest.raises(ValueError, match=r"user.op.NVIDIA_H100_80GB_HBM3\.json: expected an object with 'device'"):
        block_of("m=1,float16")


def test_where_the_users_files_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VITFAST_CONFIG_DIR", str(tmp_path / "own"))
    assert _config.user_folder() == tmp_path / "own"
    monkeypatch.delenv("VITFAST_CONFIG_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert _config.user_folder() == tmp_path / "cache" / "vitfast" / "configs"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _config.user_folder() == tmp_path / ".cache" / "vitfast" / "configs"


def test_a_device_is_a_file_name() -> None:
    assert _config.file_name("AMD Radeon RX 7900 XT/XTX") == "AMD_Radeon_RX_7900_XT_XTX.json"


def test_files_are_read_once(folder: Path) -> None:
    path = write(folder, entries(**{"m=1,float16": {"block": 64}}))
    assert block_of("m=1,float16") == 64
    path.write_text("{")
    assert block_of("m=1,float16") == 64
    _config.forget()
    with pytest.raises(ValueError, match="expected an object"):
        block_of("m=1,float16")


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("m=1000,n=768,k=768,bfloat16", "m=1000,n=768,k=768,bfloat16"),
        ("m=1100,n=768,k=768,bfloat16", "m=1000,n=768,k=768,bfloat16"),
        ("m=1900,n=768,k=768,bfloat16", "m=2000,n=768,k=768,bfloat16"),
        # in ratios 1414 is nearer to 2000 than to 1000 and 1413 is not
        ("m=1413,n=768,k=768,bfloat16", "m=1000,n=768,k=768,bfloat16"),
        ("m=1415,n=768,k=768,bfloat16", "m=2000,n=768,k=768,bfloat16"),
        ("m=500,n=768,k=768,bfloat16", "m=1000,n=768,k=768,bfloat16"),
        ("m=4000,n=768,k=768,bfloat16", "m=2000,n=768,k=768,bfloat16"),
        ("m=499,n=768,k=768,bfloat16", None),
        ("m=4001,n=768,k=768,bfloat16", None),
        ("m=1,n=768,k=768,bfloat16", None),
        ("m=1000,n=769,k=768,bfloat16", None),
        ("m=1000,n=768,k=3072,bfloat16", None),
        ("m=1000,n=768,k=768,float16", None),
        ("m=1000,n=768,k=768,bfloat16,pointers", None),
        ("m=1000,n=768,k=768,bfloat16,float32 out", "m=1200,n=768,k=768,bfloat16,float32 out"),
        ("rows=60,width=768,bfloat16", "rows=50,width=768,bfloat16"),
        ("windows=500,height=7,width=7,d=32,float16", "windows=400,height=7,width=7,d=32,float16"),
        ("rows=1000,n=768,k=768,bfloat16", None),
        ("patches=49,width=768,k=768,bfloat16", "patches=50,width=768,k=768,bfloat16"),
        ("n=197,s=197,d=64,bfloat16", "n=197,s=197,d=64,bfloat16"),
        ("n=198,s=198,d=64,bfloat16", None),
        ("m=0,n=768,k=768,bfloat16", None),
    ],
)
def test_nearest(key: str, expected: str | None) -> None:
    keys = [
        "m=1000,n=768,k=768,bfloat16",
        "m=2000,n=768,k=768,bfloat16",
        "m=1200,n=768,k=768,bfloat16,float32 out",
        "rows=50,width=768,bfloat16",
        "patches=50,width=768,k=768,bfloat16",
        "windows=400,height=7,width=7,d=32,float16",
        "n=197,s=197,d=64,bfloat16",
    ]
    wanted, there = Key.parse("op", key), [Key.parse("op", other) for other in keys]
    found = _config.nearest(wanted, there)
    assert (found and found.text) == expected
    assert _config.nearest(wanted, reversed(there)) == found
    assert _config.nearest(wanted, []) is None


def test_the_smaller_of_two_equally_near_ones() -> None:
    small, wanted, large = (Key.parse("op", f"m={m},n=1,k=1,float16") for m in (100, 200, 400))
    assert _config.nearest(wanted, [large, small]) == small


def test_lookup_takes_the_nearest_shape(folder: Path) -> None:
    write(folder, entries(**{"m=1000,n=8,k=8,float16": {"block": 64}}))
    assert block_of("m=1500,n=8,k=8,float16") == 64
    assert block_of("m=2500,n=8,k=8,float16") == 1


def test_override(folder: Path) -> None:
    key = "m=1000,n=8,k=8,float16"
    write(folder, entries(**{key: {"block": 64}}))
    with _config.override(Key.parse("op", key), {"block": 2}):
        assert block_of(key) == 2
        # only this very shape
        assert block_of("m=1001,n=8,k=8,float16") == 64
        with _config.override(Key.parse("op", key), {"block": 3}):
            assert block_of(key) == 3
        assert block_of(key) == 2
    assert block_of(key) == 64
    with pytest.raises(RuntimeError, match="on purpose"), _config.override(Key.parse("op", key), {"block": 2}):
        raise RuntimeError("on purpose")
    assert block_of(key) == 64


def test_listen(folder: Path) -> None:
    write(folder, entries(**{"m=1,float16": {"block": 64}}))
    with _config.listen() as outer, _config.listen() as inner:
        block_of("m=1,float16")
        block_of("m=7,float16")
    block_of("m=9,float16")
    wanted = {Key.parse("op", "m=1,float16"): Config(64), Key.parse("op", "m=7,float16"): Config(1)}
    assert outer == inner == wanted


def test_entries_are_added_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "linear" / "GPU_1.json"
    a, b = (Key.parse("linear", f"{name}=1,float16") for name in "ab")
    assert _config.write_entries(tmp_path, "GPU 1", {b: {"x": 2}, a: {"x": 1}}) == [path]
    _config.write_entries(tmp_path, "GPU 1", {b: {"x": 3}})
    assert json.loads(path.read_text()) == {"device": "GPU 1", "configs": {a.text: {"x": 1}, b.text: {"x": 3}}}
    assert _config.read(tmp_path, "linear", "GPU 1") == {a: {"x": 1}, b: {"x": 3}}
    path.write_text(json.dumps({"device": "GPU 2", "configs": {}}))
    with pytest.raises(ValueError, match="expected an object with 'device' = 'GPU 1'"):
        _config.write_entries(tmp_path, "GPU 1", {b: {"x": 3}})


def test_nothing_is_read_before_the_first_lookup() -> None:
    code = """
import os
os.environ["VITFAST_CONFIG_DIR"] = "before"
import vitfast.kernels
from vitfast.kernels import _config
os.environ["VITFAST_CONFIG_DIR"] = "after"
assert str(_config.user_folder()) == "after"
assert _config.table.cache_info().currsize == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_committed_files_are_of_this_form() -> None:
    root = Path(_config.__file__).parent / "configs"
    for path in root.glob("*/*.json"):
        device = json.loads(path.read_text())["device"]
        assert path.name == _config.file_name(device)
        config = module(path.parent.name.removeprefix("add_")).Config
        for entry in _config.table(path.parent.name, device).values():
            config(**entry)


@pytest.mark.parametrize(
    ("capability", "counts_as"),
    [
        ((7, 5), 80),
        ((8, 0), 80),
        ((8, 7), 86),
        ((8, 9), 89),
        ((9, 0), 90),
        ((10, 3), 100),
        ((11, 0), 100),
        ((12, 1), 120),
    ],
)
def test_every_gpu_counts_as_one_that_has_tiles(
    capability: tuple[int, int], counts_as: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert _config.arch.__wrapped__(torch.device("cuda")) == counts_as


def test_interpreter_counts_as_two_multiprocessors_of_sm_80() -> None:
    assert (_config.arch(CPU), _config.sm_count(CPU)) == (80, 2)


@pytest.mark.parametrize("tile", [1, 64, 128, 256, 1024, 2048, 16384])
def test_layer_norm_heuristic(tile: int) -> None:
    config = module("layer_norm").heuristic(tile)
    assert config.block_m * tile <= max(2048, tile)
    for size in (config.block_m, config.num_warps):
        assert size >= 1 and size & (size - 1) == 0, config
    assert config.num_warps <= 16
