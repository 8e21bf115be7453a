"""What docs/support.md says of each architecture, held to what the untouched library does."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import pickle
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves

import vitfast
from tests._close import assert_close
from tests.vitfast import _support as support
from tests.vitfast._architectures import ARCHITECTURES, Architecture, Call
from tests.vitfast._models import images
from vitfast.layers import KINDS


class Pair:
    """An architecture's untouched model, an accelerated copy, and images."""

    def __init__(self, architecture: Architecture) -> None:
        _need(architecture)
        self.architecture = architecture
        self.plain = architecture.build()
        self.fused = vitfast.accelerate(copy.deepcopy(self.plain))
        self.images = images(2, 3, *architecture.size)

    @property
    def exact(self) -> nn.Module:
        """The untouched model in float64."""
        return copy.deepcopy(self.plain).double()


def _need(architecture: Architecture) -> None:
    """Skip what the installed release of the library does not have."""
    if support.LIBRARIES[architecture.library][1] is None:
        return
    library = pytest.importorskip(architecture.library)
    if architecture.library == "timm" and not library.is_model(architecture.name):
        pytest.skip(f"this timm has no {architecture.name}")
    if architecture.library == "transformers" and not hasattr(library, architecture.name):
        pytest.skip(f"this release of Transformers has no {architecture.name}")
    if architecture.name == "CLIPModel" and library.__version__.startswith("4."):
        pytest.skip("version 4 makes masks in fp32's range even for float64")


def _call(model: nn.Module, call: Call, x: Tensor) -> Any:
    # masked autoencoders shuffle
    torch.manual_seed(3)
    with torch.no_grad():
        return call(model, x)


def _assert_same(actual: Any, exact: Any, baseline: Any) -> None:
    """The same containers, and tensors that keep the rule."""
    (found, shape), (_, expected) = tree_flatten(actual), tree_flatten(baseline)
    assert shape == expected
    assert any(isinstance(leaf, Tensor) for leaf in found)
    for i, (a, e, b) in enumerate(zip(found, tree_leaves(exact), tree_leaves(baseline), strict=True)):
        if isinstance(b, Tensor) and b.is_floating_point():
            assert_close(a, e, b, name=f"output {i}")
        elif isinstance(b, Tensor):
            assert torch.equal(a, b), f"output {i}"
        else:
            assert a == b, f"output {i}"


def _assert_calls(plain: nn.Module, fused: nn.Module, x: Tensor, calls: tuple[Call, ...]) -> None:
    exact = copy.deepcopy(plain).double()
    for call in calls:
        _assert_same(_call(fused, call, x), _call(exact, call, x.double()), _call(plain, call, x))


def _forward(pair: Pair) -> str:
    _assert_calls(pair.plain, pair.fused, pair.images, pair.architecture.calls)
    return ""


def _hidden_states(pair: Pair) -> str:
    architecture = pair.architecture
    _assert_calls(pair.plain, pair.fused, pair.images, architecture.hidden)
    if architecture.features is not None:
        plain = architecture.features()
        fused = vitfast.accelerate(copy.deepcopy(plain))
        _assert_calls(plain, fused, pair.images, (lambda model, x: model(x),))
    return ""


