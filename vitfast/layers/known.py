"""Small modules that an epilogue computes: LayerScale, what drops a branch, activations. Each library has its own.

A class is looked at where its name says that it may be one of these, and counts once it computes what it should on a
few numbers. The answer is the class's, so it is remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .guards import hooked, is_plain

_SCALE_NAMES = ("gamma", "lambda1")
_RATE_NAMES = ("drop_prob", "p")

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@contextmanager
def apart() -> Iterator[None]:
    """Seeded numbers of double precision on the CPU, with nothing of the caller's state read or changed."""
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        torch.manual_seed(0)
        yield


def _example(kind: Any, **attributes: Any) -> Any:
    """An object of a class with nothing but these attributes, in evaluation mode."""
    module = object.__new__(kind)
    nn.Module.__init__(module)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module.eval()


def _is_scale(kind: Any, name: str) -> bool:
    x, gamma = torch.randn(2, 3, 6, dtype=torch.double), torch.randn(6, dtype=torch.double)
    module = _example(kind, inplace=False, **{name: nn.Parameter(gamma)})
    return all(torch.equal(module.train(mode).forward(x.clone()), x * gamma) for mode in (False, True))


def _is_drop(kind: Any, name: str) -> bool:
    x = torch.randn(64, 3, dtype=torch.double)
    options = {"scale_by_keep": True, "mode": "row", "inplace": False}
    never, often = (_example(kind, **options, **{name: rate}) for rate in (0.0, 0.5))
    kept = (never.forward(x), often.forward(x), never.train().forward(x))
    # a rate that does nothing in training is not the one
    return all(torch.equal(out, x) for out in kept) and not torch.equal(often.train().forward(x), x)


def _first(names: tuple[str, ...], holds: Callable[[Any, str], bool], kind: Any) -> str | None:
    for name in names:
        try:
            with apart():
                if holds(kind, name):
                    return name
        except Exception:  # whatever a class raises that is given attributes which it does not know
            continue
    return None


_scales: dict[Any, str | None] = {}
_drops: dict[Any, str | None] = {nn.Dropout: "p"}
_epilogues: dict[Any, str | None] = {}


def _constant(function: Any) -> Any:
    """A compiler runs the function rather than reading it: `torch.compiler.assume_constant_result` without the second
    and a half that its import of the compiler takes."""
    function._dynamo_marked_constant = True
    return function


@_constant
def _scale_name(kind: Any) -> str | None:
    """The attribute by which a class multiplies its input, or None where it does something else."""
    if kind not in _scales:
        _scales[kind] = _first(_SCALE_NAMES, _is_scale, kind) if "LayerScale" in kind.__name__ else None
    return _scales[kind]


@_constant
def _rate_name(kind: Any) -> str | None:
    """The attribute with the rate at which a class drops in training and only then, or None where it may do more."""
    if kind not in _drops:
        named = any(word in kind.__name__ for word in ("DropPath", "StochasticDepth"))
        _drops[kind] = _first(_RATE_NAMES, _is_drop, kind) if named else None
    return _drops[kind]


@_constant
def _epilogue(kind: Any, approximate: str | None) -> str | None:
    key = (kind, kind.forward, approximate)
    if key not in _epilogues:
        _epilogues[key] = None
        if "GELU" in kind.__name__.upper():
            try:
                with apart():
                    module = kind() if approximate is None else kind(approximate=approximate)
                    found = [_curve(module.train(mode).forward) for mode in (False, True)]
                    for name, function in _ACTIVATIONS.items():
                        # Transformers writes the constant of the tanh form with ten digits
                        if all(torch.allclose(curve, _curve(function), rtol=0, atol=1e-8) for curve in found):
                            _epilogues[key] = name
            except Exception:  # an activation that wants more to be made
                pass
    return _epilogues[key]


def _curve(function: Callable[[Tensor], Tensor]) -> Tensor:
    """Values and slopes."""
    x = torch.linspace(-9, 9, 999, dtype=torch.double, requires_grad=True)
    with torch.enable_grad():
        y = function(x * 1.0)
        (slope,) = torch.autograd.grad(y.sum(), x)
    return torch.stack((y.detach(), slope))


def epilogue(module: Any) -> str | None:
    """The kernels' name for an activation module, or None where no epilogue computes it or somebody looks at it."""
    if not isinstance(module, nn.Module) or module._parameters or hooked(module):
        return None
    return _epilogue(type(module), getattr(module, "approximate", None))


def scale_of(module: Any) -> tuple[bool, Tensor | None]:
    """`(known, gamma)` of a LayerScale or what is in its place: a module, the scale itself, or None."""
    if module is None or isinstance(module, Tensor):
        return True, module
    if is_plain(module, nn.Identity):
        return True, None
    if not hooked(module) and (name := _scale_name(type(module))):
        return True, getattr(module, name)
    return False, None


def rate_of(module: Any) -> float:
    """The rate at which a module drops in training; 0 where it is no dropout that is known."""
    name = _rate_name(type(module))
    return float(getattr(module, name) or 0.0) if name else 0.0


def inactive(module: Any) -> bool:
    """Whether a dropout of any kind, or an identity in its place, passes its input through, now."""
    if is_plain(module, nn.Identity):
        return True
    # a class that is not known may drop in evaluation too (Monte Carlo dropout)
    name = _rate_name(type(module))
    return name is not None and not hooked(module) and (not module.training or not getattr(module, name))
