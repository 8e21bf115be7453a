"""The `vitfast` command in process: what it prints, its exit statuses, and its errors in one line."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import vitfast
from vitfast import kernels
from vitfast.benchmarks.runner.results import Row, Run, load
from vitfast.cli import arguments, models
from vitfast.cli.main import main
from vitfast.clock import ceilings, timing
from vitfast.doctor import Diagnosis
from vitfast.images.photo import load_image, sample_image
from vitfast.images.view import look
from vitfast.maps.pictures import draw
from vitfast.proof.parity import parity
from vitfast.proof.subjects import seed_weights
from vitfast.reference.architectures import ARCHITECTURES

TINY = {
    **ARCHITECTURES["vit_tiny_patch16_224"],
    "img_size": 32,
    "patch_size": 8,
    "depth": 2,
    "embed_dim": 24,
    "num_heads": 3,
    "num_classes": 5,
}


PHOTO = str(sample_image())


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "vit_test", TINY)


def run(capsys: pytest.CaptureFixture, *argv: str) -> tuple[int, str, str]:
    status = main(argv)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def one_error(err: str) -> str:
    """The error's line; there must be nothing else."""
    assert err.startswith("vitfast: error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    "command",
    [(), ("demo",), ("parity",), ("report",), ("attend",), ("doctor",), ("bench",), ("bench", "compare")],
    ids=lambda command: " ".join(("vitfast", *command)),
)
def test_help_says_what_there_is(capsys, command) -> None:
    status, out, err = run(capsys, *command, "--help")
    assert (status, err) == (0, "")
    assert out.startswith("usage: vitfast")
    wanted = {
        (): ("demo", "parity", "report", "attend", "doctor", "exit status"),
        ("demo",): ("--image", "--weights", "--precision", "--out", "--seed", "--device"),
        ("parity",): ("MODEL", "--precision", "--batch"),
        ("report",): ("MODEL", "--only KIND", "timm:NAME"),
        ("attend",): ("IMAGE", "--model MODEL", "--out FILE", "--layers", "--heads LAYER", "--rollout", "--weights"),
        ("doctor",): ("broken",),
        ("bench",): (
            *("--model", "--batch", "--precision", "--peers", "--layers", "--kernels", "--quick", "--budget SECONDS"),
            *("--out DIR", "end_to_end", "compare"),
        ),
        ("bench", "compare"): ("A.json", "B.json", "--fail PERCENT"),
    }[command]
    assert all(word in out for word in wanted)


