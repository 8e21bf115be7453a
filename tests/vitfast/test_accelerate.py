"""`accelerate`, `restore` and `report`: in place, reversible, and whole under what people do to models."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

import vitfast
from tests.vitfast._models import BUILDERS, assert_same, fused_names, images, reference, run, timm_vit
from vitfast import kernels
from vitfast.layers import KINDS, FusedLayer, FusedModel

X = (2, 3, 24, 32)


@pytest.fixture(params=BUILDERS)
def build(request):
    return BUILDERS[request.param]


def pair(build, **changes) -> tuple[nn.Module, nn.Module]:
    plain = build(**changes)
    return plain, vitfast.accelerate(copy.deepcopy(plain))


def types(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


# --- in place, reversible, shared


def test_in_place_and_shared(build):
    model = build(init_values=0.3)
    before = dict(model.named_parameters())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modules = list(model.modules())
    kinds = types(model)
    assert vitfast.accelerate(model) is model
    assert [id(m) for m in model.modules()] == [id(m) for m in modules]
    assert types(model) != kinds
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    # what replaces a class is a kind of it, so tools that look for the class find it
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), kinds, strict=True))
    assert vitfast.restore(model) is model
    assert types(model) == kinds
    assert all(p is before[name] for name, p in model.named_parameters())


@pytest.mark.parametrize("precision", [None, "tf32", "bf16"])
def test_restore_leaves_nothing_behind(build, precision):
    model = build(init_values=0.3)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    vitfast.restore(vitfast.accelerate(model, precision=precision, compile=precision is None))
    # torch sets the attribute back to None after `compile`
    after = {name: set(vars(module)) - {"_compiled_call_impl"} for name, module in model.named_modules()}
    assert after == before


def test_restore_of_a_model_that_was_never_accelerated(build):
    model = build()
    kinds = types(model)
    assert vitfast.restore(model) is model
    assert types(model) == kinds


def test_restore_after_a_training_step_returns_the_trained_weights(build):
    plain, fused = pair(build, init_values=0.3)
    before = copy.deepcopy(plain.state_dict())
    for model in (plain, fused):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.train()
        model(images(*X)).square().sum().backward()
        optimizer.step()
    vitfast.restore(fused)
    for name, value in fused.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-4, atol=1e-4)
        assert not torch.equal(value, before[name])


def test_state_dict_travels_both_ways(build):
    plain, fused = pair(build, init_values=0.3)
    other = build(init_values=0.3)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    fused.load_state_dict(other.state_dict())
    plain.load_state_dict(fused.state_dict())
    torch.testing.assert_close(fused(images(*X)), other(images(*X)))
    assert_same(plain, fused, images(*X), grad=False)


# --- only


SELECTIONS = [set(c) for n in (1, 2) for c in itertools.combinations(KINDS, n)]


def row_kinds(only) -> set:
    """The kinds of modules that a selection replaces: what works on a whole model is in the model's row."""
    served = set(only) & set(FusedModel.serves)
    return set(only) - {"fold", "tail"} | ({"model"} if served else set())


@pytest.mark.parametrize("only", SELECTIONS, ids=lambda only: "+".join(sorted(only)))
def test_only(build, only):
    plain = build(init_values=0.3, qk_norm=True)
    fused = vitfast.accelerate(copy.deepcopy(plain), only=only)
    assert {row.kind for row in vitfast.report(fused).replaced} == row_kinds(only)
    kept = vitfast.report(fused).kept
    assert {row.kind for row in kept} == row_kinds(KINDS) - row_kinds(only)
    assert {row.note for row in kept} == {"could be replaced, is not switched on"}
    assert_same(plain, fused, images(*X))


def test_only_adds_up(build):
    plain = build(init_values=0.3)
    fused = copy.deepcopy(plain)
    for kind in KINDS:
        vitfast.accelerate(fused, only=[kind], strict=True)
        assert_same(plain, fused, images(*X), grad=False)
    assert types(fused) == types(vitfast.accelerate(copy.deepcopy(plain)))
    vitfast.restore(fused)
    assert types(fused) == types(plain)


def test_only_nothing(build):
    model = build()
    kinds = types(model)
    assert types(vitfast.accelerate(model, only=())) == kinds


