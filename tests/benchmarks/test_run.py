"""The runner: what is wrong is refused, what is missing is a row, what is finished is kept."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

import vitfast
from vitfast.benchmarks.peers import Peer, peers, plain
from vitfast.benchmarks.report.markdown import markdown
from vitfast.benchmarks.runner import run as runner
from vitfast.benchmarks.runner.progress import Progress
from vitfast.benchmarks.runner.results import Run, load
from vitfast.benchmarks.runner.run import run, select_peers
from vitfast.benchmarks.workloads import base, libraries, photos
from vitfast.benchmarks.workloads.base import Workload
from vitfast.benchmarks.workloads.kernels import KERNELS
from vitfast.benchmarks.workloads.table import workloads
from vitfast.clock import ceilings, machine, timing

CPU = torch.device("cpu")
MODEL = "vit_tiny_patch16_224"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The suite's smallest model at two blocks and 32 pixels; environments that do not ask git or the GPU."""
    monkeypatch.setitem(base.MODELS, MODEL, {"depth": 2, "img_size": 32, "num_classes": 7})
    monkeypatch.setattr(machine, "environment", lambda device: {"device": "fake processor", "versions": {}})
    # times do not matter here, only that they are taken
    timed = timing.time_interleaved
    monkeypatch.setattr(timing, "time_interleaved", lambda *a, **k: timed(*a, **{**k, "budget_s": 0.01}))
    monkeypatch.setattr(ceilings, "CEILING_S", 0.01)
    base.reference_model.cache_clear()
    base.model_flops.cache_clear()
    yield
    base.reference_model.cache_clear()
    base.model_flops.cache_clear()


def _todo(*layers: str) -> list[Workload]:
    return workloads(layers, (MODEL,), (2,), ("fp32",))


def _run(path: Path, *names: str, layers: tuple[str, ...] = ("model",)) -> tuple[Run, list[str]]:
    log = io.StringIO()
    options: dict[str, Any] = {"peer_names": names or None, "budget_s": 600.0, "quick": True}
    result = run(_todo(*layers), path, CPU, progress=Progress(log), **options)
    return result, log.getvalue().splitlines()


def _peer(name: str, build: Any, missing: str | None = None) -> Peer:
    ops = frozenset({"model", "layer_norm"})
    return Peer(name, ops, lambda workload, device: missing, build)


def test_rows_of_a_model_and_a_training_step(tmp_path: Path) -> None:
    result, _ = _run(tmp_path / "r.json", "torch eager", "vitfast +", layers=("model", "train"))
    rows = {(row.layer, row.candidate): row for row in result.rows if row.status == "ok"}
    assert {"torch eager", "vitfast +patch_embed", "vitfast +block"} <= {name for _, name in rows}
    for row in rows.values():
        assert row.ms_p20 <= row.ms <= row.ms_p80
        assert row.error <= row.error_limit
        assert row.images_per_s == pytest.approx(2000 / row.ms)
        assert row.floor_ms == result.ceilings.floor_ms(row.flops, row.bytes, "fp32")
        assert row.cold_ms > 0 and row.samples >= 5
    assert rows["train", "torch eager"].flops == 3 * rows["model", "torch eager"].flops


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_blocks_and_files_of_every_candidate_that_runs_here(dtype: str, tmp_path: Path) -> None:
    todo = workloads(("block", "end_to_end"), (MODEL,), (6,), (dtype,))
    options: dict[str, Any] = {"peer_names": ("torch eager", "vitfast +"), "budget_s": 600.0, "quick": True}
    result = run(todo, tmp_path / "r.json", CPU, **options)
    found: dict[str, dict[str, str]] = {"block": {}, "end_to_end": {}}
    for row in result.rows:
        found[row.layer][row.candidate] = row.status
    graphs = {"vitfast +graph": "missing"}
    assert found["block"] == graphs | {"vitfast +compile +graph": "missing"} | dict.fromkeys(
        ("torch eager", *(f"vitfast +{k}" for k in ("layer_norm", "attention", "mlp", "block", "compile"))), "ok"
    )
    assert found["end_to_end"] == graphs | dict.fromkeys(
        ("torch eager", *(f"vitfast +{k}" for k in ("patch_embed", "block", "tail", "compile"))), "ok"
    )
    for row in result.rows:
        assert row.shape["batch"] == 6
        assert row.ms is None or row.images_per_s == pytest.approx(6000 / row.ms)


