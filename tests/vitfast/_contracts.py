"""What every library's users rely on, checked for a plain model and an accelerated one."""

from __future__ import annotations

import copy
import io
import pickle
import unittest.mock
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import vitfast
from tests.vitfast._models import assert_same, forward, fused_names, run
from vitfast.layers import FusedBlock


def assert_trees(actual: Any, expected: Any) -> None:
    """The same structure, and tensors that differ by rounding alone."""
    a, e = tree_leaves(actual), tree_leaves(expected)
    assert type(actual) is type(expected) and len(a) == len(e) > 0
    for left, right in zip(a, e, strict=True):
        if isinstance(right, Tensor):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def check_training(plain: nn.Module, x: Tensor, call: Callable[..., Any] = forward) -> None:
    """In training the same random numbers are drawn: outputs and gradients differ by rounding alone."""
    fused = vitfast.accelerate(copy.deepcopy(plain))
    expected = run(plain, call, x, train=True)
    actual = run(fused, call, x, train=True)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        # registers are none or more
        scale = value.abs().max().item() if value.numel() else 0.0
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")
    # and other seeds draw others
    assert not torch.equal(run(fused, call, x, train=True, seed=4)["output 0"], actual["output 0"])


def _record(model: nn.Module, x: Tensor) -> list[tuple[str, Any]]:
    seen: list[tuple[str, Any]] = []
    handles = [
        module.register_forward_hook(lambda m, args, out, name=name: seen.append((name, out)))
        for name, module in model.named_modules()
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


def check_hooks(plain: nn.Module, x: Tensor, extra: str | tuple[str, ...] = ()) -> None:
    """A hook on every module fires as often, in the same order, with the same values; and on each one alone, too.

    Args:
        plain: the model.
        x: pixels.
        extra: ends of the names of modules that may be called where the original leaves them out.
    """
    fused = vitfast.accelerate(copy.deepcopy(plain))
    expected = _record(plain, x)
    seen = [(name, out) for name, out in _record(fused, x) if not name.endswith(extra)]
    assert [name for name, _ in seen] == [name for name, _ in expected if not name.endswith(extra)]
    for (_, out), (_, wanted) in zip(seen, (pair for pair in expected if not pair[0].endswith(extra)), strict=True):
        assert_trees(out, wanted)
    values = dict(expected)
    for name, module in fused.named_modules():
        if name in values:
            alone: list[Any] = []
            handle = module.register_forward_hook(lambda m, args, out, alone=alone: alone.append(out))
            with torch.no_grad():
                fused(x)
            handle.remove()
            assert len(alone) == [n for n, _ in expected].count(name), f"the hook on {name} fired {len(alone)} times"
            assert_trees(alone[-1], values[name])


def check_copies(plain: nn.Module, x: Tensor) -> None:
    """The state dict is the plain one's; copies and pickles are accelerated and compute the same."""
    fused = vitfast.accelerate(copy.deepcopy(plain))
    state = fused.state_dict()
    assert list(state) == list(plain.state_dict())
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in state.items())
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        expected = fused(x)
        for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), saved):
            assert fused_names(twin) == fused_names(fused)
            assert [type(m) for m in twin.modules()] == [type(m) for m in fused.modules()]
            assert_trees(twin(x), expected)
            vitfast.restore(twin)
            assert [type(m) for m in twin.modules()] == [type(m) for m in plain.modules()]
    fresh = vitfast.accelerate(copy.deepcopy(plain))
    fresh.load_state_dict({key: value + 0.1 for key, value in state.items()})
    assert not torch.allclose(tree_leaves(fresh(x))[0], tree_leaves(expected)[0])
    fresh.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert_trees(fresh(x), expected)


def check_compile(plain: nn.Module, x: Tensor) -> None:
    """One graph without a break, in inference and in training."""
    fused = vitfast.accelerate(copy.deepcopy(plain))
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_trees(compiled(x), fused(x))
    assert_same(plain, fused, x, lambda model, x: compiled(x) if model is fused else model(x))
    torch._dynamo.reset()


def check_layouts(plain: nn.Module, x: Tensor) -> None:
    """Pixels in any memory layout are the same pixels."""
    fused = vitfast.accelerate(copy.deepcopy(plain))
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1])
    wide[..., ::2] = x
    layouts = {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "strided": wide[..., ::2],
        "offset": torch.cat((x[:1], x))[1:],
        "expanded": x[:1].expand(3, -1, -1, -1),
    }
    with torch.no_grad():
        for pixels in layouts.values():
            assert_trees(fused(pixels), plain(pixels.contiguous()))
        assert len(fused(x[:0])) == 0


def check_errors(plain: nn.Module, *wrong: Tensor) -> None:
    """What the library refuses, it refuses in its own words."""
    fused = vitfast.accelerate(copy.deepcopy(plain))
    for x in wrong:
        errors = []
        for model in (plain, fused):
            try:
                model(x)
            except Exception as error:
                errors.append((type(error), str(error)))
        assert len(errors) == 2 and errors[0] == errors[1], errors


def check_folds(plain: nn.Module, x: Tensor, blocks: int, call: Callable[..., Any] = forward) -> None:
    """With the kernels, in inference in 16 bits, so many frozen blocks run with norms folded into their GEMMs."""
    plain, x = copy.deepcopy(plain).half(), x.half()
    fused = vitfast.accelerate(copy.deepcopy(plain), frozen=True)
    folded, first = [], FusedBlock.folded_attention

    def note(self: FusedBlock, *args: Any, **kwargs: Any) -> Any:
        folded.append(self)
        return first(self, *args, **kwargs)

    with unittest.mock.patch.object(FusedBlock, "folded_attention", note):
        assert_same(plain, fused, x, call, grad=False)
    assert len(folded) == blocks