def test_version(capsys) -> None:
    assert run(capsys, "--version") == (0, f"vitfast {vitfast.__version__}\n", "")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "COMMAND"),
        (["demmo"], "demmo"),
        (["parity"], "MODEL"),
        (["parity", "vit_test", "--precision", "fp4"], "fp4"),
        (["parity", "vit_test", "--batch", "0"], "'0' is not a positive integer"),
        (["demo", "--seconds", "nan"], "'nan' is not a positive number of seconds"),
        (["parity", "vit_test", "--device", "toaster"], "toaster"),
        (["bench", "nonsense"], "nonsense"),
        (["bench", "--layers", "kernels"], "kernels"),
        (["bench", "--peers", "nobody", "--quick", "--device", "cpu"], "nobody"),
        (["bench", "compare", "a.json"], "B.json"),
        (["bench", "compare", "a.json", "b.json"], "a.json"),
        (["bench", "compare", "a.json", "b.json", "--fail", "100"], "'100' is not a percentage of at least 0"),
        (["parity", "vit_tiny_patch16_22", "--device", "cpu"], "'vit_tiny_patch16_224'"),
        (["parity", "vit_test", "--weights", "nowhere.pth"], "nowhere.pth"),
        (["parity", "vit_test", "--img-size", "33", "--device", "cpu"], "33x33"),
        (["demo", "--model", "vit_test", "--image", "nowhere.jpg"], "nowhere.jpg"),
        (["report"], "MODEL"),
        (["report", "vit_tiny_patch16_22"], "'vit_tiny_patch16_224'"),
        (["report", "timm:vit_tiny_patch16_22"], "timm has no model 'vit_tiny_patch16_22'; close matches: vit_tiny_"),
        (["report", "transformers:vitt"], "'vitt' is no folder with a model of Transformers"),
        (["report", "vit_test", "--only", "fc1"], "'fc1'"),
        (["attend", "nowhere.jpg", "--model", "vit_test", "--out", "map.png"], "nowhere.jpg"),
        (["attend", PHOTO, "--model", "vit_test"], "--out"),
        (["attend", PHOTO, "--model", "vit_test", "--out", "map.txt"], "'map.txt'; expected the name of a picture"),
        (["attend", PHOTO, "--model", "vit_test", "--out", "gone/map.png"], "there is no folder 'gone'"),
        (["attend", PHOTO, "--model", "vit_test", "--out", "map.png", "--layers", "0", "2"], "from -2 to 1"),
        (["attend", PHOTO, "--model", "vit_test", "--out", "map.png", "--heads", "-3"], "from -2 to 1"),
        (["attend", PHOTO, "--model", "vit_test", "--out", "map.png", "--heads", "0", "--layers", "0"], "not allowed"),
        (["attend", PHOTO, "--model", "transformers:vit", "--out", "map.png"], "does not say how it wants its images"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_in_one_line(argv, said, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *argv)
    assert status == 2
    assert said in one_error(err)
    assert out == ""
    assert not list(tmp_path.iterdir())


def test_parity_prints_the_numbers_of_the_function(capsys) -> None:
    status, out, _ = run(
        capsys, "parity", "vit_test", "--precision", "bf16", "--batch", "3", "--seed", "5", "--device", "cpu"
    )
    assert status == 0
    model = seed_weights(vitfast.create_model("vit_test"), seed=5).eval()
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    expected = parity(model, pixels, "bf16")
    assert out.endswith(f"{expected}\n")
    assert "seeded random weights (seed 5)" in out
    assert f"{expected.output.worst:.2e}" in out


def test_parity_all_has_a_line_for_every_module(capsys) -> None:
    status, out, _ = run(capsys, "parity", "vit_test", "--all", "--device", "cpu", "--img-size", "40")
    assert status == 0
    assert "2x3x40x40" in out
    replaced = vitfast.report(vitfast.accelerate(vitfast.create_model("vit_test"))).replaced
    last = [line.split()[-1] for line in out.splitlines()]
    assert {row.module or "(model)" for row in replaced} <= set(last)


def test_parity_of_a_wrong_kernel_exits_with_1(capsys, monkeypatch) -> None:
    right = kernels.layer_norm
    monkeypatch.setattr(kernels, "layer_norm", lambda *args: right(*args) + 1e-3)
    status, out, err = run(capsys, "parity", "vit_test", "--device", "cpu")
    assert (status, err) == (1, "")
    assert "BROKEN" in out
    assert re.search(r"the rule is broken .*: output, .*blocks\.0\.norm1", out)


def test_parity_reads_a_checkpoint(capsys, tmp_path) -> None:
    file = tmp_path / "tiny.pth"
    torch.save(seed_weights(vitfast.create_model("vit_test"), seed=9).state_dict(), file)
    status, out, _ = run(capsys, "parity", "vit_test", "--weights", str(file), "--device", "cpu")
    assert status == 0
    assert f"weights of {file}" in out
    assert "seeded" not in out


@pytest.mark.parametrize(
    ("name", "kind", "replaced", "kept"),
    [
        ("vit_base_patch16_224", "VisionTransformer of vitfast.reference.vit", "FusedReferenceBlock", None),
        ("timm:vit_base_patch16_224", "VisionTransformer of timm.models.vision_transformer", "FusedTimmBlock", None),
        (
            "vit_base_patch16_rpn_224",
            "VisionTransformer of timm.",
            "FusedTimmAttention",
            "not the plain pre-norm block",
        ),
        ("transformers:vit", "ViTModel of transformers.", "ViTLayer", None),
        ("resnet18", "ResNet of timm.", None, None),
    ],
)
def test_report_says_what_would_be_replaced_and_why_not(name, kind, replaced, kept, capsys) -> None:
    status, out, err = run(capsys, "report", name)
    assert (status, err) == (0, "")
    first, *table, last = out.splitlines()
    assert first.startswith(f"{name}: {kind}")
    assert re.search(r" \d+\.\d M parameters$", first)
    assert any(replaced in line for line in table) if replaced else last == "0 modules replaced, 0 kept"
    assert any(kept in line for line in table) if kept else last.endswith(", 0 kept")


def test_report_of_a_folder_reads_no_weights(capsys, tmp_path) -> None:
    from transformers import CLIPVisionConfig

    CLIPVisionConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96).save_pretrained(
        tmp_path
    )
    # the only weights there are none that could be read
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    status, out, _ = run(capsys, "report", str(tmp_path), "--only", "mlp")
    assert status == 0
    assert out.startswith(f"{tmp_path}: CLIPVisionModel of transformers.models.clip.modeling_clip")
    assert "ViTMLP" in out
    assert "could be replaced, is not switched on" in out
    assert "\n2 modules replaced, " in out


