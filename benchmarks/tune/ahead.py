"""Compile candidates ahead, in processes of their own.

Compiling takes most of a candidate's time and one core; all kernels end up in Triton's cache on disk. And what would
bring a process down (an illegal address, a crash of the compiler) brings down one of these.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from vitfast.clock import timing as measure
from vitfast.kernels._config import Key

from ..workloads.base import MODELS
from .candidates import Entry
from .result import short
from .subject import Job, Subject


@dataclass(frozen=True)
class Reached:
    """What compiling found out about one launch's candidates.

    Attributes:
        entries: that compiled and ran, in the order in which they were offered.
        failed, skipped: how many did not, and how many were not tried in time.
        note: one of those that failed, and why.
    """

    entries: list[Entry]
    failed: int = 0
    skipped: int = 0
    note: str = ""


def compile_ahead(job: Job, offered: Mapping[Key, list[Entry]], *, workers: int, seconds: float) -> dict[Key, Reached]:
    """Compile and run each candidate once, in other processes.

    Args:
        job: what the processes build.
        offered: the candidates of each launch, the likelier ones first.
        workers: how many processes; with none every candidate counts as one that runs.
        seconds: after which they are ended.
    """
    if workers < 1:
        return {key: Reached(entries) for key, entries in offered.items()}
    # the likeliest of every launch come first
    ranked = [(rank, key, entry) for key, entries in offered.items() for rank, entry in enumerate(entries)]
    work = [(key, entry) for _, key, entry in sorted(ranked, key=lambda item: item[0])]
    answers = _answers(job, work, workers, seconds)
    found = {}
    for key, entries in offered.items():
        known = [(entry, answer) for other, entry, answer in answers if other == key]
        bad = [f"{short(entry)}: {answer}" for entry, answer in known if answer != "ok"]
        ran = [entry for entry in entries if (entry, "ok") in known]
        found[key] = Reached(ran, len(bad), len(entries) - len(known), bad[0] if bad else "")
    return found


def _answers(job: Job, work: list[tuple[Key, Entry]], workers: int, seconds: float) -> list[tuple[Key, Entry, str]]:
    """What was reached, each with "ok" or what went wrong."""
    shares = [share for first in range(workers) if (share := work[first::workers])]
    running = []
    # whatever makes vitfast importable here; in a folder of its own nothing else goes by its name
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(Path(path).resolve()) for path in sys.path)}
    with tempfile.TemporaryDirectory() as folder:
        for index, share in enumerate(shares):
            plan, done = Path(folder) / f"{index}.json", Path(folder) / f"{index}.txt"
            items = [[key.op, key.text, entry] for key, entry in share]
            plan.write_text(json.dumps({"job": asdict(job), "models": MODELS, "items": items, "answers": str(done)}))
            done.touch()
            command = [sys.executable, "-m", "vitfast.benchmarks.tune", "compile", str(plan)]
            # triton prints what ptxas refused
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder, env=environment
            )
            running.append((process, done, share))
        deadline = time.monotonic() + seconds
        with tqdm(total=len(work), desc=f"compile for {job.model} b{job.batch}", unit="config", disable=None) as bar:
            while time.monotonic() < deadline and any(process.poll() is None for process, _, _ in running):
                time.sleep(0.1)
                bar.update(sum(len(done.read_text().splitlines()) for _, done, _ in running) - bar.n)
        found = []
        for process, done, share in running:
            late = process.poll() is None
            if late:
                process.kill()
                process.wait()
            answers = done.read_text().splitlines()
            if process.returncode and not late:
                # it went down over the one that it had begun
                answers.append(f"the process ended with status {process.returncode}")
            found += [(key, entry, answer) for (key, entry), answer in zip(share, answers, strict=False)]
    return found


def compile_plan(plan: Path) -> None:
    """The other side of `compile_ahead`: a line for each candidate in the plan's file of answers, once it is known."""
    content = json.loads(plan.read_text())
    MODELS.update(content["models"])
    subject = Subject(Job(**content["job"]))
    del subject.plain
    with open(content["answers"], "w") as answers:
        for op, text, entry in content["items"]:
            answer = "ok"
            try:
                subject.run({Key.parse(op, text): entry})
                measure.synchronize(subject.device)
            except Exception as error:
                answer = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(answer, file=answers, flush=True)
            if "CUDA error" in answer:
                # nothing runs in this process any more
                return
