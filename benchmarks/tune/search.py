"""The search: one launch after the other, its candidates against the config that it has, then all winners together."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vitfast.clock import machine
from vitfast.clock import timing as measure
from vitfast.kernels import INTERPRET, _config, fp32_products
from vitfast.kernels._config import Key

from ..workloads.base import DTYPES
from .ahead import Reached, compile_ahead
from .candidates import Entry, candidates, refinements
from .files import add_to_report
from .result import Result, Tuned
from .subject import OPS, Job, Rule, Subject, blocks_past_cache


def contest(
    subject: Any,
    rule: Callable[[Tensor], bool],
    key: Key,
    present: Entry,
    entries: Sequence[Entry],
    *,
    others: Mapping[Key, Entry],
    budget_s: float,
) -> tuple[Tuned, Entry]:
    """Time entries of one launch against the present one and keep the best if it is faster by more than the spread.

    Args:
        subject: has `run`, `candidate` and `device`, see `Subject`.
        rule: whether tokens are right.
        key: of the launch.
        present: the entry to beat.
        entries: to try, the likelier ones first.
        others: entries of other launches, which hold in every pass.
        budget_s: for all; at most half of it goes into preparing entries.

    Returns:
        What became of it, and the entry that is now the best.
    """
    begin = time.monotonic()
    ready: dict[str, measure.Candidate] = {"present": subject.candidate({**others, key: present})}
    failed = refused = skipped = 0
    for position, entry in enumerate(entries):
        if time.monotonic() - begin > budget_s / 2 and position:
            skipped = len(entries) - position
            break
        try:
            if rule(subject.run({**others, key: entry})):
                ready[str(position)] = subject.candidate({**others, key: entry})
            else:
                refused += 1
        except Exception:
            # whatever a compiler or a launch may raise; a device that is lost shows at the present entry
            failed += 1
    tuned = Tuned(
        key.op, key.text, present, None, offered=len(entries), failed=failed, refused=refused, skipped=skipped
    )
    if len(ready) == 1:
        return tuned, present
    left = max(0.1, budget_s - (time.monotonic() - begin))
    alive = [name for name in ready if name != "present"]
    rounds = max(1, math.ceil(math.log2(len(alive) / 2)) + 1) if len(alive) > 2 else 1
    for number in range(rounds):
        last = number == rounds - 1
        # the deciding round gets as much as all before it
        share = left / 2 if last and rounds > 1 else left if last else left / 2 / (rounds - 1)
        names = ["present", *alive]
        timings = measure.time_interleaved(
            {name: ready[name] for name in names},
            subject.device,
            budget_s=share,
            # the interpreter's times decide nothing
            min_samples=3 if subject.device.type != "cuda" else 15 if last else 5,
        )
        alive.sort(key=lambda name: timings[name].median)
        if not last:
            for name in alive[max(2, len(alive) // 2) :]:
                del ready[name]
            alive = alive[: max(2, len(alive) // 2)]
    best, before = timings[alive[0]], timings["present"]
    tuned = replace(tuned, before_ms=asdict(before), after_ms=asdict(best))
    if best.p80 < before.p20:
        winner = dict(entries[int(alive[0])])
        return replace(tuned, after=winner), winner
    return tuned, present


def tune(
    model: str,
    *,
    batch: int,
    dtype: str,
    device: torch.device,
    budget_s: float,
    fold: bool = True,
    ops: Sequence[str] | None = None,
    out: Path | None = None,
    report: Path | None = None,
    max_candidates: int = 32,
    workers: int | None = None,
) -> Result:
    """Find the fastest configs for every launch of a model at one batch size and dtype on this device.

    What is tuned already in the files that launches read is the starting point, so that a second run goes on from the
    first. Attention's entries do not depend on the batch: tune the batch that matters most last. Progress goes to
    stderr where that is a terminal.

    Args:
        model: name of an architecture, see `vitfast.list_models()`.
        batch: images a call.
        dtype: "bf16", "fp16", "tf32" or "fp32".
        device: a CUDA device; the CPU under Triton's interpreter runs the same steps, for tests.
        budget_s: seconds for all; the last steps may exceed it a little.
        fold: the launches of the model with its LayerNorms folded into the GEMMs, or those without that.
        ops: some of `OPS`; None for all that the model launches.
        out: folder that gets `<op>/<device>.json`, what is there already is kept; None for the user's own folder.
            `kernels/configs` of a checkout makes committed entries of them.
        report: a JSON file with the evidence, to which this run is added; `unpack` reads it.
        max_candidates: for one launch.
        workers: processes that compile ahead; None for one less than there are cores, at most 8.

    Returns:
        Every launch with its entries and times; `str()` gives a summary.

    Raises:
        ValueError: an unknown model, dtype or op, a CPU without the interpreter, or a damaged file of configs.
    """
    if dtype not in DTYPES:
        raise ValueError(f"precision {dtype!r}; expected one of {', '.join(DTYPES)}")
    if unknown := [op for op in ops or () if op not in OPS]:
        raise ValueError(f"op {unknown[0]!r}; expected some of {', '.join(OPS)}")
    if device.type != "cuda" and not INTERPRET:
        raise ValueError(
            f"device {str(device)!r} launches no kernels, so there is nothing to tune; expected a CUDA device"
            " (TRITON_INTERPRET=1 walks through the steps on CPU)"
        )
    deadline = time.monotonic() + budget_s
    job = Job(model, batch, dtype, str(device), blocks_past_cache(model, batch, dtype, device), fold)
    name = _config._device_name(device) or "interpreter"
    with fp32_products(device, dtype == "tf32"):
        subject = Subject(job)
        rule = Rule(subject)
        present = {key: asdict(config) for key, config in subject.launches().items() if ops is None or key.op in ops}
        limits = _limits(device)
        offered = {key: candidates(key, entry, **limits)[:max_candidates] for key, entry in present.items()}
        if workers is None:
            workers = min(8, (os.cpu_count() or 2) - 1)
        reached = compile_ahead(job, offered, workers=workers, seconds=0.35 * budget_s)
        result = _confirmed(
            Result(job, name, _launches(subject, rule, present, reached, deadline)), subject, rule, deadline
        )
    if result.entries:
        for path in _config.write_entries(out or _config.user_folder(), name, result.entries):
            print(f"tune: wrote {path}", file=sys.stderr)
        _config.forget()
    if report is not None:
        add_to_report(report, result, machine.environment(device))
    return result


def _launches(
    subject: Subject, rule: Rule, present: Mapping[Key, Entry], reached: Mapping[Key, Reached], deadline: float
) -> tuple[Tuned, ...]:
    """Each launch's contest, with the winners of those before it in place."""
    found: list[Tuned] = []
    winners: dict[Key, Entry] = {}
    weights = {key: len(compiled.entries) + 1 for key, compiled in reached.items()}
    waiting = sum(weights.values())
    job = subject.job
    with tqdm(total=waiting, desc=f"tune {job.model} b{job.batch}", unit="config", disable=None) as bar:
        for key, before in present.items():
            bar.set_postfix_str(str(key))
            compiled = reached[key]
            share = max(0.2, (deadline - time.monotonic()) * 0.95 * weights[key] / waiting)
            tuned, best = contest(
                subject, rule.holds, key, before, compiled.entries, others=winners, budget_s=0.8 * share
            )
            finer, best = contest(
                subject, rule.holds, key, best, refinements(key, best), others=winners, budget_s=0.2 * share
            )
            if best != before:
                winners[key] = best
            found.append(
                replace(
                    tuned,
                    after=winners.get(key),
                    # of a gain in two steps the second one's times say both, the first one's only half
                    after_ms=tuned.after_ms if finer.after is None else finer.after_ms,
                    before_ms=tuned.before_ms or finer.before_ms,
                    offered=tuned.offered + finer.offered + compiled.failed + compiled.skipped,
                    failed=tuned.failed + finer.failed + compiled.failed,
                    refused=tuned.refused + finer.refused,
                    skipped=tuned.skipped + finer.skipped + compiled.skipped,
                    note=compiled.note,
                )
            )
            waiting -= weights[key]
            bar.update(weights[key])
    return tuple(found)


def _confirmed(result: Result, subject: Subject, rule: Rule, deadline: float) -> Result:
    """The pass with all new entries against the one without."""
    entries = replace(result, kept=True).entries
    if not entries:
        return result
    right = rule.holds(subject.run(entries))
    functions = {"before": subject.candidate({}), "after": subject.candidate(entries)}
    left = min(10.0, max(1.0, deadline - time.monotonic()))
    timings = measure.time_interleaved(functions, subject.device, budget_s=left)
    kept = right and timings["after"].p80 < timings["before"].p20
    return replace(result, before_ms=asdict(timings["before"]), after_ms=asdict(timings["after"]), kept=kept)


def _limits(device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        return {"arch": _config.arch(device), "shared": 99 * 1024, "sms": _config.sm_count(device)}
    # torch's stubs lack it
    shared = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin")  # noqa: B009
    return {"arch": _config.arch(device), "shared": shared, "sms": _config.sm_count(device)}
