"""The machine of a run: device, driver, versions, threads and commit."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def versions() -> dict[str, str | None]:
    """Versions of what decides speed; None where it is not installed."""
    names = ("torch", "triton", "timm", "transformers", "torchvision", "xformers", "flash-attn", "flash-attn-4")
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in (*names, "quack-kernels", "onnxruntime", "openvino"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def environment(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, threads and commit of this run."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "kind": device.type,
        "driver": _nvidia_smi("driver_version") if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "capability": list(torch.cuda.get_device_capability(device)) if cuda else None,
        "multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count if cuda else None,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": versions(),
        "commit": commit(),
        "platform": sys.platform,
    }


def telemetry(device: torch.device) -> dict[str, str | None]:
    """Clocks (MHz), power (W) and temperature (degrees C) right now, as `nvidia-smi` prints them; empty on CPU."""
    if device.type != "cuda":
        return {}
    fields = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
    return {field: _nvidia_smi(field, device) for field in fields}


def _nvidia_smi(field: str, device: torch.device | None = None) -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    index = [] if device is None else ["-i", str(device.index or 0)]
    command = ["nvidia-smi", *index, f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def cpu_name() -> str:
    """The processor's model name and how many threads torch uses of it."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} threads"


def commit() -> str | None:
    """The repository's commit, with `+` behind it if the tree differs from it; None outside a repository."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run(
        ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() + ("+" if dirty.stdout.strip() else "") if done.returncode == 0 else None
