"""What keeps a kernel from standing for a module: asked of a tensor, or of a module that would be skipped.

A fused layer computes what the modules inside it do without calling them. Where that would lose something (a hook, a
LoRA layer in the place of a linear one, dropout at work), the module is called, and a note says why.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.parameter import Buffer, Parameter

from .. import kernels
from ..kernels._op import KERNEL_DTYPES
from ..kernels._triton import HAS_TRITON

# in the place of a module that a library's layer does not have
IDENTITY = nn.Identity()

# whose memory a kernel may read. Other subclasses (quantised, distributed, jagged) have an arithmetic of their own;
# the last two stand for ordinary tensors while somebody traces
TENSORS = frozenset((Tensor, Parameter, Buffer, FakeTensor, FunctionalTensor))


def alias(name: str) -> Any:
    """A class attribute that gives an object's own attribute another name: the one that the mix-ins here read."""
    return property(lambda self: getattr(self, name))


def view_as(kind: type[nn.Module], module: Any) -> Any:
    """A module seen as a fused class: the same attributes, with that class's methods. The module stays what it is."""
    if isinstance(module, kind):
        return module
    view = object.__new__(kind)
    object.__setattr__(view, "__dict__", module.__dict__)
    return view


def symbolic(x: Any) -> bool:
    """Whether `torch.fx` traces, as feature extractors do: it cannot follow a kernel."""
    return isinstance(x, Proxy)


def call_leaf(module: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Any:
    """What `torch.fx` records of a module of torch: one step, not what is inside."""
    tracer = x.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (x, *args), kwargs)


def why_not_taken(x: Any) -> str:
    """Why no kernel takes a tensor in the present mode, so that the original has to run; empty where one does."""
    if symbolic(x):
        return "torch.fx traces"
    if not isinstance(x, Tensor) or type(x) not in TENSORS:
        return f"a {type(x).__name__}: the kernels take plain tensors"
    if x.layout is not torch.strided or x.is_nested:
        return f"a {'nested' if x.is_nested else str(x.layout)[6:]} tensor"
    if why := why_not_on(x.device, x.dtype):
        return why
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transforms"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit traces"
    return ""


def takes(x: Any) -> bool:
    """`not why_not_taken(x)`, quickly."""
    if torch.compiler.is_compiling():
        # a compiler shows tensors as what they stand for, and none of the other modes
        return isinstance(x, Tensor) and not why_not_on(x.device, x.dtype)
    return (
        type(x) in TENSORS
        and x.layout is torch.strided
        and not x.is_nested
        and not why_not_on(x.device, x.dtype)
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
    )


def why_not_on(device: torch.device, dtype: torch.dtype) -> str:
    """Why no kernel computes in a dtype on a device; empty where one does."""
    kind = device.type
    if kind == "cpu" and not (dtype is torch.float64 and kernels.interprets()):
        return ""
    if kind == "cuda" and not HAS_TRITON:
        return "Triton is not installed"
    if kind in ("cpu", "cuda"):
        # whole numbers are pixels, or what the original refuses in its own words
        taken = dtype in KERNEL_DTYPES or not dtype.is_floating_point
        return "" if taken else f"{str(dtype)[6:]}: the kernels compute in fp32, fp16 and bf16"
    return "" if kind == "meta" else f"on {kind}: the kernels run on CUDA and CPU"


def hooked(module: nn.Module) -> bool:
    """Whether computing what the module does without calling it would skip a hook or a `forward` of its own."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        # attention-map tools and offloading put a function in the instance
        or own_forward(module)
        or _has_any_global_hook()
    )


def own_forward(module: nn.Module) -> bool:
    """Whether an object has a forward that is not its class's: a tool may have put that one back on the object."""
    forward = module.__dict__.get("forward")
    return forward is not None and not is_of_class(module, forward)


