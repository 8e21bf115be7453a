"""What adapters offer for which classes, and how a fused class is made around one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..layers import own_forwards


def never(module: nn.Module) -> None:
    """No reason to decline."""
    return None


def always(module: nn.Module) -> bool:
    """Every module."""
    return True


@dataclass(frozen=True)
class Call:
    """One call of an example: arguments are tensors in float64 on the CPU, and whatever else a caller gives.

    Attributes:
        args: by position.
        kwargs: by name.
        method: of the module; "__call__" runs its forward.
        backward: whether its gradients are compared too.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    method: str = "__call__"
    backward: bool = True


# what is set while a twin runs
Setting = Callable[[Any], AbstractContextManager[Any]]

# makes calls for a module: small ones, of two numbers of tokens and two batch sizes where the module takes them
Example = Callable[[Any], Iterable[Call]]


@dataclass(frozen=True)
class Offer:
    """What may stand in the place of a class, if it proves to compute the same.

    Attributes:
        name: pattern of the class's name, or that of a class which it is made of.
        kind: of replacement, see `vitfast.layers.KINDS`, or "model".
        mixins: fused layers, tried in this order.
        has: attributes that a module must have to be taken for one at all, by spaces.
        examples: ways to call it; the first that the original takes is used, so the ones that show most stand first.
        decline: says why a given module must stay as it is, or None.
        concerns: says whether a given module does what the fused layer is for.
        rtol: of the comparison, relative to the largest number; where the original rounds to fp32 within, it is wider.
        settings: under each of which it is proved: given the twin, they are open while it runs.
    """

    name: str
    kind: str
    mixins: tuple[type[Any], ...]
    has: str = ""
    examples: tuple[Example, ...] = ()
    decline: Callable[[Any], str | None] = never
    concerns: Callable[[Any], bool] = always
    rtol: float = 1e-9
    settings: tuple[Setting, ...] = (nullcontext,)

    def takes(self, module: nn.Module) -> bool:
        """Whether a module, whose class has the name, is of the kind that is meant."""
        return all(hasattr(module, name) for name in self.has.split()) and self.concerns(module)


@dataclass(frozen=True)
class Declined:
    """Classes that do a replaceable module's work, for which there is no fused layer.

    Attributes:
        name: pattern of the class's name.
        kind: of replacement that it would be.
        reason: why there is none.
        has: as of `Offer`.
    """

    name: str
    kind: str
    reason: str
    has: str = ""


@dataclass(frozen=True)
class Match:
    """What an adapter says of one module.

    Attributes:
        kind: of replacement, see `vitfast.layers.KINDS`.
        fused: the class to put in its place, or None.
        reason: why not; empty where `fused` is set.
        disproved: whether a proof ran and found other numbers.
    """

    kind: str
    fused: type[nn.Module] | None
    reason: str
    disproved: bool = False


def around(mixin: type[Any], original: type[nn.Module]) -> type[nn.Module]:
    """The fused class of a mix-in for a class that is found at run time: always the same one, and its objects pickle.

    It has the original's name, which tools read (`no_split_modules`, wrapping by class); `repr` shows the mix-in's.

    Args:
        mixin: a subclass of `Rebuilt` and of a fused layer of `vitfast.layers`.
        original: the library's class.
    """
    made = _made.get((mixin, original))
    if made is None:
        body = {
            "replaces": original,
            "forwards": own_forwards(original),
            "__module__": mixin.__module__,
            "__doc__": f"`{original.__qualname__}`.",
        }
        made = _made[mixin, original] = type(original.__name__, (mixin, original), body)
    return made


_made: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def original_class(kind: type[Any]) -> type[nn.Module]:
    """The library's class behind a fused one, or the class itself."""
    return getattr(kind, "replaces", kind)


def mixin_name(fused: type[nn.Module]) -> str:
    """The name of the mix-in that a fused class is made of, whoever made a class around it since."""
    return next(kind.__bases__[0].__name__ for kind in fused.__mro__ if "replaces" in vars(kind))


class Rebuilt:
    """For mix-ins that `around` uses: a copied or unpickled object finds its class through the two it is made of."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind: Any = type(self)
        if "replaces" not in vars(kind):
            # a class that somebody made around it
            return super().__reduce_ex__(protocol)
        return _rebuild, (kind.__bases__[0], kind.replaces), self.__getstate__()  # type: ignore[attr-defined]

    def _get_name(self) -> str:
        # for `repr`
        return mixin_name(type(self))  # type: ignore[arg-type]


def _rebuild(mixin: type[nn.Module], original: type[nn.Module]) -> Any:
    return object.__new__(around(mixin, original))


def asked(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a caller gives more than arguments that mean nothing: masks that are None, switches that are off."""
    return any(value is not None and value is not False for value in (*args, *kwargs.values()))


