"""`accelerate(example=...)`: what loses is left out, and what was found is remembered."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import vitfast
from tests.vitfast._models import BUILDERS, assert_same, fused_names, images, reference
from vitfast.clock import timing
from vitfast.layers import KINDS
from vitfast.swap.choices_file import Figure

X = (2, 3, 24, 32)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VITFAST_CONFIG_DIR", str(tmp_path))


@pytest.fixture(params=BUILDERS)
def build(request):
    return BUILDERS[request.param]


@pytest.fixture
def clock(monkeypatch):
    """Times by candidate's name instead of measured ones; what is not in the table takes 10 ms."""
    table: dict[str, float] = {}
    asked = []

    def time_interleaved(candidates, device, *, budget_s, min_samples):
        for run in candidates.values():
            run(0)
        asked.append(list(candidates))
        found = {name: table.get(name, 10.0) for name in candidates}
        return {name: timing.Timing(ms, 0.99 * ms, 1.01 * ms, 5, 1) for name, ms in found.items()}

    monkeypatch.setattr(timing, "time_interleaved", time_interleaved)
    monkeypatch.setattr(timing, "sample_ms", lambda *args: 1.0)
    table["asked"] = asked  # type: ignore[assignment]
    return table


def kinds(model: nn.Module) -> set:
    return {row.kind for row in vitfast.report(model).replaced}


def test_ties_stay(build, clock):
    plain = build(init_values=0.3)
    fused = vitfast.accelerate(copy.deepcopy(plain), example=images(*X))
    assert kinds(fused) == kinds(vitfast.accelerate(copy.deepcopy(plain)))
    assert clock["asked"] == [["", *KINDS], ["ours", "plain"]]
    assert_same(plain, fused, images(*X))


@pytest.mark.parametrize("loser", ["layer_norm", "attention", "mlp", "block"])
def test_a_kind_that_loses_is_left_out(build, clock, loser):
    clock[loser] = 9.0  # the model without it
    plain = build(init_values=0.3)
    fused = vitfast.accelerate(copy.deepcopy(plain), example=images(*X))
    assert loser not in kinds(fused)
    assert len(kinds(fused)) == 5
    (figure,) = [figure for figure in vitfast.report(fused).measured if figure.what == loser]
    assert figure == Figure(loser, 10.0, 9.0, False)
    assert f"measured, {loser}: 10 ms, without 9 ms, dropped" in str(vitfast.report(fused))
    assert_same(plain, fused, images(*X))


def test_a_tail_that_loses_is_left_out(build, clock):
    clock["tail"] = 9.0
    fused = vitfast.accelerate(build(), example=images(*X))
    assert all(block.fold for block in fused.blocks) and not fused.tail


def test_nothing_is_replaced_where_the_plain_model_wins(build, clock):
    clock["plain"] = 9.0
    plain = build()
    fused = vitfast.accelerate(copy.deepcopy(plain), example=images(*X))
    assert not fused_names(fused)
    assert vitfast.report(fused).measured[-1] == Figure("model", 10.0, 9.0, False)


def test_within_the_spread_is_a_tie(clock):
    clock["block"] = clock["plain"] = 9.85
    fused = vitfast.accelerate(reference(), example=images(*X))
    assert "block" in kinds(fused)


def test_only_what_is_selected_is_measured(clock):
    fused = vitfast.accelerate(reference(), example=images(*X), only={"mlp", "block"})
    assert clock["asked"][0] == ["", "mlp", "block"]
    assert kinds(fused) == {"mlp", "block"}


def test_precision(clock):
    plain = reference()
    fused = vitfast.accelerate(copy.deepcopy(plain), example=images(*X), precision="bf16")
    assert next(fused.parameters()).dtype == torch.bfloat16
    vitfast.restore(fused)
    assert torch.equal(next(fused.parameters()), next(plain.parameters()))
    assert not vitfast.report(fused).measured


def test_a_slow_model_is_compared_as_a_whole_alone(clock, monkeypatch):
    monkeypatch.setattr(timing, "sample_ms", lambda *args: 500.0)
    vitfast.accelerate(reference(), example=images(*X))
    assert clock["asked"] == [["ours", "plain"]]


def test_a_second_call_measures_nothing(build, clock, tmp_path):
    clock["mlp"] = 9.0
    first = vitfast.accelerate(build(), example=images(*X))
    count = len(clock["asked"])
    clock["mlp"] = 11.0
    second = vitfast.accelerate(build(), example=images(*X, seed=5))
    assert len(clock["asked"]) == count
    assert kinds(first) == kinds(second)
    assert vitfast.report(first).measured == vitfast.report(second).measured
    (file,) = (tmp_path / "choices").iterdir()
    assert len(json.loads(file.read_text())["choices"]) == 1


