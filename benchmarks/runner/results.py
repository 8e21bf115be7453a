"""What a run leaves behind: one JSON file of a versioned schema, rewritten whole as each row is finished.

    {"schema": 1, "environment": {...}, "ceilings": {...}, "rows": [{...}, ...]}

A run that is killed keeps its finished rows, and the next one goes on from them if it is the same run: same device,
same versions, same commit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from vitfast.clock.ceilings import Ceilings
from vitfast.kernels._config import write_json

SCHEMA = 1

LAYERS = ("kernel", "block", "model", "train", "end_to_end")
STATUSES = ("ok", "missing", "failed parity", "out of memory", "error")


@dataclass(frozen=True)
class Row:
    """One candidate on one workload.

    Attributes:
        layer: one of `LAYERS`.
        workload: name, such as "vit_base_patch16_224" or "linear.fc1/vit_base_patch16_224".
        shape: sizes by name, "batch" among them.
        dtype: precision name, such as "bf16".
        candidate: name of the implementation, such as "timm eager" or "vitfast +attention".
        status: one of `STATUSES`.
        note: what is missing or went wrong; empty where nothing did.
        flops: floating-point operations of one call.
        bytes: fewest bytes one call moves: each input read once, each output written once.
        ms, ms_p20, ms_p80: milliseconds a call; None unless `status` is "ok", as for all below.
        samples, calls: how many samples, and calls in each.
        cold_ms: first call.
        peak_mb: device memory of one call beyond its inputs and weights, MB (1e6).
        floor_ms: least time by this run's ceilings.
        error, error_limit: largest absolute error against float64, and what the parity rule allows.
        telemetry: clocks, power and temperature behind the last sample.
    """

    layer: str
    workload: str
    shape: dict[str, int]
    dtype: str
    candidate: str
    status: str
    note: str = ""
    flops: float = 0.0
    bytes: float = 0.0
    ms: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    samples: int | None = None
    calls: int | None = None
    cold_ms: float | None = None
    peak_mb: float | None = None
    floor_ms: float | None = None
    error: float | None = None
    error_limit: float | None = None
    telemetry: dict[str, str | None] = field(default_factory=dict)

    @property
    def key(self) -> tuple[Any, ...]:
        """What two runs compare rows by."""
        return (self.layer, self.workload, tuple(sorted(self.shape.items())), self.dtype, self.candidate)

    @property
    def images_per_s(self) -> float | None:
        """Images a second of a row that has a batch."""
        return None if self.ms is None or "batch" not in self.shape else self.shape["batch"] * 1e3 / self.ms

    @property
    def tflop_s(self) -> float | None:
        """Useful TFLOP/s (1e12): the workload's operations over the time, whatever the candidate really did."""
        return None if self.ms is None else self.flops / (self.ms * 1e9)

    @property
    def gb_s(self) -> float | None:
        """Useful GB/s (1e9): the workload's bytes over the time."""
        return None if self.ms is None else self.bytes / (self.ms * 1e6)

    @property
    def floor_share(self) -> float | None:
        """Share of the floor: 1 is as fast as this run's ceilings allow."""
        return None if self.ms is None or self.floor_ms is None else self.floor_ms / self.ms


@dataclass
class Run:
    """A results file in memory."""

    environment: dict[str, Any]
    ceilings: Ceilings | None = None
    rows: list[Row] = field(default_factory=list)

    def find(self, key: tuple[Any, ...]) -> Row | None:
        """The row of that key, if it is there."""
        return next((row for row in self.rows if row.key == key), None)

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows; one of the same key is replaced."""
        for row in rows:
            self.rows = [old for old in self.rows if old.key != row.key]
            self.rows.append(row)

    def save(self, path: Path) -> None:
        """Write the file whole or not at all."""
        content = {
            "schema": SCHEMA,
            "environment": self.environment,
            "ceilings": None if self.ceilings is None else asdict(self.ceilings),
            "rows": [asdict(row) for row in self.rows],
        }
        write_json(path, content)


def load(path: Path) -> Run:
    """Read a results file.

    Raises:
        ValueError: it is no results file, one of another schema, or one with a field that is missing, unknown or not
            what it should be; the message names the file, the row and the field.
        FileNotFoundError: there is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a results file: {error}") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path}: results of schema {schema!r}; this version reads schema {SCHEMA}")
    try:
        _check_fields(content, {"schema", "environment", "ceilings", "rows"})
        if not isinstance(content["environment"], dict):
            raise ValueError(f"environment is {content['environment']!r}; expected an object")
        if not isinstance(content["rows"], list):
            raise ValueError(f"rows is {content['rows']!r}; expected a list")
        if content["ceilings"] is not None:
            _check(content["ceilings"], Ceilings, "ceilings")
        for position, row in enumerate(content["rows"]):
            _check(row, Row, f"row {position}")
    except ValueError as error:
        raise ValueError(f"{path}: damaged results file: {error}") from error
    ceilings = None if content["ceilings"] is None else Ceilings(**content["ceilings"])
    return Run(content["environment"], ceilings, [Row(**row) for row in content["rows"]])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _is_rate(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and _is_rate(value)


def _is_map(value: Any, item: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(item(one) for one in value.values())


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("workload", "dtype", "candidate", "note"), (lambda v: isinstance(v, str), "a text")),
    "layer": (lambda v: v in LAYERS, f"one of {', '.join(LAYERS)}"),
    "status": (lambda v: v in STATUSES, f"one of {', '.join(STATUSES)}"),
    "shape": (lambda v: _is_map(v, _is_count), "an object of positive integers"),
    "telemetry": (lambda v: _is_map(v, lambda one: one is None or isinstance(one, str)), "an object of texts"),
    **dict.fromkeys(("flops", "bytes"), (_is_number, "a number that is not negative")),
    **dict.fromkeys(
        ("ms", "ms_p20", "ms_p80", "floor_ms"), (lambda v: v is None or _is_rate(v), "a positive number or null")
    ),
    **dict.fromkeys(
        ("cold_ms", "peak_mb", "error", "error_limit"),
        (lambda v: v is None or _is_number(v), "a number that is not negative, or null"),
    ),
    **dict.fromkeys(("samples", "calls"), (lambda v: v is None or _is_count(v), "a positive integer or null")),
    "copy_gb_s": (_is_rate, "a positive number"),
    "gemm_tflop_s": (lambda v: _is_map(v, _is_rate), "an object of positive numbers"),
}
"""What the fields of a row and of the ceilings may hold, and how to say so."""


def _check(value: Any, kind: type[Row] | type[Ceilings], where: str) -> None:
    """Raise a `ValueError` that names the field unless these are the fields of a row, or of ceilings."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r}; expected an object")
    if kind is Row:
        where += f" ({value.get('workload')}, {value.get('candidate')})"
    try:
        required = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
        _check_fields(value, {f.name for f in fields(kind)}, required)
        for name, one in value.items():
            right, accepted = _FIELDS[name]
            if not right(one):
                raise ValueError(f"{name} is {one!r}; expected {accepted}")
        if kind is Row and value.get("ms") is not None and value["status"] != "ok":
            raise ValueError(f"ms is {value['ms']!r}; expected null where the status is {value['status']!r}")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check_fields(value: dict[str, Any], known: set[str], required: set[str] | None = None) -> None:
    if missing := (known if required is None else required) - value.keys():
        raise ValueError(f"{min(missing)} is missing")
    if unknown := value.keys() - known:
        raise ValueError(f"{min(unknown)} is unknown; expected {', '.join(sorted(known))}")


def same_run(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether rows of two environments may stand in one file: everything that decides speed is equal."""
    return a == b
