"""What decides a proof: functions, the options that they read, and shapes."""

from __future__ import annotations

import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import Tensor, nn

from ..layers import FusedMlp, FusedSplitAttention
from .known import original_class
from .twin import INTERNAL, is_rate, tree


def decides(module: nn.Module, held: nn.Module | None, mixin: type[Any]) -> Any:
    """Something hashable that is equal for modules of which one proof holds.

    Args:
        module: it is only read.
        held: the module inside it whose blocks are stood in for, if any.
        mixin: of the fused layer, which may read options that the original does not.
    """
    parts = list(tree(module, held))
    kinds = list(dict.fromkeys(original_class(type(part)) for _, part in parts))
    read = [facts(kind) for kind in kinds]
    names = frozenset(chain.from_iterable(mentioned for _, mentioned in (*read, *map(facts, (mixin, *_INSIDE)))))
    described = tuple((name, original_class(type(part)), _shapes(part), _options(part, names)) for name, part in parts)
    return tuple(functions for functions, _ in read), described


def _shapes(module: nn.Module) -> Any:
    tensors = chain(module._parameters.items(), module._buffers.items())
    return tuple((name, t if t is None else (t.shape, t.is_floating_point())) for name, t in tensors)


def _options(module: nn.Module, names: frozenset[str]) -> Any:
    return tuple(
        (name, _frozen(value, names))
        for name, value in vars(module).items()
        if name not in INTERNAL and name in names and not is_rate(module, name, value)
    )


def _frozen(value: Any, names: frozenset[str], depth: int = 0) -> Any:
    """Something hashable that is equal for what is equal to a forward."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, nn.Module):
        return None
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item, names, depth) for item in value)
    if isinstance(value, dict):
        return tuple((key, _frozen(item, names, depth)) for key, item in value.items())
    if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
        return value.__func__
    if type(value).__name__.endswith("Config") and depth < 3:
        # what the code reads of it
        read = tuple((key, _frozen(item, names, depth + 1)) for key, item in vars(value).items() if key in names)
        return type(value), read, getattr(value, "_attn_implementation", None)
    try:
        hash(value)
    except TypeError:
        return id(value)
    return type(value), value


# whatever of these stands inside a block reads its own options
_INSIDE = (FusedSplitAttention, FusedMlp)


class _Memo(threading.local):
    facts: dict[type, Any] | None = None


_memo = _Memo()


@contextmanager
def at_once() -> Iterator[None]:
    """While open, classes are taken to stay as they are: each is read once."""
    before, _memo.facts = _memo.facts, {} if _memo.facts is None else _memo.facts
    try:
        yield
    finally:
        _memo.facts = before


def facts(kind: type[Any]) -> tuple[Any, frozenset[str]]:
    """What a class runs, by identity, with the helpers that it mentions; and all names that stand in there."""
    memo = {} if _memo.facts is None else _memo.facts
    if kind not in memo:
        found: dict[Any, None] = {}
        names: set[str] = set()
        package = kind.__module__.partition(".")[0]
        for base in kind.__mro__:
            if base is nn.Module or base is object:
                continue
            for name, value in vars(base).items():
                if name in _SILENT or (name.startswith("__") and name not in _SPOKEN):
                    continue
                if not _reach(value, package, found, names):
                    try:
                        found[name, value] = None
                    except TypeError:
                        found[name, id(value)] = None
        memo[kind] = tuple(found), frozenset(names)
    return memo[kind]


_SILENT = frozenset(("__init__", "extra_repr", "reset_parameters", "_abc_impl"))
_SPOKEN = frozenset(("__call__", "__getattr__", "__getattribute__", "__torch_function__"))


def _reach(value: Any, package: str, found: dict[Any, None], names: set[str]) -> bool:
    """Note a function and those that it mentions of its package; whether it is one."""
    if isinstance(value, property):
        for part in (value.fget, value.fset):
            _reach(part, package, found, names)
        return True
    function = getattr(value, "__func__", value)
    if not isinstance(function, types.FunctionType):
        return False
    if function in found:
        return True
    found[function] = None
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                codes.append(constant)
            elif isinstance(constant, str) and constant.isidentifier():
                names.add(constant)
        for name in code.co_names:
            known = function.__globals__.get(name)
            if isinstance(known, types.FunctionType):
                if known.__module__.partition(".")[0] == package:
                    _reach(known, package, found, names)
            elif isinstance(known, (bool, int, float, str)):
                found[name, known] = None
    for cell in function.__closure__ or ():
        try:
            _reach(cell.cell_contents, package, found, names)
        except ValueError:
            # not filled yet
            continue
    return True
