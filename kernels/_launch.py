"""Launches that are prepared once: the only file that knows how Triton's compiled kernels take their arguments.

An op's launch code computes strides, tiles, flags and descriptors from its arguments, and Triton then specialises on
them again: more host time than the kernel itself needs on a small batch. All of it follows from the arguments' sizes,
strides, dtypes and alignment. So the first call with a signature runs that code and writes down what it does: which
tensors it allocates, which kernels it launches with which numbers, and from which tensor each pointer comes
(`recording`). Later calls do just that (`Recipe.__call__`), with CUDA's own `cuLaunchKernel`. What a recording cannot
describe (a copy, a GEMM of torch's, a kernel whose parameters are not as expected) is never prepared, and runs its own
code each time.
"""

from __future__ import annotations

import ctypes
import functools
import operator
import re
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ._triton import HAS_TRITON

if HAS_TRITON:
    from triton import knobs

# bytes of what a kernel's parameter may be, and how `struct` writes it; of all others nothing is prepared
_SCALARS = {"i32": "<i", "u32": "<I", "i64": "<q", "u64": "<Q", "fp32": "<f", "f32": "<f"}
_POINTER, _TENSOR_MAP = 8, 128
# Triton's number of an element type in a compiled kernel's `tensordesc_meta`, and CUDA's CUtensorMapDataType
_MAP_TYPES = {6: 6, 7: 7, 8: 10, 9: 8, 10: 9}
# signatures with a recipe, and for each of them sets of addresses with packed parameters; a forward uses a set for each
# layer
_SIGNATURES = 4096
_ADDRESSES = 512

_PREPARES = HAS_TRITON and torch.version.hip is None

_thread = threading.local()


class _Unknown:
    """In place of the recipe of a signature that has not been seen."""


class _Impossible(Exception):
    """A launch that cannot be prepared."""


@functools.cache
def _cuda() -> ctypes.CDLL:
    """The driver that Triton loaded."""
    library = ctypes.CDLL("libcuda.so.1")
    unsigned, pointer = ctypes.c_uint, ctypes.c_void_p
    library.cuLaunchKernel.argtypes = [pointer, *[unsigned] * 7, pointer, pointer, pointer]
    library.cuTensorMapEncodeTiled.argtypes = [
        *(pointer, ctypes.c_int, unsigned, pointer, pointer, pointer, pointer, pointer),
        *[ctypes.c_int] * 4,
    ]
    return library


def _raise(status: int, what: str) -> None:
    text = ctypes.c_char_p()
    _cuda().cuGetErrorString(status, ctypes.byref(text))
    raise RuntimeError(f"{what}: CUDA error {status}: {(text.value or b'unknown').decode()}")


@dataclass(frozen=True)
class _Map:
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
        memory = ctypes.create_string_buffer(_TENSOR_MAP + 64)
        start = _aligned(memory)
        # 2: L2 promotion to 128 bytes, as Triton asks for; elements out of bounds are zero
        status = _cuda().cuTensorMapEncodeTiled(
            start, self.kind, rank, address, sizes, strides, block, ones, 0, self.swizzle, 2, 0
        )
        if status:
            _raise(status, f"a tensor map of {self.shape} in blocks of {self.block}")
        return ctypes.string_at(start, _TENSOR_MAP)