@pytest.mark.parametrize(
    ("only", "message"),
    [("block", "is a string"), (["blocks"], "unknown kind 'blocks'"), ({"mlp", "gelu"}, "unknown kind 'gelu'")],
    ids=["string", "unknown", "one unknown"],
)
def test_only_is_checked(only, message):
    model = reference()
    with pytest.raises(ValueError, match=message):
        vitfast.accelerate(model, only=only)
    assert not fused_names(model)


# --- strict, report, wrong arguments


def test_strict_takes_a_model_that_can_be_replaced(build):
    model = vitfast.accelerate(build(init_values=0.3), strict=True)
    # and again: what is replaced already is no failure
    assert fused_names(vitfast.accelerate(model, strict=True)) == fused_names(model)


def test_strict_names_each_module_and_changes_nothing():
    model = reference(mlp_layer="swiglu")
    with pytest.raises(ValueError, match="gated MLP") as error:
        vitfast.accelerate(model, strict=True, precision="bf16", compile=True)
    assert "blocks.0.mlp (GluMlp)" in str(error.value) and "blocks.1.mlp (GluMlp)" in str(error.value)
    assert not fused_names(model)
    assert next(model.parameters()).dtype == torch.float32
    # the kinds that can be replaced are no reason to refuse
    vitfast.accelerate(model, strict=True, only={"attention", "block", "patch_embed", "layer_norm"})


def test_strict_refuses_a_model_without_anything_to_replace():
    with pytest.raises(ValueError, match="nothing in this Sequential can be replaced"):
        vitfast.accelerate(nn.Sequential(nn.Linear(2, 2)), strict=True)
    vitfast.accelerate(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("function", [vitfast.accelerate, vitfast.restore, vitfast.report])
def test_something_that_is_no_model(function):
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got str"):
        function("model")


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_model_is_refused():
    scripted = torch.jit.script(nn.Sequential(nn.LayerNorm(4)))
    with pytest.raises(TypeError, match="scripted"):
        vitfast.accelerate(scripted)


def test_report_is_a_table():
    model = reference(mlp_layer="swiglu")
    text = str(vitfast.report(model))
    assert "0 modules replaced" in text and "could be replaced, is not switched on" in text
    vitfast.accelerate(model, precision="bf16")
    lines = str(vitfast.report(model)).splitlines()
    assert lines[0].split() == ["modules", "count", "kind", "original", "replaced", "by", "note"]
    block = next(line for line in lines if "FusedReferenceBlock" in line)
    assert block.startswith("blocks.0 ... blocks.1") and " 2 " in block and "mlp is a GluMlp" in block
    gated = next(line for line in lines if "GluMlp" in line and "FusedReferenceBlock" not in line)
    assert " - " in gated and "gated MLP" in gated
    assert "(model)" in "\n".join(lines)
    assert lines[-1] == "11 modules replaced, 2 kept, precision bf16"


def test_report_reads_the_model_as_it_is_now():
    model = vitfast.accelerate(timm_vit())
    assert {row.note for row in vitfast.report(model).rows} == {""}
    model.blocks[1].attn.qkv.register_forward_hook(lambda m, args, out: None)
    notes = {row.module: row.note for row in vitfast.report(model).rows if row.note}
    assert notes == {"blocks.1.attn": "qkv has hooks: called as a module"}


def test_a_part_of_a_model_and_a_model_in_a_model(build):
    plain = build(init_values=0.3)
    fused = copy.deepcopy(plain)
    vitfast.accelerate(fused.blocks[1])
    assert set(fused_names(fused)) and all(name.startswith("blocks.1") for name in fused_names(fused))
    assert_same(plain, fused, images(*X))
    wrapped = vitfast.accelerate(nn.Sequential(fused, nn.LayerNorm(7), nn.Tanh()))
    assert fused_names(wrapped)["1"] == "FusedLayerNorm"
    # seven logits through a norm: gradients are sums of what cancels, in an order that the tail changes
    assert_same(nn.Sequential(plain, nn.LayerNorm(7), nn.Tanh()), wrapped, images(*X), grad=False)


def test_a_block_used_twice(build):
    plain = build(init_values=0.3)
    plain.blocks[1] = plain.blocks[0]
    fused = vitfast.accelerate(copy.deepcopy(plain))
    assert fused.blocks[0] is fused.blocks[1]
    assert_same(plain, fused, images(*X))


# --- copies


def test_deepcopy(build):
    plain, fused = pair(build, init_values=0.3)
    twin = copy.deepcopy(fused)
    assert types(twin) == types(fused)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in fused.parameters()}
    assert_same(plain, twin, images(*X))
    vitfast.restore(twin)
    assert types(twin) == types(plain) and types(fused) != types(plain)


