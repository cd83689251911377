"""Writes adapters on tiny models as the peft library saves them, and what they compute.

Run:   python -m tests.golden.make_peft    (after tests.golden.make_bert and make_decoders)
With:  peft 0.21.2, torch 2.13.0 (CPU), transformers 5.23.0, safetensors 0.8.0, numpy 2.4.6

Each `peft_*` directory holds `adapter_config.json` and `adapter_model.safetensors`, and
`expected.safetensors`: `tokens`, `mask`, `types` int32 [5, 12], `logits` float32 [5, 3] and
`hidden` float32 [5, 12, 64] of the adapter loaded again from those files. Those on a decoder,
`peft_decoder_*`, have `tokens`, `mask` [4, 14] and `logits` [4, 14, 96].

A and B are both drawn, so that their order, the scale and the rank all show.
"""

import contextlib
import shutil

from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, BertForSequenceClassification

from tests.golden import make_decoders
from tests.golden.make_bert import GOLDEN, draw, run

_BASE = "bert_tiny"


def _configs() -> dict[str, LoraConfig]:
  return {
    # With this task type peft puts the classifier into modules_to_save.
    "peft_query_value": LoraConfig(
      task_type="SEQ_CLS", r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["query", "value"]
    ),
    # Saved with sorted keys, and the first key that matches wins: the narrow ones sort first here.
    "peft_patterns": LoraConfig(
      task_type="SEQ_CLS",
      r=4,
      lora_alpha=8,
      target_modules="all-linear",
      rank_pattern={
        "^bert.encoder.layer.0.output.dense": 5,
        "attention.*key": 6,
        "layer.1.attention.self.query": 1,
        "query": 2,
      },
      alpha_pattern={"key": 3, "layer.[01].intermediate.dense": 16, "layer.1.output.dense": 2},
    ),
    # A string is one regular expression for the whole path.
    "peft_rslora": LoraConfig(
      r=4,
      lora_alpha=16,
      use_rslora=True,
      target_modules=r".*\.layer\.\d+\.(attention\.self\.(query|key)|output\.dense)",
      rank_pattern={"key": 8},
    ),
    "peft_embedding": LoraConfig(r=3, lora_alpha=6, target_modules=["word_embeddings", "query"]),
  }


def _decoders() -> dict[str, tuple[str, LoraConfig]]:
  """By the name of the directory, the base and the adapter."""
  return {
    # Conv1D keeps its kernels [in, out], so square ones do not show a wrong turn.
    "peft_decoder_square": (
      "gpt2_tiny",
      LoraConfig(r=2, target_modules=["c_fc"], modules_to_save=["attn.c_proj", "ln_f"]),
    ),
    # Of a tied model the table alone: the head keeps the old one.
    "peft_decoder_tied": (
      "qwen2_tiny",
      LoraConfig(r=2, target_modules=["k_proj"], modules_to_save=["embed_tokens"]),
    ),
    # peft writes `base_layer.weight` of both.
    "peft_decoder_table_head": (
      "llama_tiny",
      LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"]),
    ),
  }


def _make_decoder(name: str, base: str, config: LoraConfig, seed: int) -> None:
  shutil.rmtree(name, ignore_errors=True)
  plain = lambda: AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
  config.task_type = "CAUSAL_LM"
  model = get_peft_model(plain(), config)
  draw(model, seed, "lora_")
  draw(model, seed + 10, "modules_to_save")
  config.target_modules = sorted(config.target_modules)
  model.save_pretrained(name)
  (GOLDEN / name / "README.md").unlink()
  inputs = make_decoders.batch(seed)
  logits = make_decoders.run(PeftModel.from_pretrained(plain(), name), inputs)
  save_file({**inputs, "logits": logits}, f"{name}/expected.safetensors")


def _base() -> BertForSequenceClassification:
  return BertForSequenceClassification.from_pretrained(_BASE, attn_implementation="eager")


def _make(name: str, config: LoraConfig, seed: int) -> None:
  shutil.rmtree(name, ignore_errors=True)
  model = get_peft_model(_base(), config)
  draw(model, seed, "lora_")
  draw(model, seed + 10, "modules_to_save")
  if isinstance(config.target_modules, set):
    config.target_modules = sorted(config.target_modules)  # a set would be saved in any order
  model.save_pretrained(name)
  (GOLDEN / name / "README.md").unlink()
  # From a fresh load, so that the values are what the files give.
  base = load_file(f"{_BASE}/expected.safetensors")
  inputs = {key: base[key] for key in ("tokens", "mask", "types")}
  loaded = PeftModel.from_pretrained(_base(), name)
  save_file(run(loaded, inputs), f"{name}/expected.safetensors")


def main() -> None:
  with contextlib.chdir(GOLDEN):  # peft writes the base's path into the file: keep it relative
    for seed, (name, config) in enumerate(_configs().items(), start=10):
      _make(name, config, seed)
    for seed, (name, (base, config)) in enumerate(_decoders().items(), start=50):
      _make_decoder(name, base, config, seed)


if __name__ == "__main__":
  main()
