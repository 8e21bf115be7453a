"""A class counts when it is proved: a module, plain and fused, gives the same outputs and gradients on an example.

The proof runs on a twin: the module's own classes, structure, options and shapes, with random parameters in float64 on
the CPU, without hooks. It is run in evaluation and in training, with every dropout off and with every dropout on (both
see the same random numbers), for all calls of the example. The twin's fused layers compute by the kernels' references.

What is found is kept under everything that decides it: the functions of the module's classes and the helpers that these
mention, options that they read, shapes, and the fused layer. So layers that do not differ in these share a proof,
and a function that somebody exchanges later asks for another.
"""

from __future__ import annotations

import random
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten

from .. import kernels
from ..layers import BlockPlan, FusedBlock, FusedModel, own_forwards, view_as
from .known import Call, Match, Offer, around

# what nn.Module keeps for itself
_INTERNAL = frozenset((*vars(nn.Module()), "_compiled_call_impl"))
# a rate for every dropout, under which most numbers stay and some go
_RATE = 0.3
# prime, so that no two rows of a matrix hold the same numbers
_BANK = 4099


class Unproved(Exception):
    """Says why a module does not count."""


def prove(module: nn.Module, offer: Offer, mixin: type[Any], match: Callable[[nn.Module], Match | None]) -> str | None:
    """Why a mix-in may not stand for a module, in a sentence, or None where it may.

    Args:
        module: on any device, in any dtype, fused or not; it is only read.
        offer: how it is called, and how near the results have to be.
        mixin: of the fused layer.
        match: says what stands for the modules inside it.
    """
    held = _blocks(mixin, module) if issubclass(mixin, FusedModel) else None
    key = (mixin, offer.examples, _key(module, held))
    if key not in _verdicts:
        if len(_verdicts) >= 4096:
            _verdicts.clear()
        _verdicts[key] = _try(module, offer, mixin, match, held)
    if _verdicts[key] is None:
        original = original_class(type(module))
        # a plan compares them
        around(mixin, original).forwards = own_forwards(original)  # type: ignore[attr-defined]
    return _verdicts[key]


_verdicts: dict[Any, str | None] = {}


def disproves(reason: str) -> bool:
    """Whether a reason of `prove` says that both ran and differ."""
    return reason.startswith(_OTHER)


_OTHER = "computes something else than "


def original_class(kind: type[Any]) -> type[nn.Module]:
    """The library's class behind a fused one, or the class itself."""
    return getattr(kind, "replaces", kind)


def _blocks(mixin: type[Any], module: nn.Module) -> nn.Module:
    return view_as(around(mixin, original_class(type(module))), module).blocks


# the proof


def _try(module: nn.Module, offer: Offer, mixin: type[Any], match: Any, held: nn.Module | None) -> str | None:
    with _apart():
        try:
            twin = Twin(module, held)
            twin.fuse(mixin, match)
            for setting in offer.settings:
                with setting(twin.root):
                    twin.remember()
                    if reason := _tried(twin, offer, mixin):
                        return reason
        except Unproved as error:
            return str(error)
    return None


def _tried(twin: Twin, offer: Offer, mixin: type[Any]) -> str | None:
    calls, expected = _example(twin, offer)
    for run in _runs(twin):
        if run.training:
            expected = twin.run(calls, run)
        try:
            with twin.fused():
                actual = twin.run(calls, run)
        except Exception as error:
            return f"{mixin.__name__} fails in {run}: {_brief(error)}"
        if what := _differ(actual, expected, offer.rtol):
            return f"{_OTHER}{mixin.__name__}: {what} in {run}"
    return None


@dataclass(frozen=True)
class _Run:
    """One way to run a twin.

    Attributes:
        training: or else evaluation, with all calls; in training those that are differentiated run alone.
        drops: places of the module whose dropouts are on; None for all.
        gradients: of nothing, of inputs and "vectors" (what has few numbers), or of "all" parameters too.
    """

    training: bool
    drops: frozenset[str] | None
    gradients: str

    def __str__(self) -> str:
        return (
            "evaluation" if not self.training else "training" if self.drops == frozenset() else "training with dropout"
        )


_EVALUATION = _Run(False, None, "vectors")


def _runs(twin: Twin) -> Iterator[_Run]:
    yield _EVALUATION
    yield _Run(True, frozenset(), "all")
    places = dict.fromkeys(place for place, _, _ in twin.rates)
    if places:
        yield _Run(True, None, "vectors")
    if len(places) > 1:
        # with another dropout on, a fused layer may leave all to the original
        yield from (_Run(True, frozenset((place,)), "none") for place in places)


