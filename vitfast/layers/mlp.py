"""The MLP: activation in the first GEMM's epilogue, LayerScale and residual in the second's."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from .. import kernels
from .base import FusedLayer, original_of
from .guards import add_residual, compute_linear, hooked, linear, plain
from .known import epilogue, inactive


class MlpPlan(NamedTuple):
    """How an MLP runs.

    Attributes:
        original: why the original forward runs, or "".
        notes: what is left to the original's modules, one sentence each.
        activation: the epilogue of the first layer, or None where layer and activation are called.
        plain_out: the second layer is computed without calling a module.
        drops_inside, drops: dropout behind the activation, and behind the second layer, is at work.
    """

    original: str
    notes: tuple[str, ...]
    activation: str | None
    plain_out: bool
    drops_inside: bool
    drops: bool

    @property
    def complete(self) -> bool:
        """Whether no module inside is called."""
        return (
            not self.original and not self.drops_inside and not self.drops and self.plain_out and bool(self.activation)
        )


class FusedMlp(FusedLayer):
    """Two linear layers and an activation between them."""

    kind = "mlp"
    fc1: Any
    act: Any
    drop1: Any
    fc2: Any
    drop2: Any

    def why_original(self) -> str:
        """Why the modules inside are not those that stand here by their names; empty where they are."""
        return original_of(self)

    def make_plan(self, derive: bool = False) -> MlpPlan:
        """Which of the modules inside are computed without being called."""
        if original := self.why_original():
            return MlpPlan(original, (), None, False, True, True)
        notes: list[str] = []
        plain_in, plain_out = linear("fc1", self.fc1, notes), linear("fc2", self.fc2, notes)
        activation = epilogue(self.act)
        if activation is None:
            plain("act", self.act, type(self.act) if hooked(self.act) else nn.GELU, notes)
        return MlpPlan(
            "",
            tuple(notes),
            activation if plain_in else None,
            plain_out,
            not inactive(self.drop1),
            not inactive(self.drop2),
        )

    def between(self, hidden: Tensor) -> Tensor:
        """What the model does between the activation's dropout and the second layer: nothing, here."""
        return hidden

    def fused(self, x: Tensor, plan: MlpPlan, residual: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """`residual + scale * mlp(x)`, `[..., D]` to `[..., D]`."""
        # one name for all, or the input's memory would be kept from the second layer
        if plan.activation is not None:
            x = kernels.linear(x, self.fc1.weight, self.fc1.bias, plan.activation, tf32=self.tf32)
        else:
            x = self.act(self.fc1(x))
        x = self.between(self.drop1(x) if plan.drops_inside else x)
        if not plan.drops:
            return compute_linear(plan.plain_out, self.fc2, x, residual, scale, self.tf32)
        x = self.drop2(compute_linear(plan.plain_out, self.fc2, x, None, None, self.tf32))
        return add_residual(x, residual, scale)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        plan = self.plan_for(x)
        return super().forward(x) if plan is None else self.fused(x, plan)  # type: ignore[misc]
