"""layer_norm and add_layer_norm."""

from __future__ import annotations

from tests.kernels._cases import Case, Lane, across_lanes, check


@across_lanes("layer_norm", "add_layer_norm", "linear", "mlp", "attention", "attention_qkv", "patch_embed")
def test_numbers(case: Case, lane: Lane, through_op: None, poisoned: None) -> None:
    check(case, lane.device, lane.dtype)
