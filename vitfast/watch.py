"""Is it still the model that was looked at? For plans and graphs."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.parameter import Buffer, Parameter

# where a model keeps what `restore` undoes, these graphs too
STATE = "_vitfast_state"


def refusal(model: nn.Module) -> str | None:
    """Why a model can have no graphs, or None."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            return f"{name or 'the model'} is scripted"
        for tensor in chain(module._parameters.values(), module._buffers.values()):
            if tensor is not None and type(tensor) not in (Tensor, Parameter, Buffer):
                return f"{name or 'the model'} holds a {type(tensor).__name__}, whose memory is not known"
    return None


def occupation(model: nn.Module) -> str | None:
    """What has to run in Python at each forward of the model as it is now, or None: `Watch.occupied` in words."""
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


# what nn.Module keeps for itself; the rest of a module's dictionary is its configuration, or a method put there
_INTERNAL = frozenset((*vars(nn.Module()), "_compiled_call_impl", STATE))


_REGISTRIES = ("_parameters", "_buffers", "_modules")


_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Watch:
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
