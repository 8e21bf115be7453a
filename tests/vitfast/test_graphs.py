"""`accelerate(cuda_graph=True)`: what a replay stands for, when it must not, and what is left behind.

Without a GPU the calls to CUDA are emulated: a capture records each operation with the memory that it reads and
writes, a replay runs them again on that memory. So a stale weight or an output that was not copied shows as on a GPU.
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

import vitfast
from tests._close import assert_close
from tests.vitfast._models import BUILDERS, assert_same, images, reference, timm_vit
from vitfast.graphs import cuda
from vitfast.graphs import runner as graphs
from vitfast.graphs.cuda import WARM_UP
from vitfast.graphs.runner import MAX_ENTRIES, MAX_FAILURES

X = (2, 3, 24, 32)


# --- the emulation


class Recorder(TorchDispatchMode):
    """Every operation, with aliases of the memory that it was given and gave."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing\nsecond line")
        # before the call, so that what `.data` holds later is not what is read
        frozen = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, *frozen, [leaf.detach() for leaf in tree_leaves(out)]))
        return out

    def replay(self) -> None:
        for func, args, kwargs, outputs in self.operations:
            read = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            for output, value in zip(outputs, tree_leaves(func(*args, **kwargs)), strict=True):
                if output.untyped_storage().data_ptr() not in read:
                    output.copy_(value)


class Stream:
    def __init__(self) -> None:
        self.waited: list[Event] = []

    def wait_event(self, event: Event) -> None:
        self.waited.append(event)


class Event:
    def __init__(self) -> None:
        self.recorded_on: Stream | None = None

    def record(self, stream: Stream) -> None:
        self.recorded_on = stream

    def synchronize(self) -> None:
        pass


class Emulation(graphs.Cuda):
    """CUDA graphs on the CPU. Class attributes are what the tests look at and turn."""

    captures: list[tuple[int, ...]]
    replays: int
    mib: int
    elsewhere: bool
    current: Stream

    def accepts(self, x: Tensor) -> bool:
        return not self.elsewhere

    def stream(self, device: torch.device) -> Stream:
        return type(self).current

    def event(self) -> Event:
        return Event()

    def pool(self) -> list[int]:
        return []

    def pool_bytes(self, pool: list[int]) -> int:
        return sum(pool) << 20

    def warm_up(self, function, sample):
        for _ in range(WARM_UP):
            function(sample)

    def capture(self, function, sample, pool):
        static = torch.full_like(sample, 77)
        with Recorder() as recorder:
            outputs = function(static)
        static.zero_()
        # memory that nothing has computed yet
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor):
                leaf.fill_(float("nan"))
        pool.append(type(self).mib)
        type(self).captures.append(tuple(sample.shape))

        def replay() -> None:
            type(self).replays += 1
            recorder.replay()

        return cuda.Captured(static, outputs, replay)


@pytest.fixture
def emulation(monkeypatch):
    for name, value in {"captures": [], "replays": 0, "mib": 1, "elsewhere": False, "current": Stream()}.items():
        monkeypatch.setattr(Emulation, name, value, raising=False)
    monkeypatch.setattr(graphs, "Cuda", Emulation)
    return Emulation


def graphed(model: nn.Module, cuda_graph: bool | int = True, **changes: Any) -> nn.Module:
    return vitfast.accelerate(model, cuda_graph=cuda_graph, **changes)


def fresh(model: nn.Module) -> nn.Module:
    """The same model without graphs."""
    return vitfast.restore(copy.deepcopy(model))


@torch.no_grad()
def call(model: nn.Module, batch: int = 2, seed: int = 1) -> Tensor:
    return model(images(batch, *X[1:], seed=seed, dtype=next(model.parameters()).dtype))


def warm(model: nn.Module, batch: int = 2) -> nn.Module:
    """Call until a graph of this batch size stands."""
    for seed in (10, 11, 12):
        call(model, batch, seed)
    return model


def assert_replays(model: nn.Module, plain: nn.Module, batch: int = 2, *, replays: int = 1, captures: int = 0) -> None:
    """One call: right, by so many replays and captures."""
    before = (Emulation.replays, len(Emulation.captures))
    seed = 100 + Emulation.replays
    torch.testing.assert_close(call(model, batch, seed), call(plain, batch, seed))
    assert (Emulation.replays - before[0], len(Emulation.captures) - before[1]) == (replays, captures)


