"""docs/support.md: written of what the tests of tests/vitfast/test_support.py found, and read again by them."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.vitfast._architectures import ARCHITECTURES, Architecture

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
COMMAND = "python -m pytest tests/vitfast/test_support.py --support-table docs/support.md"

REPLACED, NOTES = "replaced", "notes"
# what a check can find
PROVED, NOT_APPLICABLE, LEFT_ALONE, BROKEN = "✓", "n/a", "–", "✗"

# a table for each, and the package, where there is one, whose version matters
LIBRARIES = {
    "vitfast": ("The reference", None),
    "timm": ("timm", "timm"),
    "transformers": ("Transformers", "transformers"),
    "torchvision": ("torchvision", "torchvision"),
    "open_clip": ("open_clip", "open_clip_torch"),
    "dinov2": ("DINOv2, by a copy of its repository's structure", None),
}

HEAD = f"""# What is supported

Written by `{COMMAND}`; nothing here is typed by hand.
Each architecture is the library's own class with its own options, of two blocks or two stages, with random weights and
images of a few patches, in fp32 on a CPU. Each {PROVED} is a test in
[tests/vitfast/test_support.py](../tests/vitfast/test_support.py) that holds the accelerated model to the untouched one
under [the tolerance rule](../vitfast/rule.py), and every run of the tests holds this page to what they find.
For a model at hand, `vitfast.report(model)` says what is replaced and why the rest is not.

| column | {PROVED} proves |
|---|---|
"""

LEGEND = f"""
"{REPLACED}" names the kinds of modules that are (`accelerate(only=...)`), "{NOTES}" what is left to the library
and why; of a model with a text tower, in its image tower. "model" is the forward around the blocks, which may embed the
patches itself.

- {NOT_APPLICABLE}: the library's own model cannot do it, or it has no meaning there, as "{NOTES}" says.
- {LEFT_ALONE}: neither attention nor blocks are replaced, so there is nothing to prove. That the model works as before
  is tested all the same.
"""


def version(package: str) -> str:
    """The release that is installed, or "" without one."""
    try:
        return importlib.metadata.version(package).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return ""


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def render(columns: Mapping[str, str], found: Mapping[tuple[str, str], tuple[str, Sequence[str]]]) -> str:
    """The page.

    Args:
        columns: what a tick proves, by the name of its column.
        found: text and notes by (architecture, column).

    Raises:
        KeyError: a cell is missing: its test did not run.
    """
    parts = [HEAD + "".join(f"{_line((name, meaning))}\n" for name, meaning in columns.items()) + LEGEND]
    parts.append(f"\nMade with torch {version('torch')}.\n")
    header = ("architecture", REPLACED, *columns, NOTES)
    for library, (title, package) in LIBRARIES.items():
        rows = [architecture for architecture in ARCHITECTURES if architecture.library == library]
        lines = [_line(header), "|" + "---|" * len(header)]
        for row in rows:
            cells = [found[str(row), column] for column in (REPLACED, *columns)]
            notes = [note for _, of_cell in cells for note in of_cell]
            lines.append(_line((f"`{row.name}`", *(text for text, _ in cells), "; ".join(notes))))
        made = "" if package is None else f" {version(package)}"
        parts.append(f"\n## {title}{made}\n\n" + "\n".join(lines) + "\n")
    return "".join(parts)


class Page(NamedTuple):
    """What the page says.

    Attributes:
        tables: cells by library, architecture and column.
        versions: the release of each library, torch among them, that it was made with.
    """

    tables: dict[str, dict[str, dict[str, str]]]
    versions: dict[str, str]


def read(page: str) -> Page:
    """A page that `render` made."""
    tables: dict[str, dict[str, dict[str, str]]] = {}
    versions = {"torch": page.partition("Made with torch ")[2].partition(".\n")[0]}
    for library, (title, _) in LIBRARIES.items():
        section = page.partition(f"\n## {title}")[2].partition("\n## ")[0]
        version_made, *lines = section.splitlines() or [""]
        # cells may be empty, so the frame is cut off and not stripped
        header, _, *rows = [line[2:-2].split(" | ") for line in lines if line.startswith("|")] or ([], [])
        tables[library] = {row[0].strip("`"): dict(zip(header[1:], row[1:], strict=True)) for row in rows}
        versions[library] = version_made.strip()
    return Page(tables, versions)


def made_here(architecture: Architecture, versions: Mapping[str, str]) -> bool:
    """Whether the page was made with the releases that are installed."""
    package = LIBRARIES[architecture.library][1]
    same_library = package is None or versions[architecture.library] == version(package)
    return same_library and versions["torch"] == version("torch")
