"""A model's tensors in another dtype, and back."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _tensors(model: nn.Module) -> list[tuple[str, str, Tensor]]:
    """Every floating-point parameter and buffer, once per place it is registered in."""
    return [
        (prefix, name, tensor)
        for prefix, module in model.named_modules()
        for registry in (module._parameters, module._buffers)
        for name, tensor in registry.items()
        if tensor is not None and tensor.is_floating_point()
    ]


def _set_data(tensor: Tensor, data: Tensor) -> None:
    """Give a tensor other data, and its gradient the dtype, as `Module.to` does: the object stays."""
    grad = tensor.grad if tensor.is_leaf else None
    if grad is not None:
        tensor.grad = None
    tensor.data = data
    if grad is not None:
        tensor.grad = grad.to(data.dtype)


def cast(model: nn.Module, dtype: torch.dtype) -> dict[tuple[str, str], Tensor | None]:
    """Give a model's tensors data in `dtype`; return what they had, None where that was it. Tied tensors stay tied."""
    originals: dict[tuple[str, str], Tensor | None] = {}
    seen: dict[int, Tensor | None] = {}
    for prefix, name, tensor in _tensors(model):
        if id(tensor) not in seen:
            seen[id(tensor)] = None if tensor.dtype == dtype else tensor.data
            if tensor.dtype != dtype:
                _set_data(tensor, tensor.data.to(dtype))
        originals[prefix, name] = seen[id(tensor)]
    return originals


def uncast(model: nn.Module, dtype: torch.dtype, originals: dict[tuple[str, str], Tensor | None]) -> None:
    known = [original for original in originals.values() if original is not None]
    seen: set[int] = set()
    for prefix, name, tensor in _tensors(model):
        original = originals.get((prefix, name))
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if original is not None and _is_cast_of(tensor, original, dtype):
            # two tensors that were one when they were cast must not share memory now
            data = original.clone() if id(original) in seen else original
            seen.add(id(original))
            _set_data(tensor, data.to(tensor.device))
        elif original is not None:
            _set_data(tensor, tensor.data.to(original.dtype))
        elif (prefix, name) not in originals and tensor.dtype == dtype and known:
            # put there since: it goes where its neighbours go
            _set_data(tensor, tensor.data.to(known[0].dtype))


def _is_cast_of(tensor: Tensor, original: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor's values are still what the cast of `original` to `dtype` gave."""
    if tensor.shape != original.shape or tensor.is_meta or original.is_meta:
        return False
    return torch.equal(original.to(tensor.device, dtype).to(tensor.dtype), tensor.detach())
