"""What a prepared launch is: kernels and allocations with everything but the addresses, replayed by CUDA's own driver.

`_launch.py` writes a `Recipe` down; this file knows nothing of Triton but what its compiled kernels take.
"""

from __future__ import annotations

import ctypes
import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# bytes of a pointer and of CUDA's CUtensorMap
POINTER, TENSOR_MAP = 8, 128
# tensor maps, and packed parameters of a kernel, for so many sets of addresses; a forward uses a set for each layer
_ADDRESSES = 512


@functools.cache
def cuda() -> ctypes.CDLL:
    """The driver that Triton loaded."""
    library = ctypes.CDLL("libcuda.so.1")
    unsigned, pointer = ctypes.c_uint, ctypes.c_void_p
    library.cuLaunchKernelEx.argtypes = [pointer, pointer, pointer, pointer]
    library.cuTensorMapEncodeTiled.argtypes = [
        *(pointer, ctypes.c_int, unsigned, pointer, pointer, pointer, pointer, pointer),
        *[ctypes.c_int] * 4,
    ]
    return library


class _Attribute(ctypes.Structure):
    """CUDA's CUlaunchAttribute with a value that is one number."""

    _fields_ = (("id", ctypes.c_uint64), ("value", ctypes.c_uint), ("rest", ctypes.c_uint * 15))


class _Config(ctypes.Structure):
    """CUDA's CUlaunchConfig."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("x", "y", "z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    )


# programmatic stream serialization: the launch may begin before the previous kernel has ended
_EARLY = _Attribute(6, 1)


def _raise(status: int, what: str) -> None:
    text = ctypes.c_char_p()
    cuda().cuGetErrorString(status, ctypes.byref(text))
    raise RuntimeError(f"{what}: CUDA error {status}: {(text.value or b'unknown').decode()}")


@dataclass(frozen=True)
class TensorMap:
    """A tensor map of a kernel: all but the address.

    Attributes:
        shape, strides: of the matrix in elements, the last stride 1.
        block: of a copy.
        element: bytes.
        kind, swizzle: CUDA's numbers.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]
    element: int
    kind: int
    swizzle: int

    @functools.lru_cache(maxsize=_ADDRESSES)  # noqa: B019
    def encoded(self, address: int) -> bytes:
        """The map of a matrix at `address`."""
        rank = len(self.shape)
        # CUDA counts dimensions from the innermost, and strides in bytes without its own
        sizes = (ctypes.c_uint64 * rank)(*reversed(self.shape))
        strides = (ctypes.c_uint64 * rank)(*(self.element * stride for stride in reversed(self.strides[:-1])))
        block = (ctypes.c_uint32 * rank)(*reversed(self.block))
        ones = (ctypes.c_uint32 * rank)(*[1] * rank)
        memory = ctypes.create_string_buffer(TENSOR_MAP + 64)
        start = _aligned(memory)
        # 2: L2 promotion to 128 bytes, as Triton asks for; elements out of bounds are zero
        status = cuda().cuTensorMapEncodeTiled(
            start, self.kind, rank, address, sizes, strides, block, ones, 0, self.swizzle, 2, 0
        )
        if status:
            _raise(status, f"a tensor map of {self.shape} in blocks of {self.block}")
        return ctypes.string_at(start, TENSOR_MAP)


