"""Tables of text, for a terminal and in Markdown."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> str:
    """Columns of equal width, two blanks apart, without trailing blanks.

    Args:
        header: names of the columns; empty for rows alone.
        rows: cells; a row may be shorter than the longest.
        right: columns that are set to the right, such as numbers.
    """
    lines = [header, *rows] if header else list(rows)
    columns = max(map(len, lines), default=0)
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(columns)]
    return "\n".join(
        "  ".join(c.rjust(widths[i]) if i in right else c.ljust(widths[i]) for i, c in enumerate(line)).rstrip()
        for line in lines
    )


def markdown_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Collection[int] = (),
    bold: Collection[int] = (),
) -> str:
    """A table of GitHub's Markdown; what would be markup in a cell is escaped.

    Args:
        header: names of the columns.
        rows: cells of plain text.
        right: columns that are set to the right.
        bold: positions of the rows that stand out.
    """
    lines = [[escape_markdown(cell) for cell in header], ["---:" if i in right else "---" for i in range(len(header))]]
    for position, row in enumerate(rows):
        cells = [escape_markdown(cell) for cell in row]
        lines.append([f"**{cell}**" if cell and position in bold else cell for cell in cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escape_markdown(text: str) -> str:
    """Plain text on one line that Markdown shows as it is."""
    return re.sub(r"([\\|<>*`\[\]])", r"\\\1", " ".join(text.split()).replace("&", "&amp;"))
