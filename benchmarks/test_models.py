"""Blocks, whole models, training steps and files to logits, against their peers. Nothing is asserted of a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vitfast.benchmarks.peers import Peer
from vitfast.benchmarks.workloads.base import Workload

pytest.importorskip("pytest_benchmark", reason='pytest benchmarks/ needs pytest-benchmark: pip install "vitfast[dev]"')

LAYERS = ("block", "model", "train", "end_to_end")


def test_model(workload: Workload, peer: Peer, bench: Callable[[Workload, Peer], None]) -> None:
    bench(workload, peer)
