"""The tolerance rule.

A kernel may err twice as much as torch does in the same dtype. Truth is the reference in float64 on the same rounded
inputs and weights. The rule holds the largest error and the root mean square, each with a floor of one ulp of the
result's scale, since torch can happen to be exact. It is flash-attention's rule, kept for ops and whole models alike.
Where torch itself is far from truth it allows anything, so outputs of layers and models must resemble truth besides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 2.0
"""How many times torch's own error is allowed."""

ALIKE = 0.9
"""Cosine similarity with truth below which an output is noise, however large torch's own error is."""


@dataclass(frozen=True)
class Comparison:
    """Errors of a result and of torch's own, both absolute against float64.

    Attributes:
        worst: largest error.
        rms: root-mean-square error.
        baseline_worst, baseline_rms: the same of torch's result.
        worst_limit, rms_limit: what the rule allows.
        cosine: cosine similarity of the result and truth; 1 where both are zero.
        truth_rms: root mean square of truth, the scale of the errors.
        least_cosine: what the cosine must be, since where torch itself is far from truth its error allows anything;
            None for no demand.
    """

    worst: float
    rms: float
    baseline_worst: float
    baseline_rms: float
    worst_limit: float
    rms_limit: float
    cosine: float
    truth_rms: float
    least_cosine: float | None = None

    @property
    def relative(self) -> float:
        """Error over truth, both in the Euclidean norm."""
        return _ratio(self.rms, self.truth_rms)

    @property
    def baseline_relative(self) -> float:
        """The same of torch's result."""
        return _ratio(self.baseline_rms, self.truth_rms)

    @property
    def share(self) -> float:
        """The larger of the two errors' shares of their limits: at most 1 where the rule holds, NaN for a NaN.

        Infinite where the result is not `alike`.
        """
        shares = (_ratio(self.worst, self.worst_limit), _ratio(self.rms, self.rms_limit))
        return next((s for s in shares if s != s), max(shares) if self.alike else float("inf"))

    @property
    def ok(self) -> bool:
        """Whether the rule holds. A NaN anywhere breaks it."""
        return self.worst <= self.worst_limit and self.rms <= self.rms_limit and self.alike

    @property
    def alike(self) -> bool:
        """Whether the cosine is what it must be."""
        return self.least_cosine is None or self.cosine >= self.least_cosine


def _ratio(part: float, whole: float) -> float:
    if whole == 0.0:
        return 0.0 if part == 0.0 else float("inf")
    return part / whole


def _errors(x: Tensor, truth: Tensor) -> tuple[float, float]:
    difference = x - truth
    return difference.abs().max().item(), difference.square().mean().sqrt().item()


def _cosine(x: Tensor, truth: Tensor) -> float:
    if not x.any() and not truth.any():
        return 1.0
    # of any scale: torch's own takes small vectors for zero
    x, truth = (t.flatten() / t.abs().max().clamp_min(torch.finfo(t.dtype).tiny) for t in (x, truth))
    return torch.nn.functional.cosine_similarity(x, truth, dim=0).item()


def compare(actual: Tensor, truth: Tensor, baseline: Tensor, *, least_cosine: float | None = None) -> Comparison:
    """Hold `actual` to the rule.

    Args:
        actual: the result under test, any shape and dtype.
        truth: the same result computed in float64.
        baseline: the same result by torch in `actual`'s dtype.
        least_cosine: cosine similarity with truth that is demanded besides, `ALIKE` for outputs of layers and models.
            By default none, since a gradient may be zero but for rounding.

    Raises:
        ValueError: the shapes differ, or `actual` and `baseline` have different dtypes.
    """
    if not actual.shape == truth.shape == baseline.shape:
        raise ValueError(
            f"compare: shapes {list(actual.shape)}, {list(truth.shape)} (truth) and {list(baseline.shape)} (baseline);"
            " expected one shape"
        )
    if actual.dtype != baseline.dtype:
        raise ValueError(f"compare: dtype {actual.dtype}, but the baseline has {baseline.dtype}; expected one dtype")
    if actual.numel() == 0:
        return Comparison(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, cosine=1.0, truth_rms=0.0, least_cosine=least_cosine)
    eps = torch.finfo(actual.dtype).eps
    actual, truth, baseline = (t.detach().to("cpu", torch.float64) for t in (actual, truth, baseline))
    worst, rms = _errors(actual, truth)
    baseline_worst, baseline_rms = _errors(baseline, truth)
    truth_rms = truth.square().mean().sqrt().item()
    return Comparison(
        worst,
        rms,
        baseline_worst,
        baseline_rms,
        worst_limit=FACTOR * baseline_worst + eps * truth.abs().max().item(),
        rms_limit=FACTOR * baseline_rms + eps * truth_rms,
        cosine=_cosine(actual, truth),
        truth_rms=truth_rms,
        least_cosine=least_cosine,
    )
