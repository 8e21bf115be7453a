"""Launches for a GPU that is not there: Triton's own CUDA driver over a stand-in for CUDA's.

Kernels compile for sm_90, and all that the host does for a launch is done: specialisation, tensor maps, packing of
parameters, the call of the driver. What the driver is given is written down instead of run. Tensors are on CPU.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.backends.nvidia.driver as nvidia
from triton.compiler.compiler import CompiledKernel
from triton.runtime.driver import driver

import vitfast.kernels as kernels
from vitfast.kernels import _config, _launch, _op, _recipe

STREAM = 7
MULTIPROCESSORS = 132

# name, and bytes of each parameter, of what has been loaded
_KNOWN: dict[int, tuple[str, list[int]]] = {}


@dataclass(frozen=True)
class Launch:
    """What the driver is given.

    Attributes:
        kernel: its name.
        sizes: of grid and block, three each, shared memory in bytes, number of attributes.
        stream: CUDA's handle.
        parameters: bytes of each.
    """

    kernel: str
    sizes: tuple[int, ...]
    stream: int
    parameters: tuple[bytes, ...]


def loaded() -> int:
    """Number of compiled kernels that the driver has been given."""
    return len(_KNOWN)


class _Driver(nvidia.CudaDriver):
    def __init__(self) -> None:
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher
        self.get_device_capability = lambda device=None: (9, 0)
        self.get_current_stream = lambda device: STREAM
        self.get_current_device = lambda: -1
        self.set_current_device = lambda device: None


@functools.cache
def _library() -> ctypes.CDLL:
    """The stand-in, built and loaded, so that whoever asks for `libcuda.so.1` in this process gets it."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler, which the stand-in for libcuda and Triton's own driver are built with")
    folder = Path(tempfile.mkdtemp(prefix="vitfast-libcuda-"))
    source, library = Path(__file__).with_name("_libcuda.c"), folder / "libcuda.so.1"
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", f"-I{include}", "-o", library, source]
    subprocess.run([str(part) for part in command], check=True)
    # Triton links its launcher against the one in this folder
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def launch_cpu_tensors(patch: pytest.MonkeyPatch, active: Any, arch: int, multiprocessors: int) -> None:
    """CPU tensors are a GPU's, whose driver for Triton is `active`."""
    patch.setattr(driver, "_active", active)
    for name, module in list(sys.modules.items()):
        if name.startswith("vitfast.kernels"):
            for attribute, value in (("arch", arch), ("sm_count", multiprocessors)):
                if hasattr(module, attribute):
                    patch.setattr(module, attribute, lambda device, value=value: value)
    patch.setattr(_config, "_device_name", lambda device: None)
    # but not by a proof, which computes
    for module in (_op, kernels):
        patch.setattr(module, "interprets", lambda: _op._called() is None)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """A fixture's body: CPU tensors are launched on an H100 that is not there, and launches fill the list."""
    if torch.cuda.is_available():
        pytest.skip("CUDA's own driver is loaded")
    library = _library()
    launches: list[Launch] = []
    init = CompiledKernel._init_handles

    def init_handles(kernel: Any) -> None:
        init(kernel)
        _KNOWN[kernel.function] = kernel.metadata.name, _launch.parameter_sizes(kernel.asm["ptx"])

    @ctypes.CFUNCTYPE(
        None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
    )
    def listener(function: int, sizes: Any, stream: int, parameters: Any) -> None:
        name, lengths = _KNOWN[function]
        packed = tuple(ctypes.string_at(parameters[i], length) for i, length in enumerate(lengths))
        launches.append(Launch(name, tuple(sizes[:8]), stream or 0, packed))

    _launch.forget()
    with monkeypatch.context() as patch:
        patch.setattr(CompiledKernel, "_init_handles", init_handles)
        launch_cpu_tensors(patch, _Driver(), 90, MULTIPROCESSORS)
        patch.setattr(_launch, "current_device", lambda: None)
        patch.setattr(_recipe, "current_stream", lambda index: STREAM)
        library.stand_in_listen(listener)
        yield launches
        library.stand_in_listen(None)
    _launch.forget()
