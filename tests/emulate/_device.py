"""Launches on a GPU that is not there: Triton compiles for it, and the emulator runs the PTX on CPU tensors.

All that is adversarial is drawn from a seed: how warps are interleaved, when copies land and products are computed,
the order of programs, the lane that `elect.sync` elects. Shared memory and registers start as NaN. Accesses of global
memory are held to the allocations of the launch's tensors.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler.compiler import CompiledKernel
from triton.runtime.errors import OutOfResources

from tests.emulate._library import library
from tests.emulate._ptx import Kernel, address, parse
from tests.kernels._compiler import TARGETS
from tests.kernels._stand_in import launch_cpu_tensors
from vitfast.kernels import _launch

# cta.h's TMap
_MAGIC = 0x50414D414D545845
# programs of more warp instructions are taken for endless
_MOST_STEPS = 50_000_000
_WIDEST_ROW = {0: 1 << 30, 1: 32, 2: 64, 3: 128}
_PACK = {"i1": "<b", "i8": "<b", "i32": "<i", "i64": "<q", "u32": "<I", "u64": "<Q", "fp32": "<f"}


_present: list[Device] = []


class EmulationError(RuntimeError):
    """A kernel did what it must not: out of bounds, a deadlock, the misuse of an instruction."""


@dataclass
class Device:
    """How kernels run, and what they did.

    Attributes:
        seed: of every choice.
        change: PTX of a kernel by its name to other PTX, to plant faults.
        steps: the most warp instructions of a program.
        ran: names of the kernels that ran.
        reports: races, missing fences and the like, each once.
    """

    seed: int = 0
    change: Callable[[str, str], str] | None = None
    steps: int = _MOST_STEPS
    ran: list[str] = field(default_factory=list)
    reports: list[str] = field(default_factory=list)
    programs: dict[str, Kernel] = field(default_factory=dict)

    def run(
        self,
        text: str,
        metadata: Any,
        grid: tuple[int, int, int],
        values: list[bytes],
        allocations: set[tuple[int, int]],
    ) -> None:
        """Run a kernel.

        Args:
            text: its PTX.
            metadata: Triton's.
            grid: numbers of programs.
            values: bytes of each parameter but Triton's two scratch pointers, which are null.
            allocations: first byte and end of what it may touch.

        Raises:
            EmulationError: it did what it must not.
        """
        name = metadata.name
        text = text if self.change is None else self.change(name, text)
        if text not in self.programs:
            self.programs[text] = parse(text)
        kernel = self.programs[text]
        if getattr(metadata, "global_scratch_size", 0):
            raise EmulationError(f"{name}: the emulator has no scratch memory")
        memory = ctypes.create_string_buffer(kernel.param_bytes + 256)
        start = -(-ctypes.addressof(memory) // 128) * 128
        assert len(values) == len(kernel.params) - 2, f"{name}: {len(kernel.params)} parameters, {len(values)} values"
        for (parameter, at, size, _), value in zip(kernel.params, values, strict=False):
            assert len(value) == size, f"{name}: {parameter} has {size} bytes, {len(value)} were given"
            ctypes.memmove(start + at, value, size)
        choices = np.random.default_rng(self.seed)
        order = choices.permutation(grid[0] * grid[1] * grid[2]).astype(np.uint32)
        # how likely what is asynchronous happens before something waits for it
        early = (0.0, 0.02, 0.2, 0.8)[int(choices.integers(4))]
        ranges = np.array(sorted(allocations) or [(0, 0)], np.uint64)
        statistics, out = np.zeros(8, np.uint64), ctypes.create_string_buffer(1 << 17)
        failed = library().emu_run(
            ctypes.c_void_p(kernel.program),
            int(metadata.launch_pdl),
            ctypes.c_uint64(self.seed * 1000003 + 17),
            1,
            ctypes.c_double(early),
            8,
            -1,
            ctypes.c_uint64(self.steps),
            ctypes.c_uint32(metadata.shared),
            kernel.threads,
            address(np.array(grid, np.uint32)),
            address(order),
            len(order),
            address(ranges),
            len(ranges),
            ctypes.c_void_p(start),
            address(statistics),
            out,
            len(out),
        )
        self.ran.append(name)
        message = []
        for line in out.value.decode(errors="replace").splitlines():
            if found := re.match(r"(-?\d+) (-?\d+) (.*)", line):
                at, other = int(found[1]), int(found[2])
                after = f"; after {kernel.where(other)}" if other >= 0 else ""
                report = f"{name}: {found[3]} at {kernel.where(at)}{after}"
                if report not in self.reports:
                    self.reports.append(report)
            else:
                message.append(line)
        if failed:
            places = [kernel.where(int(at)) for at in dict.fromkeys(re.findall(r"pc (\d+)", "\n".join(message)))]
            raise EmulationError("\n".join((f"{name}, seed {self.seed}:", *message, *places)))


def _tensor_map(descriptor: Any, meta: dict[str, Any]) -> bytes:
    """128 bytes as cta.h's TMap, by the rules of CUDA's cuTensorMapEncodeTiled."""
    assert not meta["fp4_padded"] and descriptor.padding == "zero"
    element, swizzle = meta["elem_size"], meta["swizzle"]
    base = descriptor.base.data_ptr()
    shape, block = [int(n) for n in reversed(descriptor.shape)], [int(n) for n in reversed(meta["block_size"])]
    strides = [int(s) * element for s in reversed(descriptor.strides)][1:]
    if base % 16 or any(stride % 16 for stride in strides):
        raise EmulationError(f"a tensor map at {base:#x} with strides of {strides} bytes: no multiples of 16")
    row = block[0] * element
    if any(not 0 < n <= 256 for n in block) or row % 16 or row > _WIDEST_ROW[swizzle]:
        raise EmulationError(f"a tensor map with a box of {block} elements of {element} bytes, swizzle {swizzle}")
    shape, block = ([*sizes, *[0] * (5 - len(sizes))] for sizes in (shape, block))
    strides += [0] * (4 - len(strides))
    rank = len(descriptor.shape)
    head = (_MAGIC, base, rank, element, meta["elem_type"], swizzle, 0, 0)
    return struct.pack("<QQ6i5I5I4Q", *head, *shape, *block, *strides).ljust(128, b"\0")


class _Launcher:
    """In place of what Triton compiles to launch a kernel."""

    def __init__(self, kernel: CompiledKernel) -> None:
        self.metadata, self.text = kernel.metadata, kernel.asm["ptx"]
        self.signature = kernel.src.signature

    def __call__(self, x: int, y: int, z: int, *arguments: Any) -> None:
        # behind the grid: stream, function, two metadata, two hooks
        values: list[bytes] = []
        allocations: set[tuple[int, int]] = set()
        maps = iter(self.metadata.tensordesc_meta or ())

        def touch(tensor: torch.Tensor) -> None:
            storage = tensor.untyped_storage()
            allocations.add((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))

        for kind, value in zip(self.signature.values(), arguments[6:], strict=True):
            if kind == "constexpr":
                continue
            if kind.startswith("tensordesc"):
                touch(value.base)
                values.append(_tensor_map(value, next(maps)))
                values += [struct.pack("<i", n) for n in value.shape] + [struct.pack("<q", n) for n in value.strides]
            elif kind.startswith("*"):
                touch(value)
                values.append(struct.pack("<Q", value.data_ptr()))
            else:
                values.append(struct.pack(_PACK[kind], value))
        # Triton keeps its compiled kernels for longer than a device is there
        _present[-1].run(self.text, self.metadata, (x, y, z), values, allocations)


class _Driver:
    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        # keys Triton's caches of loaded kernels
        return f"emulated {self.target.arch}"

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        return divmod(self.target.arch, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return nvidia.ty_to_cpp(kind)


@contextmanager
def emulated(target: str = "sm_90", multiprocessors: int = 3) -> Iterator[Device]:
    """While open, ops launch CPU tensors on an emulated GPU.

    Args:
        target: one of NVIDIA's `TARGETS`.
        multiprocessors: few, so that persistent programs walk over several tiles.
    """
    library()
    gpu, limit = TARGETS[target]
    device = Device()

    def init_handles(kernel: CompiledKernel) -> None:
        if kernel.metadata.shared > limit:
            raise OutOfResources(kernel.metadata.shared, limit, "shared memory")
        kernel._run = _Launcher(kernel)
        kernel.module = kernel.function = 1
        kernel.n_regs = kernel.n_spills = 0

    _present.append(device)
    _launch.forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompiledKernel, "_init_handles", init_handles)
        launch_cpu_tensors(patch, _Driver(gpu), gpu.arch, multiprocessors)
        patch.setattr(_launch, "_PREPARES", False)
        yield device
    _launch.forget()
    _present.remove(device)
