"""`doctor`: what is installed here, which kernels run how, and what to do about what is missing.

Nothing is imported that vitfast does not need anyway: other packages are looked up in their metadata.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import sysconfig
from pathlib import Path
from textwrap import indent
from typing import NamedTuple

import torch

from . import __version__, kernels
from .kernels import _config
from .kernels._triton import HAS_TRITON
from .table import text_table

_CUDA_BUILD = ", beside a CUDA build of torch"
# distribution, module, what vitfast has from it, extra that installs it, what to mind
_OPTIONAL = (
    ("timm", "timm", "its Vision Transformers can be accelerated", "timm", ""),
    ("transformers", "transformers", 'its vision models, too; attn_implementation="vitfast"', "transformers", ""),
    ("torchvision", "torchvision", "its ViT and Swin, too; timm imports it", "torchvision", ", of torch's own build"),
    ("open_clip_torch", "open_clip", "its vision towers, too", "open-clip", ""),
    ("matplotlib", "matplotlib", "charts, and the demo's photograph", "bench", ", or demo --image FILE"),
    ("flash-attn", "flash_attn", 'accelerate(attention="flash_attn"); to compare with', "flash-attn", _CUDA_BUILD),
    ("xformers", "xformers", 'accelerate(attention="xformers"); to compare with', "xformers", _CUDA_BUILD),
)

_DRIVER = Path("/proc/driver/nvidia/version")


class Gpu(NamedTuple):
    """One CUDA device: its name as CUDA has it, capability such as "9.0", bytes of memory, multiprocessors."""

    name: str
    capability: str
    memory: int
    multiprocessors: int


class Op(NamedTuple):
    """How one op of `vitfast.kernels` runs on a device, in words."""

    name: str
    device: str
    how: str


class Package(NamedTuple):
    """An optional package: its version, None where it is missing, what vitfast has from it, how to install it."""

    name: str
    version: str | None
    purpose: str
    remedy: str


class Diagnosis(NamedTuple):
    """What `doctor` found. `str()` gives the page.

    Attributes:
        versions: (what, version) of the software that vitfast stands on.
        gpus: CUDA devices that torch sees.
        ops: how each op runs, per kind of device.
        packages: optional packages.
        notes: what is missing without being wrong, and what to do.
        problems: what is broken, and what to do.
    """

    versions: tuple[tuple[str, str], ...]
    gpus: tuple[Gpu, ...]
    ops: tuple[Op, ...]
    packages: tuple[Package, ...]
    notes: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is broken."""
        return not self.problems

    def __str__(self) -> str:
        gpus: list[tuple[str, ...]] = [
            (g.name, f"capability {g.capability}", f"{g.memory / 2**30:.0f} GiB", f"{g.multiprocessors} SMs")
            for g in self.gpus
        ]
        packages = [(p.name, p.version or "missing", p.purpose if p.version else p.remedy) for p in self.packages]
        sections = {
            "versions": self.versions,
            "GPUs": gpus or [("none that torch sees",)],
            "how the kernels run here": self.ops,
            "optional packages": packages,
        }
        pages = [f"{title}\n{indent(text_table((), rows), '  ')}\n" for title, rows in sections.items()]
        pages += [f"note: {note}" for note in self.notes] + [f"problem: {problem}" for problem in self.problems]
        return "\n".join([*pages, "nothing is broken" if self.ok else f"{len(self.problems)} broken"])


def _installed(distribution: str, module: str | None = None) -> str | None:
    """Version of a package, without importing it; None where it is missing."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        # put on the path by hand, or built from a checkout: there, but without metadata
        found = module is not None and importlib.util.find_spec(module) is not None
        return "of unknown version" if found else None


def _driver() -> str | None:
    """Version of NVIDIA's kernel driver; None where it is not loaded."""
    try:
        text = _DRIVER.read_text()
    except OSError:
        return None
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return found.group() if found else "of unknown version"


def c_compiler() -> str | None:
    """The C compiler that Triton takes for its launcher: `CC`, else gcc, else clang."""
    chosen = os.environ.get("CC")
    if chosen:
        return shutil.which(chosen.split()[0])
    return shutil.which("gcc") or shutil.which("clang")


def python_header() -> Path | None:
    """Python.h, which Triton's launcher includes; None where it is not installed."""
    # Debian's own scheme names a folder that has no headers; Triton makes the same correction
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_paths(scheme)["include"], "Python.h")
    return header if header.is_file() else None