@pytest.mark.parametrize(
    "change",
    ["batch", "size", "dtype", "depth", "precision", "only", "threads", "hooks", "graph", "attention"],
    ids=str,
)
def test_anything_that_decides_speed_is_measured_anew(clock, change):
    vitfast.accelerate(reference(), example=images(*X))
    count = len(clock["asked"])
    model, x, options = reference(), images(*X), {}
    threads = torch.get_num_threads()
    if change == "batch":
        x = images(3, *X[1:])
    elif change == "size":
        x = images(2, 3, 32, 32)
    elif change == "dtype":
        x, model = x.bfloat16(), model.bfloat16()
    elif change == "depth":
        model = reference(depth=3)
    elif change == "precision":
        options = {"precision": "bf16"}
    elif change == "only":
        options = {"only": {"mlp"}}
    elif change == "graph":
        options = {"cuda_graph": True}
    elif change == "attention":
        options = {"attention": "sdpa"}
    elif change == "threads":
        torch.set_num_threads(threads + 1)
    else:
        model.blocks[0].register_forward_hook(lambda module, args, out: None)
    try:
        vitfast.accelerate(model, example=x, **options)
    finally:
        torch.set_num_threads(threads)
    assert len(clock["asked"]) > count


def test_the_model_is_as_it_was_while_it_is_measured(build, monkeypatch):
    model = build(init_values=0.3)
    classes, state = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())
    model.train()

    def fails(*args, **kwargs):
        raise RuntimeError("no clock")

    monkeypatch.setattr(timing, "time_interleaved", fails)
    with pytest.raises(RuntimeError, match="no clock"):
        vitfast.accelerate(model, example=images(*X), precision="bf16")
    assert [type(m) for m in model.modules()] == classes
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


def test_by_the_real_clock(build):
    plain = build(init_values=0.3)
    fused = vitfast.accelerate(copy.deepcopy(plain), example=images(*X))
    measured = vitfast.report(fused).measured
    assert [figure.what for figure in measured] == [*KINDS, "model"]
    assert all(figure.ours_ms > 0 and figure.other_ms > 0 for figure in measured)
    assert bool(fused_names(fused)) == measured[-1].kept
    assert_same(plain, fused, images(*X))


@pytest.mark.interpret
def test_routes_of_launches(clock):
    clock["library"] = 9.0
    model = reference(depth=1)
    example = images(*X, dtype=torch.float16)
    fused = vitfast.accelerate(model, example=example, precision="fp16", only=set(KINDS) - {"fold"})
    figures = {figure.what: figure for figure in vitfast.report(fused).measured}
    routes = [what for what in figures if " " in what]
    assert any(what.startswith("attention n=1,s=13,d=12,float16") for what in routes)
    assert any(what.startswith("linear m=26,n=96,k=48,float16") for what in routes)
    assert not any(figures[what].kept for what in routes)
    assert "torch's own 9 ms, dropped" in str(vitfast.report(fused))


@pytest.mark.interpret
def test_folded_layers_and_fp32_have_one_route(clock):
    fused = vitfast.accelerate(reference(depth=2), example=images(*X))
    routes = [figure.what for figure in vitfast.report(fused).measured if " " in figure.what]
    assert routes
    assert all(what.startswith("attention") for what in routes)


@pytest.mark.parametrize(
    ("example", "error", "message"),
    [
        (images(2, 4, 24, 32), ValueError, r"example of shape \[2, 4, 24, 32\]: the model cannot take it"),
        (torch.empty(X, device="meta"), ValueError, "example is on meta, the model on cpu"),
        ("images", TypeError, "example is a str; expected a batch of pixels"),
    ],
    ids=["channels", "device", "no tensor"],
)
def test_wrong_examples(example, error, message):
    model = reference()
    with pytest.raises(error, match=message):
        vitfast.accelerate(model, example=example)
    assert not fused_names(model)


def test_an_accelerated_model_has_nothing_to_be_timed_against():
    model = vitfast.accelerate(reference())
    with pytest.raises(ValueError, match="example: the model is accelerated already; restore it"):
        vitfast.accelerate(model, example=images(*X))


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 0, "choices": {}}'], ids=["json", "list", "schema"])
def test_a_damaged_cache_is_named(clock, content, tmp_path):
    vitfast.accelerate(reference(), example=images(*X))
    (file,) = (tmp_path / "choices").iterdir()
    file.write_text(content)
    with pytest.raises(ValueError, match=r"choices.*: not a file of choices.*delete it to measure anew"):
        vitfast.accelerate(reference(), example=images(*X))
