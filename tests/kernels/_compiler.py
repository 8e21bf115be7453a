"""Compile what an op would launch, for a GPU that is not there.

Triton's own `JITFunction.warmup` does everything of a launch but the launch: it specialises on the arguments (dtype,
divisibility by 16, integers equal to 1) and compiles. It asks the active driver for the target alone, so a driver of
a few lines stands in, arguments live on torch's meta device, and the code under test is the op's own launch code.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from vitfast.kernels import _config

# (target, shared memory that a block may use, in bytes); NVIDIA: CUDA C++ Programming Guide, table of technical
# specifications per compute capability; gfx942: 64 KiB of LDS, AMD CDNA 3 ISA guide
TARGETS: dict[str, tuple[GPUTarget, int]] = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_86": (GPUTarget("cuda", 86, 32), 99 * 1024),
    "sm_89": (GPUTarget("cuda", 89, 32), 99 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "sm_120": (GPUTarget("cuda", 120, 32), 99 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx942": 304}


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel.

    Attributes:
        name: of the kernel function.
        arguments: what the launch passed, by the kernel's parameter names.
        programs: the grid's size.
        ttir: Triton's own representation, before layouts and targets.
        assembly: PTX or AMD GCN text.
        shared: bytes of shared memory a program uses.
        spills: bytes of local memory a thread uses (stack frame; on AMD scratch).
        registers: a thread's.
        cubin: the machine code (empty on AMD).
    """

    name: str
    arguments: dict[str, Any] = field(repr=False)
    programs: int
    ttir: str = field(repr=False)
    assembly: str = field(repr=False)
    shared: int
    spills: int
    registers: int
    cubin: bytes = field(repr=False)


class _Driver:
    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        # keys triton's per-device kernel caches
        return f"{self.target.backend}:{self.target.arch}"

    def get_current_stream(self, device: Any) -> int:
        return 0


def tool(name: str) -> str:
    """Path of one of the CUDA binaries in triton's wheel."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def disassemble(cubin: bytes) -> str:
    """SASS of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run(
            [tool("cuobjdump"), "-sass", str(path)], check=True, capture_output=True, text=True
        ).stdout


def _resources(cubin: bytes) -> tuple[int, int]:
    """`(registers, stack bytes)` of the cubin's kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run(
            [tool("cuobjdump"), "-res-usage", str(path)], check=True, capture_output=True, text=True
        ).stdout
    registers = re.search(r"\bREG:(\d+)", text)
    stack = re.search(r"\bSTACK:(\d+)", text)
    local = re.search(r"\bLOCAL:(\d+)", text)
    assert registers and stack and local, f"cuobjdump -res-usage printed no resources:\n{text}"
    return int(registers[1]), int(stack[1]) + int(local[1])


def _compiled(name: str, kernel: Any, arguments: dict[str, Any], programs: int) -> Compiled:
    launched = (name, arguments, programs, kernel.asm.get("ttir", ""))
    if "cubin" in kernel.asm:
        cubin = kernel.asm["cubin"]
        registers, spills = _resources(cubin)
        return Compiled(*launched, kernel.asm["ptx"], kernel.metadata.shared, spills, registers, cubin)
    text = kernel.asm["amdgcn"]
    scratch = re.search(r"\.private_segment_fixed_size:\s*(\d+)", text)
    registers_used = re.search(r"\.vgpr_count:\s*(\d+)", text)
    assert scratch and registers_used, "no resource metadata in the AMD assembly"
    return Compiled(*launched, text, kernel.metadata.shared, int(scratch[1]), int(registers_used[1]), b"")


@contextmanager
def compiling(target: str, monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> Iterator[list[Compiled]]:
    """Launches of the given kernel files compile for `target` instead; the list fills with what they would run."""
    assert os.environ.get("TRITON_INTERPRET", "0") != "1", "the interpreter replaces the compiler"
    gpu, _ = TARGETS[target]
    compiled: list[Compiled] = []

    def launch(kernel: JITFunction, grid: Any) -> Any:
        def run(**kwargs: Any) -> None:
            arguments = {name: kwargs[name] for name in kernel.arg_names}
            binary = kernel.warmup(grid=grid, **kwargs)
            compiled.append(_compiled(kernel.fn.__name__, binary, arguments, math.prod(grid)))

        return run

    capability = gpu.arch if gpu.backend == "cuda" else 80
    with monkeypatch.context() as patch:
        patch.setattr(driver, "_active", _Driver(gpu))
        patch.setattr(JITFunction, "__getitem__", launch)
        for module in (_config, *modules):
            # stands in for what CUDA would say of the device
            for name, value in (("arch", capability), ("sm_count", MULTIPROCESSORS[target])):
                if hasattr(module, name):
                    patch.setattr(module, name, lambda device, value=value: value)
            for name, function in vars(module).copy().items():
                if hasattr(function, "launch") and hasattr(function, "op"):
                    patch.setattr(module, name, function.launch)
        yield compiled


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")
