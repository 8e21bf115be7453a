"""What libraries do that a swap can lose without an error, and where each is held.

The list is that of the libraries' own sources and issue threads. A trap that has no test says why it is none here.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

# the trap, and the tests that hold it (file::function), or a sentence why there is nothing to hold
TRAPS: dict[int, tuple[str, list[str] | str]] = {
    1: (
        "Transformers captures outputs of modules that are instances of its classes: another class gives empty tuples",
        [
            "vitfast/test_adapter_transformers.py::test_captured_outputs_stay_and_blocks_stay_fused",
            "vitfast/test_adapter_transformers.py::test_swin_outputs",
        ],
    ),
    2: (
        "an attention registered with Transformers without a mask function gets no mask",
        [
            "vitfast/test_register.py::test_masks_of_every_form",
            "vitfast/test_register.py::test_both_towers_with_causal_and_padding_masks",
        ],
    ),
    3: (
        "models made from one config share its attention implementation",
        ["vitfast/test_register.py::test_models_of_one_config_share_the_implementation"],
    ),
    4: (
        "module names differ between Transformers 4 and 5, so classes are known by what they do",
        [
            "vitfast/test_adapter_transformers.py::test_copies_are_known_by_what_they_do",
            "vitfast/test_adapter_transformers.py::test_every_prototype_of_this_version_is_known",
            "vitfast/test_adapter_transformers.py::test_changed_layers_are_left_alone",
        ],
    ),
    5: (
        "timm reads whether attention is fused when a module is made, so each has its own flag",
        ["vitfast/test_adapter_timm.py::test_outputs_and_gradients_without_fused_attention"],
    ),
    6: (
        "timm's blocks and attentions take attn_mask and is_causal",
        [
            "vitfast/test_adapter_timm.py::test_masks",
            "vitfast/test_adapter_timm.py::test_eva_masks",
            "vitfast/test_adapter_transformers.py::test_attention_mask",
        ],
    ),
    7: (
        "fc_norm or norm, norm_pre, no_embed_class, and how many tokens stand in front",
        ["vitfast/test_adapter_timm.py::test_outputs_and_gradients", "vitfast/test_adapter_timm.py::test_distilled"],
    ),
    8: (
        "an eps of 1e-12 is zero in fp16",
        ["kernels/test_layer_norm.py::test_numbers", "kernels/test_layer_norm.py::test_constant_rows"],
    ),
    9: (
        "GELU by erf, by tanh and by a sigmoid are three functions",
        [
            "kernels/test_linear.py::test_gelu_in_16_bits_is_right_to_half_an_ulp",
            "vitfast/test_adapter_timm.py::test_outputs_and_gradients",
            "vitfast/test_adapter_transformers.py::test_outputs_and_gradients",
        ],
    ),
    10: (
        "head dims that are no power of two: tiles are padded, the scale is that of the true one",
        ["kernels/test_attention.py::test_numbers", "kernels/test_attention.py::test_head_dims_are_covered"],
    ),
    11: (
        "queries, keys and values are strided views",
        ["kernels/test_attention.py::test_numbers", "kernels/test_attention.py::test_heads_merge_without_a_copy"],
    ),
    12: ("fp8 products want sizes that 16 divides", "there is no fp8 policy yet, and accelerate refuses the name"),
    13: (
        "BEiT: no bias of the keys, three rows behind the table; Swin: a mask for shifted windows",
        [
            "kernels/test_attention.py::test_relative_index_is_the_libraries_own",
            "kernels/test_attention.py::test_relative_attention_is_timm_s",
            "vitfast/test_adapter_timm.py::test_beit",
            "vitfast/test_adapter_transformers.py::test_swin",
        ],
    ),
    14: (
        "LayerScale folded into weights has to be unfolded when they are saved",
        "nothing is folded into weights: LayerScale is a factor in the GEMM's epilogue, the state dict stays as it is",
    ),
    15: (
        "DropPath: DINOv2 leaves out part of the batch, timm scales each image; the same random numbers are drawn",
        [
            "vitfast/test_adapter_timm.py::test_dropout_draws_the_same_random_numbers",
            "vitfast/test_adapter_transformers.py::test_training",
        ],
    ),
    16: (
        "autocast: LayerNorm's output is fp32, and GEMMs are in autocast's dtype",
        ["vitfast/test_accelerate.py::test_autocast", "kernels/test_layer_norm.py::test_autocast_is_torch_s"],
    ),
    17: (
        "a CUDA graph's outputs are overwritten by its next run; regions compiled alone and graph trees do not compose",
        [
            "vitfast/test_graphs.py::test_outputs_are_the_callers",
            "vitfast/test_graphs.py::test_composes_with_compile",
            "vitfast/test_compile.py::test_blocks_by_themselves",
        ],
    ),
    18: (
        "wrappers' prefixes in state dicts; DDP and FSDP; copies, averages and pickles of changed modules",
        [
            "vitfast/test_accelerate.py::test_compile_true_and_restore",
            "vitfast/test_accelerate.py::test_distributed_data_parallel",
            "vitfast/test_accelerate.py::test_fully_sharded",
            "vitfast/test_accelerate.py::test_averaged_models",
            "vitfast/test_accelerate.py::test_loaded_in_a_fresh_process",
            "vitfast/test_adapter_transformers.py::test_pickle_and_deepcopy",
        ],
    ),
    19: (
        "exporters need operators that they know",
        ["vitfast/test_accelerate.py::test_export_keeps_the_ops", "vitfast/test_compile.py::test_aot_inductor_package"],
    ),
    20: (
        "libraries that import each other, and fail where versions do not fit",
        [
            "test_packaging.py::test_import_needs_no_optional_library_and_is_silent",
            "test_packaging.py::test_import_takes_no_optional_library_that_is_there",
        ],
    ),
    21: (
        "inference tensors have no versions; switching between eval and train compiles again",
        [
            "vitfast/test_accelerate.py::test_inference_mode_and_no_grad",
            "vitfast/test_accelerate.py::test_compiled_train_and_eval_switch",
        ],
    ),
    22: (
        "pixels in channels_last memory",
        ["kernels/test_patch_embed.py::test_numbers"],
    ),
    23: (
        "times without synchronisation, of the first call, against fp32 in eager mode",
        [
            "vitfast/test_clock.py::test_candidates_take_turns_and_inputs_rotate",
            "benchmarks/test_run.py::test_a_wrong_kernel_is_refused",
        ],
    ),
    24: (
        "DINOv2's blocks in chunks; timm adds the class token's position to the token when it converts them",
        ["vitfast/test_weights.py::test_a_file_gives_timms_numbers"],
    ),
    25: (
        "timm drops pre_logits; a distilled model averages its two heads",
        [
            "vitfast/test_adapter_timm.py::test_distilled",
            "vitfast/test_adapter_transformers.py::test_outputs_and_gradients",
        ],
    ),
    26: (
        "another grid of as many patches has to be resampled too",
        [
            "vitfast/test_adapter_timm.py::test_dynamic_image_size",
            "vitfast/test_weights.py::test_every_position_variant_moves_to_another_grid",
        ],
    ),
}


def test_the_list_is_whole() -> None:
    assert list(TRAPS) == list(range(1, 27))


@pytest.mark.parametrize("number", TRAPS)
def test_each_trap_has_a_test_or_a_reason(number: int) -> None:
    trap, held = TRAPS[number]
    assert trap
    if isinstance(held, str):
        assert len(held.split()) > 5
        return
    assert held
    for name in held:
        file, _, function = name.partition("::")
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name
