"""Checks of what a model is built with."""

from __future__ import annotations

from collections.abc import Sequence


def one_of(name: str, value: str, accepted: tuple[str, ...]) -> str:
    """`value`, if it is one of `accepted`; else a `ValueError` that says so."""
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}; accepted are {', '.join(map(repr, accepted))}")
    return value


def pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) from one int or two; both must be positive."""
    sides = (value, value) if isinstance(value, int) else tuple(value)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"{name} is {value!r}; accepted is a positive int or two of them (height, width)")
    return sides[0], sides[1]
