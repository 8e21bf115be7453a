"""Tuning: candidates that fit, a contest that the faster and right one wins, and files."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels._data import file_of
from vitfast.benchmarks.tune import files, search, tune, unpack
from vitfast.benchmarks.tune.__main__ import main as unpack_main
from vitfast.benchmarks.tune.candidates import candidates, refinements
from vitfast.benchmarks.tune.result import Tuned
from vitfast.benchmarks.tune.search import contest
from vitfast.benchmarks.workloads.base import MODELS
from vitfast.cli.main import main
from vitfast.clock import timing as measure
from vitfast.kernels import INTERPRET, _config
from vitfast.kernels._config import Key
from vitfast.kernels._triton import next_power_of_2

H100 = {"arch": 90, "shared": 227 * 1024, "sms": 132}
A100 = {"arch": 80, "shared": 163 * 1024, "sms": 108}
KEYS = [
    ("linear", "m=50432,n=3072,k=768,bfloat16,norm"),
    ("linear", "m=50432,n=768,k=3072,bfloat16,stats"),
    ("linear", "m=50432,n=768,k=768,bfloat16"),
    ("linear", "m=197,n=768,k=3072,bfloat16,pointers"),
    ("linear", "m=197,n=768,k=768,float32,pointers"),
    ("attention", "n=197,s=197,d=64,bfloat16"),
    ("attention", "n=577,s=577,d=72,float16,bias"),
    ("layer_norm", "rows=50432,width=768,bfloat16"),
    ("row_stats", "rows=197,width=768,bfloat16"),
    ("patch_embed", "patches=50176,width=768,k=768,bfloat16"),
    ("patch_embed", "patches=50176,width=768,k=768,bfloat16,converted"),
]


def present(key: Key, arch: int, shared: int, sms: int) -> dict[str, Any]:
    """What the op's heuristic says for a key."""
    file, sizes = file_of(key.op), [size for _, size in key.sizes]
    if key.op == "linear":
        tma = arch >= 90 and "pointers" not in key.flags
        config = file.heuristic(*sizes, key.dtype, key.dtype, arch, tma, sms, tma and arch == 90)
    elif key.op == "attention":
        config = file.heuristic(*sizes, key.dtype, "bias" in key.flags, arch)
    elif key.op == "patch_embed":
        config = file.heuristic(*sizes, key.dtype, arch)
    else:
        config = file.heuristic(next_power_of_2(sizes[1]))
    return asdict(config)


def offered(key: Key, limits: dict[str, int]) -> list[dict[str, Any]]:
    return candidates(key, present(key, **limits), **limits)