@pytest.mark.parametrize(("problems", "status"), [((), 0), (("no compiler: get one",), 1)], ids=["whole", "broken"])
def test_doctor_prints_what_the_function_found(problems, status, capsys, monkeypatch) -> None:
    found = Diagnosis((("torch", "9.9"),), (), (), (), ("a note",), problems)
    monkeypatch.setattr(importlib.import_module("vitfast.doctor"), "doctor", lambda: found)
    assert run(capsys, "doctor") == (status, f"{found}\n", "")


def _bench(capsys, out: Path, *argv: str) -> tuple[int, str, str]:
    shape = ("--model", "vit_test", "--batch", "2", "--device", "cpu", "--budget", "600", "--out", str(out))
    return run(capsys, "bench", *shape, "--peers", "torch eager", "vitfast +block", "vitfast", *argv)


@pytest.fixture
def hasty(monkeypatch) -> None:
    """Times do not matter here, only that they are taken."""
    timed = timing.time_interleaved
    monkeypatch.setattr(timing, "time_interleaved", lambda *a, **k: timed(*a, **{**k, "budget_s": 0.01}))
    monkeypatch.setattr(ceilings, "CEILING_S", 0.01)


def test_bench_measures_the_layers_that_are_asked_for(capsys, tmp_path, hasty) -> None:
    status, out, err = _bench(capsys, tmp_path, "--layers", "block", "end_to_end", "--quick")
    assert status == 0, err
    rows = load(tmp_path / "results.json").rows
    # kernels come last, so that a budget cuts them first
    assert list(dict.fromkeys(row.layer for row in rows)) == ["block", "end_to_end", "kernel"]
    assert {row.candidate for row in rows if row.layer == "end_to_end" and row.ms} >= {"torch eager", "vitfast +block"}
    assert "## One block" in out and "## End to end, from JPEG files to logits" in out and "## Kernels" in out
    # no terminal: plain lines
    assert re.search(r"^1/\d+  block vit_test b2 fp32: torch eager$", err, re.MULTILINE)
    assert "\r" not in err and "\x1b" not in err
    assert f"wrote {tmp_path / 'index.html'}" in err


def test_bench_of_a_wrong_kernel_exits_with_1(capsys, tmp_path, monkeypatch, hasty) -> None:
    right = kernels.layer_norm
    monkeypatch.setattr(kernels, "layer_norm", lambda *args: right(*args) + 1e-2)
    status, out, _ = _bench(capsys, tmp_path, "--layers", "block")
    assert status == 1
    assert "failed parity" in out


def _results(path: Path, ours_ms: float, peers: tuple[str, ...] = ("torch eager", "torch compiled")) -> str:
    def row(name: str, ms: float) -> Row:
        spread = {"ms_p20": 0.99 * ms, "ms_p80": 1.01 * ms, "samples": 30, "calls": 1}
        return Row("model", "vit_test", {"batch": 1}, "fp32", name, "ok", ms=ms, **spread)

    rows = [*(row(name, 1.0) for name in peers), row("vitfast +block", ours_ms)]
    Run({"device": "a made-up device", "versions": {}}, None, rows).save(path)
    return str(path)


@pytest.mark.parametrize(
    ("after", "fail", "status"),
    [(1.0, "0", 0), (1.2, "10", 1), (1.2, "20", 0), (0.5, "10", 0), (1.2, None, 0)],
    ids=["same", "slower", "slower, within what is put up with", "faster", "no gate"],
)
def test_bench_compare_stops_what_became_slower(after, fail, status, capsys, tmp_path) -> None:
    files = _results(tmp_path / "a.json", 1.0), _results(tmp_path / "b.json", after)
    found, out, err = run(capsys, "bench", "compare", *files, *([] if fail is None else ["--fail", fail]))
    assert (found, err) == (status, "")
    assert ("% slower" in out) == (after > 1.0)
    if fail is not None:
        assert out.endswith(f"\n{status} rows broke, or lost more than {fail} % of their speed and more than noise.\n")