def _aligned(memory: Any) -> int:
    """The first address in a buffer that is a multiple of 64, as tensor maps need."""
    return -(-ctypes.addressof(memory) // 64) * 64


class Kernel:
    """One launch of a recipe: all but the addresses.

    Args:
        name: of the kernel.
        function: CUDA's handle.
        grid: three sizes.
        threads, shared: of a program; shared memory in bytes.
        early: it may be launched before the previous kernel has ended.
        parameters: in order: bytes, `(source, offset)` of a pointer or `(source, offset, map)` of a tensor map, where
            a source is the number of one of the call's tensors or, behind them, of an allocation.
    """

    def __init__(
        self,
        name: str,
        function: int,
        grid: tuple[int, ...],
        threads: int,
        shared: int,
        early: bool,
        parameters: Sequence[Any],
    ) -> None:
        self.name, self.function, self.early, self.sizes = name, function, early, (*grid, threads, 1, 1, shared)
        self.sources = sorted({parameter[0] for parameter in parameters if isinstance(parameter, tuple)})
        self._maps: list[tuple[int, int, int, TensorMap]] = []
        self._pointers: list[tuple[int, int, int]] = []
        self._places: list[int] = []
        self._packed: dict[Any, tuple[int, int, Any]] = {}
        content = bytearray()
        for parameter in parameters:
            is_map = len(parameter) in (3, TENSOR_MAP)
            # tensor maps need a multiple of 64; all else is content with less
            content += bytes(-len(content) % (64 if is_map else 8))
            place = len(content)
            self._places.append(place)
            if isinstance(parameter, bytes):
                content += parameter
                continue
            content += bytes(TENSOR_MAP if is_map else POINTER)
            which = self.sources.index(parameter[0])
            if is_map:
                self._maps.append((place, which, *parameter[1:]))
            else:
                self._pointers.append((place, which, parameter[1]))
        self._content = bytes(content)
        # with one source `itemgetter` would give no tuple
        self._pick = operator.itemgetter(*(self.sources * 2)[: max(2, len(self.sources))]) if self.sources else tuple

    def launch(self, addresses: Sequence[int], stream: int, driver: Callable[..., int]) -> None:
        """Launch with the sources at these addresses."""
        where = self._pick(addresses)
        packed = self._packed.get((stream, where))
        if packed is None:
            packed = self._pack(stream, where)
        if status := driver(packed[0], self.function, packed[1], None):
            _raise(status, f"launching {self.name}")

    def _pack(self, stream: int, where: tuple[int, ...]) -> tuple[int, int, Any]:
        """Addresses of CUDA's launch configuration and of its array of pointers to the parameters; what they are in."""
        memory = ctypes.create_string_buffer(len(self._content) + 64)
        start = _aligned(memory)
        ctypes.memmove(start, self._content, len(self._content))
        for place, which, offset in self._pointers:
            ctypes.c_uint64.from_address(start + place).value = where[which] + offset
        for place, which, offset, tensor_map in self._maps:
            ctypes.memmove(start + place, tensor_map.encoded(where[which] + offset), TENSOR_MAP)
        pointers = (ctypes.c_void_p * len(self._places))(*[start + place for place in self._places])
        if len(self._packed) >= _ADDRESSES:
            self._packed.clear()
        config = _Config(*self.sizes, stream, ctypes.addressof(_EARLY), int(self.early))
        alive = config, pointers, memory
        packed = self._packed[stream, where] = ctypes.addressof(config), ctypes.addressof(pointers), alive
        return packed


class Recipe:
    """What a call with one signature does.

    Args:
        device: of all of it.
        steps: in order, an allocation `(shape, stride, dtype, zeroed)` or a launch.
        outputs: of each result, the number of its allocation and, unless it is that itself, `(size, stride, offset)`;
            None of one that is None.
        single: it returns a tensor, not a tuple of them.
        tensors: how many the call has.
    """

    def __init__(
        self,
        device: torch.device,
        steps: Sequence[Any],
        outputs: Sequence[tuple[int, tuple[Any, Any, int] | None] | None],
        single: bool,
        tensors: int,
    ) -> None:
        self.device, self.outputs, self.single = device, tuple(outputs), single
        self.kernels = [step for step in steps if isinstance(step, Kernel)]
        # memory that no later launch takes, and no result is, goes back after a launch, as it would without a recipe
        last = {source: kernel for kernel in self.kernels for source in kernel.sources}
        kept = {output[0] for output in outputs if output is not None}
        self._steps: list[tuple[Any, Kernel | None, list[int]]] = []
        for step in steps:
            if not isinstance(step, Kernel):
                self._steps.append((step, None, []))
                continue
            done = [s - tensors for s in step.sources if s >= tensors and last[s] is step and s - tensors not in kept]
            self._steps.append((None, step, done))

    def __call__(self, addresses: list[int]) -> Any:
        """Allocate and launch on the current stream.

        Args:
            addresses: of the call's tensors, in order; this call adds to them.
        """
        device = self.device
        made: list[Any] = []
        stream, driver = current_stream(device.index), cuda().cuLaunchKernelEx
        for allocation, kernel, done in self._steps:
            if kernel is None:
                shape, stride, dtype, zeroed = allocation
                if zeroed:
                    tensor = torch.zeros(shape, dtype=dtype, device=device)
                else:
                    tensor = empty(shape, stride, dtype, device)
                made.append(tensor)
                addresses.append(tensor.data_ptr())
            else:
                kernel.launch(addresses, stream, driver)
                for number in done:
                    made[number] = None
        outputs: list[Any] = []
        for output in self.outputs:
            if output is None:
                outputs.append(None)
            else:
                number, view = output
                outputs.append(made[number] if view is None else made[number].as_strided(*view))
        return outputs[0] if self.single else tuple(outputs)


def empty(shape: Any, stride: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty_strided`."""
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def current_stream(index: int) -> int:
    """CUDA's handle of torch's current stream on a device."""
    return torch._C._cuda_getCurrentRawStream(index)
