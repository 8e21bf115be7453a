"""Which tile sizes a launch uses: a tuned entry for this device and shape, else the op's own heuristic.

Entries come from two files of one form, the device named as CUDA names it with spaces as underscores:
`configs/<op>/<device>.json` beside this one, and the user's own of the same name in `user_folder()`, whose entries win.

    {"device": "NVIDIA H100 80GB HBM3", "configs": {"m=50432,n=768,k=768,float16": {"block_m": 128, ...}}}

An entry's fields are those of the op's `Config`, so a choice that an op learns later (another library's GEMM, say) is a
field of its `Config` with a default, and older files stay valid. A shape without an entry takes that of the nearest one
which differs in a size that grows with the batch, see `nearest`. No file is written here and nothing is tuned here.
"""

import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

C = TypeVar("C")

_FOLDER = Path(__file__).parent / "configs"

BATCHED_SIZES = ("m", "rows", "patches", "windows")
"""Sizes that grow with the batch; a key that can be near another one starts with one of them."""

NEAR = 2.0
"""By how much such a size may differ from a tuned one. Further away, another number of waves asks for other tiles."""

_BATCHED_KEY = re.compile(rf"({'|'.join(BATCHED_SIZES)})=(\d+),(.+)")

# the tuner's and the tests' means, empty otherwise: what is used whatever the files say, and who listens to lookups
_overrides: dict[tuple[str, str], Mapping[str, Any]] = {}
_listeners: list[dict[tuple[str, str], Any]] = []


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


def file_name(device_name: str) -> str:
    """A device's file in an op's folder."""
    return re.sub(r"[\s/]", "_", device_name) + ".json"


def user_folder() -> Path:
    """Where the user's own files are: `$VITFAST_CONFIG_DIR`, else `vitfast/configs` in the user's cache."""
    own = os.environ.get("VITFAST_CONFIG_DIR")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitfast" / "configs"


def read(path: Path, device_name: str) -> dict[str, dict[str, Any]]:
    """The entries of one file; empty where there is none.

    Raises:
        ValueError: it is not of this form, or another device's.
    """
    if not path.is_file():
        return {}
    expected = f"{path}: expected an object with 'device' = {device_name!r} and 'configs'"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{expected}; {error}") from error
    if (
        not isinstance(content, dict)
        or content.get("device") != device_name
        or not isinstance(content.get("configs"), dict)
        or not all(isinstance(entry, dict) for entry in content["configs"].values())
    ):
        raise ValueError(f"{expected}, an object of fields by key")
    return content["configs"]


def _files(op: str, device_name: str) -> tuple[Path, Path]:
    """What comes with the package, and the user's own; the later one's entries win."""
    return tuple(folder / op / file_name(device_name) for folder in (_FOLDER, user_folder()))  # type: ignore[return-value]


@functools.cache
def table(op: str, device_name: str) -> dict[str, dict[str, Any]]:
    """The entries of one op for one device, the user's before the package's; empty where there is no file."""
    entries: dict[str, dict[str, Any]] = {}
    for path in _files(op, device_name):
        entries |= read(path, device_name)
    return entries


def nearest(key: str, keys: Iterable[str]) -> str | None:
    """The key whose entry serves a shape: itself, else the nearest one in the size that grows with the batch.

    Everything else must be equal: the other sizes, dtypes and flags. Distance is the ratio of the two sizes, at most
    `NEAR`; of two that are equally near, the smaller size. Attention's keys have no such size and match exactly.

    Args:
        key: as an op's file writes it, such as "m=50432,n=768,k=768,bfloat16".
        keys: of the entries that there are.
    """
    keys = set(keys)
    if key in keys:
        return key
    wanted = _BATCHED_KEY.fullmatch(key)
    if wanted is None:
        return None
    name, size, rest = wanted[1], int(wanted[2]), wanted[3]
    near: list[tuple[float, int, str]] = []
    for other in keys:
        found = _BATCHED_KEY.fullmatch(other)
        if found and (found[1], found[3]) == (name, rest) and size and int(found[2]):
            distance = abs(math.log(int(found[2]) / size))
            if distance <= math.log(NEAR) + 1e-9:
                near.append((distance, int(found[2]), other))
    return min(near)[2] if near else None


@functools.lru_cache(maxsize=4096)
def _tuned(op: str, device_name: str, key: str, config: Callable[..., C]) -> C | None:
    """The config of the entry that serves a key. Cached whole, since a launch must not pay for the search."""
    entries = table(op, device_name)
    chosen = nearest(key, entries)
    if chosen is None:
        return None
    try:
        return config(**entries[chosen])
    except TypeError as error:
        path = next(path for path in reversed(_files(op, device_name)) if chosen in read(path, device_name))
        raise ValueError(
            f"{path}: the entry {chosen!r} has the fields {sorted(entries[chosen])}; expected those of"
            f" vitfast.kernels.{op}'s Config: {error}"
        ) from error


def forget() -> None:
    """Read the files anew at the next launch, as after one of them was written."""
    table.cache_clear()
    _tuned.cache_clear()


@contextmanager
def override(op: str, key: str, entry: Mapping[str, Any]) -> Iterator[None]:
    """While open, launches of this process with that key use `entry`, whatever the files say. For tuner and tests."""
    before = _overrides.get((op, key))
    _overrides[op, key] = entry
    try:
        yield
    finally:
        if before is None:
            del _overrides[op, key]
        else:
            _overrides[op, key] = before


@contextmanager
def listen() -> Iterator[dict[tuple[str, str], Any]]:
    """While open, what is looked up: `{(op, key): config that was used}`, in order. For tuner and tests."""
    heard: dict[tuple[str, str], Any] = {}
    _listeners.append(heard)
    try:
        yield heard
    finally:
        # by identity: two that heard the same are equal
        _listeners[:] = [listener for listener in _listeners if listener is not heard]


def lookup(op: str, key: str, device: torch.device, config: Callable[..., C], heuristic: Callable[[], C]) -> C:
    """The tuned config for `key` on `device`, else `heuristic()`.

    Args:
        op: folder name under `configs`.
        key: the shape and dtype as the op's file writes them.
        device: where the launch happens.
        config: the op's `Config` class; takes the fields of a table's entry.
        heuristic: called when no entry matches.

    Raises:
        ValueError: a file of this op and device is not of the documented form.
    """
    chosen: C | None = None
    if _overrides and (op, key) in _overrides:
        chosen = config(**_overrides[op, key])
    elif name := _device_name(device):
        chosen = _tuned(op, name, key, config)
    if chosen is None:
        chosen = heuristic()
    for heard in _listeners:
        heard[op, key] = chosen
    return chosen
