"""Families of decoders equal transformers': random shapes, windows, generation."""

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification

import peftjax as pj
from peftjax import hf_peft
from tests.golden.make_decoders import batch, draw, make, run

pytestmark = pytest.mark.parity


def _shape(width, heads, kv_heads, head_dim, ffn, layers=4, **fields):
  return {
    "vocab_size": 96,
    "hidden_size": width,
    "num_hidden_layers": layers,
    "num_attention_heads": heads,
    "num_key_value_heads": kv_heads,
    **({"head_dim": head_dim} if head_dim else {}),
    "intermediate_size": ffn,
    "max_position_embeddings": 64,
    **fields,
  }


_WINDOWS = {"use_sliding_window": True, "sliding_window": 4}


def _experts(width, count, routed):
  return {"moe_intermediate_size": width, "num_experts": count, "num_experts_per_tok": routed}


_TIED = {"tie_word_embeddings": True}
_GEMMA = {"sliding_window": 5, "query_pre_attn_scalar": 7, "final_logit_softcapping": 4.0}
_THETAS = {"rope_theta": 900.0, "rope_local_base_freq": 40.0}
_PAD = {"pad_token_id": 0}
CASES = {
  "qwen3": ("qwen3", _shape(40, 6, 2, 10, 72, **_TIED)),
  "qwen3 biases": ("qwen3", _shape(32, 4, 4, 8, 48, attention_bias=True)),
  "qwen3 windows": ("qwen3", _shape(24, 4, 1, 12, 40, 5, **_WINDOWS, max_window_layers=2)),
  "qwen3 all windows": ("qwen3", _shape(24, 4, 2, 4, 40, **_WINDOWS, max_window_layers=0)),
  "phi3": ("phi3", _shape(40, 4, 2, None, 72, **_PAD, sliding_window=4)),
  "phi3 part of a head": (
    "phi3",
    _shape(48, 4, 1, None, 40, 5, **_PAD, partial_rotary_factor=0.5, rope_theta=90.0, **_TIED),
  ),
  "phi3 wide heads": ("phi3", _shape(24, 4, 4, 10, 40, **_PAD, partial_rotary_factor=0.8)),
  "gemma2": ("gemma2", _shape(40, 4, 2, 12, 72, 5, **_GEMMA, attn_logit_softcapping=3.0)),
  "gemma2 untied": (
    "gemma2",
    _shape(24, 6, 1, 8, 40, tie_word_embeddings=False, sliding_window=4, attention_bias=True),
  ),
  "gemma2 uncapped": (
    "gemma2",
    _shape(
      *(32, 4, 4, 6, 40, 4),
      **{**_GEMMA, "final_logit_softcapping": None, "attn_logit_softcapping": None},
      layer_types=["full_attention"] * 4,
    ),
  ),
  "gemma3": ("gemma3_text", _shape(40, 4, 2, 12, 72, 7, **_GEMMA, **_THETAS)),
  "gemma3 pattern": (
    "gemma3_text",
    _shape(
      *(24, 4, 1, 10, 40, 5),
      sliding_window=4,
      sliding_window_pattern=2,
      rope_scaling={"rope_type": "linear", "factor": 3.0},
      tie_word_embeddings=False,
    ),
  ),
  "gemma3 all windows": ("gemma3_text", _shape(24, 4, 4, 8, 40, **_GEMMA, **_THETAS)),
  "gemma3 no windows": (
    "gemma3_text",
    _shape(24, 4, 2, 8, 40, **_THETAS, layer_types=["full_attention"] * 4),
  ),
  "qwen3_moe": ("qwen3_moe", _shape(40, 6, 2, 10, 72, **_experts(24, 8, 3), norm_topk_prob=True)),
  "qwen3_moe unnormalised": (
    "qwen3_moe",
    _shape(24, 4, 1, 12, 40, 5, **_experts(40, 5, 2), attention_bias=True, **_TIED),
  ),
  "qwen3_moe windows": ("qwen3_moe", _shape(24, 4, 2, 4, 40, **_experts(20, 3, 3), **_WINDOWS)),
  "mixtral": ("mixtral", _shape(40, 4, 2, None, 72, num_local_experts=8)),
  "mixtral windows": (
    "mixtral",
    _shape(24, 4, 1, 10, 40, 5, num_local_experts=3, num_experts_per_tok=1, sliding_window=4),
  ),
  "qwen2 windows": ("qwen2", _shape(24, 4, 2, 6, 40, 5, **_WINDOWS, max_window_layers=3)),
}


