"""What every fused layer has: a plan that is made once and kept for as long as a watch says that it holds.

Each fused class is a mix-in in front of the class that it replaces, made by `vitfast.adapters.known.around`, and
`accelerate` sets a module's `__class__` to it. So parameters, buffers, hooks and attributes stay where they are,
`isinstance` holds, `super().forward` is the original, and restoring is setting `__class__` back. The attribute names
are timm's, which the reference model shares.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .. import kernels
from ..watch import PLAN, Watch
from .guards import foreign, is_of_class, takes, why_not_on

# what `accelerate` sets on a fused layer, and `restore` takes away
SWITCHES = ("tf32", "attention_backend", "frozen", "fold", "tail", "stem")

KINDS = ("patch_embed", "layer_norm", "attention", "mlp", "block", "fold", "tail")


class Plan(NamedTuple):
    """What a fused layer decided; layers with more to decide have records of their own with these two in front.

    Attributes:
        original: why the original forward runs, or "".
        notes: what is left to the original's modules, one sentence each.
    """

    original: str
    notes: tuple[str, ...]


class Held:
    """A plan and the watch that says whether it holds. A copy of a module, or one that is unpickled, has none yet."""

    __slots__ = ("frozen", "plan", "stale", "watch")

    def __init__(self, watch: Watch | None = None, plan: Any = None, frozen: bool = False) -> None:
        self.watch, self.plan, self.frozen = watch, plan, frozen
        # weights may have been written unseen since: what was derived is not to be read again
        self.stale = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Held, ()


class FusedLayer(nn.Module if TYPE_CHECKING else object):  # type: ignore[misc]
    """What every fused layer has.

    Attributes:
        kind: one of `KINDS`, or "model".
        replaces: the class in whose place it stands.
        forwards: `own_forwards` of that class when it was proved.
        tf32: lets fp32 products run in tf32 on CUDA (precision "tf32").
        attention_backend: who computes attention, one of `vitfast.layers.backends.BACKENDS`.
        frozen: weights stay as they are, so what is derived from them may be kept (`accelerate(frozen=True)`).
    """

    kind: ClassVar[str]
    replaces: ClassVar[type[nn.Module]]
    forwards: ClassVar[tuple[Any, ...]]
    tf32: bool = False
    attention_backend: str = "auto"
    frozen: bool = False

    def make_plan(self, derive: bool = False) -> Any:
        """Decide, of the modules as they are now, what runs in which kernel.

        Args:
            derive: also compute what is derived from weights, and keep it in the plan.
        """
        raise NotImplementedError

    def plan(self) -> Any:
        """The plan, made anew where the watch says that something changed."""
        if torch.compiler.is_compiling():
            # a compiler guards what it reads; a derived tensor it would not see change
            return self.make_plan()
        held = self.__dict__.get(PLAN)
        if (
            held is not None
            and held.watch is not None
            and held.watch.same(self)
            and not (held.frozen and held.watch.written())
        ):
            return held.plan
        return self._hold()

    def _hold(self) -> Any:
        self._release()
        derive = self.frozen and not self.training and not _unwatchable(self)
        if derive:
            # ordinary tensors, which may be read in any mode
            with torch.inference_mode(False), torch.no_grad():
                plan = self.make_plan(derive=True)
            if any(p.is_cuda for p in self.parameters()):
                # whatever stream reads them next
                torch.cuda.current_stream(next(self.parameters()).device).synchronize()
        else:
            plan = self.make_plan()
        self.__dict__[PLAN] = Held(Watch(self, tensors=derive), plan, derive)
        return plan

    def plan_for(self, x: Any) -> Any:
        """The plan by which these tokens are computed, or None where the original has to run."""
        if not takes(x):
            return None
        plan = self.plan()
        return None if plan.original else plan

    def forget(self) -> None:
        """Drop the plan, and what is derived from weights with it: they may have been written unseen."""
        held = self._release()
        if held is not None:
            held.stale = True

    def _release(self) -> Held | None:
        held = self.__dict__.pop(PLAN, None)
        if held is not None and held.frozen and any(p.is_cuda for p in self.parameters()):
            # a launch on another stream may still read what was derived
            torch.cuda.synchronize(next(self.parameters()).device)
        return held

    def __setattr__(self, name: str, value: Any) -> None:
        # Transformers 4.57 puts a forward on the object to capture outputs, and the class's own when that is done
        if name == "forward" and is_of_class(self, value):
            self.__dict__.pop("forward", None)
        else:
            super().__setattr__(name, value)

    def train(self, mode: bool = True) -> Any:
        """As `torch.nn.Module.train`. Training ends what was derived from weights; evaluation derives it anew."""
        if mode:
            self.forget()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.forget()
        return super()._apply(fn, recurse)

    def __prepare_scriptable__(self) -> nn.Module:
        """The module for `torch.jit.script`, which compiles the original's code."""
        return as_original(self)

    def limits(self) -> list[str]:
        """What this layer leaves to the original's modules at present, one sentence each."""
        plan = self.make_plan()
        elsewhere = {why for p in self._parameters.values() if p is not None if (why := why_not_on(p.device, p.dtype))}
        found = [f"{why}: the original forward runs" for why in (*sorted(elsewhere), plan.original) if why]
        if self.frozen and _unwatchable(self):
            found.append("weights are inference tensors or others that hide their changes: nothing is derived")
        return [*found, *plan.notes]


def _unwatchable(module: nn.Module) -> bool:
    """Whether a module holds tensors that do not say when they change."""
    return any(p.is_inference() or foreign(part) for part in module.modules() for p in part.parameters(recurse=False))


def as_original(module: nn.Module) -> nn.Module:
    """A copy of a module and those inside it, of the classes that fused ones replace; parameters are shared."""
    twin = copy.copy(module)
    twin.__dict__ = dict(module.__dict__)
    twin.__dict__.pop(PLAN, None)
    twin._modules = {name: None if m is None else as_original(m) for name, m in module._modules.items()}
    if isinstance(module, FusedLayer):
        object.__setattr__(twin, "__class__", type(module).replaces)
    return twin


class FusedLayerNorm(FusedLayer):
    """LayerNorm over the last dimension: `vitfast.kernels.layer_norm`."""

    kind = "layer_norm"
    weight: Any
    bias: Any
    eps: float

    def make_plan(self, derive: bool = False) -> Plan:
        """Weights are what decides."""
        return Plan(original_of(self), ())

    def plan(self) -> Plan:
        """Made in each call, since it takes less time than a watch."""
        return self.make_plan()

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        return super().forward(x) if self.plan_for(x) is None else self.compute(x)  # type: ignore[misc]

    def compute(self, x: Tensor) -> Tensor:
        """`forward` where nothing keeps the kernel from it."""
        return kernels.layer_norm(x, self.weight, self.bias, self.eps)


def own_forwards(kind: type) -> tuple[Any, ...]:
    """The `forward` of a class and of each that it is made of."""
    return tuple(vars(base).get("forward") for base in kind.__mro__)


def original_of(module: nn.Module) -> str:
    """Why a module's own tensors, or its class, keep the kernels from it."""
    if held := foreign(module):
        return f"holds a {held}"
    if not torch.compiler.is_compiling():
        kind: Any = type(module)
        if own_forwards(kind.replaces) != kind.forwards:
            return f"the forward of {kind.replaces.__name__} was replaced"
    return ""