def how_ops_run(device: torch.device) -> tuple[Op, ...]:
    """How each op runs on the CPU or a CUDA device, from the kernels' own conditions."""
    names = ("patch_embed", "layer_norm", "add_layer_norm", "row_stats", "attention", "window_attention", "linear")
    if device.type == "cuda" and HAS_TRITON:
        arch = _config.arch(device)
        how = dict.fromkeys(names, "Triton kernel")
        how["linear"] = (
            "Triton kernel: persistent, operands by tensor descriptors (TMA); by pointers in exact fp32 or unaligned"
            if arch >= 90
            else "Triton kernel: one tile a program, operands by pointers"
        )
        name = torch.cuda.get_device_name(device)
        for op in how:
            tuned = len(_config.table(op, name))
            how[op] += f"; {tuned} tuned shapes" if tuned else "; tiles by heuristic"
    elif device.type == "cpu" and kernels.INTERPRET:
        how = dict.fromkeys(names, "Triton's interpreter (TRITON_INTERPRET=1): fp32 and fp16, slow")
    elif device.type == "cpu":
        how = dict.fromkeys(names, "reference, in torch's own calls")
    else:
        how = dict.fromkeys(names, "does not run")
    how |= dict.fromkeys(("attention_qkv", "attention_lse", "relative_attention"), "as attention")
    how |= {"linear_stats": "as linear", "norm_linear": "as linear", "mlp": "two linear calls"}
    return tuple(Op(op, str(device), text) for op, text in how.items())


def _too_old() -> list[str]:
    """Installed requirements that are older than vitfast's metadata allow."""
    try:
        requirements = importlib.metadata.requires("vitfast") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    old = []
    for requirement in requirements:
        found = re.match(r"([\w.-]+)\s*>=\s*([\d.]+)", requirement)
        if found is None or "extra" in requirement:
            continue
        name, least = found.groups()
        version = _installed(name)
        if version is not None and _numbers(version) < _numbers(least):
            old.append(f"{name} {version} is older than {least}: pip install --upgrade {name}")
    return old


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def _findings(packages: tuple[Package, ...]) -> tuple[list[str], list[str]]:
    """(notes, problems), each with what to do."""
    notes, problems = [], _too_old()
    linux = sys.platform == "linux"
    driver, cuda = _driver(), torch.cuda.is_available()
    if driver and torch.version.cuda is None and torch.version.hip is None:
        problems.append(
            f"this machine has NVIDIA's driver {driver} and torch {torch.__version__} has no CUDA: "
            "install a CUDA build of torch, or the GPU stays unused"
        )
    elif driver and not cuda:
        problems.append(
            "torch has CUDA and the driver is loaded, but torch sees no device: look at CUDA_VISIBLE_DEVICES and "
            f"whether driver {driver} is new enough for CUDA {torch.version.cuda}"
        )
    elif not cuda:
        notes.append("torch sees no CUDA device: replaced layers run as torch's own calls, and nothing gets faster")

    if not HAS_TRITON:
        text = "triton cannot be imported: pip install triton" if linux else "triton has no build for this system"
        (problems if cuda else notes).append(f"{text}; without it the kernels do not run on a GPU")
    elif torch.version.hip is None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        for found, missing, package in (
            (c_compiler(), "C compiler (CC, gcc or clang)", "gcc"),
            (python_header(), f"Python.h of {version}", f"python{version}-dev"),
        ):
            if found is None:
                text = f"no {missing}: apt install {package}, or your system's equivalent"
                (problems if cuda else notes).append(f"{text}; Triton compiles its launcher with it on a GPU machine")
    if kernels.INTERPRET and cuda:
        problems.append("TRITON_INTERPRET=1 is set beside a GPU: unset it, or every kernel is interpreted")

    torchvision = next((p.version for p in packages if p.name == "torchvision"), None)
    if linux and torchvision and torch.version.cuda is None and torch.version.hip is None and "+" not in torchvision:
        notes.append(
            f"torchvision {torchvision} looks like a CUDA build beside a CPU build of torch: its import, and so "
            "timm's, may fail; install torchvision from the index that torch came from"
        )
    return notes, problems


def doctor() -> Diagnosis:
    """Look at this machine and this installation.

    Returns:
        Versions, GPUs, how each op runs, optional packages, and what to do about what is missing or broken.
    """
    versions = [
        ("vitfast", __version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", torch.__version__),
        ("triton", _installed("triton", "triton") or "missing"),
        ("ROCm of torch", torch.version.hip)
        if torch.version.hip
        else ("CUDA of torch", torch.version.cuda or "none (CPU build)"),
        ("NVIDIA driver", _driver() or "none"),
        ("C compiler", c_compiler() or "none"),
        ("Python.h", str(python_header() or "none")),
        ("torch threads", str(torch.get_num_threads())),
    ]
    gpus, devices = [], [torch.device("cpu")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            it = torch.cuda.get_device_properties(index)
            gpus.append(Gpu(it.name, f"{it.major}.{it.minor}", it.total_memory, it.multi_processor_count))
        devices.insert(0, torch.device("cuda", 0))
    packages = tuple(
        Package(name, _installed(name, module), purpose, f'pip install "vitfast[{extra}]"{besides}')
        for name, module, purpose, extra, besides in _OPTIONAL
    )
    notes, problems = _findings(packages)
    ops = tuple(op for device in devices for op in how_ops_run(device))
    return Diagnosis(tuple(versions), tuple(gpus), ops, packages, tuple(notes), tuple(problems))
