"""Parity: every replaced module of a model, and the model's output, held to the tolerance rule of `vitfast.rule`."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import match
from ..adapters.known import mixin_name
from ..kernels import fp32_products
from ..layers import FusedBlock, FusedLayer
from ..rule import ALIKE, FACTOR, Comparison, compare
from ..swap.accelerate import accelerate, restore
from ..swap.precision import get_precision
from ..table import text_table
from .draws import Draws, RandomState


@dataclass(frozen=True)
class ModuleParity:
    """How one replaced module does on the input that the plain model gives it.

    Attributes:
        module: its name in the model, "" for the model itself.
        kind: of replacement, see `vitfast.layers.KINDS`.
        original: name of the library's class.
        fused: name of the class in its place.
        comparison: the rule on its output; of a module that runs more than once, the call nearest to its limit.
    """

    module: str
    kind: str
    original: str
    fused: str
    comparison: Comparison


@dataclass(frozen=True)
class Top1:
    """On how many images the largest output is where truth's is.

    Two classes nearer to each other than the allowed error are a tie that torch could not break either, so these
    counts are shown and the rule on the outputs decides.

    Attributes:
        images: number of images.
        accelerated, plain: images with truth's largest output.
        equal: images on which the two agree with each other.
    """

    images: int
    accelerated: int
    plain: int
    equal: int


@dataclass(frozen=True)
class Parity:
    """What the rule says of an accelerated model. `str()` gives a table.

    Attributes:
        precision: name of the policy.
        device: where it ran.
        shape: of the pixels.
        modules: one per replaced module that ran, in the order in which they finished.
        output: the rule on the model's output.
        top1: largest outputs; None where the model has no classes.
    """

    precision: str
    device: str
    shape: tuple[int, ...]
    modules: tuple[ModuleParity, ...]
    output: Comparison
    top1: Top1 | None

    @property
    def broken(self) -> tuple[ModuleParity, ...]:
        """Modules that break the rule."""
        return tuple(row for row in self.modules if not row.comparison.ok)

    @property
    def ok(self) -> bool:
        """Whether the model's output and every replaced module keep the rule."""
        return self.output.ok and not self.broken

    def groups(self) -> list[tuple[int, ModuleParity]]:
        """(number of modules, the one nearest to its limit or furthest over it) per kind and original class."""
        grouped: dict[tuple[str, str], list[ModuleParity]] = {}
        for row in self.modules:
            grouped.setdefault((row.kind, row.original), []).append(row)
        return [(len(rows), max(rows, key=_severity)) for rows in grouped.values()]

    def table(self, *, each: bool = False) -> str:
        """Rows of errors, then the verdict.

        Args:
            each: a row for every module, instead of the worst of each kind and original class.
        """
        numbers = ("count", "max error", "limit", "relative", "torch's", "of limit")
        rows = [
            (row.kind, row.original, str(count), *_cells(row.comparison), row.module or "(model)")
            for count, row in ([(1, row) for row in self.modules] if each else self.groups())
        ]
        rows.append(("output", "", "", *_cells(self.output), "(model)"))
        lines = [text_table(("kind", "original", *numbers, "rule", "worst at"), rows, right=range(2, 8))]
        if self.output.truth_rms == 0.0:
            # such as a new model's, whose head is zero
            lines.append("output: zero whatever the modules do, so that their rows alone prove something")
        else:
            lines.append(f"output: cosine similarity with float64 {self.output.cosine:.9f}")
        if self.top1 is not None and self.output.truth_rms > 0.0:
            lines.append(
                f"top-1: {self.top1.accelerated} of {self.top1.images} as in float64 "
                f"(plain model: {self.top1.plain}), {self.top1.equal} of {self.top1.images} as in the plain model"
            )
        lines.append(self.verdict)
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    @property
    def verdict(self) -> str:
        """One sentence: whether the rule holds, and what breaks it."""
        rule = f"at most {FACTOR:g} x torch's own error in {self.precision}, plus one ulp"
        if self.ok:
            return f"the rule holds ({rule}): output and {len(self.modules)} modules"
        broken = [row.module or "(model)" for row in self.broken]
        if not self.output.ok:
            broken.insert(0, "output")
        names = ", ".join(broken[:4]) + (f" and {len(broken) - 4} more" if len(broken) > 4 else "")
        return f"the rule is broken ({rule}): {names}"


def _severity(row: ModuleParity) -> float:
    share = row.comparison.share
    return float("inf") if share != share else share


def _cells(c: Comparison) -> tuple[str, ...]:
    return (
        f"{c.worst:.2e}",
        f"{c.worst_limit:.2e}",
        f"{c.relative:.2e}",
        f"{c.baseline_relative:.2e}",
        f"{100.0 * c.share:.0f} %",
        "ok" if c.ok else "BROKEN",
    )


def first_tensor(output: Any) -> Tensor:
    """The tensor that counts in what a module returned: itself, or the first of a tuple, a dict or a model output."""
    while not isinstance(output, Tensor):
        if isinstance(output, Mapping) and output:
            output = next(iter(output.values()))
        elif isinstance(output, (tuple, list)) and output:
            output = output[0]
        else:
            raise ValueError(f"expected a tensor in what the model returns, got {type(output).__name__}")
    return output


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _double(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_double(item) for item in value)
    return value


