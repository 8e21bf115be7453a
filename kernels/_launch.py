"""Launches that are prepared once: the only file that knows how Triton's compiled kernels take their arguments.

An op's launch code computes strides, tiles, flags and descriptors from its arguments, and Triton then specialises on
them again: more host time than the kernel itself needs on a small batch. All of it follows from the arguments' sizes,
strides, dtypes and alignment. So the first call with a signature runs that code and writes down what it does: which
tensors it allocates, which kernels it launches with which numbers, and from which tensor each pointer comes
(`recording`). Later calls do just that (`Recipe.__call__`), with CUDA's own `cuLaunchKernelEx`. What a recording cannot
describe (a copy, a GEMM of torch's, a kernel whose parameters are not as expected) is never prepared, and runs its own
code each time.
"""

from __future__ import annotations

import re
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ._recipe import POINTER, TENSOR_MAP, Kernel, Recipe, TensorMap
from ._triton import HAS_TRITON

if HAS_TRITON:
    from triton import knobs

# bytes of what a kernel's parameter may be, and how `struct` writes it; of all others nothing is prepared
_SCALARS = {"i32": "<i", "u32": "<I", "i64": "<q", "u64": "<Q", "fp32": "<f"}
# Triton's number of an element type in a compiled kernel's `tensordesc_meta`, and CUDA's CUtensorMapDataType
_MAP_TYPES = {6: 6, 7: 7, 8: 10, 9: 8, 10: 9}
# so many signatures have a recipe at once
_SIGNATURES = 4096

_PREPARES = HAS_TRITON and torch.version.hip is None

_thread = threading.local()


class _Unknown:
    """In place of the recipe of a signature that has not been seen."""


class _Impossible(Exception):
    """A launch that cannot be prepared."""


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
        elif func._schema.is_mutable or (
            # neither a view nor free of tensors, as the promotion of dtypes is
            not (returns and all(r.alias_info is not None for r in returns))
            and (isinstance(out, Tensor) or any(isinstance(value, Tensor) for value in args))
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

    def _kernel(self, compiled: Any, grid: Sequence[int], arguments: dict[str, Any]) -> Kernel:
        metadata = compiled.metadata
        plain = ("num_ctas", 1), ("launch_cooperative_grid", False)
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
                sizes.append(POINTER)
            elif kind.startswith("tensordesc"):
                if not maps or not maps[0] or value.padding != "zero":
                    raise _Impossible
                where, tensor_map = self.pointer(value.base), _map(maps.pop(0), value)
                parameters.append((*where, tensor_map) if len(where) == 2 else tensor_map.encoded(*where))
                parameters += [struct.pack("<i", size) for size in value.shape]
                parameters += [struct.pack("<q", stride) for stride in value.strides]
                sizes += [TENSOR_MAP, *[4] * len(value.shape), *[8] * len(value.strides)]
            elif kind in _SCALARS:
                parameters.append(struct.pack(_SCALARS[kind], value))
                sizes.append(len(parameters[-1]))
            else:
                raise _Impossible
        # Triton's scratch memory, of which these kernels have none
        parameters += [bytes(POINTER), bytes(POINTER)]
        if parameter_sizes(compiled.asm["ptx"]) != [*sizes, POINTER, POINTER]:
            raise _Impossible
        num_warps, _, shared = compiled.packed_metadata
        whole = (*grid, 1, 1)[:3]
        return Kernel(metadata.name, compiled.function, whole, 32 * num_warps, shared, metadata.launch_pdl, parameters)


def _map(meta: dict[str, Any], descriptor: Any) -> TensorMap:
    kind = _MAP_TYPES.get(meta["elem_type"])
    if kind is None or meta["fp4_padded"] or meta.get("is_im2col"):
        raise _Impossible
    shape, strides, block = map(tuple, (descriptor.shape, descriptor.strides, meta["block_size"]))
    return TensorMap(shape, strides, block, meta["elem_size"], kind, meta["swizzle"])


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
    if arguments.get("EARLY"):
        arguments["launch_pdl"] = True
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
