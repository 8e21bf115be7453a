"""Tables: columns line up, and nothing in a cell is taken for markup."""

from __future__ import annotations

from vitfast.table import markdown_table, text_table


def test_columns_of_text_line_up() -> None:
    text = text_table(["name", "ms", ""], [["a", "12.5", "note"], ["longer", "3", ""], ["b"]], right={1})
    assert text.splitlines() == [
        "name      ms",
        "a       12.5  note",
        "longer     3",
        "b",
    ]


def test_rows_without_a_header_and_no_rows() -> None:
    assert text_table([], [["a", "b"], ["cc", "d"]]) == "a   b\ncc  d"
    assert text_table([], []) == ""


def test_markdown_escapes_what_would_be_markup() -> None:
    text = markdown_table(["x", "n"], [["a|b <i>*_&", "1"], ["", "2\n3"]], right={1}, bold={0, 1})
    assert text.splitlines() == [
        "| x | n |",
        "| --- | ---: |",
        r"| **a\|b \<i\>\*_&amp;** | **1** |",
        "|  | **2 3** |",
    ]