def _aligned(memory: Any) -> int:
    """The first address in a buffer that is a multiple of 64, as tensor maps need."""
    return -(-ctypes.addressof(memory) // 64) * 64


class _Kernel:
    """One launch of a recipe: all but the addresses.

    Args:
        name: of the kernel.
        function: CUDA's handle.
        grid: three sizes.
        threads, shared: of a program; shared memory in bytes.
        parameters: in order: bytes, `(source, offset)` of a pointer or `(source, offset, map)` of a tensor map, where
            a source is the number of one of the call's tensors or, behind them, of an allocation.
    """

    def __init__(
        self, name: str, function: int, grid: tuple[int, ...], threads: int, shared: int, parameters: Sequence[Any]
    ) -> None:
        self.name, self.function, self.sizes = name, function, (*grid, threads, 1, 1, shared)
        self.sources = sorted({parameter[0] for parameter in parameters if isinstance(parameter, tuple)})
        self._maps: list[tuple[int, int, int, _Map]] = []
        self._pointers: list[tuple[int, int, int]] = []
        self._places: list[int] = []
        self._packed: dict[Any, tuple[int, Any, Any]] = {}
        content = bytearray()
        for parameter in parameters:
            is_map = len(parameter) in (3, _TENSOR_MAP)
            # tensor maps need a multiple of 64; all else is content with less
            content += bytes(-len(content) % (64 if is_map else 8))
            place = len(content)
            self._places.append(place)
            if isinstance(parameter, bytes):
                content += parameter
                continue
            content += bytes(_TENSOR_MAP if is_map else _POINTER)
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
        packed = self._packed.get(where)
        if packed is None:
            packed = self._pack(where)
        if status := driver(self.function, *self.sizes, stream, packed[0], None):
            _raise(status, f"launching {self.name}")

    def _pack(self, where: tuple[int, ...]) -> tuple[int, Any, Any]:
        """The address of CUDA's array of pointers to the parameters, the array, and the memory they point into."""
        memory = ctypes.create_string_buffer(len(self._content) + 64)
        start = _aligned(memory)
        ctypes.memmove(start, self._content, len(self._content))
        for place, which, offset in self._pointers:
            ctypes.c_uint64.from_address(start + place).value = where[which] + offset
        for place, which, offset, tensor_map in self._maps:
            ctypes.memmove(start + place, tensor_map.encoded(where[which] + offset), _TENSOR_MAP)
        pointers = (ctypes.c_void_p * len(self._places))(*[start + place for place in self._places])
        if len(self._packed) >= _ADDRESSES:
            self._packed.clear()
        # the last two stand there so that they live as long
        packed = self._packed[where] = ctypes.addressof(pointers), pointers, memory
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
        self.kernels = [step for step in steps if isinstance(step, _Kernel)]
        # memory that no later launch takes, and no result is, goes back after a launch, as it would without a recipe
        last = {source: kernel for kernel in self.kernels for source in kernel.sources}
        kept = {output[0] for output in outputs if output is not None}
        self._steps: list[tuple[Any, _Kernel | None, list[int]]] = []
        for step in steps:
            if not isinstance(step, _Kernel):
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
        stream, driver = current_stream(device.index), _cuda().cuLaunchKernel
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


def current_device() -> int:
    """Number of torch's current device."""
    return torch._C._cuda_getDevice()


def observed() -> bool:
    """Whether somebody listens to Triton's launches, a profiler say. Those go through Triton then."""
    return bool(knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls)


def _extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if not tensor.numel():
        return 0
    return tensor.element_size() * (1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)))


