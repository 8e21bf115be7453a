"""Tensors derived from parameters: computed once, kept beside the first of them, made anew when one has changed.

A parameter has changed when its version (in-place writes) or its address (other data) has. Writes in place through
`.data` change neither, which is torch's own rule; `expire` is for who knows of them. What is derived is no state:
it stands in no state dict, is neither copied nor pickled with a module, and dies with the parameter that it is kept by.
A second computation writes to the memory of the first, so that a CUDA graph which reads it is right again.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Make = Callable[..., tuple[Tensor, ...]]

_State = tuple[tuple[int, int] | None, ...]


@dataclass(frozen=True)
class _Entry:
    others: tuple[Any, ...]  # weak references to the sources but the first, or None
    state: _State
    make: Make
    made: tuple[Tensor, ...]


# by the first source, then by what it is
_cache: Any = WeakTensorKeyDictionary()


def _state(sources: tuple[Tensor | None, ...]) -> _State:
    return tuple(None if t is None else (t.data_ptr(), t._version) for t in sources)


def derived(what: str, make: Make, first: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
    """`make(first, *others)`, computed at the first call and again when one of them has changed.

    Args:
        what: names `make`; one parameter may have several things derived from it.
        make: a function of the tensors; its results' shapes and dtypes follow from theirs.
        first: whose life the results share. Inference tensors, which have no versions, are refused by torch.
        others: further tensors, or None.
    """
    sources = (first, *others)
    entries = _cache.get(first)
    known: _Entry | None = None if entries is None else entries.get(what)
    state = _state(sources)
    if known is not None and known.state == state:
        return known.made
    # ordinary tensors, which may be written to again in any mode
    with torch.inference_mode(False), torch.no_grad():
        return _make(what, make, sources, state, known)


def _make(
    what: str, make: Make, sources: tuple[Any, ...], state: _State, known: _Entry | None
) -> tuple[Tensor, ...]:
    first, *others = sources
    fresh = make(*sources)
    if first.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            # this memory is the graph's own, which computes it at every replay
            return fresh
        # whatever stream reads it next
        torch.cuda.current_stream(first.device).synchronize()
    if known is not None and [(t.shape, t.dtype, t.device) for t in known.made] == [
        (t.shape, t.dtype, t.device) for t in fresh
    ]:
        for old, new in zip(known.made, fresh, strict=True):
            old.copy_(new)
        fresh = known.made
    references = tuple(None if t is None else weakref.ref(t) for t in others)
    _cache.setdefault(first, {})[what] = _Entry(references, state, make, fresh)
    return fresh


def rederive() -> None:
    """Make anew what has changed in place, before a CUDA graph is replayed that reads it."""
    changed = True
    # one thing may be derived from another
    while changed:
        changed = False
        for first, entries in list(_cache.items()):
            for what, entry in list(entries.items()):
                others = tuple(None if other is None else other() for other in entry.others)
                if any(ref is not None and other is None for ref, other in zip(entry.others, others, strict=True)):
                    # nobody can ask for it again
                    del entries[what]
                elif _state((first, *others)) != entry.state:
                    derived(what, entry.make, first, *others)
                    changed = True


def expire(first: Tensor) -> None:
    """Make what is derived from a parameter anew at the next call: it may have changed unseen, through `.data`."""
    entries = _cache.get(first) or {}
    for what, entry in entries.items():
        entries[what] = replace(entry, state=())


def release(first: Tensor) -> None:
    """Forget what is derived from a parameter."""
    _cache.pop(first, None)