def save(model: nn.Module, way: str) -> nn.Module:
    buffer = io.BytesIO()
    if way == "pickle":
        pickle.dump(model, buffer)
        return pickle.loads(buffer.getvalue())
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("precision", [None, "bf16"], ids=["as is", "bf16"])
@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_saved_and_loaded(build, way, precision):
    plain = build(init_values=0.3)
    fused = vitfast.accelerate(copy.deepcopy(plain), precision=precision)
    loaded = save(fused, way)
    assert types(loaded) == types(fused)
    x = images(*X).to(next(fused.parameters()).dtype)
    assert torch.equal(loaded(x), fused(x))
    vitfast.restore(loaded)
    assert types(loaded) == types(plain)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), plain.parameters(), strict=True))


def test_loaded_in_a_fresh_process(build, tmp_path):
    fused = vitfast.accelerate(build(init_values=0.3))
    x = images(*X)
    torch.save({"model": fused, "x": x, "y": fused(x).detach()}, tmp_path / "model.pt")
    script = (
        # the stub that lets timm be imported beside a CPU build of torch
        "import tests.conftest, torch, sys\n"
        "saved = torch.load(sys.argv[1], weights_only=False)\n"
        "assert repr(saved['model'].blocks[0]).startswith('Fused')\n"
        "torch.testing.assert_close(saved['model'](saved['x']), saved['y'])\n"
        "import vitfast\n"
        "vitfast.restore(saved['model'])\n"
        "torch.testing.assert_close(saved['model'](saved['x']), saved['y'])\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model.pt")], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["AveragedModel", "AveragedModel, EMA", "ModelEmaV3"])