class _Recorder(TorchDispatchMode):
    """Sees what a launch function does with torch, and is told of its launches."""

    def __init__(self, tensors: Sequence[Tensor], constants: Sequence[Tensor]) -> None:
        super().__init__()
        self.arguments = [tensor.data_ptr() for tensor in tensors]
        self.ends = [tensor.data_ptr() + _extent(tensor) for tensor in tensors]
        self.constants = [(tensor.data_ptr(), tensor.data_ptr() + _extent(tensor)) for tensor in constants]
        self.made: list[Tensor] = []
        self.steps: list[Any] = []
        self.possible = len(set(self.arguments)) == len(self.arguments)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name, returns = func._schema.name, func._schema.returns
        if name in ("aten::empty", "aten::empty_like", "aten::zeros") and out.is_contiguous():
            self.made.append(out)
            self.steps.append((tuple(out.shape), out.stride(), out.dtype, name == "aten::zeros"))
        # else it is a view, or has nothing to do with tensors, such as the promotion of dtypes
        elif not (returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)) and (
            isinstance(out, Tensor) or any(isinstance(value, Tensor) for value in args)
        ):
            self.possible = False
        return out

    def pointer(self, tensor: Tensor) -> tuple[int, ...]:
        """`(number, offset)`: which of the call's tensors, or behind them of the allocations, a tensor's memory is.

        Or `(address,)`: it is a constant's.

        Raises:
            _Impossible: neither.
        """
        address = tensor.data_ptr()
        for i, made in enumerate(self.made):
            start = made.data_ptr()
            if start <= address < start + _extent(made):
                return len(self.arguments) + i, address - start
        if address in self.arguments:
            return self.arguments.index(address), 0
        if any(start <= address < end for start, end in self.constants):
            return (address,)
        # views of one memory may contain each other's
        within = [i for i, end in enumerate(self.ends) if self.arguments[i] <= address < end]
        if len(within) != 1:
            raise _Impossible
        return within[0], address - self.arguments[within[0]]

    def output(self, out: Any) -> tuple[int, tuple[Any, Any, int] | None] | None:
        """The number of a result's allocation and how it is seen, None for as it is; None where it is of another."""
        for i, made in enumerate(self.made if isinstance(out, Tensor) else ()):
            if out.dtype == made.dtype and out.untyped_storage()._cdata == made.untyped_storage()._cdata:
                same = out.shape == made.shape and out.stride() == made.stride() and not out.storage_offset()
                return i, None if same else (tuple(out.shape), out.stride(), out.storage_offset())
        return None

    def launched(self, compiled: Any, grid: Sequence[int], arguments: dict[str, Any]) -> None:
        """Write down a launch that has just been made."""
        if self.possible:
            try:
                self.steps.append(self._kernel(compiled, grid, arguments))
            except _Impossible:
                self.possible = False

    def _kernel(self, compiled: Any, grid: Sequence[int], arguments: dict[str, Any]) -> _Kernel:
        metadata = compiled.metadata
        plain = ("num_ctas", 1), ("launch_cooperative_grid", False), ("launch_pdl", False)
        scratch = ("global_scratch_size", 0), ("profile_scratch_size", 0)
        if any(getattr(metadata, name, value) != value for name, value in plain + scratch):
            raise _Impossible
        maps = list(getattr(metadata, "tensordesc_meta", None) or ())
        parameters: list[Any] = []
        sizes: list[int] = []
        for name, kind in compiled.src.signature.items():
            value = arguments[name]
            if kind == "constexpr":
                continue
            if kind.startswith("*"):
                where = self.pointer(value)
                parameters.append(where if len(where) == 2 else struct.pack("<Q", *where))
                sizes.append(_POINTER)
            elif kind.startswith("tensordesc"):
                if not maps or not maps[0] or value.padding != "zero":
                    raise _Impossible
                where, tensor_map = self.pointer(value.base), _map(maps.pop(0), value)
                parameters.append((*where, tensor_map) if len(where) == 2 else tensor_map.encoded(*where))
                parameters += [struct.pack("<i", size) for size in value.shape]
                parameters += [struct.pack("<q", stride) for stride in value.strides]
                sizes += [_TENSOR_MAP, *[4] * len(value.shape), *[8] * len(value.strides)]
            elif kind in _SCALARS:
                parameters.append(struct.pack(_SCALARS[kind], value))
                sizes.append(len(parameters[-1]))
            else:
                raise _Impossible
        # Triton's scratch memory, of which these kernels have none
        parameters += [bytes(_POINTER), bytes(_POINTER)]
        if parameter_sizes(compiled.asm["ptx"]) != [*sizes, _POINTER, _POINTER]:
            raise _Impossible
        num_warps, _, shared = compiled.packed_metadata
        whole = (*grid, 1, 1)[:3]
        return _Kernel(metadata.name, compiled.function, whole, 32 * num_warps, shared, parameters)


