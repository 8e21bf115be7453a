"""vitfast's kernels: one file per op, each a `torch.library` operator.

Every name here is a plain function of tensors. On CUDA it launches a Triton kernel, on CPU it runs the same
function in torch's own calls (or the Triton kernel itself when `TRITON_INTERPRET=1` was set before import).
"""

if __name__ == "vitfast.kernels":
    from ._op import INTERPRET, by_reference, fp32_products, interprets, together
    from .activation import ACTIVATIONS
    from .attention import (
        MAX_HEAD_DIM,
        attention,
        attention_lse,
        attention_lse_ref,
        attention_qkv,
        attention_ref,
    )
    from .layer_norm import MAX_WIDTH, add_layer_norm, add_layer_norm_ref, layer_norm, layer_norm_ref
    from .linear import linear, linear_ref
    from .mlp import mlp, mlp_ref
    from .norm_linear import (
        Folded,
        fold,
        linear_stats,
        linear_stats_ref,
        norm_linear,
        norm_linear_ref,
        row_stats,
        row_stats_ref,
    )
    from .patch_embed import patch_embed, patch_embed_ref
    from .relative_attention import relative_attention, relative_attention_ref
    from .window_attention import window_attention, window_attention_ref
else:
    # with the repository root on `sys.path` a bare `import kernels` finds this folder, whose name belongs to another
    # PyPI package. Libraries probe for that one without a `try`; a module without file and version counts as absent
    globals().update(__file__=None, __path__=[])

__all__ = [
    "ACTIVATIONS",
    "INTERPRET",
    "MAX_HEAD_DIM",
    "MAX_WIDTH",
    "add_layer_norm",
    "add_layer_norm_ref",
    "attention",
    "attention_lse",
    "attention_lse_ref",
    "attention_qkv",
    "attention_ref",
    "Folded",
    "by_reference",
    "fold",
    "fp32_products",
    "interprets",
    "layer_norm",
    "layer_norm_ref",
    "linear",
    "linear_ref",
    "linear_stats",
    "linear_stats_ref",
    "mlp",
    "mlp_ref",
    "norm_linear",
    "norm_linear_ref",
    "patch_embed",
    "patch_embed_ref",
    "relative_attention",
    "relative_attention_ref",
    "row_stats",
    "row_stats_ref",
    "together",
    "window_attention",
    "window_attention_ref",
]