def test_averaged_models(build, kind):
    plain, fused = pair(build, init_values=0.3)
    averages = {}
    for key, model in (("plain", plain), ("fused", fused)):
        average = {
            "AveragedModel": lambda m: AveragedModel(m),
            "AveragedModel, EMA": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
            "ModelEmaV3": lambda m: ModelEmaV3(m, decay=0.9),
        }[kind](model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for step in range(2):
            optimizer.zero_grad()
            model(images(*X, seed=step)).square().mean().backward()
            optimizer.step()
            update = average.update_parameters if kind.startswith("Averaged") else average.update
            update(model)
        averages[key] = average.module
    assert fused_names(averages["fused"]) == fused_names(fused)
    torch.testing.assert_close(averages["fused"](images(*X)), averages["plain"](images(*X)), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(averages["fused"](images(*X)), fused(images(*X)))


# --- modes, transforms, wrappers


def test_train_and_eval_switch(build):
    plain, fused = pair(build, drop_path_rate=0.5, proj_drop_rate=0.3)
    for train in (True, False, True, False):
        assert_same(plain, fused, images(4, 3, 24, 32), train=train, grad=False)


def test_inference_mode_and_no_grad(build):
    plain, fused = pair(build, init_values=0.3)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            torch.testing.assert_close(fused(images(*X)), plain(images(*X)))
    # what ran in inference mode trains afterwards
    assert_same(plain, fused, images(*X))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("changes", [{}, {"init_values": 0.3, "qk_norm": True}, {"global_pool": "avg"}], ids=str)
def test_autocast(build, dtype, changes):
    plain, fused = pair(build, **changes)

    def call(model, x):
        with torch.autocast("cpu", dtype=dtype, enabled=x.dtype != torch.float64):
            return model.forward_features(x), model(x)

    with torch.no_grad():
        for got, expected in zip(call(fused, images(*X)), call(plain, images(*X)), strict=True):
            assert got.dtype == expected.dtype
    assert_same(plain, fused, images(*X), call)


def test_autocast_with_relative_positions():
    plain, fused = pair(reference, pos_embed="relative")

    def call(model, x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=x.dtype != torch.float64):
            return model(x)

    assert_same(plain, fused, images(*X), call)


def test_frozen_parameters(build):
    plain, fused = pair(build, init_values=0.3)
    for model in (plain, fused):
        for name, p in model.named_parameters():
            p.requires_grad_("blocks.1" in name and "bias" not in name)
    results = run(fused, lambda m, x: m(x), images(*X))
    assert "gradient of blocks.0.mlp.fc1.weight" not in results
    assert "gradient of blocks.1.ls2.gamma" in results
    assert_same(plain, fused, images(*X))


def test_meta_device(build):
    with torch.device("meta"):
        model = build(init_values=0.3)
    vitfast.accelerate(model, precision="bf16")
    out = model(torch.empty(2, 3, 24, 32, device="meta", dtype=torch.bfloat16))
    assert out.is_meta and out.shape == (2, 7) and out.dtype == torch.bfloat16
    vitfast.restore(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    # made on meta, filled later: the way large models are loaded
    model = vitfast.accelerate(model).to_empty(device="cpu").eval()
    plain = build(init_values=0.3)
    model.load_state_dict(plain.state_dict())
    assert_same(plain, model, images(*X), grad=False)


def test_empty_batch(build):
    plain, fused = pair(build, init_values=0.3)
    x = images(0, 3, 24, 32)
    assert fused(x).shape == plain(x).shape == (0, 7)
    fused(x).sum().backward()
    assert all(not p.grad.any() for p in fused.parameters() if p.grad is not None)


def test_float64(build):
    plain, fused = pair(build, init_values=0.3, qk_norm=True)
    x = images(*X, dtype=torch.float64)
    torch.testing.assert_close(fused.double()(x), plain.double()(x))


def test_functional_call_vmap_and_per_sample_gradients(build):
    plain, fused = pair(build, init_values=0.3)
    x = images(*X)
    weights = {name: p.detach() * 1.1 for name, p in plain.named_parameters()}
    expected = torch.func.functional_call(plain, weights, (x,))
    torch.testing.assert_close(torch.func.functional_call(fused, weights, (x,)), expected)
    assert not torch.allclose(expected, fused(x))

    def loss(model):
        def of(weights, image):
            return torch.func.functional_call(model, weights, (image[None],)).square().sum()

        return torch.func.vmap(torch.func.grad(of), in_dims=(None, 0))(weights, x)

    expected, got = loss(plain), loss(fused)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4)


def test_second_derivatives(build):
    # gradient penalties and adversarial training differentiate twice; torch's own attention must allow it
    plain, fused = pair(build, init_values=0.3)
    results = []
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for model in (plain, fused):
            x = images(*X).requires_grad_()
            (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
            grad.square().sum().backward()
            results.append(x.grad)
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_jit_trace(build):
    plain, fused = pair(build, init_values=0.3)
    traced = torch.jit.trace(fused, images(*X))
    torch.testing.assert_close(traced(images(*X, seed=2)), plain(images(*X, seed=2)))


def test_data_parallel(build):
    plain, fused = pair(build)
    wrapped = nn.DataParallel(fused)
    torch.testing.assert_close(wrapped(images(*X)), plain(images(*X)))
    assert fused_names(wrapped)["module"]
    vitfast.restore(wrapped)
    assert types(fused) == types(plain)


@pytest.fixture
def gloo(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _step(model: nn.Module, x) -> torch.Tensor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(x).square().mean().backward()
    optimizer.step()
    return model(x).detach()


@pytest.mark.parametrize("order", ["accelerate, wrap", "wrap, accelerate"])
def test_distributed_data_parallel(build, gloo, order):
    plain, fused = build(init_values=0.3), build(init_values=0.3)
    if order == "accelerate, wrap":
        wrapped = nn.parallel.DistributedDataParallel(vitfast.accelerate(fused))
    else:
        wrapped = vitfast.accelerate(nn.parallel.DistributedDataParallel(fused))
    assert fused_names(fused)
    torch.testing.assert_close(_step(wrapped, images(*X)), _step(plain, images(*X)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ["accelerate, shard", "shard, accelerate"])
def test_fully_sharded(build, gloo, order):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (1,))
    plain, fused = build(init_values=0.3), build(init_values=0.3)
    if order == "accelerate, shard":
        vitfast.accelerate(fused)
    for block in fused.blocks:
        fully_shard(block.mlp, mesh=mesh)
        fully_shard(block, mesh=mesh)
    fully_shard(fused, mesh=mesh)
    if order == "shard, accelerate":
        # the classes are FSDP's own now: what it has not touched can be replaced
        vitfast.accelerate(fused)
        assert "accelerate before sharding" in str(vitfast.report(fused))
    assert "blocks.0.attn" in fused_names(fused)
    torch.testing.assert_close(_step(fused, images(*X)), _step(plain, images(*X)), rtol=1e-4, atol=1e-5)


# --- torch.compile and torch.export


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED = {
    "plain": {},
    "LayerScale, qk_norm, registers": {"init_values": 0.3, "qk_norm": True, "reg_tokens": 2},
    "average pool, drop_path": {"global_pool": "avg", "drop_path_rate": 0.2},
}


@pytest.mark.parametrize("option", COMPILED)
def test_one_graph_for_every_batch_size(build, option, dynamo):
    # as users get it: the size that changed becomes a symbol when it changes first, and batch 1 is a case of its own.
    # with the batch marked dynamic there is one graph from the start
    plain, fused = pair(build, **COMPILED[option])
    counter = CompileCounter()
    compiled = torch.compile(fused, backend=counter, fullgraph=True)
    with torch.no_grad():
        for batch in (2, 3, 8, 5, 2):
            x = images(batch, 3, 24, 32)
            torch._dynamo.mark_dynamic(x, 0)
            torch.testing.assert_close(compiled(x), plain(x))
    assert counter.frame_count == 1


def test_automatic_dynamic_sizes_compile_twice_at_most(build, dynamo):
    plain, fused = pair(build)
    counters = []
    for model in (plain, fused):
        torch._dynamo.reset()
        counters.append(CompileCounter())
        compiled = torch.compile(model, backend=counters[-1], fullgraph=True)
        with torch.no_grad():
            for batch in (2, 3, 8, 5, 2):
                compiled(images(batch, 3, 24, 32))
    # static for the first size, dynamic from the second on: the plain model does the same
    assert [counter.frame_count for counter in counters] == [2, 2]


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_no_graph_breaks(build, dynamo, train):
    fused = vitfast.accelerate(build(init_values=0.3, drop_path_rate=0.2, attn_drop_rate=0.1)).train(train)
    explained = torch._dynamo.explain(fused)(images(*X))
    assert explained.graph_count == 1 and explained.graph_break_count == 0


def test_no_graph_breaks_with_checkpointing_and_hooks(build, dynamo):
    fused = vitfast.accelerate(build(init_values=0.3))
    fused.set_grad_checkpointing(True)
    fused.blocks[0].attn.qkv.register_forward_hook(lambda m, args, out: 2.0 * out)
    x = images(*X)
    expected = fused(x)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("changes", [{"init_values": 0.3}, {"qk_norm": True, "act_layer": "quick_gelu"}], ids=str)
def test_compiled_training_gives_the_same_gradients(build, changes, dynamo):
    plain, fused = pair(build, **changes)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)

    def call(model, x):
        return (compiled if model is fused else model)(x)

    assert_same(plain, fused, images(*X), call)


def test_compiled_training_with_relative_positions(dynamo):
    plain, fused = pair(reference, pos_embed="relative")
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert_same(plain, fused, images(*X), lambda model, x: (compiled if model is fused else model)(x))


@pytest.mark.slow
def test_inductor_training_step(dynamo):
    plain, fused = pair(timm_vit, init_values=0.3, depth=1)
    compiled = torch.compile(fused, fullgraph=True)
    assert_same(plain, fused, images(*X), lambda model, x: (compiled if model is fused else model)(x))


def test_compiled_train_and_eval_switch(build, dynamo):
    plain, fused = pair(build, drop_path_rate=0.5)
    counter = CompileCounter()
    compiled = torch.compile(fused, backend=counter, fullgraph=True)
    for train in (False, True, False, True, False):
        plain.train(train)
        fused.train(train)
        results = []
        for model in (plain, compiled):
            torch.manual_seed(3)
            results.append(model(images(4, 3, 24, 32)))
        torch.testing.assert_close(results[1], results[0])
    # one graph for each mode, none for going back
    assert counter.frame_count == 2


def test_accelerate_and_restore_after_compiling(build, dynamo):
    # the model that torch.compile wraps is swapped under its feet; guards on the classes must notice
    plain = build(init_values=0.3)
    model = copy.deepcopy(plain)
    ops: list[str] = []

    def backend(graph, example_inputs):
        ops.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for change in (lambda m: m, vitfast.accelerate, vitfast.restore):
        change(model)
        torch.testing.assert_close(compiled(images(*X)), plain(images(*X)))
    assert ["vitfast" in op for op in ops][:2] == [False, True]


def test_compile_true_and_restore(build, dynamo, monkeypatch):
    plain = build(init_values=0.3)
    calls = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: calls.append(self) or _compile_eager(self))
    model = vitfast.accelerate(copy.deepcopy(plain), compile=True)
    assert calls == [model]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert model._compiled_call_impl is not None
    torch.testing.assert_close(model(images(*X)), plain(images(*X)))
    loaded = save(model, "torch.save")
    torch.testing.assert_close(loaded(images(*X)), plain(images(*X)))
    vitfast.restore(model)
    assert model._compiled_call_impl is None
    assert types(model) == types(plain)
    torch.testing.assert_close(model(images(*X)), plain(images(*X)))


def _compile_eager(model: nn.Module) -> None:
    model._compiled_call_impl = torch.compile(model._call_impl, backend="eager")


OPS = {"patch_embed", "layer_norm", "linear", "attention"}


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_keeps_the_ops(build, strict):
    plain, fused = pair(build, init_values=0.3)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(fused, (images(*X),), dynamic_shapes=({0: batch},), strict=strict)
    ops = Counter(str(node.target) for node in exported.graph.nodes if "vitfast" in str(node.target))
    assert {name.split(".")[1] for name in ops} == OPS
    # four a block, and in the last one the class token's queries by themselves
    assert sum(n for name, n in ops.items() if "linear" in name) == 9
    torch.testing.assert_close(exported.module()(images(5, 3, 24, 32)), plain(images(5, 3, 24, 32)))


# --- what it costs on CPU


class Calls(TorchDispatchMode):
    """Counts the operators that reach the dispatcher's end, and the elements they write."""

    # views cost nothing and may differ between the two paths; promote_types touches no tensor
    free = frozenset(
        "view _unsafe_view reshape t transpose permute expand unbind select slice unsqueeze squeeze split detach alias"
        " as_strided promote_types".split()
    )

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name not in self.free:
            first = out[0] if isinstance(out, tuple) else out
            self.count[name, tuple(first.shape) if isinstance(first, torch.Tensor) else ()] += 1
        return out


COSTS = {
    "plain": {},
    "LayerScale": {"init_values": 0.3},
    "qk_norm": {"qk_norm": True},
    "average pool, no class token": {"global_pool": "avg", "class_token": False},
    "registers, no_embed_class": {"reg_tokens": 2, "no_embed_class": True},
    "QuickGELU": {"act_layer": "quick_gelu"},
}


@pytest.mark.parametrize("only", [None, *KINDS], ids=str)
@pytest.mark.parametrize("option", COSTS)
def test_the_same_work_on_cpu(build, option, only):
    # no clock: the same operators on the same shapes, so nothing is computed or copied twice
    plain = build(**COSTS[option])
    # the tail does less
    fused = vitfast.accelerate(copy.deepcopy(plain), only=set(KINDS) - {"tail"} if only is None else [only])
    counts = []
    for model in (plain, fused):
        with torch.no_grad(), Calls() as calls:
            model(images(*X))
        counts.append(calls.count)
    extra = counts[1] - counts[0]
    # a stem without prefix tokens hands out dense tokens where torch leaves the convolution's layout to the first norm,
    # and one with several joins them before they meet the batch
    allowed = {"average pool, no class token": {"clone"}, "registers, no_embed_class": {"cat"}}.get(option, set())
    assert {name for name, _ in extra} <= allowed, extra
    assert extra.total() <= 1


def test_cpu_calls_do_not_cross_the_operator_boundary(build, monkeypatch):
    # the crossing costs 10 to 70 us a call: on CPU the reference is called as it is
    fused = vitfast.accelerate(build(init_values=0.3))
    if kernels.INTERPRET:
        pytest.skip("the interpreter takes the reference's place")
    with torch.no_grad(), Calls() as calls:
        fused(images(*X))
    assert not [name for name, _ in calls.count if "vitfast" in name]


def test_every_kind_of_layer_is_known():
    assert {row.kind for row in vitfast.report(vitfast.accelerate(reference())).replaced} == row_kinds(KINDS)
    assert all(isinstance(m, nn.Module) for m in vitfast.accelerate(reference()).modules() if isinstance(m, FusedLayer))
