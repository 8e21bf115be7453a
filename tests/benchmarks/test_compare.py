"""What `compare` calls a difference: not the noise of two runs of the same code, and every real shift."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.benchmarks._fake import environment, fake_run, timed
from vitfast.benchmarks.report.compare import FLOOR, compare
from vitfast.benchmarks.runner.results import Row, Run
from vitfast.clock.ceilings import Ceilings
from vitfast.clock.timing import summarize

Draw = Callable[[random.Random], float]

NOISES: dict[str, Draw] = {
    "normal": lambda r: r.gauss(1.0, 0.02),
    "long tail": lambda r: 1.0 + 0.02 * r.lognormvariate(0.0, 1.0),
    "two levels": lambda r: r.gauss(1.0, 0.005) + (0.05 if r.random() < 0.3 else 0.0),
}


def _row(i: int, samples: list[float]) -> Row:
    t = summarize(samples, 1)
    return Row(
        "model", f"w{i}", {"batch": 1}, "bf16", "vitfast", "ok",
        ms=t.median, ms_p20=t.p20, ms_p80=t.p80, samples=t.samples, calls=1,
    )  # fmt: skip


def _simulate(draw: Draw, samples: int, shift: float, rows: int = 300) -> Counter[str]:
    r = random.Random(0)
    a, b = (
        Run(environment(), None, [_row(i, [factor * draw(r) for _ in range(samples)]) for i in range(rows)])
        for factor in (1.0, shift)
    )
    return Counter(pair.verdict for pair in compare(a, b).pairs)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("samples", [5, 10, 200])
def test_samples_of_one_distribution_are_no_difference(noise: str, samples: int) -> None:
    found = _simulate(NOISES[noise], samples, 1.0)
    # five samples of a noise with two levels can all lie on one of them, and then nothing tells them from a shift
    least = 297 if samples >= 10 else 282 if noise == "two levels" else 291
    assert found["no difference"] >= least, found


@pytest.mark.parametrize("samples", [10, 30, 200])
@pytest.mark.parametrize(("shift", "verdict"), [(1.1, "slower"), (1 / 1.1, "faster")])
def test_a_tenth_is_found_at_two_per_cent_of_spread(samples: int, shift: float, verdict: str) -> None:
    found = _simulate(NOISES["normal"], samples, shift)
    assert found[verdict] >= 285, found
    assert found[verdict] + found["no difference"] == 300, found


def _busy(seed: int, rounds: int, load: float, *, ours: float = 1.0, workloads: int = 60) -> Run:
    """A run beside another process that comes and goes and takes up to `load` of what everyone needs, for about forty
    samples on end; scheduling hits single samples too. `ours` is how much slower our own candidates are."""
    r, slowed, rows = random.Random(seed), 1.0, []
    speeds = {"torch eager": 1.0, "torch compiled": 1.0, "vitfast +mlp": ours, "vitfast +block": ours}
    for i in range(workloads):
        taken: dict[str, list[float]] = {name: [] for name in speeds}
        for _ in range(rounds):
            for name in r.sample(list(speeds), len(speeds)):
                if r.random() < 0.025:
                    slowed = 1.0 if slowed > 1.0 else 1.0 + load * r.random()
                hit = 1.5 if r.random() < 0.05 else 1.0
                taken[name].append(speeds[name] * slowed * hit * NOISES["long tail"](r))
        rows += [replace(_row(i, samples), candidate=name) for name, samples in taken.items()]
    return Run(environment(), None, rows)


@pytest.mark.parametrize("load", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("rounds", [5, 30])
def test_the_same_code_on_a_busy_machine_is_no_difference(rounds: int, load: float) -> None:
    for seed in range(2):
        found = compare(_busy(2 * seed, rounds, load), _busy(2 * seed + 1, rounds, load))
        assert Counter(pair.verdict for pair in found.pairs)["no difference"] >= 0.995 * len(found.pairs)
        assert found.regressions(0.0) == []
        assert found.controlled


def test_slower_code_is_found_on_a_busy_machine() -> None:
    found = compare(_busy(1, 30, 0.3), _busy(2, 30, 0.3, ours=2.0))
    ours = [pair for pair in found.pairs if pair.a.candidate.startswith("vitfast")]
    assert len(found.regressions(0.05)) >= 0.9 * len(ours)


def test_without_peers_there_is_no_control() -> None:
    def alone(run: Run) -> Run:
        return Run(run.environment, None, [row for row in run.rows if row.candidate.startswith("vitfast")])

    assert not compare(alone(_busy(1, 5, 1.0)), alone(_busy(2, 5, 1.0))).controlled
    # peers of another version moved for a reason of their own
    newer = _busy(2, 5, 1.0)
    newer.environment = environment(versions={"torch": "2.12.0"})
    assert not compare(_busy(1, 5, 1.0), newer).controlled


def test_two_processes_differ_by_more_than_their_samples() -> None:
    # tight samples, far apart for them, but no farther than two processes are
    assert _simulate(lambda r: r.gauss(1.0, 1e-4), 200, 1 + 0.9 * FLOOR)["no difference"] == 300
    assert _simulate(lambda r: r.gauss(1.0, 1e-4), 200, 1 + 1.2 * FLOOR)["slower"] == 300


def test_two_runs_of_the_same_code_are_no_difference() -> None:
    found = compare(fake_run(seed=1), fake_run(seed=2))
    assert Counter(p.verdict for p in found.pairs)["no difference"] == len(found.pairs) > 100
    assert found.regressions(0.0) == []
    assert (found.only_a, found.only_b, found.differences) == ((), (), ())
    assert "no difference" in str(found)


def test_a_slower_candidate_is_found_among_the_others() -> None:
    found = compare(fake_run(seed=1), fake_run(seed=2, faster={"vitfast +mlp": 0.9}))
    slower = [pair for pair in found.pairs if pair.verdict != "no difference"]
    assert {pair.a.candidate for pair in slower} == {"vitfast +mlp"}
    assert {pair.verdict for pair in slower} == {"slower"}
    assert found.regressions(0.05) == slower
    assert found.regressions(0.2) == []
    text = str(found)
    table = text[text.index("verdict\n") :].splitlines()
    assert "% slower" in table[2], "what is slower comes first"
    assert "0.9" in table[2]


def test_peers_that_moved_are_a_control() -> None:
    # the machine was slower by a tenth for everyone, ours included: that says nothing about the code
    everyone = dict.fromkeys((row.candidate for row in fake_run().rows), 0.9)
    found = compare(fake_run(seed=1), fake_run(seed=2, faster=everyone))
    assert found.drift == pytest.approx(0.9, abs=0.005)
    assert found.controls > 100
    ours = Counter(pair.verdict for pair in found.pairs if pair.a.candidate.startswith("vitfast"))
    assert ours["no difference"] >= 0.985 * ours.total()
    assert "peers are the control" in str(found)
    assert "moved by -10" in str(found) or "moved by -9" in str(found)
    assert "quiet machine" not in str(found)


@pytest.mark.parametrize(("ours", "verdict"), [(0.8, "no difference"), (0.6, "slower"), (1.3, "faster")])
def test_the_peers_of_a_workload_are_its_control(ours: float, verdict: str) -> None:
    # another process took a fifth of the machine while one workload was measured; few rows, so no control of the run
    blank = Row("model", "w", {"batch": 1}, "bf16", "torch eager", "ok")
    r = random.Random(0)

    def rows(peer: float, fused: float) -> list[Row]:
        speeds = {"torch eager": peer, "vitfast": fused}
        return [
            timed(replace(blank, candidate=name), 1.0 / speed, spread=0.01, samples=30, draw=r)
            for name, speed in speeds.items()
        ]

    found = compare(Run(environment(), None, rows(1.0, 1.0)), Run(environment(), None, rows(0.8, ours)))
    assert found.controls == 1
    assert [pair.verdict for pair in found.pairs] == ["no difference", verdict]


def test_peers_of_another_version_are_no_control() -> None:
    a, b = fake_run(seed=1), fake_run(seed=2, faster={"torch compiled": 0.5})
    b.environment = environment(versions={"torch": "2.12.0"})
    found = compare(a, b)
    assert (found.controls, found.drift) == (0, 1.0)
    assert "torch differs: 2.11.0+cu130 in A, 2.12.0 in B" in str(found)
    assert "two machines" not in str(found)


def test_another_device_is_said_on_top() -> None:
    a, b = fake_run(batches=(1,)), fake_run(batches=(1,))
    b.environment = environment("FAKE other device")
    b.ceilings = Ceilings(2000.0, {"bf16": 150.0})
    lines = str(compare(a, b)).splitlines()
    assert lines[0] == "device differs: FAKE H100 (not a device) in A, FAKE other device in B"
    assert lines[1].startswith("These are two machines")
    assert lines[2] == "B's ceilings over A's: copy 2.000, bf16 GEMM 1.500"


def test_rows_of_one_run_only_are_listed() -> None:
    a, b = fake_run(batches=(1, 8)), fake_run(batches=(8, 32))
    found = compare(a, b)
    assert {row.shape["batch"] for row in found.only_a} == {1}
    assert {row.shape["batch"] for row in found.only_b} == {32}
    assert {pair.a.shape["batch"] for pair in found.pairs} == {8}
    assert "missing" not in {row.status for row in (*found.only_a, *found.only_b)}
    assert "Only in A:" in str(found)
    assert "Only in B:" in str(found)


def _pair(status_a: str, status_b: str) -> tuple[Run, Run]:
    blank = Row("model", "w", {"batch": 1}, "bf16", "vitfast", "ok")

    def row(status: str) -> Row:
        if status == "ok":
            return timed(blank, 1.0, spread=0.01, samples=10, draw=random.Random(0))
        return replace(blank, status=status, note="a made-up reason")

    return Run(environment(), None, [row(status_a)]), Run(environment(), None, [row(status_b)])


@pytest.mark.parametrize("status", ["failed parity", "out of memory", "error"])
def test_what_breaks_is_a_regression_and_the_other_way_round_is_none(status: str) -> None:
    a, b = _pair("ok", status)
    found = compare(a, b)
    assert [pair.verdict for pair in found.pairs] == ["broken"]
    assert len(found.regressions(0.5)) == 1
    assert "broken: a made-up reason" in str(found)
    back = compare(b, a)
    assert [pair.verdict for pair in back.pairs] == ["fixed"]
    assert back.regressions() == []


def test_a_peer_that_is_missing_in_one_run_is_no_regression() -> None:
    a, b = _pair("ok", "missing")
    found = compare(a, b)
    assert (found.pairs, len(found.only_a), found.only_b, found.regressions()) == ((), 1, (), [])
    found = compare(b, a)
    assert (found.pairs, found.only_a, len(found.only_b), found.regressions()) == ((), (), 1, [])


def test_one_sample_tells_no_spread_and_so_no_difference() -> None:
    fast, slow = (_row(0, [ms]) for ms in (1.0, 2.0))
    found = compare(Run(environment(), None, [fast]), Run(environment(), None, [slow]))
    assert [pair.verdict for pair in found.pairs] == ["no difference"]


def test_the_ratio_is_speed_and_has_a_range() -> None:
    a, b = (_row(0, [ms * (1 + 0.01 * i) for i in range(-5, 6)]) for ms in (2.0, 1.0))
    (pair,) = compare(Run(environment(), None, [a]), Run(environment(), None, [b])).pairs
    assert pair.ratio == pytest.approx(2.0)
    assert pair.verdict == "faster"
    assert pair.ratio_range is not None
    low, high = pair.ratio_range
    assert low < 2.0 < high


@pytest.mark.parametrize("threshold", [-0.1, 1.0, 5.0])
def test_a_threshold_is_a_share(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        compare(fake_run(batches=(1,)), fake_run(batches=(1,))).regressions(threshold)


def test_the_same_files_give_the_same_verdicts() -> None:
    first, second = (str(compare(fake_run(seed=1, spread=0.1), fake_run(seed=2, spread=0.1))) for _ in range(2))
    assert first == second


def test_empty_runs_compare() -> None:
    assert "none in common" in str(compare(Run(environment()), Run(environment())))


def test_a_few_peers_that_did_change_do_not_hide_ours() -> None:
    changed = {"torch compiled": 0.5, "vitfast +mlp": 0.9}
    found = compare(fake_run(seed=1), fake_run(seed=2, faster=changed))
    assert {pair.a.candidate for pair in found.pairs if pair.verdict == "slower"} == set(changed)


def test_a_busy_machine_is_said_to_be_one() -> None:
    text = str(compare(fake_run(seed=1), fake_run(seed=2, spread=0.3)))
    assert "ranges are wider than 20%; repeat on a quiet machine" in text
