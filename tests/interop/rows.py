"""What other people have, a row each, and the tests that say what becomes of it.

  python -m tests.interop.rows    # prints the files of these tests, a line each

A test is named "FILE::NAME" or "FILE::NAME[CASE]" below `tests`, where * is anything. No outcome is
written here: `tests.interop.table` writes those of a run to docs/interop.json. A row that names no
test has not been tried.
"""

import re

# The tests that say what becomes of it.
Row = tuple[str, ...]


class Refused(tuple):
  """Tests of which each sees something refused."""

  def __new__(cls, *tests: str) -> "Refused":
    return super().__new__(cls, tests)


def case(*names: str) -> Row:
  """All laws of a model in `tests/third_party.py`."""
  return tuple(f"third_party_test.py::*[{name}]" for name in names)


FACTORY = "training/factory_test.py::test_{}"
NNX = "nnx_test.py::test_{}"
FAMILY = "parity/decoder_families_test.py::test_*[{}*]"
ENCODER = "parity/encoders_test.py::test_*[{}-*]"
PEFT = "parity/peft_test.py::test_{}"

ROWS: dict[str, dict[str, Row]] = {
  "Linen models of others": {
    "linen's own layers: Dense, DenseGeneral, Einsum, Embed, attention": (
      "linen_test.py::test_the_bridge_*",
    ),
    "DeepMind's gemma blocks": case("gemma"),
    "big_vision's gemma: scan of remat, a table looked up by index": case("gemma, scan of remat"),
    "big_vision's ViT, scanned or not": case("ViT", "ViT, scan"),
    "t5x's T5: flat kernels with named axes": case("t5x"),
    "t5x's scalable T5: the same, scanned": case("scalable t5x"),
    "flax's lm1b example: boxes on kernels and biases": case("lm1b"),
    "flax's wmt example: encoder, decoder, one table": case("wmt"),
    "a UNet of a diffusion model": case("UNet"),
    "flax's ResNet: convolutions in groups, running means, train=False": case("convolutions"),
    "experts by nn.vmap": case("vmapped experts"),
    "OptimizedLSTMCell": case("OptimizedLSTMCell"),
    "LSTMCell, GRUCell, a module called twice, remat": case("shared, remat, cells"),
    "a subclass of nn.Dense": case("subclass of Dense"),
    "dot_general, precision and promote_dtype of one's own": case("own products"),
    "nn.WeightNorm, nn.SpectralNorm": (
      "third_party_test.py::test_modules_that_map_over_parameters_get_the_dense_array",
    ),
    "an NNX module by nnx.bridge.to_linen": (
      "third_party_test.py::test_an_nnx_module_that_was_made_linen",
    ),
    '"all-linear" and four bits with convolutions in the model': (
      "third_party_test.py::test_a_convolution_is_adapted_by_name_alone",
      *case("UNet"),
    ),
    "linen's attention in four bits": ("third_party_test.py::test_four_bits_*[ViT*]",),
  },
  "Functions and other libraries": {
    "any function: casts, reshapes, slices, scan, cond, vmap, checkpoint": (
      "core/factored_test.py::test_it_computes_what_the_dense_array_gives_and_builds_none",
    ),
    "stacked experts by ragged_dot, convolutions": (
      "core/factored_test.py::test_other_weights_than_lora",
    ),
    "a custom_vjp of one's own stays in force": (
      "core/factored_test.py::test_a_rule_for_gradients_of_activations_is_kept",
    ),
    "what else is done to a weight is done to its dense array, and named": (
      "core/factored_test.py::test_all_else_is_done_to_the_dense_array_and_named",
    ),
    "Equinox: MLP, attention, GRUCell": ("interop/equinox_test.py::*",),
  },
  "NNX": {
    "attention, Einsum, Embed, BatchNorm, raw parameters, each method": (
      NNX.format("it_computes_what_the_merged_model_does[*toy*]"),
      NNX.format("no_equation_has_the_shape_of_a_weight[*toy*]"),
    ),
    "nnx.scan of remat over layers by nnx.vmap": (
      NNX.format("it_computes_what_the_merged_model_does[*scanned*]"),
      NNX.format("no_equation_has_the_shape_of_a_weight[*scanned*]"),
    ),
    "nnx.jit, DiffState, nnx.Optimizer; the base bit-equal": (
      NNX.format("nnx_trains_what_is_trained_and_nothing_else"),
    ),
    "Orbax: all of a model, or its base before and after": (NNX.format("checkpoints"),),
    "one adapter in place of another": (
      NNX.format("two_adapters_take_each_others_place_without_tracing_again"),
    ),
    "NF4 base, read array by array": (
      NNX.format("a_quantised_base"),
      NNX.format("a_quantised_attention"),
      NNX.format("a_model_is_read_and_quantised_array_by_array"),
    ),
    "dropout of adapters, layer by layer in a scan": (NNX.format("dropout_*"),),
    "VeRA's pair, once for all modules": (NNX.format("vera_has_its_pair_once"),),
    "AdaLoRA by the optimizer of its own": (
      NNX.format("the_optimizer_of_a_method_does_what_it_does_to_a_tree"),
    ),
    "AdaLoRA by another optimizer": Refused(
      NNX.format("adalora_is_trained_by_its_own_optimizer_alone")
    ),
    "a pure function and a plain tree": (
      NNX.format("a_split_model_is_a_pure_function_of_its_parameters"),
    ),
    "attach of linen given the model or its state": Refused(
      NNX.format("bad_input_is_refused_in_a_sentence[the tree's way*]")
    ),
    "a Weight put into an nnx.Param by hand": Refused(
      NNX.format("bad_input_is_refused_in_a_sentence[a weight in a parameter]")
    ),
    "no nnx.Param": Refused(NNX.format("bad_input_is_refused_in_a_sentence[no parameter]")),
    "a parameter in an nnx.List": Refused(
      NNX.format("bad_input_is_refused_in_a_sentence[in a list]")
    ),
    "a raw array in a list": Refused(
      NNX.format("bad_input_is_refused_in_a_sentence[an array in a list]")
    ),
    "a parameter of two modules": Refused(NNX.format("bad_input_is_refused_in_a_sentence[tied]")),
    "bottleneck adapters": Refused(NNX.format("bad_input_is_refused_in_a_sentence[adapters]")),
    "prefixes": Refused(NNX.format("bad_input_is_refused_in_a_sentence[prefix]")),
    "Tunix's Qwen3 by its PeftTrainer": (
      "interop/tunix_test.py::*[qwen3-lora]",
      "interop/tunix_test.py::*[qwen3]",
      "interop/tunix_test.py::*[qwen3, tied, remat*]",
    ),
    "Tunix's Qwen3-MoE, its experts raw parameters": ("interop/tunix_test.py::*[qwen3-moe*]",),
    "QLoRA on Tunix's Qwen3, resumed from its checkpoint": (
      "interop/tunix_test.py::test_qlora_goes_on_from_a_checkpoint_of_tunix",
    ),
    "bonsai, jimm": (),
  },
  "experiments.train on a model by import path": {
    "linen classifier: train, resume to the bit, predict": (
      FACTORY.format("*[classifier]"),
      FACTORY.format("a_factory_that_makes_another_model_is_refused"),
    ),
    "NNX classifier: train, resume to the bit, predict": (FACTORY.format("*[nnx_classifier]"),),
    "linen and NNX language models, in four bits too": (FACTORY.format("*[*decoder*]"),),
    "outputs of another shape, writes to its variables": Refused(
      FACTORY.format("what_does_not_fit_the_task_is_refused")
    ),
    "no such function, no model": Refused(FACTORY.format("what_makes_no_model_is_refused")),
    "PEFT files of such a model": Refused(
      FACTORY.format("peft_files_hold_no_adapter_of_such_a_model")
    ),
  },
  "Families, against transformers": {
    "bert, roberta": ("parity/transformers_test.py::test_tiny_random_models",),
    "bert, roberta for tokens": (ENCODER.format("bert"), ENCODER.format("roberta")),
    "xlm-roberta, camembert": (ENCODER.format("xlm-roberta"), ENCODER.format("camembert")),
    "electra": (ENCODER.format("electra"),),
    "distilbert": (ENCODER.format("distilbert"),),
    "deberta-v2 and v3": (
      ENCODER.format("deberta-v2"),
      "parity/encoders_test.py::test_rows_of_relative_positions",
    ),
    "llama, mistral, qwen2, gpt2": ("parity/decoders_test.py::test_tiny_random_models",),
    "qwen3": (FAMILY.format("qwen3"),),
    "gemma2": (FAMILY.format("gemma2"),),
    "gemma3 (text)": (FAMILY.format("gemma3"),),
    "phi3": (FAMILY.format("phi3"),),
    "decoders that classify texts": (
      "parity/decoder_families_test.py::test_scores_of_whole_texts",
    ),
    "t5, vit, qwen3_moe, mixtral": (),
    "a token classifier taken for one of texts": Refused(
      "models/heads_test.py::test_a_head_of_another_task_is_not_taken_for_a_classifier"
      "[bert_tiny-BertForTokenClassification]",
    ),
    "granite": Refused(
      "models/hf_config_test.py::test_families_that_look_like_others_are_refused[granite]"
    ),
    "smollm3": Refused(
      "models/hf_config_test.py::test_families_that_look_like_others_are_refused[smollm3]"
    ),
    "NoPE layers": Refused(
      "models/hf_config_test.py::test_what_only_relatives_compute_is_refused[*no_rope_layers*]"
    ),
    "experts in a dense family": Refused(
      "models/hf_config_test.py::test_what_only_relatives_compute_is_refused[*num_experts*]"
    ),
    "logit soft-capping in a family without": Refused(
      "models/hf_config_test.py::test_what_only_relatives_compute_is_refused[*softcapping*]"
    ),
  },
  "Files of Hugging Face PEFT, both ways": {
    "LoRA, rsLoRA, DoRA, IA3, VeRA of encoders, with their heads": (
      PEFT.format("ours_in_peft"),
      PEFT.format("pefts_in_ours"),
      PEFT.format("pefts_ia3_in_ours"),
      PEFT.format("pefts_vera_in_ours_and_back"),
    ),
    "AdaLoRA": (
      "parity/adalora_peft_test.py::test_our_directory_in_peft",
      "parity/adalora_peft_test.py::test_pefts_directory_in_ours",
    ),
    "prefix and prompt": (PEFT.format("virtual_tokens_*"),),
    "decoders: LoRA, DoRA, AdaLoRA, IA3, VeRA, on Conv1D too": (
      "parity/peft_decoders_test.py::test_adapters_of_decoders_both_ways",
    ),
    "LoRA on embed_tokens and lm_head of a decoder": (
      "parity/peft_decoders_test.py::test_adapters_of_decoders_both_ways[*lm_head*]",
      "parity/peft_decoders_test.py::test_adapters_of_decoders_both_ways[*embed_tokens*]",
    ),
    "modules_to_save of a decoder": (
      "parity/peft_decoders_test.py::test_adapters_of_decoders_both_ways",
      "parity/peft_decoders_test.py::test_tables_that_are_saved_unasked_replace_the_bases",
    ),
    "the newer encoders": ("parity/encoders_test.py::test_lora_goes_to_peft_and_comes_back",),
    "LN tuning": ("parity/ln_tuning_test.py::*",),
    "LoHa": ("parity/lycoris_test.py::test_directories_go_both_ways[loha*]",),
    "LoKr": ("parity/lycoris_test.py::test_directories_go_both_ways[lokr*]",),
    "which modules a config names": (
      "parity/peft_targets_test.py::test_the_modules_that_a_config_names_are_pefts",
    ),
    "each field of every config: read, harmless or refused": (
      "parity/peft_targets_test.py::test_every_field_of_peft_is_known_and_no_other",
      "parity/peft_targets_test.py::test_the_defaults_are_pefts",
    ),
    "an unknown field": Refused(
      "hf_peft/files_test.py::test_an_unknown_field_is_refused_with_the_version_it_came_from"
    ),
    "a trained array that the format cannot hold": Refused(
      "hf_peft/directories_test.py::test_what_the_format_cannot_say_is_not_saved[*bias*]"
    ),
    "OFT, BOFT, FourierFT, P-tuning": Refused(
      *(
        "hf_peft/files_test.py::test_a_config_whose_field_is_not_what_it_must_be_is_refused"
        f"[peft_type='{kind}']"
        for kind in ("OFT", "BOFT", "FOURIERFT", "P_TUNING")
      )
    ),
  },
  "Leaving and combining": {
    "a merged or dequantised model for transformers": (
      "parity/export_test.py::test_logits_of_what_is_written",
    ),
    "in other dtypes, sharded, by pipelines": (
      "parity/export_test.py::test_dtypes",
      "parity/export_test.py::test_a_pipeline_of_transformers_takes_the_directory",
    ),
    "GGUF in and out": ("parity/export_test.py::test_a_gguf_*",),
    "any adapter as LoRA, with what that loses": (
      "experiments/convert_command_test.py::test_an_adapter_becomes_lora_with_its_errors",
    ),
    "combine_adapters as peft's add_weighted_adapter": ("parity/combine_test.py::*",),
    "rows of one batch with different adapters": ("methods/stack_test.py::test_each_row_*",),
    "no array of the base has rows": ("methods/stack_test.py::test_no_array_of_a_base_has_rows",),
    "the same in cached generation": ("methods/stack_test.py::test_generation_with_a_cache",),
    "a name on the hub, from its cache": ("io/hub_test.py::test_a_model_is_loaded_by_its_name",),
    "a name on the hub, offline": Refused(
      "io/hub_test.py::test_what_is_nowhere_says_what_to_put_where"
    ),
  },
  "Mistakes in notebooks": {
    "fine-tuning one's own texts in a call": (
      "training/fit_test.py::test_the_numbers_are_those_of_a_run",
      "training/fit_test.py::test_a_module_of_ones_own_takes_arrays",
      "training/fit_test.py::test_a_module_of_nnx_takes_arrays",
    ),
    "a scanned model without a layout": (
      "core/layout_test.py::test_scanned_models_need_no_layout",
    ),
    '{"params": ...} given to attach': Refused(
      "core/given_test.py::test_what_are_no_parameters[attach-*]"
    ),
    "partition forgotten: an optimizer of the whole tree": Refused(
      "core/given_test.py::test_an_optimizer_of_the_whole_tree_is_refused"
    ),
    "combine forgotten": Refused("core/given_test.py::test_a_half_is_not_applied"),
    "pj.apply forgotten: a warning": (
      "core/given_test.py::test_apply_of_flax_warns_once_and_ours_never",
    ),
    "tensors of torch": Refused("core/given_test.py::test_inputs_of_others[x0-*]"),
    "train=True without a key": Refused("core/given_test.py::test_training_without_a_key"),
    "frozen weights closed over: a warning": (
      "core/given_test.py::test_parameters_that_a_jitted_function_closes_over",
    ),
    "ids beyond the table": Refused("core/given_test.py::test_ids_that_are_none"),
  },
}


def names(row: Row, nodeid: str) -> bool:
  """Whether a row names the test of that id."""
  return any(
    re.fullmatch(re.escape(test).replace(r"\*", ".*") + r"(\[.*\])?", nodeid.partition("/")[2])
    for test in row
  )


def every() -> list[Row]:
  return [row for section in ROWS.values() for row in section.values()]


if __name__ == "__main__":
  print(*sorted({f"tests/{test.partition('::')[0]}" for row in every() for test in row}), sep="\n")
