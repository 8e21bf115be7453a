"""A tuning report: one JSON file with the evidence of all runs on a device, and the entries that came of them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vitfast.kernels._config import Key, write_entries, write_json

from .result import Result

SCHEMA = 1


def read_report(path: Path) -> dict[str, Any]:
    """A report as `tune` writes it.

    Raises:
        ValueError: it is none, or one of another schema.
        FileNotFoundError: there is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a tuning report: {error}") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA or not isinstance(content.get("runs"), list) or not isinstance(content.get("configs"), dict):
        raise ValueError(f"{path}: a tuning report of schema {schema!r}; this version reads schema {SCHEMA}")
    return content


def add_to_report(path: Path, result: Result, environment: dict[str, Any]) -> None:
    """Add a run and its entries to a report, in the place of an earlier run of the same job.

    Raises:
        ValueError: what is there is no report, or another device's.
    """
    content: dict[str, Any] = {"schema": SCHEMA, "device": result.device_name, "runs": [], "configs": {}}
    if path.is_file():
        content = read_report(path)
        if content.get("device") != result.device_name:
            raise ValueError(f"{path}: a tuning report of {content.get('device')!r}; expected {result.device_name!r}")
    run = {**asdict(result), "environment": environment}
    content["runs"] = [old for old in content["runs"] if old["job"] != run["job"]] + [run]
    for key, entry in result.entries.items():
        content["configs"].setdefault(key.op, {})[key.text] = entry
    write_json(path, content)


def unpack(report: Path, folder: Path) -> list[Path]:
    """Lay a report's entries out as `<folder>/<op>/<device>.json`, such as `kernels/configs` of a checkout.

    Raises:
        ValueError: the report or a file that is there is not of its form.
        FileNotFoundError: there is no such report.
    """
    content = read_report(report)
    configs = content["configs"].items()
    entries = {Key.parse(op, text): entry for op, found in configs for text, entry in found.items()}
    return write_entries(folder, content["device"], entries)
