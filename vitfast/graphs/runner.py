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
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ..watch import Watch, why_busy, why_unwatched
from .cuda import Cuda
from .graph import Graph, memory_format

# what the graphs of one model may keep of the device's memory, in MiB
DEFAULT_MIB = 2048
# graphs, and sizes seen once, that are remembered
MAX_ENTRIES = 64
# a model that fails to be captured so many times in a row is left alone
MAX_FAILURES = 4

# one capture at a time in a process; a model in a model is captured as a part of the outer one
_capturing = threading.Lock()
_thread = threading.local()


def memory_bound(cuda_graph: bool | int) -> int | None:
    """What `accelerate(cuda_graph=...)` allows, in MiB; None: no graphs."""
    if isinstance(cuda_graph, bool):
        return DEFAULT_MIB if cuda_graph else None
    if not isinstance(cuda_graph, int) or cuda_graph <= 0:
        raise ValueError(f"cuda_graph={cuda_graph!r}; expected True, False or a positive number of MiB")
    return cuda_graph


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
        self._entries: OrderedDict[tuple[Any, ...], Graph | str | None] = OrderedDict()
        self._watch: Watch | None = None
        self._pool: Any = None
        self._used: tuple[Any, Any] | None = None  # the stream that ran a graph last, and an event behind that
        self._busy = False
        self._failures = 0
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
            memory_format(x),
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
            # by their newer names, since the older ones raise once these were used
            torch.backends.cuda.matmul.fp32_precision,
            torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
            torch.are_deterministic_algorithms_enabled(),
        )

    def _by_graph(self, x: Tensor) -> tuple[Any] | None:
        """The outputs in a tuple, or None where no graph stands for this call."""
        watch = self._watch
        if watch is not None and not watch.in_place():
            self._drop()
            watch = None
        # what held the last call back; otherwise it is looked for behind the launch
        if watch is not None and self._busy:
            if not watch.same_modules():
                self._drop()
            elif watch.busy():
                return None
            self._busy = False
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
        if not watch.same_modules() or watch.written():
            # what the graph reads may be derived from weights as they were
            self._drop()
            return None
        if watch.busy():
            self._busy = True
            return None
        return (outputs,)

    def _launch(self, graph: Graph, x: Tensor, stream: Any) -> Any:
        try:
            return graph(x)
        finally:
            event = self._backend.event() if self._used is None else self._used[1]
            event.record(stream)
            self._used = (stream, event)

    def _find(self, x: Tensor) -> Graph | None:
        """The graph for a batch; captured where one of its size came before."""
        key = (x.shape[0], *self._kind(x))
        if key not in self._entries:
            self._entries[key] = None
            self._trim()
            return None
        self._entries.move_to_end(key)
        entry = self._entries[key]
        if entry is None:
            return self._capture(key, x)
        return entry if isinstance(entry, Graph) else None

    def _capture(self, key: tuple[Any, ...], x: Tensor) -> Graph | None:
        model = self._model()
        assert model is not None
        self._off = self._off or why_unwatched(model)
        if self._off:
            return None
        self._watch = self._watch or self._look_at(model)
        self._busy = self._watch.busy()
        if self._busy:
            return None
        sample = torch.empty_like(x, memory_format=memory_format(x)).copy_(x)
        reason = self._warm_up(sample)
        while not reason:
            alone = self._pool is None
            self._pool = self._backend.pool() if alone else self._pool
            try:
                captured = self._exclusively(self._backend.capture, self._plain, sample, self._pool)
                # the forward itself may write attributes
                self._watch = self._look_at(model)
                graph = Graph(captured, self._watch)
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
            self._exclusively(self._backend.warm_up, self._plain, sample)
        except Exception as error:  # whatever a model raises
            return _reason(error)
        return ""

    @staticmethod
    def _look_at(model: nn.Module) -> Watch:
        return Watch(model, tensors=True, attributes=True)

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
        """Forget every graph, and what was found out for the model as it was; reasons for having none stay."""
        self._synchronize()
        reasons = {key: entry for key, entry in self._entries.items() if isinstance(entry, str)}
        self._entries.clear()
        self._entries.update(reasons)
        self._watch = self._pool = self._used = None

    def release(self) -> None:
        """Free every graph; calls to come capture anew."""
        with self._lock:
            self._drop()
            self._entries.clear()

    def notes(self) -> list[str]:
        """What is captured, and why the rest is not, in a sentence each."""
        with self._lock:
            captured = [key for key, entry in self._entries.items() if isinstance(entry, Graph)]
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
        if model is not None and (busy := why_busy(model)) is not None:
            notes.append(f"the plain path runs: {busy}")
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