@pytest.mark.parametrize("limits", [H100, A100], ids=["H100", "A100"])
@pytest.mark.parametrize(("op", "text"), KEYS)
def test_candidates(op: str, text: str, limits: dict[str, int]) -> None:
    key = Key.parse(op, text)
    found = offered(key, limits)
    assert len(found) >= 4
    config = file_of(op).Config
    made = [config(**entry) for entry in found]
    assert len(set(made)) == len(made), "a candidate twice"
    assert config(**present(key, **limits)) not in made
    for entry in found:
        for name, value in entry.items():
            if name.startswith("block") or name == "num_warps":
                assert value & (value - 1) == 0
        if op == "linear" and "stats" in key.flags:
            assert (entry["block_n"] // (2 if entry["subtile"] else 1)) % 64 == 0
        if op == "linear" and not entry["library"]:
            assert not (entry["tma"] and entry["split_k"] > 1)
            assert limits["arch"] >= 90 or not entry["tma"]
            assert entry["tma"] or not entry["subtile"]
            loads = (entry["num_stages"] - 1) * (entry["block_m"] + entry["block_n"]) * entry["block_k"]
            assert loads * key.dtype.itemsize <= limits["shared"]


def test_the_nearest_candidates_come_first() -> None:
    key = Key.parse("linear", "m=50432,n=768,k=768,bfloat16")
    now = present(key, **H100)
    library, first, *_ = offered(key, H100)
    assert library == {**now, "library": True}
    assert sum(first[name] != value for name, value in now.items()) == 1
    # and from there on: what has won is the middle of the next run's
    again = candidates(key, first, **H100)
    assert now in again and again[1:] != offered(key, H100)[1:]
    # torch's own as the present one is beaten by any of ours, the tile that it stands for among them
    assert candidates(key, library, **H100)[0] == now


def test_torch_s_own_routine_is_a_candidate_where_it_can_be() -> None:
    def can(op: str, text: str) -> bool:
        return any(entry.get("library") for entry in offered(Key.parse(op, text), H100))

    assert can("linear", "m=50432,n=768,k=768,bfloat16")
    assert can("attention", "n=197,s=197,d=64,bfloat16")
    assert not can("linear", "m=50432,n=768,k=768,bfloat16,norm")
    assert not can("linear", "m=50432,n=768,k=768,bfloat16,stats")
    assert not can("linear", "m=50432,n=768,k=768,float32,pointers")


def test_few_tiles_of_a_long_k_are_split() -> None:
    few = offered(Key.parse("linear", "m=197,n=768,k=3072,bfloat16,stats"), H100)
    assert len({entry["split_k"] for entry in few[:32]}) > 1
    many = offered(Key.parse("linear", "m=50432,n=768,k=3072,bfloat16,stats"), H100)
    assert {entry["split_k"] for entry in many} == {1}


def test_only_what_does_not_depend_on_the_tile_is_refined() -> None:
    key = Key.parse("linear", "m=197,n=768,k=768,bfloat16")
    entry = present(key, **H100)
    assert {e["group_m"] for e in refinements(key, entry)} == {1, 4, 16}
    assert refinements(key, {**entry, "library": True}) == []


# the contest, with a clock of its own


class Subject:
    """Entries' times by a table; entries in `wrong` give other tokens, those in `broken` raise."""

    device = torch.device("cpu")

    def __init__(self, wrong: tuple[int, ...] = (), broken: tuple[int, ...] = ()) -> None:
        self.wrong, self.broken = wrong, broken

    def run(self, entries: dict[Key, dict[str, int]]) -> Tensor:
        if entries[KEY]["block_m"] in self.broken:
            raise RuntimeError("does not compile")
        return torch.tensor(float(entries[KEY]["block_m"] in self.wrong))

    def candidate(self, entries: dict[Key, dict[str, int]]) -> Any:
        assert entries[OTHER] == {"block_m": 99}
        function = lambda i: None  # noqa: E731
        function.block_m = entries[KEY]["block_m"]
        return function


KEY, OTHER = (Key.parse("linear", f"m={m},n=128,k=128,float16") for m in (128, 256))
PRESENT = {"block_m": 1}


def decided(subject: Subject, entries: list[dict[str, int]], budget_s: float = 5.0) -> tuple[Tuned, dict[str, Any]]:
    return contest(subject, right, KEY, PRESENT, entries, others={OTHER: {"block_m": 99}}, budget_s=budget_s)


def right(tokens: Tensor) -> bool:
    return tokens.item() == 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Milliseconds by `block_m`."""
    table: dict[int, float] = {}

    def time_interleaved(functions: dict[str, Any], device: torch.device, **options: Any) -> dict[str, measure.Timing]:
        times = {name: table[function.block_m] for name, function in functions.items()}
        return {name: measure.Timing(ms, 0.99 * ms, 1.01 * ms, 5, 1) for name, ms in times.items()}

    monkeypatch.setattr(measure, "time_interleaved", time_interleaved)
    return table


def entries(*blocks: int) -> list[dict[str, int]]:
    return [{"block_m": block} for block in blocks]


def test_the_fastest_wins(clock: dict[int, float]) -> None:
    clock |= {1: 10.0, **{block: 20.0 - block for block in range(2, 18)}}
    won, best = decided(Subject(), entries(*range(2, 18)))
    assert best == won.after == {"block_m": 17}
    assert (won.before, won.offered, won.failed, won.refused) == (PRESENT, 16, 0, 0)
    assert won.before_ms is not None and won.before_ms["median"] == 10.0
    assert won.after_ms is not None and won.after_ms["median"] == 3.0


def test_within_the_spread_the_present_one_stays(clock: dict[int, float]) -> None:
    clock |= {1: 10.0, 2: 9.9, 3: 11.0}
    won, best = decided(Subject(), entries(2, 3))
    assert best == PRESENT
    assert won.after is None


def test_wrong_and_broken_candidates_are_counted_and_never_timed(clock: dict[int, float]) -> None:
    clock |= {1: 10.0, 4: 9.0}
    subject = Subject(wrong=(2,), broken=(3,))
    won, best = decided(subject, entries(2, 3, 4))
    assert best == {"block_m": 4}
    assert (won.refused, won.failed) == (1, 1)
    won, best = decided(subject, entries(2, 3))
    assert best == PRESENT
    assert won.after_ms is None


def test_what_the_budget_does_not_reach_is_counted(clock: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> None:
    clock |= {1: 10.0, 2: 9.0}
    now = iter(range(100))
    monkeypatch.setattr(search, "time", SimpleNamespace(monotonic=lambda: float(next(now))))
    won, best = decided(Subject(), entries(2, 3, 4, 5), 3.0)
    assert best == {"block_m": 2}
    assert won.skipped == 3


# files


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 99, "runs": [], "configs": {}}'])
def test_a_damaged_report_is_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"tuned\.json: .*tuning report"):
        unpack(path, tmp_path)


def test_unpack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "tuned.json"
    configs = {"linear": {"m=1,n=1,k=1,float16": {"x": 1}}, "attention": {"n=1,s=1,d=1,float16": {"y": 2}}}
    report.write_text(json.dumps({"schema": files.SCHEMA, "device": "GPU 1", "runs": [], "configs": configs}))
    assert unpack_main(["unpack", str(report), str(tmp_path / "configs")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    for op, entries in configs.items():
        content = json.loads((tmp_path / "configs" / op / "GPU_1.json").read_text())
        assert content == {"device": "GPU 1", "configs": entries}


# all of it


@pytest.mark.skipif(INTERPRET, reason="says what happens where no kernel is launched")
def test_without_a_gpu_there_is_nothing_to_tune(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "device 'cpu' launches no kernels, so there is nothing to tune; expected a CUDA device" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "fp8"], "precision 'fp8'; expected one of fp32"),
        (["--ops", "softmax"], "op 'softmax'; expected some of linear"),
        (["--budget", "0"], "'0' is not a positive number of seconds"),
        (["--batch", "0"], "'0' is not a positive integer"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.interpret
@pytest.mark.parametrize("fold", [True, False], ids=["folded", "unfolded"])
def test_end_to_end(fold: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the interpreter's times decide nothing: here a clock says that every candidate is faster
    monkeypatch.setitem(
        MODELS, "vit_tiny_patch16_224", {"img_size": 32, "depth": 1, "embed_dim": 32, "num_heads": 2, "num_classes": 7}
    )
    monkeypatch.setenv("VITFAST_CONFIG_DIR", str(tmp_path / "user"))

    def time_interleaved(functions: dict[str, Any], device: torch.device, **options: Any) -> dict[str, measure.Timing]:
        slow = ("present", "before")
        times = {name: 10.0 if name in slow else 5.0 for name in functions}
        return {name: measure.Timing(ms, 0.99 * ms, 1.01 * ms, 5, 1) for name, ms in times.items()}

    monkeypatch.setattr(measure, "time_interleaved", time_interleaved)
    package = Path(_config.__file__).parent / "configs"
    before = sorted(package.rglob("*"))
    result = tune(
        "vit_tiny_patch16_224",
        batch=2,
        dtype="fp16",
        device=torch.device("cpu"),
        budget_s=10.0,
        fold=fold,
        report=tmp_path / "tuned.json",
        max_candidates=2,
        workers=0,
    )
    assert result.kept
    ops = {tuned.op for tuned in result.launches}
    assert ops == {"linear", "attention", "patch_embed", "layer_norm", *(["row_stats"] if fold else [])}
    assert any("norm" in tuned.key.split(",") for tuned in result.launches) == fold
    assert not any(tuned.refused or tuned.failed for tuned in result.launches), str(result)
    written = _config.read(tmp_path / "user", "linear", "interpreter")
    assert written == {key: entry for key, entry in result.entries.items() if key.op == "linear"}
    content = files.read_report(tmp_path / "tuned.json")
    for key, entry in result.entries.items():
        file_of(key.op).Config(**entry)
        assert content["configs"][key.op][key.text] == entry
    assert content["runs"][0]["job"] == asdict(result.job)
    assert sorted(package.rglob("*")) == before, "something was written into the package"
    assert "all together: 10.0000 ms before, 5.0000 ms after" in str(result)
