"""What the host does for a launch, on a stand-in for CUDA's driver: prepared launches are Triton's own."""

from __future__ import annotations

import copy
import pickle
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vitfast
import vitfast.kernels as kernels
from tests.kernels._cases import CASES
from tests.kernels._data import Case, Data
from tests.kernels._stand_in import STREAM, Launch, loaded, stand_in
from vitfast.kernels import _config, _launch, _op, _recipe
from vitfast.layers import backends

pytestmark = pytest.mark.compile_only

# their launch code copies an argument, or is given one twice, or folds a norm into weights in each call
UNPREPARED = {
    "add_layer_norm-D64-transposed",
    "add_layer_norm-D67-broadcast-residual",
    "add_layer_norm-same-tensor",
    "attention-transposed",
    "layer_norm-D64-transposed",
    "layer_norm-D96-broadcast",
    "linear-residual-broadcast",
    "linear-residual-is-x",
    "linear-residual-transposed",
    "linear-weight-transposed",
    "linear-x-broadcast",
    "linear-x-transposed",
    "patch_embed-channels-last",
    "patch_embed-channels-last-4",
    "patch_embed-uint8-channels-last",
    "patch_embed-uint8-crop-channels-last",
    "patch_embed-weight-channels-last",
    "relative_attention-4x4-broadcast",
    "window_attention-transposed",
}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    yield from stand_in(monkeypatch)


class _SameMemory(TorchDispatchMode):
    """The nth allocation while one of these is open is the same memory as the nth while another with it was."""

    def __init__(self, memory: list[torch.Tensor]) -> None:
        super().__init__()
        self.memory, self.count = memory, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name not in ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::zeros"):
            return out
        if self.count == len(self.memory):
            self.memory.append(torch.empty(out.numel() * out.element_size() + 64, dtype=torch.uint8))
        storage = self.memory[self.count].untyped_storage()
        self.count += 1
        return out.new_empty(0).set_(storage, 0, out.shape, out.stride())


