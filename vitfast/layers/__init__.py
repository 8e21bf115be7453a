"""Fused layers: `forward` only, no state of their own. Adapters put them in front of the classes that they replace.

`base` has the plan that each layer makes once and a watch renews, `guards` and `known` what it is made from.
"""

from .. import kernels as kernels
from .attention import AttentionPlan, FusedAttention, FusedSplitAttention, joined
from .base import KINDS, FusedLayer, FusedLayerNorm, Plan, original_of, own_forwards
from .block import BlockPlan, FusedBlock
from .guards import (
    IDENTITY,
    add_residual,
    alias,
    call_leaf,
    compute_linear,
    derive_anywhere,
    deriving,
    foreign,
    hooked,
    is_linear,
    is_plain,
    linear,
    overridden,
    own_forward,
    plain,
    symbolic,
    takes,
    view_as,
)
from .known import epilogue, inactive, rate_of, scale_of
from .mlp import FusedMlp, MlpPlan
from .model import FusedModel, FusedStemModel
from .patch_embed import FusedPatchEmbed, for_dropout
from .tables import by_columns, cosine_scales, kept, position_table, why_uncut, windows_pay

__all__ = [
    "IDENTITY",
    "KINDS",
    "AttentionPlan",
    "BlockPlan",
    "FusedAttention",
    "FusedBlock",
    "FusedLayer",
    "FusedLayerNorm",
    "FusedMlp",
    "FusedModel",
    "FusedPatchEmbed",
    "FusedSplitAttention",
    "FusedStemModel",
    "MlpPlan",
    "Plan",
    "add_residual",
    "alias",
    "by_columns",
    "call_leaf",
    "compute_linear",
    "cosine_scales",
    "derive_anywhere",
    "deriving",
    "epilogue",
    "for_dropout",
    "foreign",
    "hooked",
    "inactive",
    "is_linear",
    "is_plain",
    "joined",
    "kept",
    "linear",
    "original_of",
    "own_forwards",
    "overridden",
    "own_forward",
    "plain",
    "position_table",
    "rate_of",
    "scale_of",
    "symbolic",
    "takes",
    "view_as",
    "why_uncut",
    "windows_pay",
]
