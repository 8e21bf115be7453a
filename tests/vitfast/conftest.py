"""`--support-table PATH`: write docs/support.md of what the tests of test_support.py find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--support-table", metavar="PATH", help="write docs/support.md there, of what this run's tests find"
    )


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("support_table", None)
    # xdist's workers hand their reports to the process that started them
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Writer(Path(path)))


class _Writer:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[tuple[str, str], tuple[str, list[str]]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call":
            return
        for name, value in report.user_properties:
            if name == "support":
                architecture, column, text, notes = value
                self.found[architecture, column] = text, notes

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        from tests.vitfast._support import render
        from tests.vitfast.test_support import MEANINGS

        try:
            page = render(MEANINGS, self.found)
        except KeyError as missing:
            terminalreporter.write_line(f"{self.path} is not written: nothing was found for {missing}")
            return
        self.path.write_text(page, encoding="utf-8")
        terminalreporter.write_line(f"wrote {self.path}")
