"""Which tile sizes a launch uses: a tuned entry for this device and shape, else the op's own heuristic.

Entries come from two files of one form, the device named as CUDA names it with spaces as underscores:
`configs/<op>/<device>.json` beside this one, and the user's own of the same name in `user_folder()`, whose entries win.

    {"device": "NVIDIA H100 80GB HBM3", "configs": {"m=50432,n=768,k=768,float16": {"block_m": 128, ...}}}

What stands between the quotes is the text of a `Key`, which says all that a config may depend on but the device. An
entry's fields are those of the op's `Config`, so a choice that an op learns later (another library's GEMM, say) is a
field of its `Config` with a default, and older files stay valid. A shape without an entry takes that of the nearest one
which differs in a size that grows with the batch, see `nearest`. Nothing is tuned here.
"""

import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from . import _launch

C = TypeVar("C")

_FOLDER = Path(__file__).parent / "configs"

BATCHED_SIZES = ("m", "rows", "patches", "windows")
"""Sizes that grow with the batch; a key that can be near another one starts with one of them."""

NEAR = 2.0
"""By how much such a size may differ from a tuned one. Further away, another number of waves asks for other tiles."""


class Key(NamedTuple):
    """What a launch's config may depend on. A named tuple, since every launch makes one and looks it up.

    Attributes:
        op: folder name of its configs.
        sizes: `(name, size)` in the op's own order, the one that grows with the batch first.
        dtype: of the operands.
        flags: what else decides, such as "pointers".
    """

    op: str
    sizes: tuple[tuple[str, int], ...]
    dtype: torch.dtype
    flags: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """As files write it, such as "m=50432,n=768,k=768,bfloat16,pointers"."""
        return ",".join((*(f"{name}={size}" for name, size in self.sizes), str(self.dtype)[6:], *self.flags))

    @classmethod
    def parse(cls, op: str, text: str) -> "Key":
        """The key of an op that has this text.

        Raises:
            ValueError: it has not.
        """
        found = re.fullmatch(r"((?:\w+=\d+,)+)(\w+)(?:,(.+))?", text)
        dtype = getattr(torch, found[2], None) if found else None
        if found is None or not isinstance(dtype, torch.dtype):
            raise ValueError(
                f"key {text!r} of {op}; expected sizes and a dtype, such as 'm=50432,n=768,k=768,bfloat16'"
            )
        sizes = tuple((name, int(size)) for name, size in (part.split("=") for part in found[1][:-1].split(",")))
        return cls(op, sizes, dtype, tuple(found[3].split(",")) if found[3] else ())

    def __str__(self) -> str:
        return f"{self.op} {self.text}"


def has_library(key: Key) -> bool:
    """Whether a config may send this launch to torch's own routine, by `library` in the op's `Config`."""
    if key.op == "linear":
        return key.dtype != torch.float32 and not {"norm", "stats"} & set(key.flags)
    return key.op == "attention"


# the tuner's and the tests' means, empty otherwise: what is used whatever the files say, and who listens to lookups
_overrides: dict[Key, Mapping[str, Any]] = {}
_listeners: list[dict[Key, Any]] = []


ARCHS = (80, 86, 89, 90, 100, 120)
"""The compute capabilities that tiles are chosen for. One between two of them has what the lower one has, at least."""


@functools.cache
def arch(device: torch.device) -> int:
    """Compute capability as one of `ARCHS`: 80 for 8.0, 100 for 10.3 and 11.0, 120 for 12.1.

    What has neither wgmma nor a tensor copy engine counts as 80: the interpreter's CPU and AMD's GPUs, whose own
    numbering (9.4 for gfx942) means something else.
    """
    if device.type != "cuda" or torch.version.hip:
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return max((known for known in ARCHS if known <= 10 * major + minor), default=ARCHS[0])


def early(device: torch.device) -> bool:
    """Whether kernels may be launched before the previous one has ended: programmatic dependent launch, from 9.0 on."""
    return arch(device) >= 90


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


