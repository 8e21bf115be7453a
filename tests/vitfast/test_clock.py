"""The clock: candidates take turns, medians and percentiles are what they say, a ceiling is the best of its samples."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from vitfast.clock import ceilings, timing

CPU = torch.device("cpu")


def test_candidates_take_turns_and_inputs_rotate() -> None:
    seen: dict[str, list[int]] = {"a": [], "b": []}
    order: list[str] = []

    def candidate(name: str) -> timing.Candidate:
        def call(index: int) -> None:
            seen[name].append(index)
            order.append(name)

        return call

    timings = timing.time_interleaved(
        {name: candidate(name) for name in seen},
        CPU,
        budget_s=0.05,
        min_samples=6,
        max_samples=6,
        sample_target_ms=1e-9,
    )
    assert {name: t.samples for name, t in timings.items()} == {"a": 6, "b": 6}
    timed = order[-12:]
    assert all({timed[i], timed[i + 1]} == {"a", "b"} for i in range(0, 12, 2))
    # no index comes twice, so no call gets the inputs of the one before
    assert len(set(seen["a"] + seen["b"])) == len(seen["a"]) + len(seen["b"])


def test_a_ceiling_is_the_fastest_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([9.0, 8.0, 3.0, 2.0, 7.0])
    monkeypatch.setattr(ceilings, "sample_ms", lambda *args: next(times, 4.0))
    monkeypatch.setattr(ceilings, "CEILING_S", 0.05)
    assert ceilings._fastest_ms(lambda i: None, CPU) == 2.0


def test_every_gemm_of_the_ceiling_is_the_product() -> None:
    a, b = torch.randn(2, 24, 24).unbind(0)
    gemms = ceilings._gemms(a, b)
    assert len(gemms) == 1 + torch.backends.mkldnn.is_available()
    for gemm in gemms:
        torch.testing.assert_close(gemm(0), a @ b)


def test_percentiles() -> None:
    found = timing.summarize([float(i) for i in range(1, 12)], calls=3)
    assert dataclasses.astuple(found) == (6.0, 3.0, 9.0, 11, 3)
    assert timing.summarize([4.0], calls=1).p80 == 4.0