@pytest.mark.parametrize("wrong", ["the order", "a crop", "a value"])
def test_wrong_pixels_are_refused(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = plain.preprocess

    def preprocess(file: str, spec: Any) -> Tensor:
        if wrong == "the order":
            file = photos.photo_files()[1][0]
        pixels = right(file, spec)
        return {"the order": pixels, "a crop": pixels.roll(1, -1), "a value": pixels ^ 1}[wrong]

    monkeypatch.setattr(plain, "preprocess", preprocess)
    result, _ = _run(tmp_path / "r.json", "torch eager", "vitfast +block", layers=("end_to_end",))
    assert {row.status for row in result.rows} == {"failed parity"}


def test_photographs_are_jpeg_files_of_several_sizes() -> None:
    opened = [Image.open(path) for path in photos.photo_files()[1]]
    assert {image.format for image in opened} == {"JPEG"}
    assert {image.size for image in opened} == set(photos.PHOTO_SIZES)
    (workload,) = workloads(("end_to_end",), (MODEL,), (3,), ("fp32",))
    first, second = (workload.inputs(CPU, i)["files"] for i in (0, 1))
    assert len({*first, *second}) == 6, "no call decodes what the one before did"


def test_a_training_step_has_an_optimiser_that_leaves_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.optim.AdamW] = []
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **k: made.append(adamw(*a, **k)) or made[-1])
    (workload,) = workloads(("train",), (MODEL,), (2,), ("fp32",))
    for name in ("torch eager", "vitfast +block"):
        (peer,) = select_peers((name,))
        step = peer.build(workload, CPU)
        (optimizer,) = made
        made.clear()
        parameters = optimizer.param_groups[0]["params"]
        before = [p.detach().clone() for p in parameters]
        gradients = [step(workload.inputs(CPU, i)).clone() for i in (0, 0, 1)]
        assert {int(optimizer.state[p]["step"]) for p in parameters} == {3}
        assert all(optimizer.state[p]["exp_avg_sq"].abs().sum() > 0 for p in parameters if p.grad.abs().max() > 1e-15)
        assert all(torch.equal(old, new) for old, new in zip(before, parameters, strict=True))
        assert torch.equal(gradients[0], gradients[1]) and not torch.equal(gradients[0], gradients[2])


def test_other_libraries_compute_the_same(tmp_path: Path) -> None:
    names = ("timm eager", "torchvision eager", "Transformers eager")
    for name in names:
        pytest.importorskip(name.split()[0].lower())
    result, _ = _run(tmp_path / "r.json", *names, layers=("model", "train"))
    assert {(row.layer, row.candidate, row.status, row.note) for row in result.rows} == {
        (layer, name, "ok", "") for layer in ("model", "train") for name in names
    }


def test_other_libraries_models_plain_and_accelerated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    transformers.ViTConfig(**config, image_size=32, patch_size=8).save_pretrained(tmp_path / "vit")
    name = f"transformers:{tmp_path / 'vit'}"
    todo = workloads(("kernel", "block", "model"), (name,), (2,), ("fp32",))
    assert [str(workload) for workload in todo] == [f"{name} b2 fp32"]
    result = run(todo, tmp_path / "r.json", CPU, peer_names=None, budget_s=600.0, quick=True)
    ours = {"vitfast +tail", "vitfast +compile"}
    assert {row.candidate for row in result.rows if row.status == "ok"} == {"torch eager", "torch compiled"} | ours
    assert result == load(tmp_path / "r.json")
    assert "## Inference" in markdown(result)
    # the suite's own are there or said to be missing
    monkeypatch.setitem(sys.modules, "open_clip", None)
    missing = libraries.missing_libraries(libraries.LIBRARY_MODELS)
    assert missing["open_clip:ViT-B-16"] == 'this needs open_clip; pip install "vitfast[open-clip]"'


def test_attention_of_other_libraries_models(tmp_path: Path) -> None:
    todo = workloads(("kernel",), (libraries.BEIT, libraries.SWIN), (1,), ("fp32",))
    assert [workload.op for workload in todo] == ["relative_attention"] + ["window_attention"] * 4
    names = ("torch eager", "vitfast")
    result = run(todo, tmp_path / "r.json", CPU, peer_names=names, budget_s=600.0, quick=True)
    ok = {(row.workload, row.candidate) for row in result.rows if row.status == "ok"}
    assert ok == {(workload.name, name) for workload in todo for name in names}


def test_every_kernel_is_offered_by_torch_and_by_us(tmp_path: Path) -> None:
    result, _ = _run(tmp_path / "r.json", "torch eager", "vitfast", layers=("kernel",))
    ok = {(row.workload.split("/")[0], row.candidate) for row in result.rows if row.status == "ok"}
    assert ok == {(name, candidate) for name in KERNELS for candidate in ("torch eager", "vitfast")}


