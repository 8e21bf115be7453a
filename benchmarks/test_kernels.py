"""Each kernel against its peers, at the models' shapes. Nothing is asserted of a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vitfast.benchmarks.peers import Peer
from vitfast.benchmarks.workloads.base import Workload

pytest.importorskip("pytest_benchmark", reason='pytest benchmarks/ needs pytest-benchmark: pip install "vitfast[dev]"')

LAYERS = ("kernel",)


def test_kernel(workload: Workload, peer: Peer, bench: Callable[[Workload, Peer], None]) -> None:
    bench(workload, peer)
