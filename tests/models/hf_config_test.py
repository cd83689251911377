"""config.json: defaults by model type, other spellings, and damage of every kind."""

import json
from pathlib import Path

import numpy as np
import pytest

from peftjax.models import configuration, families, hf_config

GOLDEN = Path(__file__).parents[1] / "golden"
DEFAULTS = json.loads((GOLDEN / "hf_defaults.json").read_text())
# What transformers works out and we have under another name.
RESOLVED = {
  "num_key_value_heads": lambda said: said.kv_heads,
  "head_dim": lambda said: None if said.model_type == "mixtral" else said.head_size,
  "sliding_window": lambda said: said.window,
  "rope_parameters": lambda said: rotary(said),
  "rope_scaling": lambda said: rotary(said),
  "layer_types": lambda said: said.types,
  "mlp_only_layers": lambda said: said.mlp_only_layers or [],
  "pooler_hidden_size": lambda said: said.pooler_hidden_size or said.hidden_size,
  "num_decoder_layers": lambda said: said.num_decoder_layers or said.num_layers,
  "dense_act_fn": lambda said: said.activation,
  "is_gated_act": lambda said: said.gated,
  "scale_decoder_outputs": lambda said: said.scales,
  "tie_word_embeddings": lambda said: said.tie_word_embeddings is not False,
}


def rotary(said):
  named = lambda theta, items: {"rope_theta": theta, **items}
  if said.model_type != "gemma3_text":
    return named(*said.rope())
  return {"sliding_attention": named(*said.window_rope()), "full_attention": named(*said.rope())}


@pytest.mark.parametrize("kind", hf_config.SCHEMAS)
def test_defaults_are_those_of_the_model_type(kind):
  """Field by field what transformers has: `tests/golden/make_hf_defaults.py`."""
  said = hf_config.read({"model_type": kind})
  assert len(DEFAULTS[kind]) > 10
  for field, want in DEFAULTS[kind].items():
    assert RESOLVED.get(field, lambda s, f=field: getattr(s, f))(said) == want, field


def config(name):
  return json.loads((GOLDEN / name / "config.json").read_text())


DAMAGE = ["64", -1, None, True, [1], {"a": 1}, 2**31, 10**400, 1.5, float("nan"), float("inf"), ""]
OPTIONAL = """architectures classifier_dropout eos_token_id id2label pad_token_id head_dim
layer_types mlp_only_layers num_key_value_heads rope_parameters sliding_window n_inner
attention_dropout
attn_logit_softcapping final_logit_softcapping use_bidirectional_attention num_decoder_layers
dense_act_fn is_gated_act scale_decoder_outputs""".split()

_UNTYPED = "tie_word_embeddings", "t5_tiny"  # transformers asks whether it is false


@pytest.mark.parametrize(
  "name",
  """bert_tiny roberta_tiny llama3_tiny mistral_tiny qwen2_tiny qwen3_tiny gemma2_tiny gemma3_tiny
  phi3_tiny qwen3_moe_tiny mixtral_tiny gpt2_tiny image_vit t5_tiny""".split(),
)
def test_damage_is_one_sentence_with_file_field_and_value(name):
  """Every field that is read, with values of every wrong kind; what is left is harmless."""
  whole = config(name)
  schema = hf_config.SCHEMAS[whole["model_type"]]
  accepted = set()
  for field in set(whole) & set(schema.__dataclass_fields__) - {"model_type"}:
    for value in DAMAGE:
      try:
        said = hf_config.read({**whole, field: value}, "F/config.json")
        if "rope" in field:
          said.rope("F/config.json")
        accepted.add((field, repr(value)))
      except ValueError as error:
        told = str(error)
        assert told.startswith("F/config.json: ") and len(told) < 450
        assert field in told or "must divide" in told or "head_size" in told or "pad_token" in told
  rest = {
    (field, value)
    for field, value in accepted
    if not (value == "None" and (field in OPTIONAL or (field, name) == _UNTYPED))
    and not field.endswith("_token_id")  # whole numbers, held against the tables
    and not (field.endswith("softcapping") and value in ("1.5", "2147483648"))
    and value != "True"  # where it is true or false
  }
  assert not rest