def without_proxies(more: Any) -> Any:
    """Further arguments; where `torch.fx` traces a root it puts a proxy in their place, and there are none."""
    if not isinstance(more, Proxy):
        return more
    return {} if str(more.node.target).startswith("**") else ()


def handed_on(original: type[nn.Module], behind: int) -> dict[str, Any]:
    """The arguments of a forward behind the first ones, with their defaults."""
    taken = list(inspect.signature(original.forward).parameters.values())[behind:]
    return {parameter.name: parameter.default for parameter in taken}


def stray_arguments(mixin: type[Any], original: type[nn.Module]) -> list[str]:
    """Arguments of an original's forward that a mix-in's does not take."""
    taken = inspect.signature(mixin.forward).parameters
    kinds = {parameter.kind for parameter in taken.values()}
    if inspect.Parameter.VAR_KEYWORD in kinds and inspect.Parameter.VAR_POSITIONAL in kinds:
        return []
    asked = inspect.signature(original.forward).parameters
    names = [name for name, parameter in asked.items() if parameter.kind is not inspect.Parameter.VAR_POSITIONAL]
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        # the first argument is given by position
        return [
            name for name in names[2:] if name not in taken and asked[name].kind is not inspect.Parameter.VAR_KEYWORD
        ]
    return []


# examples that several adapters share


def width(module: nn.Module) -> int:
    """Of the tokens that a module reads: the columns of its first matrix."""
    for name, parameter in module.named_parameters():
        if name.endswith("weight") and parameter.dim() == 2:
            return parameter.shape[1]
    raise ValueError("it has no linear layer to say how wide its tokens are")


def tokens(*shape: int) -> Tensor:
    """Random numbers whose rows are of different sizes, so that what is added to a variance counts."""
    x = torch.randn(shape, dtype=torch.float64, device="cpu")
    return x * torch.logspace(-2.5, 0.5, shape[-2], dtype=torch.float64, device="cpu")[:, None]


def of_tokens(module: Any) -> list[Call]:
    """Two sequences `[B, N, D]`."""
    size = width(module)
    return of_rows(size)


def of_rows(size: int) -> list[Call]:
    """Two sequences of tokens of a width, a short one and a long one."""
    return [Call((tokens(2, 5, size),)), Call((tokens(1, 41, size),), backward=False)]


def pixels(module: nn.Module, batch: int, height: int, width: int) -> Tensor:
    """Random images with as many channels as a module's convolution reads."""
    channels = next((p.shape[1] for p in module.parameters() if p.dim() == 4 and p.shape[0] != 1), 3)
    return torch.randn(batch, channels, height, width, dtype=torch.float64, device="cpu")


def pair(size: Any) -> tuple[int, int]:
    """`(height, width)` of a number or of two."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


# what a model says before its head
FEATURES = (Call((), {}, "forward_features", backward=False),)


def of_images(
    patch: Callable[[Any], Any], size: Callable[[Any], Any] | None = None, also: tuple[Call, ...] = ()
) -> tuple[Example, ...]:
    """Examples for what reads images: of few patches and of its own size, or where it takes no other, of that alone.

    Args:
        patch: reads the size of a patch from the module.
        size: reads the size of its images, where that matters; it may have none.
        also: further calls with the first images, as `Call((), kwargs, method)`.
    """

    def calls(first: Tensor, *others: Tensor) -> list[Call]:
        return [
            Call((first,)),
            *(Call((x,), backward=False) for x in others),
            *(Call((first,), call.kwargs, call.method, call.backward) for call in also),
        ]

    def own(module: Any) -> list[Tensor]:
        own_size = None if size is None else size(module)
        return [] if own_size is None else [pixels(module, 1, *pair(own_size))]

    def small(module: Any) -> list[Call]:
        rows, cols = pair(patch(module))
        few, more = pixels(module, 2, 2 * rows, 3 * cols), pixels(module, 1, 6 * rows, 7 * cols)
        return calls(few, more, *own(module))

    return (small, lambda module: calls(*own(module)))
