"""The gpu test lane in processes that may die: a hang or a CUDA fault takes one test, and the others are run again.

This is a pytest plugin that writes down each test's end as it comes, and what starts pytest with it. It needs pytest
alone: neither pytest-timeout nor pytest-xdist.
"""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import pytest

TEST_SECONDS = 120.0
"""A test that takes longer hangs: its process is ended."""

ERROR_LINES = 15
"""Of a failed test in the log."""

DIED = "died"
"""Outcome of a test that took its process with it, beside pytest's passed, failed and skipped."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vitfast")
    group.addoption("--vitfast-events", type=Path, help="file that gets a line of JSON for each test")
    group.addoption("--vitfast-log", type=Path, help="file that gets the end of each failure")
    group.addoption("--vitfast-seconds", type=float, help="for one test")


def pytest_configure(config: pytest.Config) -> None:
    options = config.option
    if options.vitfast_events is not None:
        config.pluginmanager.register(_Watch(options.vitfast_events, options.vitfast_log, options.vitfast_seconds))


class _Watch:
    def __init__(self, events: Path, log: Path, seconds: float) -> None:
        self.events = events.open("a", encoding="utf-8")
        self.log = log.open("a", encoding="utf-8")
        self.seconds = seconds
        self.outcome = "passed"

    def _write(self, **event: Any) -> None:
        self.events.write(json.dumps(event) + "\n")
        self.events.flush()

    def _failed(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        self.log.write(f"FAILED {report.nodeid}\n{last_lines(report.longreprtext)}\n")
        self.log.flush()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._write(collected=[item.nodeid for item in session.items])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._failed(report)
            self._write(broken=report.nodeid)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.outcome = "passed"
        self._write(started=nodeid)
        # it fires in a thread of its own, so also while the test waits for a kernel
        faulthandler.dump_traceback_later(self.seconds, exit=True, file=self.log)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and self.outcome == "passed":
            self.outcome = "skipped"
        if not report.failed:
            return
        self.outcome = "failed"
        self._failed(report)
        if is_cuda_lost():
            # every later test of this process would fail of it
            self._write(ended=report.nodeid, outcome="failed")
            os._exit(1)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._write(ended=nodeid, outcome=self.outcome)


def is_cuda_lost() -> bool:
    """Whether a fault (an illegal address, say) has left this process without its device for good."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def last_lines(text: str, count: int = ERROR_LINES) -> str:
    """The last lines that are not blank."""
    return "\n".join([line for line in text.splitlines() if line.strip()][-count:])


def _pytest(
    arguments: Sequence[str], log: Path, seconds: float
) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as folder:
        events = Path(folder) / "events"
        events.touch()
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", __name__]
        command += [f"--vitfast-events={events}", f"--vitfast-log={log}", f"--vitfast-seconds={seconds:g}"]
        process = subprocess.run([*command, *arguments], capture_output=True, text=True, errors="replace", check=False)
        return process, [json.loads(line) for line in events.read_text(encoding="utf-8").splitlines()]


def collect(arguments: Sequence[str], log: Path) -> tuple[list[str], list[str]]:
    """The tests that pytest finds, and the files that it cannot import.

    Raises:
        RuntimeError: it finds neither; says what pytest says.
    """
    process, events = _pytest(["--collect-only", *arguments], log, TEST_SECONDS)
    tests = [test for event in events for test in event.get("collected", ())]
    broken = [event["broken"] for event in events if "broken" in event]
    if not tests and not broken:
        said = last_lines(process.stdout + process.stderr, 3)
        raise RuntimeError(f"pytest {' '.join(arguments)}: no tests (status {process.returncode}): {said}")
    return tests, broken


def outcomes(tests: Sequence[str], log: Path, seconds: float = TEST_SECONDS) -> Iterator[tuple[str, str]]:
    """Each test and its outcome: passed, failed, skipped, or died.

    Args:
        tests: from `collect`.
        log: gets the end of each failure as it happens.
        seconds: for one test.

    Raises:
        RuntimeError: pytest ends before any test begins; says what it says.
    """
    todo = list(tests)
    while todo:
        process, events = _pytest(todo, log, seconds)
        found = {event["ended"]: event["outcome"] for event in events if "ended" in event}
        for event in events:
            if "started" in event and event["started"] not in found:
                found[event["started"]] = DIED
                with log.open("a", encoding="utf-8") as file:
                    # the interpreter begins its report with what happened and where
                    said = "\n".join(process.stderr.splitlines()[:ERROR_LINES])
                    file.write(f"DIED {event['started']} (status {process.returncode})\n{said}\n")
        if not found:
            said = last_lines(process.stdout + process.stderr, 3)
            raise RuntimeError(f"pytest ended with status {process.returncode} before any test: {said}")
        yield from found.items()
        todo = [test for test in todo if test not in found]
