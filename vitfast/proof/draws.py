"""Random numbers in a comparison: every model gets the same ones, whatever its precision.

Some models draw in evaluation too: a mask over patches, dropout that stays on. Two forwards can be compared only if
they draw the same. From one state of the generators they do, in one dtype; in another one `randn` gives other numbers
and a GPU's dropout another mask. So the draws of the plain model in the tested precision are recorded, and float64 gets
those.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


def _generators() -> list[torch.Generator]:
    """torch's default generators of the CPU and of the CUDA devices in use."""
    return [torch.default_generator, *(torch.cuda.default_generators if torch.cuda.is_initialized() else ())]


def _own(model: nn.Module) -> dict[str, torch.Generator]:
    """Generators that modules hold, by the attribute's path."""
    return {
        f"{name}.{attribute}": value
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, torch.Generator)
    }


class RandomState:
    """The state of every generator that a forward may draw from: torch's, NumPy's, Python's and the model's own.

    Args:
        model: whose own generators are read.
    """

    def __init__(self, model: nn.Module) -> None:
        self._defaults = [generator.get_state() for generator in _generators()]
        self._own = {name: generator.get_state() for name, generator in _own(model).items()}
        self._others = random.getstate(), np.random.get_state()

    def restore(self, model: nn.Module) -> None:
        """Puts it back; `model` may be a copy of the one that it was read from."""
        for generator, state in zip(_generators(), self._defaults, strict=False):
            generator.set_state(state)
        for name, generator in _own(model).items():
            generator.set_state(self._own[name])
        python, numpy = self._others
        random.setstate(python)
        np.random.set_state(numpy)

    def moved(self, model: nn.Module) -> bool:
        """Whether something was drawn since."""
        now = RandomState(model)
        python, numpy = self._others
        return not (
            len(now._defaults) == len(self._defaults)
            and all(map(torch.equal, now._defaults, self._defaults))
            and all(torch.equal(state, self._own[name]) for name, state in now._own.items())
            and now._others[0] == python
            and all(np.array_equal(a, b) for a, b in zip(now._others[1], numpy, strict=True))
        )


class Draws(TorchDispatchMode):
    """While open, records what torch's operators draw, or gives back what another one recorded.

    Args:
        given: draws to give back, in order; None to record into `made`.

    Raises:
        ValueError: from the forward inside: a draw that cannot be told from what the operator makes of its inputs, or
            one that is not the next given.
    """

    def __init__(self, given: list[tuple[str, Tensor]] | None = None) -> None:
        super().__init__()
        self.made: list[tuple[str, Tensor]] = []
        self._given = given
        self._paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave alone what is drawn inside."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def finish(self) -> None:
        """Raises a `ValueError` if not all that was given was drawn."""
        if self._given is not None and len(self.made) != len(self._given):
            raise ValueError(_DIFFERENT.format(f"{len(self.made)} draws, not {len(self._given)}"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        # dropout and attention come whole in inference mode, and draw inside
        with self:
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        generators = _generators()
        if kwargs.get("generator") is not None:
            generators.append(kwargs["generator"])
        before = [generator.get_state() for generator in generators]
        out = func(*args, **kwargs)
        if all(torch.equal(g.get_state(), state) for g, state in zip(generators, before, strict=True)):
            return out
        name = func._schema.name
        drawn = _drawn(name, args, out)
        if drawn is None:
            raise ValueError(
                f"the model draws random numbers inside {name}; float64 would draw others there, so there is no truth "
                "to hold it to"
            )
        if self._given is not None:
            expected, value = self._given[len(self.made)] if len(self.made) < len(self._given) else ("nothing", drawn)
            if (expected, value.shape) != (name, drawn.shape):
                raise ValueError(_DIFFERENT.format(f"{name} {list(drawn.shape)}, not {expected} {list(value.shape)}"))
            drawn.copy_(value)
            if name == "aten::native_dropout":
                x, rate = args[:2]
                out = x * drawn * (1.0 / (1.0 - rate)), drawn
        self.made.append((name, drawn.clone()))
        return out


_DIFFERENT = "the model draws other random numbers in float64 ({}); there is no truth to hold it to"


def _drawn(name: str, args: Any, out: Any) -> Tensor | None:
    """The random part of what an operator gave; None where it is mixed with its inputs."""
    if name == "aten::native_dropout":
        return out[1]
    inputs = sum(isinstance(argument, Tensor) for argument in args)
    # nothing is read but a shape, or probabilities of which only the outcome counts
    blind = inputs == 0 or (inputs == 1 and name.endswith(("_", "_like")))
    return out if blind or name in ("aten::bernoulli", "aten::multinomial") else None
