"""Is it still the model that was looked at? One watch for plans of layers and for graphs of models.

A plan or a graph is what Python decided once. What the decision was read from is compared at every call, so the loops
over a block's two dozen modules run in C: about 4 us a block. Nothing here computes; what is found changed is made anew
by whoever asked.
"""

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

# where a model keeps what `restore` undoes, its graphs too, and where a fused layer keeps its plan
STATE = "_vitfast_state"
PLAN = "_vitfast_plan"

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_REGISTRIES = ("_modules", "_parameters", "_buffers")
# what nn.Module keeps for itself; the rest of a module's dictionary is its configuration, or a method put there
_INTERNAL = frozenset((*vars(nn.Module()), "_compiled_call_impl", STATE, PLAN))
# whose forward does not ask whether they train
_MODELESS = (nn.Linear, nn.LayerNorm, nn.Identity, nn.GELU, nn.Conv2d)

_training = itemgetter("training")
_version = attrgetter("_version")
_forward = attrgetter("forward")


class Watch:
    """What a forward depends on beside its input, as it stands now, to tell later whether it still does.

    It refers to everything that it compares, but for the module that is watched: that one holds what holds the watch,
    and shall go without the garbage collector.

    Args:
        root: the module whose forward it is.
        tensors: whether a forward reads memory that is remembered, or what was derived from it: then `written` says
            whether parameters and buffers lie where they lay and have the versions that they had.
        attributes: whether the modules' plain attributes and the plans of fused layers are compared too.
    """

    def __init__(self, root: nn.Module, *, tensors: bool = False, attributes: bool = False) -> None:
        self._root = weakref.ref(root)
        parts = list(root.modules())[1:]
        own = [vars(part) for part in parts]
        self._parts, self._types, self._own = parts, list(map(type, parts)), own
        # a replica shares all but this
        self._children = root._modules
        registries = [d[name] for d in (vars(root), *own) for name in _REGISTRIES]
        self._filled = registries if attributes else [registry for registry in registries if registry]
        self._members = list(self._registered())
        # an attribute more may be a `forward`
        self._sized = [*own, *self._filled]
        self._sizes = list(map(len, self._sized))
        # as a `forward` that somebody puts on a class
        self._kinds = list({kind.replaces: None for kind in (type(root), *self._types) if hasattr(kind, "replaces")})
        self._forwards = list(map(_forward, self._kinds))
        self._hooks = [d[name] for d in (vars(root), *own) for name in HOOKS]
        self._without = [hooks for hooks in self._hooks if not hooks]
        self._with = [hooks for hooks in self._hooks if hooks]
        self._global = _has_any_global_hook()
        self._trains = root.training
        self._modes = [d for part, d in zip(parts, own, strict=True) if not isinstance(part, _MODELESS)]
        self._modes_were = list(map(_training, self._modes))
        self._getters: list[Any] = []
        self._attributes: list[Any] = []
        if attributes:
            keys = [[key for key in d if key not in _INTERNAL] for d in (vars(root), *own)]
            # the first key twice, since one alone would not give a tuple
            self._root_getter = itemgetter("_modules", "_parameters", *keys[0])
            self._getters = [(itemgetter(k[0], *k), d) for k, d in zip(keys[1:], own, strict=True) if k]
            self._attributes = list(self._configured())
            self._root_names = len(keys[0])
        # held here, what a plan derived stays allocated
        self._plans = [d[PLAN] for d in own if PLAN in d] if attributes else []
        watched = {id(t): t for t in self._members if isinstance(t, Tensor)} if tensors else {}
        self._tensors = list(watched.values())
        self._addresses = list(map(Tensor.data_ptr, self._tensors))
        # inference tensors do not say when they change
        self._versioned = [t for t in self._tensors if not t.is_inference()]
        self._versions = list(map(_version, self._versioned))

    def _registered(self) -> Iterator[Any]:
        return chain.from_iterable(map(dict.values, self._filled))

    def _configured(self) -> Iterator[Any]:
        return chain(self._root_getter(vars(self._root())), chain.from_iterable(get(d) for get, d in self._getters))

    def same_modules(self) -> bool:
        """Whether modules, classes, parameters, buffers and, if asked for, attributes are what they were."""
        root = self._root()
        return (
            root is not None
            and root._modules is self._children
            and list(map(type, self._parts)) == self._types
            and list(map(_forward, self._kinds)) == self._forwards
            and list(map(len, self._sized)) == self._sizes
            # by identity: comparing tensors would compare what they hold
            and all(map(is_, self._registered(), self._members))
            and (not self._attributes or self._same_attributes())
        )

    def _same_attributes(self) -> bool:
        try:
            same = all(map(is_, self._configured(), self._attributes))
        except KeyError:
            return False
        names = vars(self._root()).keys() - _INTERNAL
        return same and len(names) == self._root_names and not any(plan.stale for plan in self._plans)

    def same(self, root: nn.Module) -> bool:
        """`same_modules` of this very module, and whether hooks stand where they stood and what trained trains."""
        return (
            # a replica's dictionary holds what its original's holds
            self._root() is root
            and root.training is self._trains
            and not any(self._without)
            and all(self._with)
            and _has_any_global_hook() == self._global
            and list(map(_training, self._modes)) == self._modes_were
            and self.same_modules()
        )

    def busy(self) -> bool:
        """Whether a module trains, or has something to call in Python at each forward."""
        root = self._root()
        own = [vars(root), *self._own]
        return (
            any(self._hooks)
            or bool(_has_any_global_hook())
            or any(map(_training, own))
            or any("forward" in d for d in own)
        )

    def in_place(self) -> bool:
        """Whether weights lie where they lay and classes are what they were: before a launch that reads that memory."""
        return (
            list(map(Tensor.data_ptr, self._tensors)) == self._addresses and list(map(type, self._parts)) == self._types
        )

    def written(self) -> bool:
        """Whether weights were moved or written to in place; what goes through `.data` is not seen."""
        return (
            list(map(Tensor.data_ptr, self._tensors)) != self._addresses
            or list(map(_version, self._versioned)) != self._versions
        )


def why_unwatched(model: nn.Module) -> str | None:
    """Why a model cannot be watched, in words, or None."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            return f"{name or 'the model'} is scripted"
        for tensor in chain(module._parameters.values(), module._buffers.values()):
            if tensor is not None and type(tensor) not in (Tensor, Parameter, Buffer):
                return f"{name or 'the model'} holds a {type(tensor).__name__}, whose memory is not known"
    return None


def why_busy(model: nn.Module) -> str | None:
    """`Watch.busy` in words: what has to run in Python at each forward of the model as it is now, or None."""
    for name, module in model.named_modules():
        own = vars(module)
        for holds, what in (
            (any(own[hooks] for hooks in HOOKS), "has hooks"),
            ("forward" in own, "has a forward of its own"),
            (module.training, "is in train mode"),
        ):
            if holds:
                return f"{name or 'the model'} ({type(module).__name__}) {what}"
    return "there are global hooks" if _has_any_global_hook() else None
