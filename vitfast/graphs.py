"""CUDA graphs of a model's whole forward: captured when a batch size comes again, replayed, given up when stale.

`accelerate(model, cuda_graph=True)` puts a `Graphs` where `Module.compile` puts its function, so `model(x)` goes
through it and the model stays the same object. A replay costs one launch instead of one per kernel, which is what small
batches wait for. What a replay cannot stand for takes the plain path: gradients, train mode, hooks, keywords, tracing.

A graph holds addresses and the choices that Python made during the capture. Both are checked at every call: what could
make a replay read freed memory, before the launch; everything else while the device works, and then the outcome is
thrown away and computed again where the model turns out to be another one. So the check's cost is hidden.

Graphs of one model share a memory pool, since only one of them runs at a time: memory is that of the largest, not the
sum. The order is kept by a lock between threads and by an event between streams.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.parameter import Buffer, Parameter
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from . import kernels

# where a model keeps what `restore` undoes, these graphs too
STATE = "_vitfast_state"
# what the graphs of one model may keep of the device's memory, in MiB
DEFAULT_MIB = 2048
# graphs, and sizes seen once, that are remembered
MAX_ENTRIES = 64
# a model that changes before its graphs paid off, or fails to be captured, so many times in a row is left alone
MAX_FRUITLESS = 8
MAX_FAILURES = 4
# replays that pay for a capture and its warm-up
WORTHWHILE = 8
WARM_UP = 2

# one capture at a time in a process; a model in a model is captured as a part of the outer one
_capturing = threading.Lock()
_thread = threading.local()


@dataclass(frozen=True)
class Captured:
    """A graph: `replay()` computes `outputs` from what lies in `static`, into the same memory each time."""

    static: Tensor
    outputs: Any
    replay: Callable[[], None]


class Cuda:
    """The calls to CUDA. Tests put an emulation in its place."""

    def accepts(self, x: Tensor) -> bool:
        """Whether a forward of this tensor can be a graph."""
        # inside somebody else's capture the forward becomes part of theirs
        return x.is_cuda and not torch.cuda.is_current_stream_capturing()

    def stream(self, device: torch.device) -> Any:
        """The caller's stream."""
        return torch.cuda.current_stream(device)

    def event(self) -> Any:
        """An event to order streams by."""
        return torch.cuda.Event()

    def pool(self) -> Any:
        """A handle of a memory pool that graphs share."""
        return torch.cuda.graph_pool_handle()

    def pool_bytes(self, pool: Any) -> int:
        """Device memory that a pool holds."""
        return sum(segment["total_size"] for segment in torch.cuda.memory_snapshot(pool))

    def warm_up(self, function: Callable[[Tensor], Any], sample: Tensor) -> None:
        """Let `function` compile and allocate what it will, on the stream that `capture` takes next."""
        with torch.cuda.device(sample.device):
            stream, self._side = torch.cuda.current_stream(), torch.cuda.Stream()
            self._side.wait_stream(stream)
            try:
                with torch.cuda.stream(self._side):
                    for _ in range(WARM_UP):
                        function(sample)
            finally:
                stream.wait_stream(self._side)

    def capture(self, function: Callable[[Tensor], Any], sample: Tensor, pool: Any) -> Captured:
        """Capture `function` of a tensor like `sample`."""
        first: Exception | None = None
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph stays on its stream where a capture fails; the block around it does not
        with torch.cuda.device(sample.device), torch.cuda.stream(self._side):
            try:
                # other threads may allocate meanwhile
                with torch.cuda.graph(graph, pool=pool, stream=self._side, capture_error_mode="thread_local"):
                    try:
                        # in the pool, which is not handed out again while a launched replay may read it
                        static = torch.empty_like(sample)
                        outputs = function(static)
                    except Exception as error:
                        first = error
                        raise
            except Exception as error:
                # a capture that cannot be ended leaves the allocator waiting for its end
                with suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(sample.device.index, pool)
                # the end's own complaint says less
                raise first or error from None
        # padding is never what the memory held
        static.zero_()
        return Captured(static, outputs, graph.replay)


def memory_bound(cuda_graph: bool | int) -> int | None:
    """What `accelerate(cuda_graph=...)` allows, in MiB; None: no graphs."""
    if isinstance(cuda_graph, bool):
        return DEFAULT_MIB if cuda_graph else None
    if not isinstance(cuda_graph, int) or cuda_graph <= 0:
        raise ValueError(f"cuda_graph={cuda_graph!r}; expected True, False or a positive number of MiB")
    return cuda_graph