class _Probabilities(TorchFunctionMode):
    """While open, keeps the probabilities `[B, h, N, N]` of whatever attends through torch's own functions."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if function is F.scaled_dot_product_attention:
            q, k = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("query", "key")))
            mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            scale = kwargs.get("scale") or 1.0 / math.sqrt(q.shape[-1])
            logits = scale * (q @ k.transpose(-2, -1))
            self._keep((logits if mask is None else logits + mask).softmax(dim=-1))
        elif function is F.multi_head_attention_forward:
            self._keep(function(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})[1])
        elif function in (torch.softmax, F.softmax, Tensor.softmax):
            self._keep(out)
        return out

    def _keep(self, probabilities: Tensor) -> None:
        # pooling has fewer queries than keys
        if probabilities.ndim == 4 and probabilities.shape[-1] == probabilities.shape[-2]:
            self.found.append(probabilities.detach())


def _seen(model: nn.Module, x: Tensor) -> list[Tensor]:
    with _Probabilities() as mode:
        model(x)
    return mode.found


def _maps(pair: Pair) -> str:
    architecture = pair.architecture
    tower = architecture.tower(pair.fused)
    if architecture.no_maps:
        with pytest.raises(ValueError):
            vitfast.attention_maps(tower, pair.images)
        return architecture.no_maps
    torch.manual_seed(3)
    maps = vitfast.attention_maps(tower, pair.images, heads=None)
    expected = []
    for model, x in ((pair.exact, pair.images.double()), (pair.plain, pair.images)):
        torch.manual_seed(3)
        expected.append(_seen(architecture.tower(model), x))
    assert len(maps) == len(expected[0]) >= 2
    for i, (a, e, b) in enumerate(zip(maps, *expected, strict=True)):
        assert_close(a, e, b, name=f"map {i}")
    rows, cols = maps.grid
    assert rows * cols + maps.num_prefix_tokens == maps[0].shape[-1]
    return ""


def _compile(pair: Pair) -> str:
    call = pair.architecture.calls[0]

    def compiled(model: nn.Module) -> Any:
        torch._dynamo.reset()
        return _call(torch.compile(model, fullgraph=True, backend="aot_eager"), call, pair.images)

    try:
        actual = compiled(pair.fused)
    except Exception:
        try:
            compiled(pair.plain)
        except Exception:
            return "the library's own model does not compile in one graph"
        raise
    _assert_same(actual, _call(pair.exact, call, pair.images.double()), _call(pair.plain, call, pair.images))
    return ""


def _step(model: nn.Module, call: Call, x: Tensor, seed: int = 3) -> dict[str, Tensor]:
    """Outputs in training mode, and every parameter after a step of plain gradient descent on them."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    torch.manual_seed(seed)
    outputs = [out for out in tree_leaves(call(model, x)) if isinstance(out, Tensor) and out.requires_grad]
    weights = [images(out.numel(), seed=7 + i, dtype=out.dtype) for i, out in enumerate(outputs)]
    torch.stack([out.flatten() @ weight for out, weight in zip(outputs, weights, strict=True)]).sum().backward()
    optimizer.step()
    found = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    return found | {name: parameter.detach() for name, parameter in model.named_parameters()}


def _train_step(pair: Pair) -> str:
    call, x = pair.architecture.calls[0], pair.images
    before = dict(pair.plain.named_parameters())
    baseline = _step(pair.plain, call, x)
    assert any(not torch.equal(baseline[name], parameter) for name, parameter in before.items())
    draws = not torch.equal(_step(pair.plain, call, x, seed=4)["output 0"], baseline["output 0"])
    exact = _step(pair.exact, call, x.double())
    # float64 draws other numbers than fp32, so there both are in float64
    actual = _step(copy.deepcopy(pair.fused).double() if draws else pair.fused, call, x.double() if draws else x)
    assert actual.keys() == exact.keys() == baseline.keys()
    for name, value in actual.items():
        if draws:
            torch.testing.assert_close(
                value, exact[name], rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}"
            )
        else:
            assert_close(value, exact[name], baseline[name], name=name)
    return ""


def _assert_equal(actual: Any, expected: Any) -> None:
    (found, shape), (wanted, expected_shape) = tree_flatten(actual), tree_flatten(expected)
    assert shape == expected_shape
    for a, e in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, e)


def _types(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules()]


def _storages(model: nn.Module) -> set[int]:
    return {parameter.data_ptr() for parameter in model.parameters() if parameter.numel()}


def _pickles(model: nn.Module) -> bool:
    try:
        torch.save(model, io.BytesIO())
    except (AttributeError, pickle.PicklingError):
        # functions within functions
        return False
    return True


