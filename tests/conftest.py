"""Lanes, and what lets torchvision's models be imported beside a CPU build of torch."""

from __future__ import annotations

import os
import sys

import pytest
import torch

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"

try:
    import torchvision  # noqa: F401
except ImportError:
    pass
except RuntimeError:
    # beside a CPU build of torch its native half does not load: its Python half looks two operators up, so they
    # need a schema, and what is left of the first attempt would pass for imported
    for _name in [name for name in sys.modules if name.startswith("torchvision.")]:
        del sys.modules[_name]
    _library = torch.library.Library("torchvision", "DEF")
    for _schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        _library.define(_schema)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))
        if item.get_closest_marker("interpret") and not INTERPRET:
            item.add_marker(pytest.mark.skip(reason="runs in the interpreter lane: TRITON_INTERPRET=1"))
        if item.get_closest_marker("compile_only") and INTERPRET:
            item.add_marker(pytest.mark.skip(reason="the interpreter replaces the compiler"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Fill what `torch.empty` hands out with NaN, so that an element a kernel does not write shows."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    enabled = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(enabled)
    torch.utils.deterministic.fill_uninitialized_memory = fill