# --- when a graph is captured


def test_a_batch_size_is_captured_when_it_comes_again(emulation):
    plain = reference()
    model = graphed(copy.deepcopy(plain))
    assert_replays(model, plain, replays=0)
    assert_replays(model, plain, captures=1)
    for _ in range(3):
        assert_replays(model, plain)
    assert emulation.captures == [X]


def test_each_size_has_a_graph_of_its_own(emulation):
    plain = reference()
    model = graphed(copy.deepcopy(plain))
    for batch in (17, 3):
        assert_replays(model, plain, batch, replays=0)
    for batch in (17, 3):
        assert_replays(model, plain, batch, captures=1)
    for batch in (3, 17, 3):
        assert_replays(model, plain, batch)
    assert [shape[0] for shape in emulation.captures] == [17, 3]


def test_kinds_of_calls_have_graphs_of_their_own(emulation):
    plain = timm_vit(dynamic_img_size=True)
    model = graphed(copy.deepcopy(plain))
    inputs = [
        images(2, 3, 24, 32),
        images(2, 3, 32, 24),
        images(2, 3, 24, 32).to(memory_format=torch.channels_last),
        images(2, 3, 48, 32)[:, :, ::2],
    ]
    with torch.no_grad():
        for _ in range(2):
            for x in inputs:
                torch.testing.assert_close(model(x), plain(x))
    assert len(emulation.captures) == 3
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(3):
            expected = plain(inputs[0])
            got = model(inputs[0])
            assert got.dtype == expected.dtype == torch.bfloat16
            torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)
    assert len(emulation.captures) == 4
    before = emulation.replays
    torch.testing.assert_close(call(model), call(plain))
    assert emulation.replays == before + 1


def test_autocast_casts_inside_the_graph(emulation):
    plain = reference()
    model = graphed(copy.deepcopy(plain))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        warm(model)
        with torch.no_grad():
            for p in (*model.parameters(), *plain.parameters()):
                p.mul_(1.5)
        torch.clear_autocast_cache()
        before = emulation.replays
        torch.testing.assert_close(call(model), call(plain), rtol=0.05, atol=0.05)
        assert emulation.replays > before
        assert torch.is_autocast_cache_enabled()


def test_outputs_are_the_callers(emulation):
    model = warm(graphed(reference()))
    first = call(model, seed=20)
    kept = first.clone()
    second = call(model, seed=21)
    assert torch.equal(first, kept) and not torch.equal(first, second)
    first.zero_()
    assert torch.equal(call(model, seed=21), second)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("other", [torch.no_grad, torch.inference_mode])
def test_modes(emulation, mode, other):
    plain = reference()
    model = graphed(copy.deepcopy(plain))
    for context in (mode, mode, mode, other, mode):
        with context():
            out = model(images(*X))
            assert out.is_inference() == (context is torch.inference_mode) and not out.requires_grad
            torch.testing.assert_close(out, plain(images(*X)))
    with torch.inference_mode():
        x = images(*X)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))
    assert emulation.replays == 5
    # what ran in inference trains afterwards
    assert_same(plain, model, images(*X))


Pair = namedtuple("Pair", "first second")


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Any:
        y = self.head(x.mean((2, 3)))
        return {"y": y, "pair": Pair(y * 2, (y[:, :2], None)), "layers": 3}


def test_structured_outputs(emulation):
    plain = Structured().eval()
    model = warm(graphed(copy.deepcopy(plain)))
    got, expected = call(model), call(plain)
    assert emulation.replays and type(got["pair"]) is Pair and got["pair"].second[1] is None and got["layers"] == 3
    torch.testing.assert_close(got, expected)
    call(model, seed=3)
    torch.testing.assert_close(got, expected)


class Holder:
    def __init__(self, y: Tensor) -> None:
        self.y = y


class Opaque(Structured):
    def forward(self, x: Tensor) -> Any:
        return Holder(self.head(x.mean((2, 3))))