class _Modules:
    """Compares replaced modules while the plain model runs, so that no activation outlives its module's call."""

    def __init__(self, plain: nn.Module, fused: nn.Module, truth: nn.Module, draws: Draws | None) -> None:
        self.rows: dict[str, ModuleParity] = {}
        self._models = (plain, fused, truth)
        self._draws = draws
        # of the modules that run now, from the outermost: the state at the start, and what was drawn before
        self._started: list[tuple[RandomState, int]] = []

    def watch(self, name: str) -> Iterator[Any]:
        """Hooks on the plain module of that name, to be removed."""
        module, fused, truth = (model.get_submodule(name) for model in self._models)

        def start(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._draws is not None:
                self._started.append((RandomState(module), len(self._draws.made)))

        def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self._draws is None:
                actual, exact = fused(*args, **kwargs), truth(*_double(args), **_double(kwargs))
            else:
                (state, drawn), after = self._started.pop(), RandomState(module)
                with self._draws.paused():
                    state.restore(fused)
                    actual = fused(*args, **kwargs)
                    state.restore(truth)
                    with Draws(self._draws.made[drawn:]) as given:
                        exact = truth(*_double(args), **_double(kwargs))
                given.finish()
                after.restore(module)
            self.add(name, fused, _compare(first_tensor(actual), first_tensor(exact), first_tensor(output)))

        yield module.register_forward_pre_hook(start, with_kwargs=True)
        yield module.register_forward_hook(end, with_kwargs=True)

    def add(self, name: str, fused: Any, comparison: Comparison) -> None:
        row = ModuleParity(name, fused.kind, fused.replaces.__name__, mixin_name(type(fused)), comparison)
        known = self.rows.get(name)
        if known is None or _severity(row) > _severity(known):
            self.rows[name] = row


def _compare(actual: Tensor, truth: Tensor, baseline: Tensor) -> Comparison:
    return compare(actual, truth, baseline, least_cosine=ALIKE)


@contextmanager
def _first_block_input(model: nn.Module) -> Iterator[list[Tensor]]:
    """While open, a forward of `model` leaves the tokens that enter its first block; nothing where it has no blocks."""
    caught: list[Tensor] = []
    block = next((module for module in model.modules() if _is_block(module)), None)
    handle = None
    if block is not None:
        handle = block.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    try:
        yield caught
    finally:
        if handle is not None:
            handle.remove()


def _is_block(module: nn.Module) -> bool:
    if isinstance(module, FusedBlock):
        return True
    found = None if isinstance(module, FusedLayer) else match(module)
    return found is not None and found.kind == "block"


@torch.inference_mode()
def parity(model: nn.Module, pixels: Tensor, precision: str = "fp32", *, only: Collection[str] | None = None) -> Parity:
    """Errors of an accelerated model and of each replaced module against float64, held to the rule.

    Truth is the plain model in float64 with the weights and pixels that the tested precision has. Each replaced module
    gets the input that the plain model gives it in that precision, so errors of modules do not add up in its row. A
    replaced model class (prefix tokens and position embedding in the patch-embed kernel) is judged by the tokens that
    enter the first block. Works on copies: `model` stays as it is, and so does the state of every generator.

    Every forward that is compared starts from the same state of every generator. If the plain model draws random
    numbers in evaluation, float64 gets those that the tested precision drew. An output that is not like truth (cosine
    similarity below `vitfast.rule.ALIKE`) breaks the rule, however large torch's own error is.

    Args:
        model: plain or accelerated; a copy of it is restored, set to evaluation mode and accelerated anew.
        pixels: `[B, C, H, W]`, any floating dtype, on the model's device.
        precision: "fp32", "tf32", "bf16" or "fp16"; "tf32" differs from "fp32" on CUDA only.
        only: kinds of replacement, see `vitfast.accelerate`.

    Raises:
        ValueError: an unknown precision or kind, nothing in the model can be replaced, or it draws random numbers in a
            way that float64 cannot repeat.
    """
    policy = get_precision(precision)
    pixels = pixels.to(policy.dtype)
    plain = restore(copy.deepcopy(model)).eval().to(policy.dtype)
    fused = accelerate(copy.deepcopy(plain), precision=precision, only=only, frozen=True)
    truth = copy.deepcopy(plain).double()
    replaced = [name for name, module in fused.named_modules() if isinstance(module, FusedLayer)]
    if not replaced:
        raise ValueError(f"nothing in this {type(model).__name__} can be replaced; vitfast.report(model) says why")

    state = RandomState(plain)
    try:
        with fp32_products(pixels.device, policy.tf32):
            with _first_block_input(plain) as plain_tokens:
                baseline = first_tensor(plain(pixels))
            draws = Draws() if state.moved(plain) else None
            state.restore(fused)
            with _first_block_input(fused) as actual_tokens:
                actual = first_tensor(fused(pixels))
            modules = _Modules(plain, fused, truth, draws)
            state.restore(plain)
            with ExitStack() as stack:
                # hooks come after the accelerated run, and only the plain model has them
                for name in filter(None, replaced):
                    for handle in modules.watch(name):
                        stack.callback(handle.remove)
                stack.enter_context(draws or nullcontext())
                plain(pixels)
        state.restore(truth)
        given = None if draws is None else Draws(draws.made)
        with given or nullcontext(), _first_block_input(truth) as exact_tokens:
            exact = first_tensor(truth(pixels.double()))
        if given is not None:
            given.finish()
    finally:
        state.restore(plain)
    if "" in replaced and exact_tokens:
        modules.add("", fused, _compare(actual_tokens[0], exact_tokens[0], plain_tokens[0]))

    top1 = None
    if exact.ndim == 2 and getattr(model, "num_classes", None) != 0:
        best = [logits.argmax(dim=-1) for logits in (exact, actual, baseline)]
        accelerated, agreeing, equal = (int((best[i] == best[j]).sum()) for i, j in ((0, 1), (0, 2), (1, 2)))
        top1 = Top1(exact.shape[0], accelerated, agreeing, equal)
    return Parity(
        policy.name,
        str(pixels.device),
        tuple(pixels.shape),
        tuple(modules.rows.values()),
        _compare(actual, exact, baseline),
        top1,
    )
