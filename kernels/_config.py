"""Which tile sizes a launch uses: the committed file for this device, else the op's own heuristic.

A file is `configs/<op>/<device>.json`, the device named as CUDA names it with spaces as underscores:

    {"device": "NVIDIA H100 80GB HBM3", "configs": {"m=50432,n=768,k=768,float16": {"block_m": 128, ...}}}

An entry's fields are those of the op's `Config`. No file is written here and nothing is tuned here.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

C = TypeVar("C")

_FOLDER = Path(__file__).parent / "configs"


@functools.cache
def arch(device: torch.device) -> int:
    """Compute capability as one number: 80 for 8.0, 90 for 9.0.

    What has neither wgmma nor a tensor copy engine counts as 80: the interpreter's CPU and AMD's GPUs, whose own
    numbering (9.4 for gfx942) means something else.
    """
    if device.type != "cuda" or torch.version.hip:
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def sm_count(device: torch.device) -> int:
    """Number of multiprocessors. The interpreter's CPU has 2, so that persistent loops are walked."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def _device_name(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


@functools.cache
def table(op: str, device_name: str) -> dict[str, dict[str, int]]:
    """The committed entries of one op for one device; empty where there is no file."""
    path = _FOLDER / op / f"{device_name.replace(' ', '_')}.json"
    if not path.is_file():
        return {}
    expected = f"{path}: expected an object with 'device' = {device_name!r} and 'configs'"
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{expected}; {error}") from error
    if (
        not isinstance(content, dict)
        or content.get("device") != device_name
        or not isinstance(content.get("configs"), dict)
    ):
        raise ValueError(expected)
    return content["configs"]


def lookup(op: str, key: str, device: torch.device, config: Callable[..., C], heuristic: Callable[[], C]) -> C:
    """The committed config for `key` on `device`, else `heuristic()`.

    Args:
        op: folder name under `configs`.
        key: the shape and dtype as the op's file writes them.
        device: where the launch happens.
        config: the op's `Config` class; takes the fields of a table's entry.
        heuristic: called when no entry matches.
    """
    name = _device_name(device)
    entry = table(op, name).get(key) if name else None
    return heuristic() if entry is None else config(**entry)