@pytest.mark.parametrize(
  "name, change, message",
  [
    ("bert_tiny", {"num_attention_heads": 5}, "num_attention_heads is 5; it must divide hidden_si"),
    ("bert_tiny", {"hidden_dropout_prob": 1.0}, "prob is 1.0; it must be a number < 1"),
    ("bert_tiny", {"id2label": 2}, "id2label is 2; it must be an object"),
    ("bert_tiny", {"tie_word_embeddings": "no"}, "embeddings is 'no'; it must be true or false"),
    ("bert_tiny", {"pad_token_id": -2}, "pad_token_id is -2; it must be a whole number >= -1"),
    ("llama_tiny", {"eos_token_id": 10**60}, "eos_token_id is 10*; it must be a whole number <"),
    ("bert_tiny", {"id2label": {}}, "id2label is {}; it must give each output"),
    ("bert_tiny", {"id2label": {"x": "y"}}, "id2label is {'x': 'y'}; it must give each output"),
    ("bert_tiny", {"num_labels": 7}, "num_labels is 7; id2label names 3 outputs"),
    ("bert_tiny", {"id2label": None, "num_labels": 2**30}, "num_labels is 1073741824; it must be"),
    ("bert_tiny", {"hidden_act": "mish"}, "hidden_act is 'mish'; it must be one of gelu"),
    ("bert_tiny", {"add_cross_attention": True}, "add_cross_attention is True; only encoders"),
    ("roberta_tiny", {"pad_token_id": None}, "pad_token_id is None; positions start after it"),
    ("roberta_tiny", {"max_position_embeddings": 2}, "pad_token_id is 1; .* from 0 to 0"),
    ("llama_tiny", {"num_key_value_heads": 4}, "num_key_value_heads is 4; it must divide num_atte"),
    ("llama_tiny", {"head_dim": 7}, "head_size is 7; .* even"),
    ("llama_tiny", {"head_dim": 2**30}, "head_dim is 1073741824; it must be a whole number <="),
    ("llama_tiny", {"hidden_size": 6 * 2**20, "head_dim": None}, "most 65536"),
    ("llama_tiny", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; .* it must be 'silu'"),
    ("llama_tiny", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be a number"),
    ("llama_tiny", {"rope_parameters": {"rope_type": "ntk"}}, "rope_type is 'ntk'; it must be"),
    ("llama_tiny", {"rope_parameters": {"rope_type": "linear"}}, "factor is None; rope_type"),
    ("llama_tiny", {"rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2'; it must"),
    ("llama_tiny", {"rope_scaling": {"facter": 2.0}}, "scaling.facter is 2.0; it is unknown"),
    ("llama_tiny", {"partial_rotary_factor": 0.5}, "rotary_factor is 0.5; only whole"),
    (
      "llama3_tiny",
      {"rope_scaling": {**config("llama3_tiny")["rope_parameters"], "high_freq_factor": 1.0}},
      "high_freq_factor is 1.0; it must be above low_freq_factor 1.0",
    ),
    ("qwen2_tiny", {"layer_types": ["full_attention", "sliding_attention"]},
     "use_sliding_window is False; layers of sliding_attention need it"),
    ("qwen3_tiny", {"layer_types": ["full_attention", "chunked_attention"]},
     "layer_types is .*only full_attention and sliding_attention"),
    ("qwen3_moe_tiny", {"mlp_only_layers": [0]}, "mlp_only_layers is .*; layers with experts"),
    ("qwen3_moe_tiny", {"decoder_sparse_step": 2}, "step is 2; layers with .* only 1 is supported"),
    ("qwen3_moe_tiny", {"num_experts_per_tok": 6}, "per_tok is 6; .* at most .* experts, 5"),
    ("qwen3_moe_tiny", {"num_experts": 4}, "num_experts is 4; num_local_experts, .* is 5"),
    ("mixtral_tiny", {"output_router_logits": True}, "logits is True; no loss that balances"),
    ("mixtral_tiny", {"router_jitter_noise": 0.1}, "noise is 0.1; training adds no noise"),
    ("mixtral_tiny", {"sliding_window": 0}, "sliding_window is 0; it must be"),
    ("mistral_tiny", {"num_local_experts": 8}, "experts is 8; models of type mistral are computed"),
    ("gemma2_tiny", {"hidden_activation": "gelu"}, "must be 'gelu_pytorch_tanh'"),
    ("gemma2_tiny", {"use_bidirectional_attention": True}, "attention is True; only decoders"),
    ("gemma2_tiny", {"sliding_window": None}, "sliding_window is None; layers of sliding_att"),
    ("gemma3_tiny", {"attn_logit_softcapping": 5.0}, "softcapping is 5.0; Gemma 3 caps no sc"),
    ("gemma3_tiny", {"rope_parameters": {"rope_type": "default"}}, "type is 'default'; of this mo"),
    ("gemma3_tiny", {"rope_parameters": {"full_attention": 3}}, "full_attention is 3; it must be"),
    ("phi3_tiny", {"rope_parameters": {"type": "longrope", "short_factor": [1.0]}},
     "rope_parameters.rope_type is 'longrope'; it must be one of default"),
    ("phi3_tiny", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "is 'yarn'; of Phi-3 only"),
    ("phi3_tiny", {"rope_parameters": {"partial_rotary_factor": 1.5}}, "factor is 1.5; it must"),
    ("phi3_tiny", {"rope_parameters": {"partial_rotary_factor": 0.4}}, "even number of a head's"),
    ("qwen3_tiny", {"num_hidden_layers": 2**30}, "num_hidden_layers is .*whole number <= 65536"),
    ("qwen2_tiny", {"layer_types": ["full_attention"]}, "layer_types is .*must have num_h"),
    ("gpt2_tiny", {"n_head": 5}, "n_head is 5; it must divide n_embd 48"),
    ("gpt2_tiny", {"hidden_size": 64}, "hidden_size is 64; n_embd, the same thing, is 48"),
    ("gpt2_tiny", {"scale_attn_weights": False}, "scale_attn_weights is False; only true"),
    ("gpt2_tiny", {"model_type": ["gpt2"]}, r"has model_type \['gpt2'\]; supported are bert"),
    ("gpt2_tiny", {"eos_token_id": []}, r"eos_token_id is \[\]; it must name a token"),
  ],
)  # fmt: skip
def test_what_does_not_go_together(name, change, message):
  made = {**config(name), **change}
  with pytest.raises(ValueError, match=message):
    said = hf_config.read(made)
    said.rope()


@pytest.mark.parametrize("kind", "granite smollm3 olmo2 cohere cohere2 gemma gemma3 llama4".split())
def test_families_that_look_like_others_are_refused(kind):
  with pytest.raises(ValueError, match=f"model_type '{kind}'; supported are .*gemma3_text"):
    hf_config.read({**config("llama_tiny"), "model_type": kind})


@pytest.mark.parametrize(
  "name, field, value",
  [
    ("llama_tiny", "attn_logit_softcapping", 50.0),
    ("llama_tiny", "no_rope_layers", [1, 0]),
    ("llama_tiny", "residual_multiplier", 0.22),
    ("mistral_tiny", "num_local_experts", 8),
    ("qwen3_tiny", "num_experts", 128),
    ("phi3_tiny", "final_logit_softcapping", 30.0),
  ],
)
def test_what_only_relatives_compute_is_refused(name, field, value):
  """By the field's name; a value that turns it off is none."""
  with pytest.raises(ValueError, match=f"F: {field} is .*are computed without it: leave it out"):
    hf_config.read({**config(name), field: value}, "F")
  hf_config.read({**config(name), field: None})


@pytest.mark.parametrize(
  "spelled, theta, items",
  [
    ({}, 10_000.0, {"rope_type": "default"}),
    ({"rope_theta": 5e5}, 5e5, {"rope_type": "default"}),
    ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, {"rope_type": "default"}),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, 1e4, {"rope_type": "linear", "factor": 2}),
    (
      {"rope_theta": 7.0, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
      7.0,
      {"rope_type": "linear", "factor": 2.0},
    ),
    (
      {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default", "rope_theta": 9.0}},
      9.0,
      {"rope_type": "default"},
    ),
    (  # what older files have goes first, as in transformers
      {"rope_parameters": {"rope_theta": 9.0}, "rope_scaling": {"type": "linear", "factor": 3.0}},
      1e4,
      {"rope_type": "linear", "factor": 3.0},
    ),
  ],
)
def test_spellings_of_rotary_parameters(spelled, theta, items):
  assert hf_config.read({"model_type": "llama", **spelled}).rope() == (theta, items)


def test_aliases_and_labels():
  names = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
  said = hf_config.read({"model_type": "gpt2", "max_position_embeddings": 32, **names})
  assert (said.n_embd, said.n_layer, said.n_head, said.n_positions) == (48, 2, 4, 32)
  labels = lambda **fields: hf_config.read({"model_type": "bert", **fields}).labels
  assert labels() == 2 and labels(num_labels=5) == 5 and labels(id2label={"0": "a"}) == 1


@pytest.mark.parametrize(
  "kind, fields, ends, pad",
  [
    ("roberta", {}, (2,), 1),
    ("bert", {"eos_token_id": 7}, (7,), 0),
    ("llama", {}, (2,), 0),
    ("llama", {"eos_token_id": [5, 6], "pad_token_id": -1}, (5, 6), 0),
    ("gpt2", {}, (50256,), 0),
    ("mistral", {"pad_token_id": 3}, (2,), 3),
  ],
)
def test_special_ids_of_a_directory(kind, fields, ends, pad, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **fields}))
  assert configuration.end_ids(tmp_path) == ends and configuration.pad_id(tmp_path) == pad


def test_a_text_needs_an_end(tmp_path):
  for fields, message in (
    ({}, "config.json names no eos_token_id"),
    ({"eos_token_id": None}, "names no eos_token_id"),
    (
      {"eos_token_id": [5, 2**31 - 1]},
      "eos_token_id names 2147483647, and the model has the tokens 0 to",
    ),
    ({"eos_token_id": [5, 10**400]}, "eos_token_id"),
    ({"eos_token_id": -1}, "eos_token_id is -1; it must be a whole number >= 0"),
  ):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", **fields}))
    with pytest.raises(ValueError, match=message):
      configuration.end_ids(tmp_path)


def test_mistrals_window_and_heads_are_its_own():
  made = families.FAMILIES["mistral"].CONFIG.from_hf({"model_type": "mistral"})
  assert (made.window, made.kv_heads, made.heads, made.ffn) == (4096, 8, 32, 14336)
  assert np.isclose(made.frequencies()[0][0], 1.0)
