"""The only tolerance rule of the tests; what it says stands in `vitfast.rule`."""

from __future__ import annotations

from torch import Tensor

from vitfast.rule import FACTOR, compare


def assert_close(actual: Tensor, truth: Tensor, baseline: Tensor, *, name: str = "output") -> None:
    """Assert that `actual` is as near to `truth` as the rule demands.

    Args:
        actual: the result under test.
        truth: the same result computed in float64.
        baseline: the same result by torch in `actual`'s dtype.
        name: for the message.
    """
    result = compare(actual, truth, baseline)
    assert not actual.isnan().any(), f"{name}: {int(actual.isnan().sum())} of {actual.numel()} elements are NaN"
    assert result.ok, (
        f"{name} ({actual.dtype}): largest error {result.worst:.3e}, allowed {result.worst_limit:.3e};"
        f" rms error {result.rms:.3e}, allowed {result.rms_limit:.3e}; the limits are {FACTOR:g} x torch's"
        f" {result.baseline_worst:.3e} and {result.baseline_rms:.3e} plus one ulp"
    )
