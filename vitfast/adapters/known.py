"""What adapters say of classes, and how a fused class is made around one."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Swap:
    """How one class is replaced.

    Attributes:
        fused: the class that takes its place; its `kind` is what `accelerate(only=...)` selects by.
        decline: says why a given module of the class must stay as it is, or None.
        concerns: says whether a given module does what the fused class is for; None where all of the class do.
    """

    fused: type[nn.Module]
    decline: Callable[[nn.Module], str | None]
    concerns: Callable[[nn.Module], bool] | None = None


@dataclass(frozen=True)
class Match:
    """What an adapter says of one module.

    Attributes:
        kind: of replacement, see `vitfast.layers.KINDS`.
        fused: the class to put in its place, or None.
        reason: why not; empty where `fused` is set.
    """

    kind: str
    fused: type[nn.Module] | None
    reason: str


def around(mixin: type[nn.Module], original: type[nn.Module]) -> type[nn.Module]:
    """The fused class of a mix-in for a class that is found at run time: always the same one, and its objects pickle.

    Args:
        mixin: a subclass of `Rebuilt` and of a fused layer of `vitfast.layers`.
        original: the library's class.
    """
    made = _made.get((mixin, original))
    if made is None:
        body = {"replaces": original, "__module__": mixin.__module__, "__doc__": f"`{original.__qualname__}`."}
        made = _made[mixin, original] = type(f"Fused{original.__name__}", (mixin, original), body)
    return made


_made: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


class Rebuilt:
    """For mix-ins that `around` uses: a copied or unpickled object finds its class through the two it is made of."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind: Any = type(self)
        if "replaces" not in vars(kind):
            # a class that somebody made around it
            return super().__reduce_ex__(protocol)
        return _rebuild, (kind.__bases__[0], kind.replaces), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__


def _rebuild(mixin: type[nn.Module], original: type[nn.Module]) -> Any:
    return object.__new__(around(mixin, original))


def instructions(function: Any) -> tuple[tuple[str, Any], ...]:
    """What a function does, step by step: equal for copies of one source, whatever module they stand in."""
    # what decorators put around it is not the function's own
    code = inspect.unwrap(function).__code__
    return tuple((step.opname, step.argval) for step in dis.get_instructions(code))
