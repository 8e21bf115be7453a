"""What looks like attention, an MLP, a block or a patch embedding, for a report that leaves none of them out."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

_NAMES = {
    "attention": re.compile(r".*(Attention|Attn)(V\d|\d[dD])?|Attention.*"),
    "mlp": re.compile(r".*(Mlp|MLP|FeedForward|FFN|SwiGLU|Intermediate).*"),
    "block": re.compile(r".*(Block|Layer)(V\d|PostNorm)?"),
    "patch_embed": re.compile(r".*Patch(ify|Embed|Embedding|Embeddings|Embedder|Encoder)(\w\d|\dd|\dD)?"),
}


def alike(module: nn.Module) -> str | None:
    """The kind of replacement that a module looks as if it were for, by its class's name and what it holds."""
    kind = type(module)
    if kind.__module__.startswith("torch.nn."):
        # containers, and what is offered for by itself
        return None
    children = dict(module.named_modules())
    shapes = [parameter.dim() for name, parameter in module.named_parameters() if name.endswith("weight")]
    matrices = shapes.count(2)
    if matrices >= 2 and (_NAMES["attention"].fullmatch(kind.__name__) or {"qkv", "proj"} <= children.keys()):
        return "attention"
    if matrices >= (1 if "Intermediate" in kind.__name__ else 2) and _NAMES["mlp"].fullmatch(kind.__name__):
        return "mlp"
    if _NAMES["block"].fullmatch(kind.__name__):
        inside = [type(child).__name__ for child in children.values() if child is not module]
        holds = (any(_NAMES[what].fullmatch(name) for name in inside) for what in ("attention", "mlp"))
        return "block" if all(holds) else None
    if any(dim > 3 for dim in shapes) and _NAMES["patch_embed"].fullmatch(kind.__name__):
        return "patch_embed"
    return None


def innermost(kinds: Mapping[str, str], taken: Mapping[str, str]) -> dict[str, str]:
    """Of modules that look like something those that hold no other such, by name.

    Args:
        kinds: what each looks like, by its name in the model.
        taken: kinds of the modules that are replaced, or are known and left alone, by name.
    """
    places = [*kinds.items(), *taken.items()]

    def inside(name: str, place: str) -> bool:
        return place != name and place.startswith(f"{name}." if name else "")

    return {
        name: kind
        for name, kind in kinds.items()
        if not any(other == kind and inside(name, place) for place, other in places)
    }