def theirs_and_files(name, path):
  theirs = make(*CASES[name], seed=list(CASES).index(name)).eval()
  theirs.save_pretrained(path)
  theirs.set_attn_implementation("eager")
  return theirs


@pytest.mark.parametrize("name", CASES)
def test_logits(name, tmp_path):
  """Within 2e-5 of the largest, layers scanned and unrolled."""
  theirs, inputs = theirs_and_files(name, tmp_path), batch(1)
  real, want = inputs["mask"] > 0, run(theirs, inputs)
  for scan in (False, True):
    model, params = pj.load_pretrained(tmp_path, scan_layers=scan)
    got = jax.jit(lambda p, m=model: pj.apply(m, p, inputs["tokens"], inputs["mask"]))(params)
    np.testing.assert_allclose(np.asarray(got)[real], want[real], atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", CASES)
def test_generation(name, tmp_path):
  """Greedy texts from a cache, past the window, of prompts padded on the left."""
  theirs, inputs = theirs_and_files(name, tmp_path), batch(2)
  model, params = pj.load_pretrained(tmp_path, scan_layers=True)
  new, _ = pj.generate(model, params, inputs["tokens"], inputs["mask"], max_new_tokens=10)
  with torch.no_grad():
    want = theirs.generate(
      input_ids=torch.from_numpy(inputs["tokens"]).long(),
      attention_mask=torch.from_numpy(inputs["mask"]).long(),
      max_new_tokens=10,
      do_sample=False,
      eos_token_id=None,
      pad_token_id=0,
    )
  np.testing.assert_array_equal(new, want[:, 14:].numpy())


@pytest.mark.parametrize("name", ["qwen3", "phi3", "gemma2", "gemma3"])
def test_scores_of_whole_texts(name, tmp_path):
  """By the last token, padding on either side; a head of another size is new."""
  kind, fields = CASES[name]
  config = AutoConfig.for_model(kind, **{**fields, "pad_token_id": 0, "num_labels": 3})
  theirs = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
  draw(theirs, 5)
  theirs.save_pretrained(tmp_path)
  inputs = batch(5)
  model, params = pj.load_pretrained(tmp_path)
  for side in (1, -1):
    tokens, mask = (inputs[key][:, ::side].copy() for key in ("tokens", "mask"))
    want = run(theirs, {"tokens": tokens, "mask": mask})
    got = pj.apply(model, params, tokens, mask)
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
  model, params = pj.load_pretrained(tmp_path, num_labels=5)
  assert pj.apply(model, params, inputs["tokens"], inputs["mask"]).shape == (4, 5)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_and_the_score_both_ways(tmp_path):
  """PEFT saves the head whole beside the adapter, as here."""
  kind, fields = CASES["qwen3"]
  plain = AutoConfig.for_model(kind, **{**fields, "pad_token_id": 0, "num_labels": 3})
  base = AutoModelForSequenceClassification.from_config(plain, attn_implementation="eager")
  draw(base, 5)
  base.save_pretrained(tmp_path / "base")
  lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "v_proj"])
  theirs, inputs = get_peft_model(base, lora), batch(5)
  draw(theirs, 6)
  theirs.save_pretrained(tmp_path / "theirs")
  model, params = pj.load_pretrained(tmp_path / "base", num_labels=3)
  before = pj.apply(model, params, inputs["tokens"], inputs["mask"])
  # Not all of what was drawn anew is in an adapter's file: the base is read again.
  again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
  again.set_attn_implementation("eager")
  want = run(PeftModel.from_pretrained(again, tmp_path / "theirs"), inputs)
  loaded, mask = hf_peft.load(tmp_path / "theirs", params, model)
  got = pj.apply(model, loaded, inputs["tokens"], inputs["mask"])
  np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
  assert np.abs(before - want).max() > 0.05
  hf_peft.save(tmp_path / "ours", loaded, model, trained=mask)
  again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
  again.set_attn_implementation("eager")
  ours = run(PeftModel.from_pretrained(again, tmp_path / "ours"), inputs)
  np.testing.assert_allclose(ours, want, atol=1e-5)
