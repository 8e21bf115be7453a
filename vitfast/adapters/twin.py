"""A module's twin: its own structure with random parameters in float64 on the CPU, that runs plain and fused."""

from __future__ import annotations

import random
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..layers import BlockPlan, FusedBlock, FusedLayer, FusedModel
from ..layers.base import SWITCHES
from ..watch import PLAN, STATE
from .known import Call, Match, around, original_class

# what nn.Module keeps for itself, and what `accelerate` puts into a module
INTERNAL = frozenset((*vars(nn.Module()), "_compiled_call_impl", STATE, PLAN, *SWITCHES))
# a rate for every dropout, under which most numbers stay and some go
_RATE = 0.3
# prime, so that no two rows of a matrix hold the same numbers
_BANK = 4099


class Unproved(Exception):
    """Says why a module does not count."""


@dataclass(frozen=True)
class Run:
    """One way to run a twin.

    Attributes:
        training: or else evaluation, with all calls; in training those that are differentiated run alone.
        drops: places of the module whose dropouts are on; None for all.
        gradients: of nothing, of inputs and "vectors" (what has few numbers), or of "all" parameters too.
        frozen: fused layers read what they derived from their weights.
    """

    training: bool
    drops: frozenset[str] | None
    gradients: str
    frozen: bool = False

    def __str__(self) -> str:
        if not self.training:
            return "evaluation with frozen weights" if self.frozen else "evaluation"
        return "training" if self.drops == frozenset() else "training with dropout"


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


def count(module: nn.Module, held: nn.Module | None) -> int:
    """How many parameters a twin would have."""
    return sum(p.numel() for _, part in tree(module, held) for p in part._parameters.values() if p is not None)


class Twin:
    """A module's own structure with random parameters, that runs plain and fused.

    Args:
        module: the original; it is only read.
        held: the module inside it whose blocks are stood in for, if any.
        dtype: of its numbers.

    Raises:
        Unproved: no twin of it can be made.
    """

    def __init__(self, module: nn.Module, held: nn.Module | None, dtype: torch.dtype = torch.float64) -> None:
        self._dtype = dtype
        self._twins: dict[int, Any] = {}
        self._to_refill: dict[Any, None] = {}
        self._count = 0
        self._tensors: dict[int, Tensor] = {}
        self._bank = torch.randn(_BANK, dtype=dtype, generator=torch.Generator().manual_seed(1))
        for _, part in tree(module, held):
            self._twins[id(part)] = object.__new__(original_class(type(part)))
        for _, part in tree(module, held):
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
            if is_rate(part, name, value)
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
                name not in INTERNAL
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
            name: b if b is None else self._once(b, partial(self._buffer, module, name))
            for name, b in module._buffers.items()
        }
        if module is held:
            own["_modules"] = {"0": StandIn(), "1": StandIn()}
        else:
            own["_modules"] = {name: m and self._twins[id(m)] for name, m in module._modules.items()}

    def _parameter(self, parameter: Tensor) -> Tensor:
        return nn.Parameter(self._numbers(parameter), requires_grad=parameter.is_floating_point())

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
            return buffer.to(self._dtype) if buffer.is_floating_point() else buffer
        if buffer.is_floating_point():
            return torch.zeros(buffer.shape, dtype=self._dtype) if self._refills(module) else self._numbers(buffer)
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

    def _tensor(self, x: Tensor) -> Tensor:
        if x.is_meta:
            return self._numbers(x)
        try:
            x = x.detach().cpu()
        except (NotImplementedError, RuntimeError) as error:
            raise Unproved(f"cannot be copied from {x.device}: {str(error).partition('. ')[0]}") from error
        return x.to(self._dtype) if x.is_floating_point() else x

    def _copied(self, value: Any) -> Any:
        if isinstance(value, nn.Module):
            if id(value) not in self._twins:
                raise Unproved(f"holds a {type(value).__name__} that is no part of it")
            return self._twins[id(value)]
        if isinstance(value, Tensor):
            return self._once(value, self._tensor)
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
            fused: type[nn.Module] | None
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

    def run(self, calls: list[Call], run: Run) -> tuple[list[Any], Any, list[Any]]:
        """Outputs as (leaves, their form), and gradients of inputs and parameters, for all calls."""
        for part, state in zip(self.modules, self._state, strict=True):
            stem = {name: vars(part)[name] for name in ("tail", "stem") if name in vars(part)}
            part.__dict__.clear()
            part.__dict__.update(state, training=run.training, **stem)
            if isinstance(part, FusedLayer):
                part.__dict__["frozen"] = run.frozen
        with torch.no_grad():
            for buffer, before in self._buffers:
                buffer.copy_(before)
        for place, part, name in self.rates:
            part.__dict__[name] = _RATE if run.drops is None or place in run.drops else 0.0
        leaves: dict[int, Tensor] = {}

        def given(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            leaf = leaves.setdefault(id(x), x.detach().to(self._dtype).requires_grad_())
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
            loss = torch.stack([(x * ramp(x)).sum() for x in differentiable]).sum()
            sources = [*leaves.values(), *(self._parameters if run.gradients == "all" else self._vectors)]
            grads = list(torch.autograd.grad(loss, sources, allow_unused=True))
        return found, form, grads


def ramp(x: Tensor) -> Tensor:
    """Weights for a sum of a tensor's numbers, in which no two count the same."""
    return torch.linspace(0.0, 7.0, x.numel(), dtype=x.dtype).cos().view(x.shape)


def is_rate(module: nn.Module, name: str, value: Any) -> bool:
    """Whether an attribute is the rate of a dropout."""
    if type(value) not in (int, float) or not 0 <= value <= 1:
        return False
    drops = "drop" in type(module).__name__.lower() or type(module).__name__ == "StochasticDepth"
    return "drop" in name.lower() or (drops and name in ("p", "prob", "rate"))


def tree(
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
                yield from tree(child, held, f"{prefix}.{name}", seen)