def read(folder: Path, op: str, device_name: str) -> dict[Key, dict[str, Any]]:
    """The entries of `<folder>/<op>/<device>.json`; empty where there is none.

    Raises:
        ValueError: it is not of this form, or another device's.
    """
    path = folder / op / file_name(device_name)
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
    try:
        return {Key.parse(op, text): entry for text, entry in content["configs"].items()}
    except ValueError as error:
        raise ValueError(f"{expected}; {error}") from error


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all, its folder too.

    Raises:
        ValueError: a NaN or an infinity in it, which JSON has no number for.
    """
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_entries(folder: Path, device_name: str, entries: Mapping[Key, Mapping[str, Any]]) -> list[Path]:
    """Add entries to `<folder>/<op>/<device>.json`; those of other keys stay, those of the same key are replaced.

    Raises:
        ValueError: a file that is there is not of that form, or another device's.
    """
    written = []
    for op in dict.fromkeys(key.op for key in entries):
        merged = {**read(folder, op, device_name), **{key: entry for key, entry in entries.items() if key.op == op}}
        configs = {key.text: merged[key] for key in sorted(merged, key=lambda key: key.text)}
        path = folder / op / file_name(device_name)
        write_json(path, {"device": device_name, "configs": configs})
        written.append(path)
    return written


def _folders() -> tuple[Path, Path]:
    """What comes with the package, and the user's own; the later one's entries win."""
    return _FOLDER, user_folder()


@functools.cache
def table(op: str, device_name: str) -> dict[Key, dict[str, Any]]:
    """The entries of one op for one device, the user's before the package's; empty where there is no file.

    Raises:
        ValueError: a file is not of the documented form.
    """
    package, user = (read(folder, op, device_name) for folder in _folders())
    return package | user


def nearest(key: Key, keys: Iterable[Key]) -> Key | None:
    """The key whose entry serves a shape: itself, else the nearest one in the size that grows with the batch.

    Everything else must be equal: the other sizes, dtypes and flags. Distance is the ratio of the two sizes, at most
    `NEAR`; of two that are equally near, the smaller size. Attention's keys have no such size and match exactly.

    Args:
        key: of a launch.
        keys: of the entries that there are.
    """
    keys = set(keys)
    if key in keys:
        return key
    (name, size), *rest = key.sizes
    near: list[tuple[float, int, Key]] = []
    for other in keys if name in BATCHED_SIZES else ():
        (_, there), *_ = other.sizes
        if size and there and other == key._replace(sizes=((name, there), *rest)):
            distance = abs(math.log(there / size))
            if distance <= math.log(NEAR) + 1e-9:
                near.append((distance, there, other))
    return min(near)[2] if near else None


@functools.lru_cache(maxsize=4096)
def _tuned(key: Key, device_name: str, config: Callable[..., C]) -> C | None:
    """The config of the entry that serves a key. Cached whole, since a launch must not pay for the search."""
    entries = table(key.op, device_name)
    chosen = nearest(key, entries)
    if chosen is None:
        return None
    try:
        return config(**entries[chosen])
    except TypeError as error:
        folder = next(folder for folder in reversed(_folders()) if chosen in read(folder, key.op, device_name))
        raise ValueError(
            f"{folder / key.op / file_name(device_name)}: the entry {chosen.text!r} has the fields"
            f" {sorted(entries[chosen])}; expected those of vitfast.kernels.{key.op}'s Config: {error}"
        ) from error


def steered() -> bool:
    """Whether somebody overrides configs, or listens to the lookups."""
    return bool(_overrides or _listeners)


def forget() -> None:
    """Read the files anew at the next launch, as after one of them was written."""
    _launch.forget()
    table.cache_clear()
    _tuned.cache_clear()


@contextmanager
def override(key: Key, entry: Mapping[str, Any]) -> Iterator[None]:
    """While open, launches of this process with that key use `entry`, whatever the files say. For tuner and tests."""
    before = _overrides.get(key)
    _overrides[key] = entry
    try:
        yield
    finally:
        if before is None:
            del _overrides[key]
        else:
            _overrides[key] = before


@contextmanager
def listen() -> Iterator[dict[Key, Any]]:
    """While open, what is looked up and the config that was used, in order. For tuner and tests."""
    heard: dict[Key, Any] = {}
    _listeners.append(heard)
    try:
        yield heard
    finally:
        # by identity: two that heard the same are equal
        _listeners[:] = [listener for listener in _listeners if listener is not heard]


def lookup(key: Key, device: torch.device, config: Callable[..., C], heuristic: Callable[[], C]) -> C:
    """The tuned config for `key` on `device`, else `heuristic()`.

    Args:
        key: of the launch.
        device: where the launch happens.
        config: the op's `Config` class; takes the fields of a table's entry.
        heuristic: called when no entry matches.

    Raises:
        ValueError: a file of this op and device is not of the documented form.
    """
    chosen: C | None = None
    if _overrides and key in _overrides:
        chosen = config(**_overrides[key])
    elif name := _device_name(device):
        chosen = _tuned(key, name, config)
    if chosen is None:
        chosen = heuristic()
    for heard in _listeners:
        heard[key] = chosen
    return chosen