def _example(twin: Twin, offer: Offer) -> tuple[list[Call], Any]:
    """The first example that the original takes, and what it gives in evaluation."""
    error: Any = None
    for example in offer.examples:
        try:
            calls = list(example(twin.root))
            return calls, twin.run(calls, _EVALUATION)
        except Exception as found:
            error = error or found
    raise Unproved(f"cannot be tried: {_brief(error)}")


def _brief(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {text[:120]}"


def _differ(actual: Any, expected: Any, rtol: float) -> str | None:
    (found, shape, grads), (wanted, expected_shape, expected_grads) = actual, expected
    if shape != expected_shape:
        return "outputs of another form"
    if not all(map(_close, found, wanted, [rtol] * len(found))):
        return "other outputs"
    # what is zero but for rounding is as near as its neighbours are large
    largest = max((_largest(g) for g in expected_grads if g is not None), default=0.0)
    for a, b in zip(grads, expected_grads, strict=True):
        if not _close(a, b, rtol, largest * rtol):
            return "other gradients"
    return None


def _largest(x: Tensor) -> float:
    return max(map(abs, torch.aminmax(x))).item() if x.numel() else 0.0  # type: ignore[call-overload]


def _close(a: Any, b: Any, rtol: float, atol: float = 0.0) -> bool:
    """Compares, and overwrites the first."""
    if a is None or b is None:
        # an unused parameter's gradient
        return all(x is None or not isinstance(x, Tensor) or _largest(x) == 0.0 for x in (a, b)) if atol else a is b
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and (not isinstance(a, (int, float, str, bool)) or a == b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    size = _largest(b)
    error = _largest(a.detach().sub_(b.detach())) if a.numel() else 0.0
    # a NaN is no number that is near
    return error <= max(rtol * size, atol)


@contextmanager
def _apart() -> Iterator[None]:
    """Whatever modes a user set are off, and no random number of his is drawn."""
    numpy = sys.modules.get("numpy")
    python, of_numpy = random.getstate(), numpy and numpy.random.get_state()
    try:
        with ExitStack() as stack:
            stack.enter_context(_disable_current_modes())
            stack.enter_context(torch.device("cpu"))
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast("cpu", enabled=False))
            stack.enter_context(kernels.by_reference())
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            torch.default_generator.manual_seed(0)
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(of_numpy)


# the twin


class StandIn(nn.Module):
    """In the place of a model's blocks: cheap, and mixes tokens."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`."""
        return x + torch.tanh(x.mean(dim=-2, keepdim=True) + 0.5 * x.roll(1, -1))


class FusedStandIn(FusedBlock, StandIn):
    """What a fused model may ask of its last block."""

    replaces = StandIn

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`."""
        return StandIn.forward(self, x)

    def plan(self) -> BlockPlan:
        """It computes the first tokens alone, and has nothing to fold."""
        return BlockPlan("", (), prefix=True)

    def fused_prefix(self, x: Tensor, count: int, plan: BlockPlan) -> Tensor:
        """The first tokens: `[B, N, D]` to `[B, count, D]`."""
        return StandIn.forward(self, x)[:, :count]

    def limits(self) -> list[str]:
        """None."""
        return []


class Twin:
    """A module's own structure with random parameters, that runs plain and fused.

    Args:
        module: the original; it is only read.
        held: the module inside it whose blocks are stood in for, if any.

    Raises:
        Unproved: no twin of it can be made.
    """

    def __init__(self, module: nn.Module, held: nn.Module | None) -> None:
        self._twins: dict[int, Any] = {}
        self._to_refill: dict[Any, None] = {}
        self._count = 0
        self._tensors: dict[int, Tensor] = {}
        self._bank = torch.randn(_BANK, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for _, part in _tree(module, held):
            self._twins[id(part)] = object.__new__(original_class(type(part)))
        for _, part in _tree(module, held):
            self._fill(part, held)
        with torch.no_grad():
            for twin in self._to_refill:
                twin._init_buffers()
        self.root: Any = self._twins[id(module)]
        self.modules: list[Any] = list(self.root.modules())
        # (the place inside the root, the module, the attribute)
        self.rates = [
            ((path or name).partition(".")[0], part, name)
            for path, part in self.root.named_modules()
            for name, value in vars(part).items()
            if _is_rate(part, name, value)
        ]
        parameters = list(self.root.parameters())
        self._parameters = [p for p in parameters if p.is_floating_point()]
        self._vectors = [p for p in self._parameters if p.numel() < _BANK]
        self._state: list[dict[str, Any]] = []
        self._buffers = [(b, b.clone()) for b in self.root.buffers()]
        self._classes: list[tuple[Any, type, type]] = []

    def _fill(self, module: nn.Module, held: nn.Module | None) -> None:
        twin = self._twins[id(module)]
        own = twin.__dict__
        own.update(vars(nn.Module()))
        kind = type(module)
        for name, value in vars(module).items():
            if (
                name not in _INTERNAL
                and not callable(getattr(kind, name, None))
                and not name.startswith(("_vitfast", "_hf_hook"))
            ):
                own[name] = self._copied(value)
        own["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
        own["_parameters"] = {
            name: p
            if p is None
            else self._once(p, lambda p: nn.Parameter(self._numbers(p), requires_grad=p.is_floating_point()))
            for name, p in module._parameters.items()
        }
        own["_buffers"] = {
            name: b if b is None else self._once(b, lambda b, name=name: self._buffer(module, name, b))
            for name, b in module._buffers.items()
        }
        if module is held:
            own["_modules"] = {"0": StandIn(), "1": StandIn()}
        else:
            own["_modules"] = {name: m and self._twins[id(m)] for name, m in module._modules.items()}

    def _once(self, tensor: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        if id(tensor) not in self._tensors:
            self._tensors[id(tensor)] = make(tensor)
        return self._tensors[id(tensor)]

    def _numbers(self, like: Tensor) -> Tensor:
        """Random numbers of a parameter's shape: none is zero or one, and no two rows are the same."""
        if not (like.is_floating_point() or like.is_meta):
            return like.detach().cpu()
        shape, count = like.shape, like.numel()
        self._count += 1
        bank = self._bank.roll(997 * self._count)
        if len(shape) < 2:
            bank = 0.3 * bank + 0.6
        elif shape[0] == 1:
            bank = 0.5 * bank
        else:
            bank = bank * (shape[0] / max(count, 1)) ** 0.5
        return bank.repeat(-(-count // _BANK))[:count].view(shape)

    def _buffer(self, module: nn.Module, name: str, buffer: Tensor) -> Tensor:
        if not buffer.is_meta:
            buffer = buffer.detach().cpu().clone()
            return buffer.double() if buffer.is_floating_point() else buffer
        if buffer.is_floating_point():
            return torch.zeros(buffer.shape, dtype=torch.float64) if self._refills(module) else self._numbers(buffer)
        if name == "position_ids":
            return torch.arange(buffer.numel()).view(buffer.shape)
        makes = getattr(self._twins[id(module)], "_create_relative_position_index", None)
        if name == "relative_position_index" and makes is not None:
            return makes().view(buffer.shape)
        if self._refills(module):
            return torch.zeros(buffer.shape, dtype=buffer.dtype)
        raise Unproved(f"its buffer {name} is on the meta device: what stands in it is not known")

    def _refills(self, module: nn.Module) -> bool:
        """Whether a module can make its buffers anew."""
        twin = self._twins[id(module)]
        if hasattr(type(twin), "_init_buffers"):
            self._to_refill[twin] = None
            return True
        return False

    def _copied(self, value: Any) -> Any:
        if isinstance(value, nn.Module):
            if id(value) not in self._twins:
                raise Unproved(f"holds a {type(value).__name__} that is no part of it")
            return self._twins[id(value)]
        if isinstance(value, Tensor):
            return self._once(
                value,
                lambda x: (
                    self._numbers(x)
                    if x.is_meta
                    else x.detach().cpu().double()
                    if x.is_floating_point()
                    else x.detach().cpu()
                ),
            )
        if type(value) in (list, tuple, set):
            return type(value)(map(self._copied, value))
        if type(value) is dict:
            return {key: self._copied(of_key) for key, of_key in value.items()}
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            return types.MethodType(value.__func__, self._copied(value.__self__))
        return value

    def remember(self) -> None:
        """Start each run from what the modules hold now."""
        self._state = [dict(vars(part)) for part in self.modules]

    def fuse(self, mixin: type[Any], match: Callable[[nn.Module], Match | None]) -> None:
        """Decide what runs in the place of what: as a whole, and inside."""
        for part in self.modules:
            if part is self.root:
                fused = around(mixin, type(part))
            elif isinstance(part, StandIn):
                fused = FusedStandIn
            else:
                found = match(part)
                fused = found.fused if found else None
            if fused is not None:
                self._classes.append((part, type(part), fused))

    @contextmanager
    def fused(self) -> Iterator[None]:
        """While open, the twin is fused."""
        try:
            for part, _, fused in self._classes:
                part.__class__ = fused
                if isinstance(part, FusedModel):
                    part.__dict__.update(tail=True, stem=True)
            yield
        finally:
            for part, original, _ in self._classes:
                part.__class__ = original

    def run(self, calls: list[Call], run: _Run) -> tuple[list[Any], Any, list[Any]]:
        """Outputs as (leaves, their form), and gradients of inputs and parameters, for all calls."""
        for part, state in zip(self.modules, self._state, strict=True):
            stem = {name: vars(part)[name] for name in ("tail", "stem") if name in vars(part)}
            part.__dict__.clear()
            part.__dict__.update(state, training=run.training, **stem)
        with torch.no_grad():
            for buffer, before in self._buffers:
                buffer.copy_(before)
        for place, part, name in self.rates:
            part.__dict__[name] = _RATE if run.drops is None or place in run.drops else 0.0
        leaves: dict[int, Tensor] = {}

        def given(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            leaf = leaves.setdefault(id(x), x.detach().requires_grad_())
            return clones.setdefault(id(x), leaf.clone())

        outputs, differentiated = [], []
        # torch.manual_seed would seed GPUs too
        torch.default_generator.manual_seed(0)
        random.seed(0)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(0)
        for call in calls:
            if run.training and not call.backward:
                continue
            clones: dict[int, Tensor] = {}
            args = [given(x) for x in call.args]
            kwargs = {name: given(x) for name, x in call.kwargs.items()}
            outputs.append(getattr(self.root, call.method)(*args, **kwargs))
            if call.backward:
                differentiated.append(outputs[-1])
        found, form = tree_flatten(outputs)
        leaves_out = tree_flatten(differentiated)[0]
        differentiable = [x for x in leaves_out if isinstance(x, Tensor) and x.requires_grad]
        grads: list[Any] = []
        if differentiable and run.gradients != "none":
            # weights of all numbers differ
            loss = torch.stack([(x * _ramp(x)).sum() for x in differentiable]).sum()
            sources = [*leaves.values(), *(self._parameters if run.gradients == "all" else self._vectors)]
            grads = list(torch.autograd.grad(loss, sources, allow_unused=True))
        return found, form, grads


def _ramp(x: Tensor) -> Tensor:
    return torch.linspace(0.0, 7.0, x.numel(), dtype=x.dtype).cos().view(x.shape)


def _is_rate(module: nn.Module, name: str, value: Any) -> bool:
    """Whether an attribute is the rate of a dropout."""
    if type(value) not in (int, float) or not 0 <= value <= 1:
        return False
    drops = "drop" in type(module).__name__.lower() or type(module).__name__ == "StochasticDepth"
    return "drop" in name.lower() or (drops and name in ("p", "prob", "rate"))


# what decides a proof


def _tree(
    module: nn.Module, held: nn.Module | None, prefix: str = "", seen: Any = None
) -> Iterator[tuple[str, nn.Module]]:
    seen = set() if seen is None else seen
    if id(module) in seen:
        return
    seen.add(id(module))
    yield prefix, module
    if module is not held:
        for name, child in module._modules.items():
            if child is not None:
                yield from _tree(child, held, f"{prefix}.{name}", seen)


def _key(module: nn.Module, held: nn.Module | None) -> Any:
    parts = list(_tree(module, held))
    kinds = list(dict.fromkeys(original_class(type(part)) for _, part in parts))
    facts = [_facts(kind) for kind in kinds]
    names = frozenset(chain.from_iterable(mentioned for _, mentioned in facts))
    described = tuple((name, original_class(type(part)), _shapes(part), _options(part, names)) for name, part in parts)
    return tuple(functions for functions, _ in facts), described


def _shapes(module: nn.Module) -> Any:
    tensors = chain(module._parameters.items(), module._buffers.items())
    return tuple((name, t if t is None else (t.shape, t.is_floating_point())) for name, t in tensors)


def _options(module: nn.Module, names: frozenset[str]) -> Any:
    return tuple(
        (name, _frozen(value, names))
        for name, value in vars(module).items()
        if name not in _INTERNAL and name in names and not _is_rate(module, name, value)
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


def _facts(kind: type[nn.Module]) -> tuple[Any, frozenset[str]]:
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