def is_of_class(module: nn.Module, forward: Any) -> bool:
    """Whether a forward is the one that a module's class gives it."""
    return (
        isinstance(forward, MethodType)
        and forward.__self__ is module
        and forward.__func__ is getattr(type(module), "forward", None)
    )


def overridden(module: nn.Module) -> list[str]:
    """A sentence for each method that an object has of its own, in the place of its class's."""
    # what every module has (train, state_dict) is not part of the forward
    names = [
        name for name in vars(module) if callable(getattr(type(module), name, None)) and not hasattr(nn.Module, name)
    ]
    return [f"{name} is replaced on this object" for name in (*["forward"] * own_forward(module), *names)]


def is_plain(module: Any, kind: type[nn.Module]) -> bool:
    """Whether a module is of this very class and calling it does nothing beyond the class's `forward`."""
    # exactly this class: LoRA, quantised and parametrised layers are others, with a forward of their own
    return type(module) is kind and not hooked(module)


def is_linear(module: Any) -> bool:
    """Whether a module is a linear layer and nothing else, with plain weights."""
    # nn.MultiheadAttention's output projection is the second kind: the same, kept from dynamic quantisation
    if type(module) is not nn.Linear and type(module) is not NonDynamicallyQuantizableLinear:
        return False
    return not hooked(module) and not foreign(module)


def foreign(module: nn.Module) -> str:
    """Of which class a tensor is that a module holds and no kernel reads; empty where there is none."""
    for tensors in (module._parameters, module._buffers):
        for tensor in tensors.values():
            if tensor is not None and (type(tensor) not in TENSORS or tensor.layout is not torch.strided):
                return type(tensor).__name__ if type(tensor) not in TENSORS else f"{str(tensor.layout)[6:]} tensor"
    return ""


def linear(name: str, module: Any, notes: list[str]) -> bool:
    """`is_linear`, with a note where it has to be called."""
    return is_linear(module) or _noted(name, module, nn.Linear, notes)


def plain(name: str, module: Any, kind: type[nn.Module], notes: list[str]) -> bool:
    """`is_plain`, with a note where it has to be called."""
    return is_plain(module, kind) or _noted(name, module, kind, notes)


def _noted(name: str, module: Any, kind: type[nn.Module], notes: list[str]) -> bool:
    actual = type(module)
    if isinstance(module, nn.Module) and actual is kind and (held := foreign(module)):
        notes.append(f"{name} holds a {held}: called as a module")
    elif actual is kind:
        notes.append(f"{name} has hooks: called as a module")
    else:
        # peft's layers have torch's names
        library = f"{actual.__module__.partition('.')[0]}." if actual.__name__ == kind.__name__ else ""
        notes.append(f"{name} is a {library}{actual.__name__}: called as a module")
    return False


def compute_linear(
    plain: bool, module: Any, x: Tensor, residual: Tensor | None, scale: Tensor | None, tf32: bool
) -> Tensor:
    """`residual + scale * module(x)`, in one kernel where the module is known to be plain."""
    if plain:
        return kernels.linear(x, module.weight, module.bias, residual=residual, scale=scale, tf32=tf32)
    return add_residual(module(x), residual, scale)


def add_residual(x: Tensor, residual: Tensor | None, scale: Tensor | None) -> Tensor:
    """`residual + scale * x`, where a branch ends with a module that was called."""
    x = x if scale is None else x * scale
    return x if residual is None else residual + x


_thread = threading.local()


@contextmanager
def derive_anywhere() -> Iterator[None]:
    """In this thread, while open, what is derived from frozen weights is read on any device: for proofs."""
    before, _thread.anywhere = getattr(_thread, "anywhere", False), True
    try:
        yield
    finally:
        _thread.anywhere = before


def deriving(x: Tensor) -> bool:
    """Whether a layer may read, for these tokens, what was derived from frozen weights: in inference, on a GPU."""
    return getattr(_thread, "anywhere", False) or (
        (x.is_cuda or kernels.interprets())
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(x.device.type)
    )