def _map(meta: dict[str, Any], descriptor: Any) -> _Map:
    kind = _MAP_TYPES.get(meta["elem_type"])
    if kind is None or meta["fp4_padded"] or meta.get("is_im2col"):
        raise _Impossible
    shape, strides, block = map(tuple, (descriptor.shape, descriptor.strides, meta["block_size"]))
    return _Map(shape, strides, block, meta["elem_size"], kind, meta["swizzle"])


def parameter_sizes(ptx: str) -> list[int]:
    """Bytes of each parameter of the kernel in a PTX text."""
    entry = re.search(r"\.entry\s+\w+\s*\((.*?)\)", ptx, re.DOTALL)
    found = re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.[a-z]+(\d+)[^,\[]*(?:\[(\d+)\])?", entry[1] if entry else "")
    return [int(bits) // 8 * int(count or 1) for bits, count in found]


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch a Triton kernel on the current device and stream.

    Args:
        kernel: a function under `triton.jit` or `gluon.jit`.
        grid: up to three numbers of programs.
        arguments: the kernel's, and Triton's options.
    """
    compiled = kernel[grid](**arguments)
    recorder = getattr(_thread, "recorder", None)
    if recorder is not None:
        recorder.launched(compiled, grid, arguments)


Recipes = dict[tuple[Any, ...], Any]
"""Of each signature the recipe, or None where there cannot be one."""

_recipes: Recipes = {}
_era = 0


def forget() -> None:
    """Prepare every launch anew, as after configs have changed."""
    global _era
    _era += 1
    _recipes.clear()


def recorded() -> bool:
    """Whether this thread is writing down what a call does."""
    return getattr(_thread, "recorder", None) is not None


def prepared(
    function: Callable[..., Any],
    args: Sequence[Any],
    key: tuple[Any, ...],
    addresses: list[int],
    recipes: Recipes = _recipes,
    constants: Callable[[], Sequence[Tensor]] = tuple,
) -> Any:
    """Call a function that launches kernels, by its recipe from the second call with a signature on.

    Args:
        function: what a recipe is made of.
        args: its arguments, the first of which is a tensor.
        key: all that its result follows from, but the numbers in its tensors.
        addresses: of its tensors.
        recipes: where recipes are kept.
        constants: gives further tensors that it reads. They stay in their place for as long as the recipes are kept.
    """
    device = args[0].device
    if not _PREPARES or observed():
        return function(*args)
    key = (_era, *key)
    recipe = recipes.get(key, _Unknown)
    if recipe is None:
        return function(*args)
    known = _threads_devices()
    if recipe is not _Unknown and device.index in known:
        if device.index == current_device():
            return recipe(addresses)
        with torch.cuda.device(device):
            return recipe(addresses)
    # a thread's first launch on a device is Triton's, which makes CUDA's context current there
    result, recipe = recording(function, args, constants())
    if len(recipes) >= _SIGNATURES:
        recipes.clear()
    recipes[key] = recipe
    known.add(device.index)
    return result


def _threads_devices() -> set[int]:
    """Devices on which this thread has launched."""
    known: set[int] | None = getattr(_thread, "devices", None)
    if known is None:
        known = _thread.devices = set()
    return known


def recording(
    function: Callable[..., Any], args: Sequence[Any], constants: Sequence[Tensor]
) -> tuple[Any, Recipe | None]:
    """Call a function, and write down what it does.

    Returns:
        Its result, and the recipe; None where there cannot be one.
    """
    tensors = [value for value in args if isinstance(value, Tensor)]
    recorder = _Recorder(tensors, constants)
    _thread.recorder = recorder
    try:
        with recorder:
            result = function(*args)
    finally:
        _thread.recorder = None
    single = isinstance(result, Tensor)
    outputs = []
    for out in (result,) if single else result:
        view = recorder.output(out) if recorder.possible and out is not None else None
        if view is None and (out is not None or not recorder.possible):
            return result, None
        outputs.append(view)
    return result, Recipe(tensors[0].device, recorder.steps, outputs, single, len(tensors))