def test_a_wrong_kernel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = vitfast.kernels.layer_norm

    def wrong(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # one element of one row of the last image
        y = right(x, *args, **kwargs).clone()
        y[-1, -1, -1] += 0.01
        return y

    monkeypatch.setattr(vitfast.kernels, "layer_norm", wrong)
    result, _ = _run(tmp_path / "r.json", "torch eager", "vitfast", layers=("kernel",))
    row = next(r for r in result.rows if r.workload.startswith("layer_norm") and r.candidate == "vitfast")
    assert row.status == "failed parity"
    assert row.ms is None
    assert row.note.startswith("breaks the parity rule: largest error")
    assert row.error > row.error_limit


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_refused_and_can_be_saved(value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = _peer("broken", lambda w, d: lambda inputs: w.reference(inputs["pixels"]).detach() * value)
    monkeypatch.setattr(runner, "peers", lambda: (*peers(), broken))
    result, _ = _run(tmp_path / "r.json", "broken")
    assert [row.status for row in result.rows] == ["failed parity"]
    assert load(tmp_path / "r.json").rows == result.rows


def test_missing_and_failing_peers_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(workload: Workload, device: torch.device) -> Any:
        raise RuntimeError("no such luck\nsecond line")

    def too_large(workload: Workload, device: torch.device) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 3 TiB")

    added = (_peer("absent", fail, "is not installed"), _peer("failing", fail), _peer("large", too_large))
    monkeypatch.setattr(runner, "peers", lambda: (*peers(), *added))
    result, _ = _run(tmp_path / "r.json", "torch eager", "absent", "failing", "large")
    assert {row.candidate: (row.status, row.note) for row in result.rows} == {
        "torch eager": ("ok", ""),
        "absent": ("missing", "is not installed"),
        "failing": ("error", "RuntimeError: no such luck"),
        "large": ("out of memory", "tried to allocate 3 TiB"),
    }


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    whole = runner.run_workload

    def killed(workload: Workload, *args: Any, **kwargs: Any) -> Any:
        if workload.op == "add_layer_norm":
            raise KeyboardInterrupt
        return whole(workload, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "run_workload", killed)
        with pytest.raises(KeyboardInterrupt):
            _run(path, "torch eager", layers=("kernel",))
    finished = load(path).rows
    assert [row.workload.split("/")[0] for row in finished] == ["patch_embed", "layer_norm"]
    result, _ = _run(path, "torch eager", layers=("kernel",))
    assert result.rows[:2] == finished
    assert len(result.rows) == len(KERNELS)
    again, said = _run(path, "torch eager", layers=("kernel",))
    assert (again.rows, said) == (result.rows, [])


def test_a_second_precision_gets_its_ceiling(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    first, _ = _run(path, "torch eager")
    todo = workloads(("model",), (MODEL,), (2,), ("bf16",))
    second = run(todo, path, CPU, peer_names=("torch eager",), budget_s=600.0, quick=True)
    assert set(second.ceilings.gemm_tflop_s) == {"fp32", "bf16"}
    assert second.ceilings.gemm_tflop_s["fp32"] == first.ceilings.gemm_tflop_s["fp32"]
    assert [row.status for row in second.rows] == ["ok", "ok"]


def test_another_run_s_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    _run(path, "torch eager")
    monkeypatch.setattr(machine, "environment", lambda device: {"device": "another", "versions": {}})
    with pytest.raises(ValueError, match="holds another run"):
        _run(path, "torch eager")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="peer 'nobody'; expected the start of one of: "):
        select_peers(("nobody",))
    with pytest.raises(ValueError, match="precision 'bf8'; expected one of fp32, tf32, bf16, fp16"):
        workloads(("model",), (MODEL,), (1,), ("bf8",))
    with pytest.raises(ValueError, match="unknown model 'vit_nano'"):
        workloads(("model",), ("vit_nano",), (1,), ("fp32",))


class _Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_is_a_bar_without_a_guess_of_the_end() -> None:
    screen = _Screen()
    with Progress(screen) as progress:
        progress.start(4)
        progress.step("a workload: torch eager", rows=1)
        progress.say("a line that stays")
        progress.step("a workload: vitfast", rows=3)
    drawn = screen.getvalue()
    assert "a line that stays\n" in drawn and drawn.count("\n") == 1
    assert " 25%|" in drawn and "4/4 [00:0" in drawn and drawn.count("a workload: vitfast") == 1
    assert "<" not in drawn and "?" not in drawn


def test_progress_elsewhere_is_plain_lines() -> None:
    log = io.StringIO()
    with Progress(log) as progress:
        progress.start(4)
        progress.step("a workload: torch eager", rows=1)
        progress.say("a line that stays")
    assert log.getvalue() == "1/4  a workload: torch eager\na line that stays\n"


def test_every_row_of_a_run_is_counted(tmp_path: Path) -> None:
    _, said = _run(tmp_path / "r.json", "torch eager", "addmm", layers=("kernel",))
    counted = [re.match(r"(\d+)/(\d+)  ", line) for line in said[1:]]
    assert all(counted)
    numbers = [(int(found[1]), int(found[2])) for found in counted if found]
    assert {total for _, total in numbers} == {12}
    assert [n for n, _ in numbers] == sorted(n for n, _ in numbers) and numbers[-1][0] == 12


def test_flops_of_vit_b() -> None:
    # 2 * (12 * (12 * N * D^2 + 2 * N^2 * D) + 196 * 768 * D + 1000 * D), N = 197, D = 768; without biases and norms
    n, d = 197, 768
    expected = 2 * (12 * (12 * n * d * d + 2 * n * n * d) + 196 * 768 * d + 1000 * d)
    assert base.model_flops("vit_base_patch16_224") == pytest.approx(expected, rel=1e-3)