def bucket(batch: int) -> int:
    """The batch size that a batch is padded to: at most an eighth more, and none up to 16."""
    step = 1 << max(0, batch.bit_length() - 4)
    return -(-batch // step) * step


def _memory_format(x: Tensor) -> torch.memory_format:
    """The layout that the static input has for such tensors: the kernels read both in place."""
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _refusal(model: nn.Module) -> str | None:
    """Why a model can have no graphs, or None."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            return f"{name or 'the model'} is scripted"
        for tensor in chain(module._parameters.values(), module._buffers.values()):
            if tensor is not None and type(tensor) not in (Tensor, Parameter, Buffer):
                return f"{name or 'the model'} holds a {type(tensor).__name__}, whose memory is not known"
    return None


def _occupation(model: nn.Module) -> str | None:
    """What has to run in Python at each forward of the model as it is now, or None: `_Watch.occupied` in words."""
    for name, module in model.named_modules():
        own = vars(module)
        for holds, what in (
            (any(own[hooks] for hooks in _HOOKS), "has hooks"),
            ("forward" in own, "has a forward of its own"),
            (module.training, "is in train mode"),
        ):
            if holds:
                return f"{name or 'the model'} ({type(module).__name__}) {what}"
    return "there are global hooks" if _has_any_global_hook() else None


class _Graph:
    """A captured forward, called with up to as many rows as it was captured for."""

    def __init__(self, captured: Captured, keep: Any) -> None:
        self.static, self.replay = captured.static, captured.replay
        self.size = self.static.shape[0]
        leaves, spec = tree_flatten(captured.outputs)
        self.leaves: list[Any] = leaves
        self.spec: TreeSpec = spec
        for leaf in leaves:
            # anything else could hold the static memory, and would change with the next replay
            if not isinstance(leaf, Tensor | int | float | str | None):
                raise TypeError(f"the model returns a {type(leaf).__name__}, which is not known to torch.utils._pytree")
        # whether rows can be left out; found out at the first batch that would need it
        self.independent: bool | None = None
        # attributes that the capture read may be replaced by the next one's warm-up
        self.keep = keep

    def __call__(self, x: Tensor) -> Any:
        batch = x.shape[0]
        if batch == self.size:
            self.static.copy_(x)
            self.replay()
            copies = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        else:
            self.static[:batch].copy_(x)
            self.replay()
            copies = [None if leaf is None else leaf[:batch].clone() for leaf in self.leaves]
        return tree_unflatten(copies, self.spec)

    def pads(self, x: Tensor) -> bool:
        """Whether these rows come out bit for bit the same, whatever stands in the rows behind them."""
        if x.shape[0] == self.size:
            return True
        if self.independent is None:
            per_row = all(
                leaf is None or (isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == self.size)
                for leaf in self.leaves
            )
            self.independent = per_row and self._rows_are_independent(x)
        return self.independent

    def _rows_are_independent(self, x: Tensor) -> bool:
        batch = x.shape[0]
        outcomes = []
        # large beside pixels, so that a scale taken over the batch shows too
        for padding in (100, 0):
            self.static[batch:].fill_(padding)
            self.static[:batch].copy_(x)
            self.replay()
            outcomes.append([leaf[:batch].clone() for leaf in self.leaves if leaf is not None])
        return all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


# what nn.Module keeps for itself; the rest of a module's dictionary is its configuration, or a method put there
_INTERNAL = frozenset((*vars(nn.Module()), "_compiled_call_impl", STATE))
_REGISTRIES = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class _Watch:
    """What a forward depends on beside its input, as it stands now, to tell later whether it still does.

    Written so that the loops over some hundred modules run in C. It refers to everything that it compares, so no
    memory that a graph reads is freed as long as a watch of its time lives, except by what `in_place` sees.
    """

    def __init__(self, model: nn.Module) -> None:
        # the model holds what holds this, and shall go without the garbage collector
        self._root = weakref.ref(model)
        modules = list(model.modules())
        own = [vars(module) for module in modules]
        self._parts, self._types = modules[1:], [type(module) for module in modules]
        self._parts_own, self._lengths = own[1:], [len(d) for d in own]
        registries = [d[name] for d in own for name in _REGISTRIES]
        self._filled = [registry for registry in registries if registry]
        self._empty = [registry for registry in registries if not registry]
        self._members = list(self._registered())
        self._hooks = [d[name] for d in own for name in _HOOKS]
        self._replaced = any("forward" in d for d in own)
        keys = [[key for key in d if key not in _INTERNAL] for d in own]
        # the first key twice, since one alone would not give a tuple
        self._root_getter = itemgetter("_parameters", "_modules", *keys[0])
        self._getters = [(itemgetter(k[0], *k), d) for k, d in zip(keys[1:], own[1:], strict=True) if k]
        self._attributes = list(self._configured())
        tensors = list({id(t): t for t in self._members if isinstance(t, Tensor)}.values())
        self._tensors, self._addresses = tensors, [t.data_ptr() for t in tensors]
        # inference tensors do not say when they change, and nothing is derived from them
        self._versioned = [t for t in tensors if not t.is_inference()]
        self._versions = self._current_versions()

    def _own(self) -> list[dict[str, Any]]:
        return [vars(self._root()), *self._parts_own]

    def _registered(self) -> Iterator[Any]:
        return chain.from_iterable(map(dict.values, self._filled))

    def _configured(self) -> Iterator[Any]:
        parts = [get(d) for get, d in self._getters]
        return chain(self._root_getter(vars(self._root())), chain.from_iterable(parts))

    def _current_versions(self) -> list[int]:
        return list(map(attrgetter("_version"), self._versioned))

    def in_place(self) -> bool:
        """Whether weights are where they were and classes what they were: before a launch, as it reads that memory."""
        return (
            list(map(Tensor.data_ptr, self._tensors)) == self._addresses
            and list(map(type, [self._root(), *self._parts])) == self._types
        )

    def occupied(self) -> bool:
        """Whether a module trains, or has something to call in Python at each forward."""
        return (
            self._replaced
            or any(self._hooks)
            or bool(_has_any_global_hook())
            or any(map(itemgetter("training"), self._own()))
        )

    def changed(self) -> bool:
        """Whether modules, parameters, buffers or attributes are others than they were."""
        if list(map(len, self._own())) != self._lengths or any(self._empty):
            return True
        members = list(self._registered())
        # by identity: comparing tensors would compare what they hold
        if len(members) != len(self._members) or not all(map(is_, members, self._members)):
            return True
        try:
            return not all(map(is_, self._configured(), self._attributes))
        except KeyError:
            return True

    def written(self) -> bool:
        """Whether weights were written to in place since the last time."""
        versions = self._current_versions()
        if versions == self._versions:
            return False
        self._versions = versions
        return True


class Graphs:
    """The forward of a model, by CUDA graph where one stands for it.

    Args:
        model: what it computes.
        inner: what `model.compile()` put where this goes, or None.
        max_mib: bound on the device memory that the graphs keep.
    """

    def __init__(self, model: nn.Module, inner: Callable[..., Any] | None, max_mib: int) -> None:
        # the model refers to this object
        self._model = weakref.ref(model)
        self.inner = inner
        self.max_mib = max_mib
        self._backend = Cuda()
        self._lock = threading.Lock()
        # by batch size and kind of call: a graph, None for what was seen once, or why there is none
        self._entries: OrderedDict[tuple[Any, ...], _Graph | str | None] = OrderedDict()
        self._watch: _Watch | None = None
        self._pool: Any = None
        self._last: tuple[Any, ...] | None = None
        self._used: tuple[Any, Any] | None = None  # the stream that ran a graph last, and an event behind that
        self._occupied = False
        self._replays = self._fruitless = self._failures = 0
        self._off: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy of the model has graphs of its own; as with `Module.compile`, the compiled function is not copied
        return attach, (self._model(), self.max_mib)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What `model(*args, **kwargs)` does."""
        if torch.compiler.is_compiling() or kwargs or len(args) != 1 or self._off or not self._graphable(args[0]):
            return self._plain(*args, **kwargs)
        x = args[0]
        with self._lock:
            outcome = self._by_graph(x)
        return self._plain(x) if outcome is None else outcome[0]

    def _plain(self, *args: Any, **kwargs: Any) -> Any:
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return self._model()._call_impl(*args, **kwargs)  # type: ignore[union-attr]

    def _graphable(self, x: Any) -> bool:
        """Whether nobody watches or differentiates the operations of this call."""
        return (
            type(x) is Tensor
            and self._backend.accepts(x)
            and x.layout is torch.strided
            and x.dim() > 0
            and x.numel() > 0
            and not torch.is_grad_enabled()
            and not getattr(_thread, "capturing", False)
            and torch._C._len_torch_dispatch_stack() == 0
            and torch._C._functorch.peek_interpreter_stack() is None
            and torch._C._get_tracing_state() is None
            and (
                torch._C._len_torch_function_stack() == 0
                # `with torch.device(...)` only looks at what creates tensors
                or all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
            )
        )

    @staticmethod
    def _kind(x: Tensor) -> tuple[Any, ...]:
        """What a graph is good for, beside the batch size."""
        device = x.device.type
        return (
            x.shape[1:],
            x.dtype,
            x.device,
            _memory_format(x),
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
            torch.get_float32_matmul_precision(),
            torch.backends.cudnn.allow_tf32,
            torch.are_deterministic_algorithms_enabled(),
        )

    def _by_graph(self, x: Tensor) -> tuple[Any] | None:
        """The outputs in a tuple, or None where no graph stands for this call."""
        watch = self._watch
        if watch is not None and not watch.in_place():
            self._drop()
            watch = None
        # what held the last call back; otherwise it is looked for behind the launch
        if watch is not None and self._occupied:
            if watch.changed():
                self._drop()
            elif watch.occupied():
                return None
            self._occupied = False
        stream = self._backend.stream(x.device)
        if self._used is not None and self._used[0] != stream:
            stream.wait_event(self._used[1])
        graph = self._find(x)
        if graph is None:
            return None
        outputs = self._launch(graph, x, stream)
        watch = self._watch
        assert watch is not None
        # the device works meanwhile
        if watch.changed():
            self._drop()
            return None
        if watch.occupied():
            self._occupied = True
            return None
        if watch.written():
            kernels.rederive()
            outputs = self._launch(graph, x, stream)
        self._replays += 1
        return (outputs,)

    def _launch(self, graph: _Graph, x: Tensor, stream: Any) -> Any:
        try:
            return graph(x)
        finally:
            event = self._backend.event() if self._used is None else self._used[1]
            event.record(stream)
            self._used = (stream, event)

    def _find(self, x: Tensor) -> _Graph | None:
        """The graph for a batch: one of its size, else one of its bucket's; captured where such a batch came before."""
        entries, kind, batch = self._entries, self._kind(x), x.shape[0]
        exact = (batch, *kind)
        graph = entries.get(exact)
        if isinstance(graph, _Graph):
            self._last = exact
            entries.move_to_end(exact)
            return graph
        # a size twice in a row is worth a graph of its own; sizes that come and go share their bucket's
        repeated, self._last = exact == self._last, exact
        padded = (bucket(batch), *kind)
        if repeated and graph is None:
            return self._capture(exact, x)
        if padded not in entries:
            entries[padded] = None
            self._trim()
            return None
        entry = entries[padded]
        if entry is None:
            entry = self._capture(padded, x)
        if isinstance(entry, _Graph) and entry.pads(x):
            entries.move_to_end(padded)
            return entry
        return None

    def _capture(self, key: tuple[Any, ...], x: Tensor) -> _Graph | None:
        model = self._model()
        assert model is not None
        if self._watch is not None and self._watch.changed():
            self._drop()
        self._off = self._off or _refusal(model)
        if self._off:
            return None
        self._watch = self._watch or _Watch(model)
        self._occupied = self._watch.occupied()
        if self._occupied:
            return None
        sample = x.new_zeros(key[0], *x.shape[1:]).contiguous(memory_format=_memory_format(x))
        sample[: x.shape[0]].copy_(x)
        reason = self._warm_up(sample)
        while not reason:
            alone = self._pool is None
            self._pool = self._backend.pool() if alone else self._pool
            try:
                captured = self._exclusively(self._backend.capture, self._plain, sample, self._pool)
                # the forward itself may write attributes
                self._watch = _Watch(model)
                graph = _Graph(captured, self._watch)
            except Exception as error:  # whatever a model raises when it cannot be captured
                reason = _reason(error)
                self._failures += 1
                if self._failures == MAX_FAILURES:
                    self._off = f"{MAX_FAILURES} captures failed, the last with {reason}"
                # a capture that broke off leaves its pool in a state that nobody answers for
                self._drop()
                break
            size = self._backend.pool_bytes(self._pool)
            if size <= self.max_mib << 20:
                self._entries[key] = graph
                self._entries.move_to_end(key)
                self._trim()
                self._failures = 0
                return graph
            del captured, graph
            # a pool shrinks only as a whole: what is called again is captured again
            self._drop()
            if alone or self._off:
                reason = f"needs {-(-size >> 20)} MiB, and the bound is {self.max_mib} MiB"
        self._entries[key] = reason
        return None

    def _warm_up(self, sample: Tensor) -> str:
        """Why the model does not run, or an empty string."""
        try:
            kernels.rederive()
            self._exclusively(self._backend.warm_up, self._plain, sample)
        except Exception as error:  # whatever a model raises, a batch that is padded may be too large
            return _reason(error)
        return ""

    @staticmethod
    def _exclusively(call: Callable[..., Any], *args: Any) -> Any:
        """Call with the modes that a graph is made in, no other capture under way in the process."""
        cached = torch.is_autocast_cache_enabled()
        with _capturing:
            _thread.capturing = True
            # autocast's copies of weights end with its block, the graph does not
            torch.set_autocast_cache_enabled(False)
            try:
                # memory that may be written to inside and outside inference mode
                with torch.inference_mode(False), torch.no_grad():
                    return call(*args)
            finally:
                torch.set_autocast_cache_enabled(cached)
                _thread.capturing = False

    def _trim(self) -> None:
        while len(self._entries) > MAX_ENTRIES:
            self._synchronize()
            self._entries.popitem(last=False)

    def _synchronize(self) -> None:
        if self._used is not None:
            self._used[1].synchronize()

    def _drop(self) -> None:
        """Forget every graph, and what was found out for the model as it was."""
        if any(isinstance(entry, _Graph) for entry in self._entries.values()):
            self._fruitless = self._fruitless + 1 if self._replays < WORTHWHILE else 0
            if self._fruitless == MAX_FRUITLESS:
                self._off = f"the model changed {MAX_FRUITLESS} times before a graph was replayed {WORTHWHILE} times"
        self._replays = 0
        self._forget()

    def _forget(self) -> None:
        self._synchronize()
        reasons = {key: entry for key, entry in self._entries.items() if isinstance(entry, str)}
        self._entries.clear()
        self._entries.update(reasons)
        self._watch = self._pool = self._used = self._last = None

    def release(self) -> None:
        """Free every graph; calls to come capture anew."""
        with self._lock:
            self._forget()
            self._entries.clear()

    def notes(self) -> list[str]:
        """What is captured, and why the rest is not, in a sentence each."""
        with self._lock:
            captured = [key for key, entry in self._entries.items() if isinstance(entry, _Graph)]
            size = self._backend.pool_bytes(self._pool) if captured else 0
            batches = ", ".join(str(key[0]) for key in captured) or "none yet"
            notes = [f"captured for batches of {batches} ({-(-size >> 20)} of {self.max_mib} MiB)"]
            notes += [
                f"batch {key[0]} of {'x'.join(map(str, key[1]))} is not captured: {entry}"
                for key, entry in self._entries.items()
                if isinstance(entry, str)
            ]
            if self._off:
                notes.append(f"off: {self._off}")
        model = self._model()
        if model is not None and (occupation := _occupation(model)) is not None:
            notes.append(f"the plain path runs: {occupation}")
        return notes


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def attach(model: nn.Module, max_mib: int) -> Graphs:
    """Let `model(x)` go through CUDA graphs, around what `model.compile()` put there before."""
    # in the dictionary, since a model that is being unpickled has no attributes yet
    graphs = Graphs(model, vars(model).get("_compiled_call_impl"), max_mib)
    vars(model)["_compiled_call_impl"] = graphs
    return graphs


def detach(model: nn.Module, graphs: Graphs) -> None:
    """Undo `attach` and free the graphs."""
    graphs.release()
    # somebody may have compiled the model since
    if vars(model).get("_compiled_call_impl") is graphs:
        vars(model)["_compiled_call_impl"] = graphs.inner