def _call(op: str, arguments: dict[str, Any], memory: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    with torch.no_grad(), _SameMemory(memory):
        out = getattr(kernels, op)(**arguments)
    return (out,) if isinstance(out, torch.Tensor) else tuple(out)


def _assert_prepared(op: str, calls: list[dict[str, Any]], launches: list[Launch]) -> None:
    """The first call's signature is prepared, and the second one launches what Triton would."""
    memory: list[torch.Tensor] = []
    launches.clear()
    _call(op, calls[0], [])
    first = [launch.kernel for launch in launches]
    launches.clear()
    by_recipe = _call(op, calls[1], memory)
    prepared = list(launches)
    launches.clear()
    _launch.forget()
    by_triton = _call(op, calls[1], memory)
    assert None not in _launch._recipes.values()
    assert prepared == launches
    assert first == [launch.kernel for launch in launches]
    # one attribute: each may be launched before the previous one has ended
    assert all(launch.sizes[-1] == 1 for launch in launches)
    for ours, theirs in zip(by_recipe, by_triton, strict=True):
        assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
        assert ours.data_ptr() == theirs.data_ptr()


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{case}-{str(dtype)[6:]}")
        for cases in CASES.values()
        for i, case in enumerate(cases)
        for dtype in (torch.bfloat16, torch.float32)
        if case.interpret and not case.real and (i == 0 or dtype is torch.bfloat16)
    ],
)
def test_prepared(case: Case, dtype: torch.dtype, launches: list[Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    """A second call with a signature gives the driver, to the byte, what Triton would have."""
    # `_SameMemory` is a mode, which would send the calls through torch.library
    monkeypatch.setattr(_op, "quiet", lambda: True)
    if str(case) in UNPREPARED or (case.op == "norm_linear" and dtype is torch.bfloat16):
        _call(case.op, case.arguments(dtype, "cpu"), [])
        assert list(_launch._recipes.values())[-1] is None
    else:
        _assert_prepared(case.op, [case.arguments(dtype, "cpu") for _ in range(2)], launches)


@pytest.mark.parametrize("rows", [3, 20000], ids=["few", "pingpong"])
def test_folded_norms_are_prepared(rows: int, launches: list[Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_op, "quiet", lambda: True)

    def arguments() -> dict[str, Any]:
        data = Data(torch.bfloat16, "cpu")
        weight, bias, norm = data(768, 192), data(768), data(192)
        with torch.no_grad():
            folded = kernels.fold(weight, bias, norm, None)
        stats = torch.zeros(2, rows, 3)
        return dict(
            x=data(rows, 192), stats=stats, norm_weight=norm, norm_bias=None, eps=1e-6, weight=weight, bias=bias
        ) | {"folded": folded}

    _assert_prepared("norm_linear", [arguments(), arguments()], launches)
    assert len(launches) == (1 if rows == 3 else 2), "statistics are merged in front of a ping-pong GEMM alone"


def test_what_a_call_s_result_follows_from_is_in_its_signature(launches: list[Launch]) -> None:
    data = Data(torch.bfloat16, "cpu")
    x, weight, long = data(4, 64), data(32, 64), data(8, 64)
    calls: list[dict[str, Any]] = [
        {"x": x},
        {"x": data(5, 64)},
        {"x": long[::2]},
        {"x": data(4, 64, layout="offset")},
        {"x": x, "activation": "gelu"},
        {"x": x, "weight": data(48, 64)},
        {"x": x, "bias": data(32)},
        {"x": x, "residual": data(4, 32)},
        {"x": x, "residual": data(4, 32, dtype=torch.float32)},
        {"x": x.half(), "weight": weight.half()},
    ]
    with torch.no_grad():
        for count, call in enumerate(calls, 1):
            for _ in range(2):
                kernels.linear(**{"weight": weight, **call})
            assert len(_launch._recipes) == count
    fp32 = {"x": x.float(), "weight": weight.float()}
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            launches.clear()
            with torch.no_grad():
                kernels.linear(**fp32)
                kernels.linear(**fp32)
            assert len({launch.kernel for launch in launches}) == 1
            assert launches[0].kernel == ("_linear_fwd_tma_kernel" if allowed else "_linear_fwd_kernel")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_configs_and_listeners_are_heard(launches: list[Launch]) -> None:
    data = Data(torch.bfloat16, "cpu")
    arguments = {"x": data(64, 128), "weight": data(64, 128)}

    def shared() -> int:
        launches.clear()
        kernels.linear(**arguments)
        return launches[0].sizes[6]

    with torch.no_grad():
        before = [shared() for _ in range(2)]
        with _config.listen() as heard:
            shared()
        ((key, config),) = heard.items()
        with _config.override(key, {**vars(config), "num_stages": config.num_stages - 1}):
            assert shared() < before[0]
        assert shared() == before[0] == before[1]
        called: list[Any] = []
        hooks, hook = _launch.knobs.runtime.launch_enter_hook, called.append
        hooks.add(hook)
        try:
            shared()
        finally:
            hooks.remove(hook)
        assert len(called) == 1


def test_a_thread_s_first_launch_is_triton_s(launches: list[Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    # which makes CUDA's context current in the thread
    arguments = {"x": torch.zeros(4, 64, dtype=torch.bfloat16), "weight": torch.zeros(32, 64, dtype=torch.bfloat16)}
    prepared: list[bool] = []
    run = _recipe.Recipe.__call__
    monkeypatch.setattr(_recipe.Recipe, "__call__", lambda self, at: prepared.append(True) or run(self, at))

    def call() -> None:
        with torch.no_grad():
            kernels.linear(**arguments)

    call()
    call()
    counts = [len(prepared)]
    for _ in range(2):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        counts.append(len(prepared))
    assert counts == [1, 1, 1]


def test_a_refused_launch_and_a_refused_map_say_so(launches: list[Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"map of \(64, 60\) in blocks of \(64, 64\): CUDA error 1: refused"):
        _recipe.TensorMap((64, 60), (60, 1), (64, 64), 2, 10, 3).encoded(4096)
    arguments = {"x": torch.zeros(4, 64, dtype=torch.bfloat16), "weight": torch.zeros(32, 64, dtype=torch.bfloat16)}
    with torch.no_grad():
        kernels.linear(**arguments)
        monkeypatch.setattr(_recipe.cuda(), "cuLaunchKernelEx", lambda *args: 700)
        with pytest.raises(RuntimeError, match="launching _linear_fwd_tma_kernel: CUDA error 700"):
            kernels.linear(**arguments)


def test_each_stream_gets_its_own_launches(launches: list[Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"x": torch.zeros(4, 64, dtype=torch.bfloat16), "weight": torch.zeros(32, 64, dtype=torch.bfloat16)}
    with torch.no_grad():
        kernels.linear(**arguments)
        for stream in (STREAM, 9, STREAM):
            monkeypatch.setattr(_recipe, "current_stream", lambda index, stream=stream: stream)
            kernels.linear(**arguments)
    assert [launch.stream for launch in launches] == [STREAM, STREAM, 9, STREAM]


def test_behind_torch_library_launches_are_prepared_too(
    launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    # autograd and compiled code call the operator
    file = sys.modules["vitfast.kernels.linear"]
    launched: list[bool] = []
    launch = file.launch_gemm
    monkeypatch.setattr(file, "launch_gemm", lambda *args: launched.append(True) or launch(*args))
    x = torch.zeros(4, 64, dtype=torch.bfloat16, requires_grad=True)
    arguments = (x, torch.zeros(32, 64, dtype=torch.bfloat16), None, "none", None, None, False)
    for _ in range(3):
        file._linear.op._backend_fns["cuda"](*arguments)
    assert len(launched) == 1
    assert [launch.kernel for launch in launches] == ["_linear_fwd_tma_kernel"] * 3


# whole models


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, list[Launch]]]:
    """An accelerated ViT whose launches fill the list."""
    net = vitfast.create_model("vit_tiny_patch16_224", depth=3, img_size=32, num_classes=3).eval().bfloat16()
    vitfast.accelerate(net, frozen=True)
    takes = backends._TAKES["triton"]
    monkeypatch.setitem(backends._TAKES, "triton", vars(takes) and type(takes)(("cuda", "cpu"), takes.dtypes, 256))
    for launches in stand_in(monkeypatch):
        yield net, launches


def _forward(net: Any, launches: list[Launch], images: int = 2) -> list[Launch]:
    launches.clear()
    with torch.inference_mode():
        net(torch.zeros(images, 3, 32, 32, dtype=torch.bfloat16))
    return list(launches)


def _reads(launches: list[Launch], tensor: torch.Tensor) -> bool:
    """Whether a launch was given a tensor's memory, as a pointer or in a map."""
    address = tensor.data_ptr().to_bytes(8, "little")
    return any(address in parameter for launch in launches for parameter in launch.parameters)


def _shape(launches: list[Launch]) -> list[Any]:
    return [(launch.kernel, launch.sizes, [p for p in launch.parameters if len(p) == 4]) for launch in launches]


def test_a_block_of_frozen_weights_is_one_recipe(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net, launches = model
    first = _forward(net, launches)
    called: list[str] = []
    run = _recipe.Recipe.__call__
    monkeypatch.setattr(
        _recipe.Recipe, "__call__", lambda self, at: called.append(f"{len(self.kernels)}") or run(self, at)
    )
    again = _forward(net, launches)
    assert _shape(again) == _shape(first)
    # the stem, two halves of two blocks, the last block for one token, the head's norm
    assert len(called) == 7 and sum(map(int, called)) == len(again)
    monkeypatch.setattr(_op, "prepared", lambda function, args, *more: function(*args))
    assert _shape(_forward(net, launches)) == _shape(first)
    for block in net.blocks:
        assert _reads(again, block.attn.proj.weight)


def test_another_batch_and_back(model: Any) -> None:
    net, launches = model
    shapes = {n: _shape(_forward(net, launches, n)) for n in (2, 3)}
    for n in (3, 2, 3):
        assert _shape(_forward(net, launches, n)) == shapes[n]


def test_another_batch_compiles_nothing(model: Any) -> None:
    net, launches = model
    _forward(net, launches, 3)
    before = loaded()
    for images in (1, 2, 5, 16, 48):
        _forward(net, launches, images)
        assert loaded() == before, f"batch {images}"


def test_a_prepared_forward_costs_the_host_less(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net, _ = model
    pixels = torch.zeros(2, 3, 32, 32, dtype=torch.bfloat16)

    def seconds() -> float:
        begin = time.perf_counter()
        with torch.inference_mode():
            net(pixels)
        return time.perf_counter() - begin

    def by_triton() -> float:
        with monkeypatch.context() as patch:
            for file in (_op, kernels._launch):
                patch.setattr(file, "prepared", lambda function, args, *rest: function(*args))
            return seconds()

    for _ in range(3):
        seconds(), by_triton()
    ratios = sorted(by_triton() / seconds() for _ in range(30))
    assert statistics.median(ratios) > 2, ratios


def test_weights_that_move_are_read_where_they_are(model: Any) -> None:
    net, launches = model
    _forward(net, launches)
    old = net.blocks[0].attn.proj.weight.data
    # kept, so that its memory is not given to the next
    net.blocks[0].attn.proj.weight.data = old.clone()
    for _ in range(2):
        found = _forward(net, launches)
        assert _reads(found, net.blocks[0].attn.proj.weight) and not _reads(found, old)
    net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()}, assign=True)
    for _ in range(2):
        assert _reads(_forward(net, launches), net.blocks[1].mlp.fc2.weight)


def test_a_copy_prepares_its_own(model: Any) -> None:
    net, launches = model
    for _ in range(2):
        _forward(net, launches)
    twin = copy.deepcopy(net)
    pickle.dumps(net)
    for _ in range(2):
        found = _forward(twin, launches)
        assert _reads(found, twin.blocks[0].attn.proj.weight) and not _reads(found, net.blocks[0].attn.proj.weight)


def test_hooks_still_see_a_block(model: Any) -> None:
    net, launches = model
    for _ in range(2):
        _forward(net, launches)
    seen: list[Any] = []
    net.blocks[1].mlp.fc2.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    with torch.inference_mode():
        net(torch.zeros(2, 3, 32, 32, dtype=torch.bfloat16))
    assert seen == [(2, 5, 192)]


def test_memory_goes_back_as_it_does_without_a_recipe(model: Any) -> None:
    net, launches = model
    _forward(net, launches)
    recipes = [recipe for block in net.blocks for recipe in block.plan().recipes.values()]
    assert len(recipes) == 5
    for recipe in recipes:
        done = [number for _, _, numbers in recipe._steps for number in numbers]
        kept = {output[0] for output in recipe.outputs if output is not None}
        made = sum(kernel is None for _, kernel, _ in recipe._steps)
        assert sorted(done) == sorted(set(range(made)) - kept)