def test_bench_compare_does_not_judge_without_a_control(capsys, tmp_path) -> None:
    files = _results(tmp_path / "a.json", 1.0, peers=()), _results(tmp_path / "b.json", 1.2, peers=())
    status, _, err = run(capsys, "bench", "compare", *files, "--fail", "5")
    assert status == 2
    assert "no timed rows of the same peers" in one_error(err)
    assert run(capsys, "bench", "compare", *files)[0] == 0


def test_an_interrupt_is_130(capsys, monkeypatch) -> None:
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "doctor_command", interrupted)
    assert run(capsys, "doctor") == (130, "", "vitfast: interrupted\n")


def test_an_unexpected_error_is_named_and_its_traceback_can_be_had(capsys, monkeypatch) -> None:
    def failing(options):
        raise RuntimeError("out of\nluck")

    monkeypatch.setattr(models, "doctor_command", failing)
    status, _, err = run(capsys, "doctor")
    assert status == 2
    assert one_error(err) == "vitfast: error: RuntimeError: out of luck\n"
    for argv in (["--traceback", "doctor"], ["doctor", "--traceback"]):
        with pytest.raises(RuntimeError, match="luck"):
            main(argv)


def test_an_installed_package_adds_a_command_and_a_broken_one_is_named(capsys, monkeypatch) -> None:
    def add(commands, common) -> None:
        parser = commands.add_parser("hello", help="from elsewhere", parents=[common])
        parser.set_defaults(run=lambda options: print("hello") or 3)

    entry = EntryPoint("hello", "elsewhere:add", "vitfast.commands")
    monkeypatch.setattr(arguments, "entry_points", lambda group: [entry])
    monkeypatch.setitem(sys.modules, "elsewhere", SimpleNamespace(add=add))
    assert run(capsys, "hello") == (3, "hello\n", "")
    assert "from elsewhere" in run(capsys, "--help")[1]
    monkeypatch.setitem(sys.modules, "elsewhere", None)
    status, _, err = run(capsys, "doctor")
    assert status == 2
    assert "elsewhere" in one_error(err)


def test_as_a_program_with_a_reader_that_goes_away() -> None:
    read, write = os.pipe()
    os.close(read)
    child = subprocess.Popen(
        [sys.executable, "-m", "vitfast", "doctor"], stdout=write, stderr=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    os.close(write)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 141
    assert err == b""


def attended(model: torch.nn.Module, spec, rollout: bool = False, **options) -> Image.Image:
    pixels, view = look(load_image(PHOTO), spec)
    flow = vitfast.rollout(vitfast.attention_maps(model, pixels)) if rollout else None
    return draw(view, vitfast.attention_maps(model, pixels, **options), flow)


@pytest.mark.parametrize(
    ("argv", "options"),
    [
        ((), {}),
        (("--layers", "-1", "--rollout"), {"layers": [1], "rollout": True}),
        (("--heads", "0"), {"layers": [0], "heads": None}),
    ],
    ids=["all layers", "one layer and the rollout", "heads"],
)
def test_attend_draws_what_the_functions_give(argv, options, capsys, tmp_path) -> None:
    out = tmp_path / "map.png"
    status, said, _ = run(
        capsys, "attend", PHOTO, "--model", "vit_test", "--seed", "3", "--device", "cpu", "--out", str(out), *argv
    )
    assert status == 0
    assert "seeded random weights (seed 3), which mean nothing" in said
    assert "4x4 patches as the class token sees them; tokens in front of them: 1" in said
    model = seed_weights(vitfast.create_model("vit_test"), seed=3).eval()
    expected = attended(model, vitfast.image_spec(model), **options)
    np.testing.assert_allclose(np.asarray(Image.open(out)).astype(int), np.asarray(expected).astype(int), atol=1)


def test_attend_takes_a_folder_of_transformers_and_its_image_processor(capsys, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.SiglipVisionConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8
    )
    model = seed_weights(transformers.SiglipVisionModel(config), seed=4).eval()
    processor = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    for part in (model, processor):
        part.save_pretrained(tmp_path / "siglip")
    out = tmp_path / "map.png"
    argv = ("--model", str(tmp_path / "siglip"), "--device", "cpu", "--out", str(out), "--rollout")
    status, said, err = run(capsys, "attend", PHOTO, *argv)
    assert status == 0, err
    assert f"weights of {tmp_path / 'siglip'}" in said
    assert "they see each other, on average; tokens in front of them: 0" in said
    expected = attended(model, vitfast.image_spec(processor), rollout=True)
    np.testing.assert_allclose(np.asarray(Image.open(out)).astype(int), np.asarray(expected).astype(int), atol=1)
