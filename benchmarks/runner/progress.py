"""How far a run is: tqdm's bar on a terminal, elsewhere a line for each step."""

from __future__ import annotations

from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

# no time left: a candidate compiles for a second or for minutes, and nothing tells beforehand which
FORM = "{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}] {desc}"


class Progress:
    """Counts the rows of a run; a context manager that ends the bar."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def start(self, total: int) -> None:
        """Begin to count `total` rows."""
        hidden = not self._stream.isatty()
        self._bar = tqdm(
            total=total, file=self._stream, disable=hidden, leave=False, bar_format=FORM, dynamic_ncols=True
        )
        # a disabled bar does not count
        self._begun, self._total = 0, total

    def step(self, text: str, rows: int = 0) -> None:
        """Show what begins now; `rows` more are begun."""
        self._begun += rows
        if self._bar.disable:
            self.say(f"{self._begun}/{self._total}  {text}")
            return
        self._bar.set_description_str(text, refresh=False)
        self._bar.n = self._begun
        self._bar.refresh()

    def say(self, line: str) -> None:
        """Write a line that stays."""
        tqdm.write(line, file=self._stream)
        self._stream.flush()