def test_outputs_that_cannot_be_taken_apart_are_no_graph(emulation):
    model = warm(graphed(Opaque().eval()))
    first = call(model)
    kept = first.y.clone()
    call(model, seed=5)
    assert torch.equal(first.y, kept) and not emulation.replays
    assert any("returns a Holder" in note for note in vitfast.report(model).graphs)


# --- what changes under a graph


def load(model):
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()})


def step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    model(images(*X)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


def scale_unseen(model):
    for p in model.parameters():
        p.data.mul_(1.1)


def train_unseen(model):
    model.train()
    scale_unseen(model)
    model.eval()


def refreshed(model):
    scale_unseen(model)
    vitfast.refresh(model)


@pytest.mark.parametrize("write", [load, step, train_unseen, refreshed], ids=lambda write: write.__name__)
def test_weights_that_are_written_after_all(emulation, write):
    plain = reference()
    model = warm(graphed(copy.deepcopy(plain)))
    for m in (model, plain):
        write(m)
    captures = len(emulation.captures)
    torch.testing.assert_close(call(model), call(plain))
    # what the graph reads may have been derived from the old ones
    assert_replays(warm(model), plain)
    assert len(emulation.captures) == captures + 1


def test_unseen_writes_reach_what_is_read_in_place(emulation):
    # in fp32 nothing is derived, and the graph reads the weights where they lie
    plain = reference()
    model = warm(graphed(copy.deepcopy(plain)))
    for m in (model, plain):
        scale_unseen(m)
    assert_replays(model, plain)


def new_data(model):
    for p in model.parameters():
        p.data = p.data * 1.2


def new_parameters(model):
    model.load_state_dict({k: v * 1.2 for k, v in model.state_dict().items()}, assign=True)


def new_module(model):
    torch.manual_seed(4)
    model.blocks[1].mlp.fc1 = nn.Linear(48, 192).eval()


def new_buffer(model):
    model.head.register_buffer("unused", torch.zeros(3))


def new_attribute(model):
    model.blocks[0].norm1.eps = 0.3


def new_pool(model):
    model.global_pool = "avg"


def new_method(model):
    model.pool = lambda tokens: tokens[:, 1]


def new_child(model):
    model.blocks.append(copy.deepcopy(vitfast.restore(copy.deepcopy(model.blocks[0]))))


def dropped_child(model):
    model.blocks[1].mlp = nn.Identity().eval()


def other_dtype(model):
    model.double()


def part_restored(model):
    vitfast.restore(model.blocks[1])


CHANGES = [new_data, new_parameters, new_module, new_buffer, new_attribute, new_pool, new_method, new_child]
CHANGES += [dropped_child, other_dtype, part_restored]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_model_is_captured_anew(emulation, change):
    model = warm(graphed(timm_vit(init_values=0.3)), 2)
    warm(model, 3)
    before = call(model)
    change(model)
    plain = fresh(model)
    if change not in (new_buffer, part_restored):
        assert not torch.allclose(call(plain), before.to(call(plain).dtype))
    captures = len(emulation.captures)
    torch.testing.assert_close(call(model), call(plain))
    assert len(emulation.captures) == captures
    warm(model, 2)
    assert_replays(model, plain)
    assert len(emulation.captures) == captures + 1


def test_functional_call_computes_with_what_it_is_given(emulation):
    model = warm(graphed(reference()))
    plain = fresh(model)
    weights = {name: p.detach() * 1.3 for name, p in model.named_parameters()}
    with torch.no_grad():
        got = torch.func.functional_call(model, weights, (images(*X),))
        torch.testing.assert_close(got, torch.func.functional_call(plain, weights, (images(*X),)))
    assert_replays(warm(model), plain)


def test_a_part_that_trains(emulation):
    plain = reference(proj_drop_rate=0.5)
    model = warm(graphed(copy.deepcopy(plain)))
    # one in vain, behind which the switch shows
    before = emulation.replays + 1
    # Monte Carlo dropout: evaluation, with dropout on
    model.blocks[0].attn.proj_drop.train()
    assert not torch.equal(call(model), call(model))
    assert emulation.replays == before
    assert any("blocks.0.attn.proj_drop (Dropout) is in train mode" in note for note in vitfast.report(model).graphs)
    model.eval()
    assert_replays(model, plain)


class Counting(Structured):
    """Writes an attribute at each call in Python, as caches of rotary embeddings do."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = torch.zeros(x.shape[0])
        return self.head(x.mean((2, 3)))


def test_what_the_forward_writes_itself_is_no_change(emulation):
    model = graphed(Counting().eval())
    # a call by the plain path looks like a change from outside
    for _ in range(4):
        for batch in (2, 3):
            call(model, batch)
    for _ in range(3):
        for batch in (2, 3):
            assert_replays(model, fresh(model), batch)


# --- what takes the plain path


def assert_plain(call: Any, *, replays: int = 0) -> Any:
    """The outcome, in which no graph had a part; some may have been replayed in vain."""
    before = (Emulation.replays, len(Emulation.captures))
    out = call()
    assert (Emulation.replays - before[0], len(Emulation.captures) - before[1]) == (replays, 0)
    return out


@pytest.mark.parametrize("name", ["", "blocks.1", "blocks.0.attn.qkv", "head"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_called(emulation, name, kind):
    model = warm(graphed(timm_vit()))
    seen: list[Any] = []
    handle = getattr(model.get_submodule(name), kind)(lambda module, *rest: seen.append(module))
    for count in (1, 2, 3):
        # the first time it shows behind the launch
        assert_plain(lambda: call(model), replays=count == 1)
        assert seen == [model.get_submodule(name)] * count
    assert any("has hooks" in note for note in vitfast.report(model).graphs)
    handle.remove()
    assert_replays(model, fresh(model))
    assert not any("hooks" in note for note in vitfast.report(model).graphs)


def test_hooks_on_a_module_that_came_later(emulation):
    model = warm(graphed(timm_vit()))
    model.head = nn.Linear(48, 7).eval()
    seen: list[Any] = []
    model.head.register_forward_hook(lambda *args: seen.append(1))
    call(model)
    assert seen == [1]
    handle = model.blocks[0].register_forward_hook(lambda *args: None)
    model.blocks[0] = copy.deepcopy(model.blocks[1])
    model.head = nn.Linear(48, 7).eval()
    handle.remove()
    assert_replays(warm(model), fresh(model))


def test_global_hooks_are_called(emulation):
    model = warm(graphed(timm_vit()))
    seen: list[Any] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        for count in (1, 2):
            assert_plain(lambda: call(model), replays=count == 1)
            assert seen.count(model) == count
    finally:
        handle.remove()
    assert_replays(model, fresh(model))


def test_a_forward_that_is_replaced_is_called(emulation):
    model = warm(graphed(timm_vit()))
    seen: list[Any] = []
    forward = model.head.forward
    model.head.forward = lambda x: seen.append(1) or forward(x)
    for _ in range(3):
        call(model)
    assert len(seen) == 3
    assert any("head (Linear) has a forward of its own" in note for note in vitfast.report(model).graphs)
    del model.head.forward
    assert_replays(warm(model), fresh(model))


def test_a_model_that_never_can_be_captured_says_why(emulation):
    class Wrapped(nn.Parameter):
        pass

    model = reference()
    model.head.weight = Wrapped(model.head.weight.detach())
    plain = fresh(warm(graphed(model)))
    assert_replays(model, plain, replays=0)
    assert any("head holds a Wrapped" in note for note in vitfast.report(model).graphs)
    scripted = warm(graphed(nn.Sequential(reference(), torch.jit.script(nn.Tanh())).eval()))
    assert any("1 is scripted" in note for note in vitfast.report(scripted).graphs)


def test_hooks_before_the_first_capture(emulation):
    model = graphed(timm_vit())
    seen: list[Any] = []
    handle = model.blocks[0].register_forward_hook(lambda *args: seen.append(1))
    warm(model)
    assert len(seen) == 3 and not emulation.captures
    handle.remove()
    assert_replays(model, fresh(model), captures=1)


def test_attention_maps(emulation):
    model = warm(graphed(timm_vit()))
    maps = assert_plain(lambda: vitfast.attention_maps(model, images(*X)), replays=1)
    torch.testing.assert_close(maps[1], vitfast.attention_maps(fresh(model), images(*X))[1])
    assert_replays(model, fresh(model))


class Loose(Tensor):
    pass


class Keyword(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x=x)


def _flops(model):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images(*X))
    return counter.get_total_flops()


def _vmap(model):
    with torch.no_grad():
        return [torch.vmap(lambda x: model(x[None])[0])(images(*X)) for _ in range(3)][-1]


def _device(model):
    with torch.device("cpu"):
        return call(model)


PLAIN = {
    "gradients": lambda model: model(images(*X)).detach(),
    "train mode": lambda model: call(model.train()),
    "keyword": lambda model: call(Keyword(model)),
    "subclass": lambda model: model(images(*X).as_subclass(Loose)).as_subclass(Tensor).detach(),
    "empty": lambda model: call(model, 0),
    "flop counter": _flops,
    "vmap": _vmap,
}


@pytest.mark.parametrize("way", PLAIN, ids=str)
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_the_plain_path(emulation, build, way):
    plain = build()
    model = warm(graphed(copy.deepcopy(plain)))
    got = assert_plain(lambda: PLAIN[way](model), replays=way == "train mode")
    torch.testing.assert_close(got, PLAIN[way](plain))
    if way == "train mode":
        # weights may have been written unseen
        warm(model.eval())
    assert_replays(model, plain.eval())


def test_a_device_context_is_no_obstacle(emulation):
    model = warm(graphed(reference()))
    before = emulation.replays
    torch.testing.assert_close(_device(model), _device(fresh(model)))
    assert emulation.replays == before + 1


def test_inside_another_capture_it_becomes_part_of_it(emulation):
    model = warm(graphed(reference()))
    emulation.elsewhere = True
    assert_plain(lambda: call(model))


def test_a_tensor_on_the_cpu_and_no_tensor_at_all():
    plain = reference()
    model = graphed(copy.deepcopy(plain))
    for _ in range(3):
        torch.testing.assert_close(call(model), call(plain))
    assert vitfast.report(model).graphs == ("captured for batches of none yet (0 of 2048 MiB)",)
    with pytest.raises(TypeError):
        model()


def test_traced_and_compiled_from_outside(emulation):
    model = warm(graphed(reference()))
    expected = call(model)

    def trace():
        with torch.no_grad():
            return torch.jit.trace(model, images(*X), check_trace=False)(images(*X))

    torch.testing.assert_close(assert_plain(trace), expected)

    def compiled():
        torch.compiler.reset()
        with torch.no_grad():
            return torch.compile(model, backend="eager", fullgraph=True)(images(*X))

    torch.testing.assert_close(assert_plain(compiled), expected)

    def inside():
        torch.compiler.reset()
        with torch.no_grad():
            return torch.compile(lambda x: model(x) + 1, backend="eager", fullgraph=True)(images(*X)) - 1

    torch.testing.assert_close(assert_plain(inside), expected)

    def export():
        with torch.no_grad():
            return torch.export.export(model, (images(*X),)).module()(images(*X))

    torch.testing.assert_close(assert_plain(export), expected)
    assert_replays(model, fresh(model))


# --- failures and bounds


class Syncing(Structured):
    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x.mean((2, 3)))
        return y + 1 if x.shape[0] != 3 and y.sum().item() > 0 else y


def test_a_shape_that_cannot_be_captured(emulation):
    plain = Syncing().eval()
    model = graphed(copy.deepcopy(plain))
    for batch in (2, 2, 2, 3, 3, 3):
        torch.testing.assert_close(call(model, batch), call(plain, batch))
    assert [shape[0] for shape in emulation.captures] == [3]
    (note,) = [note for note in vitfast.report(model).graphs if "batch 2" in note]
    assert "operation not permitted when stream is capturing" in note and "second line" not in note
    assert note in str(vitfast.report(model))


def test_a_model_that_cannot_be_captured(emulation):
    plain = Syncing().eval()
    model = graphed(copy.deepcopy(plain))
    for batch in range(4, 5 + MAX_FAILURES):
        for _ in range(3):
            torch.testing.assert_close(call(model, batch), call(plain, batch))
    notes = vitfast.report(model).graphs
    assert sum("is not captured" in note for note in notes) == MAX_FAILURES
    assert any("4 captures failed" in note for note in notes)
    # asked for again it tries again
    vitfast.accelerate(model, cuda_graph=True)
    assert_replays(warm(model, 3), plain, 3)


def test_errors_are_the_models(emulation):
    model = warm(graphed(reference()))
    for _ in range(3):
        with pytest.raises(ValueError), torch.no_grad():
            model(images(2, 3, 23, 31))
    assert_replays(model, fresh(model))


def test_the_least_recently_used_is_dropped(emulation):
    plain = Structured().eval()
    model = graphed(copy.deepcopy(plain))
    sizes = range(20, 21 + MAX_ENTRIES)
    for batch in sizes:
        warm(model, batch)
        call(model, 20)
    runner = vars(model)["_vitfast_state"].graphs
    assert len(runner._entries) == MAX_ENTRIES
    captures = len(emulation.captures)
    call(model, 20)
    call(model, sizes[-1])
    assert len(emulation.captures) == captures
    warm(model, 21)
    assert len(emulation.captures) > captures


def test_the_memory_bound(emulation):
    emulation.mib = 300
    model = graphed(reference(), cuda_graph=1000)
    plain = fresh(model)
    for batch in (1, 2, 3):
        warm(model, batch)
    assert any("batches of 1, 2, 3 (900 of 1000 MiB)" in note for note in vitfast.report(model).graphs)
    # what no longer fits starts anew, and what is called again comes back
    call(model, 4)
    assert_replays(model, plain, 4, captures=2)
    assert vitfast.report(model).graphs == ("captured for batches of 4 (300 of 1000 MiB)",)
    assert_replays(warm(model, 2), plain, 2)
    emulation.mib = 1001
    warm(model, 5)
    notes = vitfast.report(model).graphs
    assert any("batch 5" in note and "needs 1001 MiB, and the bound is 1000 MiB" in note for note in notes)
    assert_replays(model, plain, 5, replays=0)


@pytest.mark.parametrize("cuda_graph", [0, -1, 2.5, "yes"])
def test_a_bound_that_bounds_nothing(cuda_graph):
    model = reference()
    with pytest.raises(ValueError, match="positive number of MiB"):
        vitfast.accelerate(model, cuda_graph=cuda_graph)
    assert not vitfast.report(model).replaced


# --- threads and streams


def test_threads(emulation):
    plain = reference()
    model = graphed(copy.deepcopy(plain))
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for i in range(12):
                batch = 1 + (seed + i) % 3
                torch.testing.assert_close(call(model, batch, seed + i), call(plain, batch, seed + i))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(0, 400, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert emulation.replays > 24 and sorted(emulation.captures) == [(i, 3, 24, 32) for i in (1, 2, 3)]


def test_streams_wait_for_each_other(emulation):
    model = warm(graphed(reference()))
    first, second = emulation.current, Stream()
    assert not first.waited
    emulation.current = second
    call(model)
    (event,) = second.waited
    assert event.recorded_on is second
    call(model)
    assert len(second.waited) == 1
    emulation.current = first
    call(model)
    assert first.waited == [event]


def test_a_model_in_a_model_is_captured_as_a_part(emulation):
    inner = graphed(reference())
    plain = nn.Sequential(fresh(inner), nn.Tanh()).eval()
    outer = graphed(nn.Sequential(inner, nn.Tanh()).eval())
    warm(outer)
    assert emulation.captures == [X] and "none yet" in vitfast.report(inner).graphs[0]
    assert_replays(outer, plain)
    # by itself it has its own
    assert_replays(warm(inner), fresh(inner))


# --- the model stays what it was


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_attached_and_detached(emulation, build):
    plain = build()
    model = copy.deepcopy(plain)
    before = set(vars(model))
    assert graphed(model) is model
    warm(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert "_compiled_call_impl" not in model.__getstate__()
    vitfast.restore(model)
    assert set(vars(model)) - {"_compiled_call_impl"} == before and vars(model)["_compiled_call_impl"] is None
    torch.testing.assert_close(assert_plain(lambda: call(model)), call(plain))
    assert vitfast.report(model).graphs == ()


def test_a_graph_goes_with_its_model(emulation):
    model = warm(graphed(reference()))
    runner = weakref.ref(vars(model)["_vitfast_state"].graphs)
    gc.disable()
    try:
        del model
        assert runner() is None
    finally:
        gc.enable()


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("way", [copy.deepcopy, _pickled], ids=["deepcopy", "pickle"])
def test_a_copy_captures_anew(emulation, way):
    model = warm(graphed(reference(), cuda_graph=512))
    twin = way(model)
    assert vitfast.report(twin).graphs == ("captured for batches of none yet (0 of 512 MiB)",)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.2)
    plain = fresh(twin)
    assert_replays(twin, plain, replays=0)
    assert_replays(twin, plain, captures=1)
    assert_replays(model, fresh(model))
    vitfast.restore(twin)
    assert not vitfast.report(twin).graphs and vitfast.report(model).graphs
    assert_replays(model, fresh(model))


def test_a_shallow_copy_leaves_the_original_its_graphs(emulation):
    model = warm(graphed(reference()))
    twin = copy.copy(model)
    assert_plain(lambda: call(twin))
    assert_replays(model, fresh(model))


def test_composes_with_compile(emulation):
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    plain = reference()
    model = copy.deepcopy(plain)
    model.compile(backend=counter)
    graphed(model)
    assert_replays(model, plain, replays=0)
    assert counter.frame_count == 1
    warm(model)
    before = emulation.replays
    torch.testing.assert_close(call(model), call(plain))
    assert emulation.replays == before + 1
    vitfast.restore(model)
    # what somebody compiled stays compiled
    assert vars(model)["_compiled_call_impl"] is not None


def test_in_any_order_with_compile(emulation, monkeypatch):
    calls: list[Any] = []

    def compile(model):
        model._compiled_call_impl = lambda x: calls.append(1) or model._call_impl(x)

    monkeypatch.setattr(nn.Module, "compile", compile)
    for order in [({"cuda_graph": True}, {"compile": True}), ({"compile": True}, {"cuda_graph": 256})]:
        calls.clear()
        model = reference()
        for keywords in order:
            vitfast.accelerate(model, **keywords)
        call(model)
        assert calls == [1]
        warm(model)
        count = len(calls)
        assert_replays(model, fresh(model))
        assert len(calls) == count
        assert any(f"of {order[-1].get('cuda_graph', 2048)} MiB" in note for note in vitfast.report(model).graphs)
        vitfast.restore(model)
        assert vars(model)["_compiled_call_impl"] is None


def test_accelerated_further(emulation):
    model = warm(graphed(reference(), only={"attention"}))
    plain = fresh(model)
    vitfast.accelerate(model)
    assert_replays(model, plain, replays=0)
    assert_replays(warm(model), plain)
    vitfast.accelerate(model, precision="bf16")
    warm(model)
    assert call(model).dtype == torch.bfloat16
    vitfast.restore(model)
    assert torch.equal(call(model), call(plain))


# --- on a GPU


def device_pair(**changes: Any) -> tuple[nn.Module, nn.Module]:
    plain = vitfast.accelerate(timm_vit(**changes).cuda())
    return plain, graphed(copy.deepcopy(plain))


@torch.no_grad()
def device_call(model: nn.Module, batch: int = 2, seed: int = 1, dtype: torch.dtype | None = None) -> Tensor:
    return model(images(batch, *X[1:], seed=seed).to("cuda", dtype or next(model.parameters()).dtype))


def captured(model: nn.Module) -> str:
    return vitfast.report(model).graphs[0]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gpu_batches(dtype):
    plain, model = device_pair()
    plain, model = plain.to(dtype), model.to(dtype)
    truth = fresh(plain).double()
    for _ in range(3):
        for batch in (1, 2, 3, 8, 17, 18, 40):
            x = images(batch, *X[1:], seed=batch).to("cuda", dtype)
            with torch.no_grad():
                got, expected = model(x), plain(x)
                assert_close(got, truth(x.double()), fresh(plain)(x))
                torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
    assert "none yet" not in captured(model)
    assert not any("not captured" in note or "off" in note for note in vitfast.report(model).graphs)


@pytest.mark.gpu
def test_gpu_weights():
    plain, model = device_pair()
    for _ in range(3):
        device_call(model)
    for factor in (1.1, 0.9):
        with torch.no_grad():
            for p in (*model.parameters(), *plain.parameters()):
                p.mul_(factor)
        for _ in range(4):
            torch.testing.assert_close(device_call(model), device_call(plain), rtol=1e-3, atol=1e-3)
        assert captured(model)
    for m in (plain, model):
        m.load_state_dict({k: v * 1.1 for k, v in m.state_dict().items()}, assign=True)
    for _ in range(3):
        torch.testing.assert_close(device_call(model), device_call(plain), rtol=1e-3, atol=1e-3)
    for m in (plain, model):
        m.bfloat16()
    torch.cuda.empty_cache()
    for _ in range(3):
        torch.testing.assert_close(device_call(model), device_call(plain), rtol=0.05, atol=0.05)


@pytest.mark.gpu
def test_gpu_autocast():
    plain, model = device_pair()
    for _ in range(4):
        # the cache of casts ends with each block
        with torch.autocast("cuda", dtype=torch.bfloat16):
            got, expected = device_call(model), device_call(plain)
        torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)
        torch.cuda.empty_cache()


@pytest.mark.gpu
def test_gpu_hooks():
    plain, model = device_pair()
    for _ in range(3):
        device_call(model)
    seen: list[Any] = []
    with model.blocks[0].attn.register_forward_hook(lambda *args: seen.append(1)):
        torch.testing.assert_close(device_call(model), device_call(plain), rtol=1e-3, atol=1e-3)
    assert seen == [1]
    maps = vitfast.attention_maps(model, images(*X).cuda())
    torch.testing.assert_close(maps[0], vitfast.attention_maps(plain, images(*X).cuda())[0], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_gpu_streams():
    plain, model = device_pair()
    for _ in range(3):
        device_call(model)
    inputs = [images(*X, seed=seed).cuda() for seed in range(40)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    outputs = []
    with torch.no_grad():
        for i, x in enumerate(inputs):
            with torch.cuda.stream(streams[i % 2]):
                # one stream lags behind the other
                if i % 2:
                    torch.cuda._sleep(1_000_000)
                outputs.append(model(x))
        torch.cuda.synchronize()
        for x, out in zip(inputs, outputs, strict=True):
            torch.testing.assert_close(out, plain(x), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_gpu_threads():
    plain, model = device_pair()
    device_call(plain)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for i in range(20):
                    batch = 1 + (seed + i) % 3
                    got = device_call(model, batch, seed + i)
                    torch.testing.assert_close(got, device_call(plain, batch, seed + i), rtol=1e-3, atol=1e-3)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(0, 400, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.gpu
def test_gpu_restore_frees_the_memory():
    _, model = device_pair()
    x = torch.randn(64, *X[1:], device="cuda")
    with torch.no_grad():
        model(x)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        for _ in range(3):
            model(x)
    assert "batches of 64" in captured(model) and "(0 of" not in captured(model)
    assert torch.cuda.memory_reserved() > before[1]
    vitfast.restore(model)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    after = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    # a stream's cuBLAS workspace stays, as it does for every stream
    assert after[0] - before[0] <= 64 << 20 and after[1] - before[1] <= 96 << 20


@pytest.mark.gpu
def test_gpu_a_model_that_waits_for_the_host():
    plain = Syncing().eval().cuda()
    model = graphed(copy.deepcopy(plain))
    for batch in (2, 2, 2, 3, 3, 3):
        torch.testing.assert_close(device_call(model, batch), device_call(plain, batch))
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    notes = vitfast.report(model).graphs
    assert any("batch 2" in note and "is not captured" in note for note in notes)
    assert "batches of 3" in captured(model)
    vitfast.restore(model)
    before = torch.cuda.memory_reserved()
    big = torch.empty(64 << 20, device="cuda")
    del big
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


@pytest.mark.gpu
@pytest.mark.slow
def test_gpu_composes_with_compile():
    torch.compiler.reset()
    plain = timm_vit().cuda()
    model = vitfast.accelerate(copy.deepcopy(plain), compile=True, cuda_graph=True)
    for _ in range(4):
        torch.testing.assert_close(device_call(model), device_call(plain), rtol=1e-3, atol=1e-3)
    assert "batches of 2" in captured(model)
    vitfast.restore(model)
    torch.testing.assert_close(device_call(model), device_call(plain), rtol=1e-3, atol=1e-3)
