"""`register`: vitfast under a name of its own inside other libraries."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels

NAME = "vitfast"


def register(*libraries: str) -> None:
    """Make vitfast known to other libraries, by its name. A second call changes nothing.

    "transformers": `attn_implementation="vitfast"` is accepted wherever "sdpa" is: by `from_pretrained`, by
    `model.set_attn_implementation` and in a config, of vision and of text models. Masks of any form count, and a call
    with `output_attentions=True` gets the probabilities. A query that may see no key gives zeros. Two models that were
    made of one config object share it: setting the implementation of one sets the other's.

    "timm": `timm.create_model("vitfast_vit_base_patch16_224")` builds `vitfast.create_model("vit_base_patch16_224")`,
    not accelerated, with timm's arguments, checkpoints and image settings; so for each name that both have.

    Args:
        libraries: some of "transformers" and "timm"; default "transformers".

    Raises:
        ValueError: an unknown library.
        ImportError: a library is missing or too old; names the extra that installs it.
    """
    for library in libraries or ("transformers",):
        if library not in _REGISTER:
            raise ValueError(f"register: unknown library {library!r}; expected some of {', '.join(_REGISTER)}")
        try:
            _REGISTER[library]()
        except ImportError as error:
            raise ImportError(f'register: pip install "vitfast[{library}]" ({error})') from error


def _transformers() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    # without a function for masks, Transformers drops 2-D ones
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_mask(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor | None:
    """The mask of a forward, as Transformers' `sdpa_mask`, but as a bias of `dtype`: made once, added in each layer."""
    from transformers.masking_utils import sdpa_mask

    # the kernel knows no causal order by itself
    kwargs["allow_is_causal_skip"] = False
    mask = sdpa_mask(*args, dtype=dtype, **kwargs)
    return None if mask is None else _bias(mask, dtype)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as Transformers calls it.

    Args:
        module: the attention module; its `is_causal` counts where the argument is None and there is no mask.
        query: `[B, H, N, d]`, any strides.
        key: `[B, H, S, d]`, or with fewer heads, each for as many queries' heads.
        value: as `key`.
        attention_mask: broadcastable to `[B, H, N, S]`, or longer than S: True where a key counts, else added to the
            scores.
        scaling: of the scores; default `d ** -0.5`.
        dropout: of the probabilities. The kernel has none, so that torch computes it.
        is_causal: no query sees a later key; a mask says so by itself.
        position_bias: added to the scores, whatever the mask is.
        output_attentions: compute and return the probabilities.

    Returns:
        `([B, N, H, d], probabilities [B, H, N, S] or None)`.

    Raises:
        ValueError: the model asks for something that the kernel does not compute.
    """
    for name in ("softcap", "s_aux", "cache", "head_mask"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attn_implementation={NAME!r} takes no {name}; expected one of Transformers' own")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    n, s = query.shape[2], key.shape[2]
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    bias = None
    if attention_mask is not None:
        # made for a cache that has room for more keys
        bias = _bias(attention_mask[..., :s], query.dtype)
    elif n > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        bias = torch.full((n, s), float("-inf"), dtype=query.dtype, device=query.device).triu(1)
    if position_bias is not None:
        position_bias = position_bias.to(query.dtype)
        bias = position_bias if bias is None else bias + position_bias
    if output_attentions or _captured():
        return _explicit(query, key, value, bias, scale, dropout)
    if dropout:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=scale)
        return out.transpose(1, 2).contiguous(), None
    return kernels.attention(query, key, value, scale, bias).transpose(1, 2), None


def _captured() -> bool:
    """Whether a forward is under way that captures probabilities: SigLIP's attention is not told of the argument."""
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:
        # version 4
        return False
    # a compiler cannot follow a context variable
    collected = _active_collector.global_var if torch.compiler.is_compiling() else _active_collector.get()
    return collected is not None and any(key.endswith("attentions") for key in collected)


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as something to add: 0 where it is True and -inf elsewhere."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def _explicit(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """Attention by way of its probabilities, in the order and precision of Transformers' eager attention."""
    scores = query @ key.mT * scale
    if bias is not None:
        scores = scores + bias
    probabilities = scores.softmax(-1, dtype=torch.float32)
    if bias is not None:
        # a query that sees no key: zeros, as in the kernel
        probabilities = probabilities.masked_fill(scores.amax(-1, keepdim=True) == float("-inf"), 0.0)
    probabilities = F.dropout(probabilities.to(query.dtype), dropout)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


def _timm() -> None:
    # once imported, its names are there
    importlib.import_module(".timm_models", __package__)


_REGISTER = {"transformers": _transformers, "timm": _timm}
