"""Adapters of decoders, their tables and heads, tied or not, both ways, with peft's logits."""

import functools
import json

import chex
import numpy as np
import pytest
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.numpy import load_file, save_file

import peftjax as pj
from peftjax import hf_peft
from tests.golden.make_bert import draw
from tests.parity.reference import GOLDEN, compute, decoder, inputs

pytestmark = [
  pytest.mark.parity,
  # Of tied models, of Conv1D kernels, and of tables that are saved.
  pytest.mark.filterwarnings("ignore"),
]
_TOKENS = inputs(96, length=9)[0][:2]
_LLAMA, _TIED, _GPT2 = "llama_tiny", "qwen2_tiny", "gpt2_tiny"
_TIE = {"ensure_weight_tying": True}


def _to(*targets, **fields):
  return {"r": 2, "lora_alpha": 3, "target_modules": [*targets], **fields}


def _saved(target, *names, **fields):
  return _to(target, modules_to_save=[*names], **fields)


_LORA = [
  *((_TIED, _saved("q_proj", *names)) for names in (["embed_tokens"], ["lm_head"])),
  (_TIED, _saved("q_proj", "embed_tokens", "lm_head")),
  (_TIED, _saved("q_proj", "embed_tokens", **_TIE)),
  (_TIED, _saved("q_proj", "lm_head", **_TIE)),
  (_TIED, _to("embed_tokens", "v_proj")),
  (_TIED, _to("lm_head")),
  (_TIED, _to("embed_tokens", "lm_head", use_rslora=True)),
  (_TIED, _to("embed_tokens", **_TIE)),
  (_TIED, _saved("lm_head", "embed_tokens")),
  (_TIED, _saved("embed_tokens", "lm_head")),
  (_TIED, _to("k_proj", use_dora=True, layers_to_transform=[1], modules_to_save=["norm"])),
  ("phi3_tiny", _to("qkv_proj", "gate_up_proj")),
  ("phi3_tiny", {"target_modules": "all-linear", "r": 2, "use_dora": True}),
  ("qwen3_tiny", _to("q_proj", "v_proj", modules_to_save=["q_norm"])),
  ("gemma2_tiny", _to("q_proj", "v_proj", "down_proj")),
  ("gemma3_tiny", {"target_modules": "all-linear", "r": 2}),
  (_LLAMA, _to("embed_tokens", "lm_head", "down_proj", alpha_pattern={"lm_head": 7})),
  (_LLAMA, _to("lm_head", use_dora=True)),
  (_LLAMA, _saved("q_proj", "embed_tokens", "lm_head", "norm", **_TIE)),
  (_LLAMA, {"target_modules": "all-linear", "exclude_modules": [r"1.mlp.up_proj"], "r": 2}),
  (_LLAMA, {"target_modules": r".*layers\.1\..*(q|o)_proj|lm_head", "r": 2}),
  (_GPT2, _saved("c_attn", "wte")),
  (_GPT2, _saved("c_attn", "wte", "lm_head")),
  (_GPT2, _saved("c_attn", "transformer.wte", **_TIE)),
  (_GPT2, _to("wte", "c_attn")),
  (_GPT2, _to("wte", "wpe", "lm_head")),
  (_GPT2, _saved("c_fc", "c_proj", "ln_1")),
  (_GPT2, _saved("c_attn", "mlp")),
  (_GPT2, {"target_modules": "all-linear", "r": 2, "rank_pattern": {r"h\.1\..*c_proj": 3}}),
]
_OTHERS = [
  (_TIED, VeraConfig, {"target_modules": ["q_proj", "lm_head"], "r": 5}),
  (_TIED, IA3Config, {"target_modules": ["lm_head", "up_proj"], "feedforward_modules": []}),
  (
    _TIED,
    IA3Config,
    {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
  ),
  (_TIED, AdaLoraConfig, {"target_modules": ["lm_head", "v_proj"], "init_r": 3, "total_step": 9}),
  (
    _GPT2,
    IA3Config,
    {
      "target_modules": ["c_attn", "mlp.c_proj"],
      "feedforward_modules": ["mlp.c_proj"],
      "modules_to_save": ["wte"],
    },
  ),
  (_GPT2, VeraConfig, {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"], "r": 5}),
]
_CASES = [*((base, LoraConfig, fields) for base, fields in _LORA), *_OTHERS]


@functools.cache
def _ours(base):
  return pj.load_pretrained(GOLDEN / base)


def _logits(model):
  return compute(model, [_TOKENS]).logits.numpy()


@pytest.mark.parametrize("base, kind, fields", _CASES, ids=lambda x: str(x)[:60])
def test_adapters_of_decoders_both_ways(base, kind, fields, tmp_path):
  plain = lambda: decoder(GOLDEN / base)
  adapted = get_peft_model(plain(), kind(task_type="CAUSAL_LM", **fields))
  names = {VeraConfig: "vera_lambda", IA3Config: "ia3_l"}
  draw(adapted, 5, names.get(kind, "lora_"))
  draw(adapted, 6, "modules_to_save")
  adapted.save_pretrained(tmp_path / "theirs")
  want = _logits(PeftModel.from_pretrained(plain(), tmp_path / "theirs"))
  assert np.abs(_logits(plain()) - want).max() > 0.05
  model, params = _ours(base)
  loaded, mask = hf_peft.load(tmp_path / "theirs", params, model)
  near = lambda got: np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)
  near(pj.apply(model, loaded, _TOKENS))
  options = {"task_type": "CAUSAL_LM", "rslora": fields.get("use_rslora", False)}
  hf_peft.save(tmp_path / "ours", loaded, model, trained=mask, **options)
  near(_logits(PeftModel.from_pretrained(plain(), tmp_path / "ours")))
  again, _ = hf_peft.load(tmp_path / "ours", params, model)
  chex.assert_trees_all_equal(pj.merge(again), pj.merge(loaded))


def test_a_state_dicts_names_are_read_as_peft_reads_them(tmp_path):
  """peft takes "default" in names; the other way its load would be of an untrained adapter."""
  plain = lambda: decoder(GOLDEN / _LLAMA)
  adapted = get_peft_model(plain(), LoraConfig(**_to("q_proj")))
  draw(adapted, 5, "lora_")
  adapted.save_pretrained(tmp_path)
  file = tmp_path / "adapter_model.safetensors"
  save_file({k.replace(".weight", ".default.weight"): v for k, v in load_file(file).items()}, file)
  want = _logits(PeftModel.from_pretrained(plain(), tmp_path))
  assert np.abs(_logits(plain()) - want).max() > 0.05
  model, params = _ours(_LLAMA)
  loaded, _ = hf_peft.load(tmp_path, params, model)
  np.testing.assert_allclose(pj.apply(model, loaded, _TOKENS), want, atol=1e-4)


def test_gpt2s_tied_adapters_which_peft_itself_does_not_read_again_are_refused(tmp_path):
  """It saves the head's, and makes none for it as it loads: its name for a table is another."""
  adapted = get_peft_model(decoder(GOLDEN / _GPT2), LoraConfig(**_to("lm_head", **_TIE)))
  draw(adapted, 5, "lora_")
  adapted.save_pretrained(tmp_path)
  again = PeftModel.from_pretrained(decoder(GOLDEN / _GPT2), tmp_path)
  assert np.abs(_logits(again) - _logits(adapted)).max() > 0.05
  model, params = _ours(_GPT2)
  with pytest.raises(ValueError, match="lm_head.lora_A"):
    hf_peft.load(tmp_path, params, model)


def test_tables_that_are_saved_unasked_replace_the_bases(tmp_path):
  """`save_embedding_layers=True`; of a tied model table and head are one array."""
  adapted = get_peft_model(decoder(GOLDEN / _TIED), LoraConfig(**_to("q_proj")))
  draw(adapted, 5, "lora_")
  draw(adapted, 6, "embed_tokens")
  adapted.save_pretrained(tmp_path, save_embedding_layers=True)
  want = _logits(PeftModel.from_pretrained(decoder(GOLDEN / _TIED), tmp_path))
  model, params = _ours(_TIED)
  loaded, mask = hf_peft.load(tmp_path, params, model)
  np.testing.assert_allclose(pj.apply(model, loaded, _TOKENS), want, atol=1e-4)
  assert mask["model"]["embed_tokens"]["embedding"]
  hf_peft.save(tmp_path / "ours", loaded, model, trained=mask)
  got = _logits(PeftModel.from_pretrained(decoder(GOLDEN / _TIED), tmp_path / "ours"))
  np.testing.assert_allclose(got, want, atol=1e-4)
  assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["modules_to_save"]
