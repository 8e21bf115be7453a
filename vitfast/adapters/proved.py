"""A class counts when it is proved: a module, plain and fused, gives the same on a small example, and so do gradients.

The proof runs on a twin: the module's own classes, structure, options and shapes, with random parameters in float64 on
the CPU, without hooks. It is run in evaluation and in training, with every dropout off and with every dropout on (both
see the same random numbers), for all calls of the example. The twin's fused layers compute by the kernels' references.

What is found is kept under everything that decides it: the functions of the module's classes and the helpers that these
mention, the options that they read, shapes, and the fused layer. So layers that differ in nothing of that share a
proof, and a function that somebody exchanges later asks for another.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from .. import kernels
from ..layers import FusedModel, derive_anywhere, own_forwards, view_as
from .decides import decides
from .known import Call, Match, Offer, around, original_class
from .twin import Run, Twin, Unproved, count


def prove(module: nn.Module, offer: Offer, mixin: type[Any], match: Callable[[nn.Module], Match | None]) -> str | None:
    """Why a mix-in may not stand for a module, in a sentence, or None where it may.

    Args:
        module: on any device, in any dtype, fused or not; it is only read.
        offer: how it is called, and how near the results have to be.
        mixin: of the fused layer.
        match: says what stands for the modules inside it.
    """
    held = _blocks(mixin, module) if issubclass(mixin, FusedModel) else None
    key = (mixin, offer, decides(module, held, mixin))
    fused: Any = around(mixin, original_class(type(module)))
    # a plan runs the original where these are others than those that were proved: not while they are
    before, fused.forwards = fused.forwards, own_forwards(fused.replaces)
    if key not in _verdicts:
        if len(_verdicts) >= 4096:
            _verdicts.clear()
        _verdicts[key] = _try(module, offer, mixin, match, held)
    if _verdicts[key] is not None:
        fused.forwards = before
    return _verdicts[key]


_verdicts: dict[Any, str | None] = {}


def disproves(reason: str) -> bool:
    """Whether a reason of `prove` says that both ran and differ."""
    return reason.startswith(_OTHER)


_OTHER = "computes something else than "


def _blocks(mixin: type[Any], module: nn.Module) -> nn.Module:
    return view_as(around(mixin, original_class(type(module))), module).blocks


def _try(module: nn.Module, offer: Offer, mixin: type[Any], match: Any, held: nn.Module | None) -> str | None:
    why = None
    with _apart():
        # what computes in fp32 whatever it is given has parameters of that dtype alone; what is large takes less time
        double, single = (torch.float64, offer.rtol), (torch.float32, max(offer.rtol, _SINGLE))
        for dtype, rtol in (single, double) if count(module, held) > _LARGE else (double, single):
            try:
                twin = Twin(module, held, dtype)
                twin.fuse(mixin, match)
                return _under_all(twin, offer, mixin, rtol)
            except Unproved as error:
                why = why or str(error)
    return why


_SINGLE = 3e-5
# parameters
_LARGE = 1 << 21


def _under_all(twin: Twin, offer: Offer, mixin: type[Any], rtol: float) -> str | None:
    for i, setting in enumerate(offer.settings):
        with setting(twin.root):
            twin.remember()
            try:
                reason = _tried(twin, offer, mixin, _runs(twin, offer) if i == 0 else _FEW, rtol)
            except Unproved:
                # what fails under a further setting fails in the original
                if i == 0:
                    raise
                continue
        if reason:
            return reason
    return None


def _tried(twin: Twin, offer: Offer, mixin: type[Any], runs: Iterable[Run], rtol: float) -> str | None:
    calls, expected = _example(twin, offer)
    for run in runs:
        if run.training:
            expected = twin.run(calls, run)
        try:
            derives = derive_anywhere() if run.frozen else nullcontext()
            with twin.fused(), kernels.by_reference() as called, derives:
                actual = twin.run(calls, run)
        except Exception as error:
            return f"{mixin.__name__} fails in {run}: {_brief(error)}"
        if run is _EVALUATION and not called and offer.kind not in ("block", "model"):
            return f"{mixin.__name__} leaves all to the original"
        if what := _differ(actual, expected, rtol):
            return f"{_OTHER}{mixin.__name__}: {what} in {run}"
    return None


# gradients are training's
_EVALUATION = Run(False, None, "none")
_FROZEN = Run(False, None, "none", frozen=True)


# what a further setting is tried in
_FEW = (_EVALUATION, Run(True, frozenset(), "vectors"))


def _runs(twin: Twin, offer: Offer) -> Iterator[Run]:
    yield _EVALUATION
    if offer.kind in ("attention", "block", "model"):
        yield _FROZEN
    # a block's matrices are those of its branches, which are proved by themselves
    yield Run(True, frozenset(), "vectors" if offer.kind in ("block", "model") else "all")
    places = frozenset(place for place, _, _ in twin.rates)
    if places:
        yield Run(True, None, "none")
    # with dropout in the softmax a fused layer leaves all to the original: the rest is tried without
    if offer.kind == "attention" and len(places) > 1:
        yield from (Run(True, frozenset((place,)), "none") for place in sorted(places))
    elif offer.kind == "block":
        rest = frozenset(place for place in places if "att" not in place)
        if rest and rest != places:
            yield Run(True, rest, "none")


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
    error = _largest(a.detach() - b.detach()) if a.numel() else 0.0
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