def _save_load(pair: Pair) -> str:
    plain, fused, call, x = pair.plain, pair.fused, pair.architecture.calls[0], pair.images
    state = fused.state_dict()
    assert list(state) == list(plain.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())

    expected = _call(plain, call, x)
    for model in (pair.architecture.build(), vitfast.accelerate(pair.architecture.build())):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        model.load_state_dict(state)
        _assert_equal(_call(model, call, x), expected)

    copies = [copy.deepcopy(fused)]
    pickles = _pickles(plain)
    if pickles:
        file = io.BytesIO()
        torch.save(fused, file)
        file.seek(0)
        copies.append(torch.load(file, weights_only=False))
    for again in copies:
        assert _types(again) == _types(fused)
        assert not _storages(again) & _storages(fused)
        _assert_equal(_call(again, call, x), expected)

    if hasattr(plain, "save_pretrained"):
        with tempfile.TemporaryDirectory() as folder:
            for model, name in ((plain, "plain"), (fused, "fused")):
                model.save_pretrained(Path(folder) / name)
            files = sorted(path.name for path in (Path(folder) / "plain").iterdir())
            assert "model.safetensors" in files
            for name in files:
                assert (Path(folder) / "fused" / name).read_bytes() == (Path(folder) / "plain" / name).read_bytes()
            again = type(plain).from_pretrained(Path(folder) / "fused").eval()
        _assert_equal(_call(vitfast.accelerate(again), call, x), expected)
    return "" if pickles else "the library's own model cannot be pickled, all else is proved"


def _restore(pair: Pair) -> str:
    plain, fused, call, x = pair.plain, pair.fused, pair.architecture.calls[0], pair.images
    parameters = list(fused.parameters())
    # a first call may leave something on the modules
    for model in (plain, fused):
        _call(model, call, x)
    restored = vitfast.restore(fused)
    assert _types(restored) == _types(plain)
    assert [list(vars(module)) for module in restored.modules()] == [list(vars(module)) for module in plain.modules()]
    assert all(a is b for a, b in zip(restored.parameters(), parameters, strict=True))
    _assert_equal(_call(restored, call, x), _call(plain, call, x))
    return ""


# by column: what a tick proves, and the check, which says why there is nothing to prove, if so
CHECKS: dict[str, tuple[str, Callable[[Pair], str]]] = {
    "forward": (
        "outputs of every type: logits, features and pooled features; tuples and dataclasses of Transformers",
        _forward,
    ),
    "hidden states": (
        "`forward_intermediates`, `get_intermediate_layers` and `features_only`; `output_hidden_states=True`; "
        "`create_feature_extractor` of torchvision",
        _hidden_states,
    ),
    "maps": ("`vitfast.attention_maps` of all heads, against the probabilities of the library's own attention", _maps),
    "compile": (
        "`torch.compile(fullgraph=True)` traces the model into one graph, whose outputs are the same",
        _compile,
    ),
    "train step": (
        "outputs in training mode, with the model's own dropout, and each parameter after a step of SGD",
        _train_step,
    ),
    "save, load": (
        "the same `state_dict`, loaded by a plain and by an accelerated model; `torch.save` of the model; `deepcopy`; "
        "`save_pretrained`",
        _save_load,
    ),
    "restore": ("the classes, attributes, parameters and outputs of before", _restore),
}
MEANINGS = {name: meaning for name, (meaning, _) in CHECKS.items()}


def _replaced(pair: Pair) -> list[str]:
    """Kinds of what is replaced in the model, or the image tower."""
    found = {row.kind for row in vitfast.report(pair.architecture.tower(pair.fused)).replaced}
    return [kind for kind in (*KINDS, "model") if kind in found]


def _left_alone(pair: Pair) -> bool:
    return not {"attention", "block"}.intersection(_replaced(pair))


def _kept(pair: Pair) -> list[str]:
    """What is left to the library, and why."""
    rows = vitfast.report(pair.architecture.tower(pair.fused)).kept
    # the page has a "; " between two notes
    notes = [f"{row.kind}: {row.note}".replace("; ", ", ") for row in rows]
    return list(dict.fromkeys(notes))


