"""Do no harm: what of `accelerate` wins on this device, for this model and these images, measured in the model.

    choice = select(model, images, kinds, swap=accelerate, precision="bf16")

First the kinds of replacement: the model without each of them is timed against the model with all, interleaved, and a
kind without which the model is faster by more than the spread is left out. Then, on a GPU, the route of every GEMM and
attention that is launched: torch's own (cuBLASLt, SDPA) against our kernel, in the model too. At last the result
against the plain model: if that is faster by more than the spread, nothing is replaced.

A choice is kept in the user's cache (`vitfast.kernels` configs' folder, beside them) under the device, the versions and
everything of the model and the images that decides speed, so that a second call measures nothing.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..clock import timing
from ..kernels import INTERPRET, _config
from ..kernels._config import Key, has_library
from .choices_file import Choice, Figure, choices_path, digest, read_choices, write_choice

BUDGET_S = 10.0
"""Seconds for all of it; what must run at least once may exceed it on a slow machine."""


def select(
    model: nn.Module,
    example: Tensor,
    kinds: Collection[str],
    *,
    swap: Callable[..., nn.Module],
    precision: str | None,
    cuda_graph: bool | int = False,
    attention: str = "auto",
    budget_s: float = BUDGET_S,
) -> Choice:
    """Measure, or look up, which kinds of replacement win for a model.

    Args:
        model: not accelerated; it stays as it is.
        example: pixels of the batch that matters, on the model's device.
        kinds: to choose from.
        swap: `accelerate`, which this is a part of.
        precision: as `accelerate` takes it.
        cuda_graph: as `accelerate` takes it; with it every candidate is timed as a graph, the plain model too.
        attention: as `accelerate` takes it; with another than "auto" it has no route to choose.
        budget_s: seconds for all of it.

    Raises:
        ValueError: the example is on another device, or the plain model cannot take it.
        TypeError: the example is no tensor.
    """
    if not isinstance(example, Tensor):
        raise TypeError(f"example is a {type(example).__name__}; expected a batch of pixels")
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if devices - {example.device}:
        raise ValueError(f"example is on {example.device}, the model on {', '.join(sorted(map(str, devices)))}")
    key = digest(model, example, kinds, precision, bool(cuda_graph), attention)
    path = choices_path(example.device)
    if (known := read_choices(path).get(key)) is not None:
        return Choice(tuple(known["kinds"]), known["library"], tuple(Figure(**figure) for figure in known["figures"]))
    choice = _measure(model, example, tuple(kinds), swap, precision, cuda_graph, attention, budget_s)
    write_choice(path, key, choice)
    return choice


def _measure(
    model: nn.Module,
    example: Tensor,
    kinds: tuple[str, ...],
    swap: Callable[..., nn.Module],
    precision: str | None,
    cuda_graph: bool | int,
    attention: str,
    budget_s: float,
) -> Choice:
    begin = time.monotonic()
    device = example.device
    # cast and put to inference once; every candidate is a tree of modules of its own around these tensors
    base = swap(copy.deepcopy(model), precision=precision, only=()).eval()
    weight = next((p for p in base.parameters() if p.is_floating_point()), None)
    if weight is not None and example.is_floating_point():
        example = example.to(weight.dtype)

    def with_kinds(selected: Collection[str]) -> Callable[[int], Any]:
        twin = copy.deepcopy(base, {id(t): t for t in (*base.parameters(), *base.buffers())})
        if selected or cuda_graph:
            options = {"precision": precision, "cuda_graph": cuda_graph, "attention": attention}
            swap(twin, only=selected, frozen=True, **options)

        def run(i: int) -> Any:
            with torch.inference_mode():
                return twin(example)

        return run

    plain = with_kinds(())
    try:
        plain(0)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"example of shape {list(example.shape)}: the model cannot take it: {error}") from error

    def timed(candidates: Mapping[str, Callable[[int], Any]], share: float) -> Mapping[str, Any]:
        for run in candidates.values():
            # kernels compile at their first call, and a graph is captured when a size comes again
            for i in range(3 if cuda_graph else 1):
                run(i)
        left = max(0.2, share * (budget_s - (time.monotonic() - begin)))
        return timing.time_interleaved(candidates, device, budget_s=left, min_samples=3)

    figures: list[Figure] = []
    ours = with_kinds(kinds)
    ours(0)
    once = timing.sample_ms(ours, 0, 1, device) / 1e3
    kept = list(kinds)
    # six calls of each candidate are the least that a comparison takes
    if 6 * once * (1 + len(kinds)) < 0.7 * budget_s:
        without = {kind: with_kinds([other for other in kinds if other != kind]) for kind in kinds}
        timings = timed({"": ours, **without}, 0.5)
        for kind in kinds:
            stays = not timings[kind].p80 < timings[""].p20
            figures.append(Figure(kind, timings[""].median, timings[kind].median, stays))
            if not stays:
                kept.remove(kind)

    library: dict[str, tuple[str, ...]] = {}
    entries: dict[Key, dict[str, Any]] = {}
    heard = _heard(with_kinds(kept)) if kept and (device.type == "cuda" or INTERPRET) else {}
    for key, config in heard.items():
        if not has_library(key) or (key.op == "attention" and attention != "auto"):
            continue
        routes = [asdict(replace(config, library=library_too)) for library_too in (False, True)]
        # a model for each route: a graph keeps the one under which it was captured
        candidates = [_under(with_kinds(kept), {key: entry}) for entry in routes]
        timings = timed(dict(zip(("ours", "library"), candidates, strict=True)), 0.2)
        stays = not timings["library"].p80 < timings["ours"].p20
        figures.append(Figure(str(key), timings["ours"].median, timings["library"].median, stays))
        if not stays:
            library[key.op] = (*library.get(key.op, ()), key.text)
            entries[key] = routes[True]
    timings = timed({"ours": _under(with_kinds(kept), entries), "plain": plain}, 0.9)
    wins = bool(kept) and not timings["plain"].p80 < timings["ours"].p20
    figures.append(Figure("model", timings["ours"].median, timings["plain"].median, wins))
    if not wins:
        return Choice((), {}, tuple(figures))
    _adopt(entries, device)
    return Choice(tuple(kept), library, tuple(figures))


def _heard(run: Callable[[int], Any]) -> dict[Key, Any]:
    with _config.listen() as heard:
        run(0)
    return heard


def _under(run: Callable[[int], Any], entries: Mapping[Key, dict[str, Any]]) -> Callable[[int], Any]:
    """A call with these entries in the place of what its launches would look up."""

    def call(i: int) -> Any:
        with ExitStack() as stack:
            for key, entry in entries.items():
                stack.enter_context(_config.override(key, entry))
            return run(i)

    return call


def _adopt(entries: Mapping[Key, dict[str, Any]], device: torch.device) -> None:
    """Have later launches take torch's routine: an entry in the user's own configs for this device."""
    name = _config._device_name(device)
    if not entries or name is None:
        return
    _config.write_entries(_config.user_folder(), name, entries)
    _config.forget()


# what was found before
