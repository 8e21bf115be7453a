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
from dataclasses import dataclass
from pathlib import Path

import torch

from . import __version__, kernels
from .kernels import _config
from .kernels._triton import HAS_TRITON

# distribution, module, what vitfast has from it, how to get it
_OPTIONAL = (
    ("timm", "timm", "its Vision Transformers can be accelerated", 'pip install "vitfast[timm]"'),
    (
        "transformers",
        "transformers",
        'its vision models can be accelerated; attn_implementation="vitfast"',
        'pip install "vitfast[transformers]"',
    ),
    (
        "torchvision",
        "torchvision",
        "its ViT and Swin can be accelerated; timm imports it",
        'pip install "vitfast[torchvision]", of the same build as torch',
    ),
    ("open_clip_torch", "open_clip", "its vision towers can be accelerated", 'pip install "vitfast[open-clip]"'),
    ("matplotlib", "matplotlib", "carries the demo's photograph", 'pip install "vitfast[dev]", or demo --image FILE'),
    (
        "flash-attn",
        "flash_attn",
        'accelerate(attention="flash_attn"); to compare with',
        'pip install "vitfast[flash-attn]", beside a CUDA build of torch',
    ),
    (
        "xformers",
        "xformers",
        'accelerate(attention="xformers"); to compare with',
        'pip install "vitfast[xformers]", beside a CUDA build of torch',
    ),
)

_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Gpu:
    """One CUDA device.

    Attributes:
        name: as CUDA has it.
        capability: such as "9.0".
        memory: in bytes.
        multiprocessors: their number.
    """

    name: str
    capability: str
    memory: int
    multiprocessors: int


@dataclass(frozen=True)
class Op:
    """How one op runs.

    Attributes:
        name: in `vitfast.kernels`.
        device: "cpu" or "cuda:0", ...
        how: in words.
    """

    name: str
    device: str
    how: str


@dataclass(frozen=True)
class Package:
    """An optional package.

    Attributes:
        name: of the distribution.
        version: installed one, None where there is none.
        purpose: what vitfast has from it.
        remedy: how to install it.
    """

    name: str
    version: str | None
    purpose: str
    remedy: str


@dataclass(frozen=True)
class Diagnosis:
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
        lines = ["versions", *_table([[name, version] for name, version in self.versions])]
        lines += ["", "GPUs"]
        gpus = [
            [g.name, f"capability {g.capability}", f"{g.memory / 2**30:.0f} GiB", f"{g.multiprocessors} SMs"]
            for g in self.gpus
        ]
        lines += _table(gpus) or ["  none that torch sees"]
        lines += ["", "how the kernels run here", *_table([[op.name, op.device, op.how] for op in self.ops])]
        lines += ["", "optional packages"]
        lines += _table(
            [
                [package.name, package.version or "missing", package.purpose if package.version else package.remedy]
                for package in self.packages
            ]
        )
        lines += [""] + [f"note: {note}" for note in self.notes]
        lines += [f"problem: {problem}" for problem in self.problems]
        lines.append("nothing is broken" if self.ok else f"{len(self.problems)} broken")
        return "\n".join(lines)


def _table(rows: list[list[str]]) -> list[str]:
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


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
    """How each op runs on a device, from the kernels' own conditions.

    Args:
        device: "cpu" or a CUDA device.
    """
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
        missing = []
        if c_compiler() is None:
            missing.append("no C compiler (CC, gcc or clang): apt install gcc, or your system's equivalent")
        if python_header() is None:
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            missing.append(f"no Python.h of {version}: apt install python{version}-dev, or your system's equivalent")
        for text in missing:
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
        ("CUDA of torch", torch.version.cuda or "none (CPU build)"),
        ("NVIDIA driver", _driver() or "none"),
        ("C compiler", c_compiler() or "none"),
        ("Python.h", str(python_header() or "none")),
        ("torch threads", str(torch.get_num_threads())),
    ]
    if torch.version.hip:
        versions[4] = ("ROCm of torch", torch.version.hip)
    gpus, devices = [], [torch.device("cpu")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            seen = torch.cuda.get_device_properties(index)
            gpus.append(Gpu(seen.name, f"{seen.major}.{seen.minor}", seen.total_memory, seen.multi_processor_count))
        devices.insert(0, torch.device("cuda", 0))
    packages = tuple(
        Package(name, _installed(name, module), purpose, remedy) for name, module, purpose, remedy in _OPTIONAL
    )
    notes, problems = _findings(packages)
    ops = tuple(op for device in devices for op in how_ops_run(device))
    return Diagnosis(tuple(versions), tuple(gpus), ops, packages, tuple(notes), tuple(problems))
