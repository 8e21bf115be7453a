"""What was measured before, in the user's cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import _config

SCHEMA = 1


@dataclass(frozen=True)
class Figure:
    """One decision.

    Attributes:
        what: "model" (the result against the plain one), a kind, or a launch, "linear m=197,n=768,k=768,float16".
        ours_ms: median of the model with it, in milliseconds a batch.
        other_ms: median of the model without it, or with torch's own route.
        kept: whether it stays.
    """

    what: str
    ours_ms: float
    other_ms: float
    kept: bool

    def __str__(self) -> str:
        other = "plain" if self.what == "model" else "torch's own" if " " in self.what else "without"
        verdict = "kept" if self.kept else "dropped"
        return f"{self.what}: {self.ours_ms:.4g} ms, {other} {self.other_ms:.4g} ms, {verdict}"


@dataclass(frozen=True)
class Choice:
    """What `select` found.

    Attributes:
        kinds: to switch on.
        library: keys of launches, by op, that go to torch's own routine.
        figures: what was measured.
    """

    kinds: tuple[str, ...]
    library: Mapping[str, tuple[str, ...]]
    figures: tuple[Figure, ...]


def choices_path(device: torch.device) -> Path:
    from ..clock.machine import cpu_name

    return _config.user_folder() / "choices" / _config.file_name(_config._device_name(device) or cpu_name())


def digest(
    model: nn.Module,
    example: Tensor,
    kinds: Collection[str],
    precision: str | None,
    cuda_graph: bool,
    attention: str,
) -> str:
    """A digest of all that decides what is faster, but the device."""
    from .. import __version__
    from ..clock.machine import versions

    modules = [
        (name, f"{type(module).__module__}.{type(module).__qualname__}", len(module._forward_hooks))
        for name, module in model.named_modules()
    ]
    tensors = [(name, list(t.shape), str(t.dtype)) for name, t in model.state_dict().items()]
    batch = (list(example.shape), list(example.stride()), str(example.dtype))
    software = (__version__, versions())
    threads = torch.get_num_threads() if example.device.type == "cpu" else 0
    decides = (SCHEMA, software, threads, sorted(kinds), precision, cuda_graph, attention, batch, modules, tensors)
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:32]


def read_choices(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a file of choices ({error}); delete it to measure anew") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or not isinstance(content.get("choices"), dict):
        raise ValueError(f"{path}: not a file of choices of schema {SCHEMA}; delete it to measure anew")
    return content["choices"]


def write_choice(path: Path, key: str, choice: Choice) -> None:
    choices = {**read_choices(path), key: asdict(choice)}
    _config.write_json(path, {"schema": SCHEMA, "choices": choices})