@pytest.fixture(scope="module")
def page(request: pytest.FixtureRequest) -> Any:
    """What the page says, by library, architecture and column; None while it is written."""
    if request.config.getoption("support_table", None) is not None:
        return None
    return support.read(support.PAGE.read_text(encoding="utf-8"))


@pytest.fixture
def found(request: pytest.FixtureRequest, architecture: Architecture) -> Any:
    """A function that hands what was found of a column to whoever writes the page."""

    def hand(column: str, text: str, notes: Sequence[str] = ()) -> None:
        request.node.user_properties.append(("support", (str(architecture), column, text, list(notes))))

    return hand


def _row(page: Any, architecture: Architecture) -> dict[str, str] | None:
    """The page's cells, or None where this run cannot be held to them."""
    if page is None or not support.made_here(architecture, page.versions):
        return None
    return page.tables[architecture.library].get(architecture.name, {})


RENEW = f"docs/support.md is not what is found; renew it: {support.COMMAND}"


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_replaced(architecture, page, found):
    pair = Pair(architecture)
    replaced, kept = ", ".join(_replaced(pair)), _kept(pair)
    found(support.REPLACED, replaced, kept)
    row = _row(page, architecture)
    if row is None:
        return
    assert row.get(support.REPLACED) == replaced, RENEW
    reasons = [f"{column}: " for column in CHECKS if row[column] == support.NOT_APPLICABLE]
    notes = row[support.NOTES].split("; ") if row[support.NOTES] else []
    assert notes[: len(kept)] == kept, RENEW
    rest = notes[len(kept) :]
    assert len(rest) == len(reasons), RENEW
    assert all(note.startswith(reason) for note, reason in zip(rest, reasons, strict=True)), RENEW


@pytest.mark.parametrize("column", CHECKS)
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_support(architecture, column, page, found):
    # what stands there if this test fails
    found(column, support.BROKEN)
    pair = Pair(architecture)
    left_alone = _left_alone(pair)
    # attention that is not known has no maps here
    with contextlib.suppress(ValueError) if left_alone and column == "maps" else contextlib.nullcontext():
        reason = CHECKS[column][1](pair)
    if left_alone:
        text, notes = support.LEFT_ALONE, []
    elif reason:
        text, notes = support.NOT_APPLICABLE, [f"{column}: {reason}"]
    else:
        text, notes = support.PROVED, []
    found(column, text, notes)
    row = _row(page, architecture)
    if row is not None:
        assert row.get(column) == text, RENEW
        assert all(note in row[support.NOTES].split("; ") for note in notes), RENEW


@pytest.fixture
def written(page: Any) -> Any:
    if page is None:
        pytest.skip("the page is being written")
    return page


def test_page_has_these_rows_and_columns(written):
    for library in support.LIBRARIES:
        rows = [architecture.name for architecture in ARCHITECTURES if architecture.library == library]
        assert list(written.tables[library]) == rows, RENEW
        for cells in written.tables[library].values():
            assert list(cells) == [support.REPLACED, *CHECKS, support.NOTES], RENEW


def test_page_has_forty_architectures(written):
    rows = [set(cells.values()) for table in written.tables.values() for cells in table.values()]
    assert sum(not row & {support.LEFT_ALONE, support.BROKEN} for row in rows) >= 40


def test_page_was_made_with_the_pinned_releases(written):
    pins = (support.PAGE.parents[1] / "constraints.txt").read_text(encoding="utf-8").split()
    packages = {library: package for library, (_, package) in support.LIBRARIES.items() if package}
    for library, package in {"torch": "torch", **packages}.items():
        pin = f"{package}=={written.versions[library]}".replace("_", "-")
        assert pin in pins, f"{pin} is not pinned; renew the page: {support.COMMAND}"


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_on_a_gpu(architecture):
    """In bf16, which no lane without a GPU can run."""
    _need(architecture)
    plain = architecture.build().to("cuda", torch.bfloat16)
    fused = vitfast.accelerate(copy.deepcopy(plain))
    # enough numbers for errors of 16 bits to be more than luck
    _assert_calls(plain, fused, images(16, 3, *architecture.size).to("cuda", torch.bfloat16), architecture.calls)
