"""`pytest benchmarks/`: the suite through pytest-benchmark, as a regression gate and for its own comparisons.

    pytest benchmarks/ --benchmark-autosave
    pytest benchmarks/ --benchmark-compare --benchmark-compare-fail=median:5%

With a GPU it measures ViT-B/16 and L/16 in bf16 at batches 256 and 1, against every peer that is installed; without
one, a toy model in fp32 and no compilers, to show in seconds that it works. `--vitfast-model`, `--vitfast-batch`,
`--vitfast-precision` and `--vitfast-peer`, each as often as needed, choose something else.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from vitfast.benchmarks.peers import Peer
from vitfast.benchmarks.report.targets import is_ours
from vitfast.benchmarks.runner.check import Parity, rotation
from vitfast.benchmarks.runner.run import build, select_peers
from vitfast.benchmarks.workloads import base
from vitfast.benchmarks.workloads.base import DTYPES, Workload
from vitfast.benchmarks.workloads.table import workloads
from vitfast.clock import machine, timing
from vitfast.clock.ceilings import Ceilings, measure_ceilings
from vitfast.kernels import fp32_products

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
MODELS = ("vit_base_patch16_224", "vit_large_patch16_224")

TOY = "vit_tiny_patch16_224"
TOY_OPTIONS = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 7}

ROUND_S = 0.005
"""A round is at least this long, so that reading the clock and synchronising do not count."""

Prepare = Callable[[Workload], tuple[list[dict[str, Any]], Parity]]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vitfast")
    group.addoption("--vitfast-model", action="append", help="an architecture")
    group.addoption("--vitfast-batch", action="append", type=int, help="images a call")
    group.addoption("--vitfast-precision", action="append", help="such as bf16")
    group.addoption("--vitfast-peer", action="append", help="start of a candidate's name")


@contextmanager
def _models(config: pytest.Config) -> Iterator[bool]:
    """The suite's models; without a GPU, and if none is asked for, the toy under a model's name (yields whether)."""
    if CUDA or config.getoption("--vitfast-model"):
        yield False
        return
    caches = (base.reference_model.cache_clear, base.model_flops.cache_clear)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(base.MODELS, TOY, TOY_OPTIONS)
        for forget in caches:
            forget()
        yield True
    for forget in caches:
        forget()


@pytest.fixture(scope="module", autouse=True)
def _suite(request: pytest.FixtureRequest) -> Iterator[None]:
    with _models(request.config):
        yield


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each workload of the module's layers and each peer that has a function for it."""
    if "peer" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    names = option("--vitfast-peer")
    chosen = select_peers(tuple(names) if names else None)
    with _models(metafunc.config) as toy:
        todo = workloads(
            metafunc.module.LAYERS,
            tuple(option("--vitfast-model") or ((TOY,) if toy else MODELS)),
            tuple(option("--vitfast-batch") or ((256, 1) if CUDA else (2,))),
            tuple(option("--vitfast-precision") or (("bf16",) if CUDA else ("fp32",))),
        )
    if toy and not names:
        # neither a compiler nor an exporter finishes in seconds
        slow = ("compile", "ONNX", "OpenVINO")
        chosen = tuple(peer for peer in chosen if not any(word in peer.name for word in slow))
    pairs = [(workload, peer) for workload in todo for peer in chosen if workload.op in peer.ops]
    names_of = [f"{workload} {peer.name}".replace(" ", "-") for workload, peer in pairs]
    metafunc.parametrize(("workload", "peer"), pairs, ids=names_of)


def _clock() -> float:
    """The wall clock behind the device: what was launched before counts, whoever reads it."""
    timing.synchronize(DEVICE)
    return time.perf_counter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if "peer" in parameters:
            item.add_marker(pytest.mark.benchmark(group=str(parameters["workload"]), timer=_clock))


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """What decides speed: GPU, driver, CUDA, torch, triton. The commit has a place of its own: it may differ."""
    found = machine.environment(DEVICE)
    machine_info["vitfast"] = {name: value for name, value in found.items() if name != "commit"}


@pytest.fixture(scope="session")
def ceilings() -> Ceilings:
    """This machine's, measured once in the run."""
    return measure_ceilings(DEVICE, DTYPES if CUDA else {"fp32": torch.float32}, quick=True)


@pytest.fixture(scope="session")
def prepared() -> Prepare:
    """Inputs and truth of the workload whose peers follow one another; those of the last one are dropped."""
    held: dict[int, tuple[list[dict[str, Any]], Parity]] = {}

    def prepare(workload: Workload) -> tuple[list[dict[str, Any]], Parity]:
        if id(workload) not in held:
            held.clear()
            sets = rotation(workload, DEVICE)
            held[id(workload)] = sets, Parity(workload, DEVICE, sets[0])
        return held[id(workload)]

    return prepare


@pytest.fixture
def bench(benchmark: Any, ceilings: Ceilings, prepared: Prepare) -> Callable[[Workload, Peer], None]:
    """Hold a candidate to the parity rule, then time it. What breaks fails the test if it is ours, else skips it."""

    def run(workload: Workload, peer: Peer) -> None:
        # before the truth is computed, which is a waste for those
        if reason := peer.missing(workload, DEVICE):
            pytest.skip(f"{peer.name}: {reason}")
        with fp32_products(DEVICE, workload.dtype == "tf32"):
            try:
                sets, parity = prepared(workload)
            except torch.OutOfMemoryError:
                pytest.skip("inputs and reference do not fit")
            row, call = build(workload, peer, DEVICE, sets, parity)
            if call is None:
                said = f"{peer.name} is not timed: {row.status}: {row.note}"
                if is_ours(peer.name) and row.status != "out of memory":
                    pytest.fail(said, pytrace=False)
                pytest.skip(said)
            numbers = itertools.count()

            def timed() -> None:
                call(next(numbers))

            # twice, since the first timed call may still set something up
            once = []
            for _ in range(2):
                begin = _clock()
                timed()
                once.append(_clock() - begin)
            iterations = max(1, min(1000, round(ROUND_S / max(min(once), 1e-6))))
            benchmark.pedantic(timed, rounds=20 if CUDA else 5, iterations=iterations, warmup_rounds=2)
        if workload.dtype in ceilings.gemm_tflop_s:
            row = replace(row, floor_ms=ceilings.floor_ms(workload.flops, workload.bytes, workload.dtype))
        # under --benchmark-disable nothing is timed
        if benchmark.stats is not None:
            row = replace(row, ms=1e3 * benchmark.stats.stats.median)
        row = replace(row, telemetry=machine.telemetry(DEVICE))
        told = ("status", "note", "ms", "ms_p20", "ms_p80", "samples", "calls")
        benchmark.extra_info.update({name: value for name, value in asdict(row).items() if name not in told})
        benchmark.extra_info["floor_share"] = row.floor_share

    return run
