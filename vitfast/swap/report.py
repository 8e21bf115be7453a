"""`report`: what is replaced in a model, and why the rest is not."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..adapters.decides import at_once
from ..adapters.known import mixin_name
from ..layers import FusedLayer, overridden
from ..watch import STATE
from .choices_file import Figure
from .match import check_model, disproved, matches


@dataclass(frozen=True)
class Row:
    """One replaceable module.

    Attributes:
        module: its name in the model, "" for the model itself.
        kind: of replacement, one of `vitfast.layers.KINDS`.
        original: name of the class that the library made.
        fused: name of the fused layer in its place, or None.
        note: why it is not replaced; for a replaced module what it still leaves to the original's modules, if anything.
    """

    module: str
    kind: str
    original: str
    fused: str | None
    note: str


@dataclass(frozen=True)
class Report:
    """What is replaced in a model, and why the rest is not. `str()` gives a table.

    Attributes:
        rows: one per module that is replaced, could be, or looks like what is replaced, in the model's order.
        precision: name of the policy the model was cast to, or None.
        measured: what `accelerate(example=...)` measured, decision by decision; empty without it.
        graphs: of `accelerate(cuda_graph=...)`: what is captured, and why the rest is not, in a sentence each.
        attention: the backend that `accelerate(attention=...)` chose.
        frozen: weights are promised to stay, so that what is derived from them is kept.
    """

    rows: tuple[Row, ...]
    precision: str | None = None
    measured: tuple[Figure, ...] = ()
    graphs: tuple[str, ...] = ()
    attention: str = "auto"
    frozen: bool = False

    @property
    def replaced(self) -> tuple[Row, ...]:
        """Rows of fused modules."""
        return tuple(row for row in self.rows if row.fused)

    @property
    def kept(self) -> tuple[Row, ...]:
        """Rows of modules that are as the library made them."""
        return tuple(row for row in self.rows if not row.fused)

    def __str__(self) -> str:
        groups: dict[tuple[str, str, str, str], list[str]] = {}
        for row in self.rows:
            key = (row.kind, row.original, row.fused or "-", row.note)
            groups.setdefault(key, []).append(row.module or "(model)")
        table = [("modules", "count", "kind", "original", "replaced by", "note")]
        for (kind, original, fused, note), names in groups.items():
            table.append((_collapse(names), str(len(names)), kind, original, fused, note))
        widths = [max(len(line[i]) for line in table) for i in range(5)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[5]]).rstrip()
            for line in table
        ]
        summary = f"{len(self.replaced)} modules replaced, {len(self.kept)} kept"
        figures = [f"measured, {figure}" for figure in self.measured]
        graphs = [f"cuda graphs: {note}" for note in self.graphs]
        precision = f", precision {self.precision}" if self.precision else ""
        attention = f", attention {self.attention}" if self.attention != "auto" else ""
        frozen = ", frozen: after writing weights through .data, call vitfast.refresh(model)" if self.frozen else ""
        return "\n".join([*lines, summary + precision + attention + frozen, *figures, *graphs])


def _collapse(names: list[str]) -> str:
    """`blocks.0.attn ... blocks.11.attn` for a run of names, so that a table has a line per pattern."""
    return names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"


def report(model: nn.Module) -> Report:
    """What `accelerate` replaced in a model, what it could replace, and why the rest stays.

    It reads the model as it is now, so hooks or adapters added since `accelerate` show.

    Args:
        model: any model, accelerated or not.

    Raises:
        TypeError: `model` is no `torch.nn.Module`.
    """
    check_model(model)
    left = {name: found for name, _, found in matches(model)}
    rows = []
    with at_once():
        for name, module in model.named_modules():
            if isinstance(module, FusedLayer):
                original = module.replaces.__name__
                if why := disproved(module):
                    rows.append(Row(name, module.kind, original, None, f"changed since it was replaced: {why}"))
                    continue
                note = "; ".join(overridden(module) + module.limits())
                rows.append(Row(name, module.kind, original, mixin_name(type(module)), note))
            elif (found := left.get(name)) is not None:
                note = found.reason or "could be replaced, is not switched on"
                rows.append(Row(name, found.kind, type(module).__name__, None, note))
    state = vars(model).get(STATE)
    precision = state.precision.name if state and state.precision else None
    measured = state.choice.figures if state and state.choice else ()
    graphs = tuple(state.graphs.notes()) if state and state.graphs else ()
    attention, frozen = (state.attention, state.frozen) if state else ("auto", False)
    return Report(tuple(rows), precision, measured, graphs, attention, frozen)
