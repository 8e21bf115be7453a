"""What the doctor says of machines that are not this one."""

from __future__ import annotations

import importlib
import importlib.metadata
from types import SimpleNamespace

import pytest
import torch

import vitfast
from vitfast.doctor import doctor, how_ops_run
from vitfast.kernels import _config

# the module, whatever the package exports under its name
module = importlib.import_module("vitfast.doctor")

OPS = {"patch_embed", "layer_norm", "add_layer_norm", "row_stats", "attention", "attention_lse", "attention_qkv"}
OPS |= {"relative_attention", "window_attention", "linear", "linear_stats", "norm_linear", "mlp"}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """A machine with a GPU of a given capability, as torch would describe it."""

    def pretend(major: int, minor: int) -> None:
        seen = SimpleNamespace(
            name="Pretended GPU", major=major, minor=minor, total_memory=80 * 2**30, multi_processor_count=132
        )
        monkeypatch.setattr(module, "_driver", lambda: "580.1")
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: seen)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: seen.name)
        # the real one remembers its answers
        monkeypatch.setattr(_config, "arch", lambda device: 10 * major + minor)
        monkeypatch.setattr(module, "c_compiler", lambda: "/usr/bin/cc")
        monkeypatch.setattr(module, "python_header", lambda: "Python.h")
        monkeypatch.setattr(module.kernels, "INTERPRET", False)

    return pretend


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_driver", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def how(device: str) -> dict[str, str]:
    return {op.name: op.how for op in how_ops_run(torch.device(device))}


def test_every_public_kernel_is_told_about() -> None:
    public = {name for name in vitfast.kernels.__all__ if name.islower() and not name.endswith("_ref")}
    # of these none computes what a model does
    public -= {"by_reference", "fold", "fp32_products", "interprets", "together"}
    assert set(how("cpu")) == public == OPS


def test_on_cpu_the_reference_runs_unless_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.kernels, "INTERPRET", False)
    assert "torch's own calls" in how("cpu")["linear"]
    monkeypatch.setattr(module.kernels, "INTERPRET", True)
    assert "interpreter" in how("cpu")["attention"]


@pytest.mark.skipif(not module.HAS_TRITON, reason="says how Triton's kernels run")
def test_the_gemm_follows_the_capability(gpu) -> None:
    gpu(9, 0)
    assert "TMA" in how("cuda")["linear"]
    gpu(8, 0)
    assert "TMA" not in how("cuda")["linear"]
    assert "pointers" in how("cuda")["linear"]


@pytest.mark.skipif(not module.HAS_TRITON, reason="says how Triton's kernels run")
def test_tuned_shapes_are_counted(gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(9, 0)
    monkeypatch.setattr(_config, "table", lambda op, name: {"a": {}, "b": {}} if op == "linear" else {})
    assert "2 tuned shapes" in how("cuda")["linear"]
    assert "heuristic" in how("cuda")["attention"]


@pytest.mark.skipif(not module.HAS_TRITON, reason="a GPU without Triton is a problem of its own")
def test_a_whole_gpu_machine_has_no_problems(gpu) -> None:
    gpu(9, 0)
    found = doctor()
    assert found.ok, found.problems
    assert (found.gpus[0].name, found.gpus[0].capability) == ("Pretended GPU", "9.0")
    assert "80 GiB" in str(found)
    assert {op.device for op in found.ops} == {"cuda:0", "cpu"}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("HAS_TRITON", False, "pip install triton"),
        ("c_compiler", lambda: None, "apt install gcc"),
        ("python_header", lambda: None, "no Python.h"),
    ],
    ids=["triton", "C compiler", "Python.h"],
)
def test_what_a_gpu_machine_needs_is_a_problem_there_and_a_note_elsewhere(
    name: str, value, said: str, gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(9, 0)
    monkeypatch.setattr(module.sys, "platform", "linux")
    if name != "HAS_TRITON":
        monkeypatch.setattr(module, "HAS_TRITON", True)
    monkeypatch.setattr(module, name, value)
    found = doctor()
    assert not found.ok
    assert any(said in problem for problem in found.problems)
    assert "problem: " in str(found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module, "_driver", lambda: None)
    found = doctor()
    assert found.ok
    assert any(said in note for note in found.notes)


def test_a_cpu_build_beside_a_driver_is_a_problem(no_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_driver", lambda: "580.1")
    assert any("install a CUDA build of torch" in problem for problem in doctor().problems)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert any("CUDA_VISIBLE_DEVICES" in problem for problem in doctor().problems)


def test_without_a_gpu_all_is_well_and_said(no_gpu) -> None:
    found = doctor()
    assert found.ok, found.problems
    assert any("no CUDA device" in note for note in found.notes)
    versions = dict(found.versions)
    assert versions["torch"] == torch.__version__
    assert versions["vitfast"] == vitfast.__version__
    text = str(found)
    assert "none that torch sees" in text
    assert text.endswith("nothing is broken")


def test_packages_are_found_without_importing_them(no_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"timm": "1.2.3", "torchvision": "0.99.0", "torch": torch.__version__}

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object() if name == "xformers" else None)
    monkeypatch.setattr(module.sys, "platform", "linux")
    found = doctor()
    packages = {package.name: package.version for package in found.packages}
    assert packages["timm"] == "1.2.3"
    assert packages["flash-attn"] is None
    assert packages["xformers"] == "of unknown version"
    assert 'pip install "vitfast[flash-attn]"' in str(found)
    # a torchvision from PyPI beside a CPU build of torch
    assert any("torchvision 0.99.0" in note for note in found.notes)


def test_a_package_older_than_the_metadata_allow_is_a_problem(no_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["torch>=99.1", 'timm>=99; extra == "timm"'])
    assert [p.split(":")[0] for p in doctor().problems] == [f"torch {torch.__version__} is older than 99.1"]


def test_the_c_compiler_is_the_one_triton_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(module.shutil, "which", lambda name: f"/bin/{name}" if name in ("clang", "icc") else None)
    assert module.c_compiler() == "/bin/clang"
    monkeypatch.setenv("CC", "icc -O2")
    assert module.c_compiler() == "/bin/icc"
    monkeypatch.setenv("CC", "missing")
    assert module.c_compiler() is None
