"""Writes tiny random encoders of each family and head, and what transformers computes from them.

Run:   python -m tests.golden.make_encoders
With:  torch 2.13.0 (CPU), transformers 5.23.0, safetensors 0.8.0, numpy 2.4.6

Each directory `encoder_*` is as `save_pretrained` writes it, and holds `expected.safetensors`
besides: `tokens`, `mask`, `types` int32 [4, 9]; `logits` float32 [4, 3], [4, 9, 3] of a head that
labels tokens, or [4, 9, 2] of one that finds answers; `hidden` float32 [4, 9, 16], the last hidden
state, in evaluation mode with eager attention.

Every weight is drawn, biases and norms too, so that a dropped or swapped one shows.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import (
  AutoConfig,
  AutoModelForQuestionAnswering,
  AutoModelForSequenceClassification,
  AutoModelForTokenClassification,
)

GOLDEN = Path(__file__).parent
CLASSES = {
  "text": AutoModelForSequenceClassification,
  "token": AutoModelForTokenClassification,
  "span": AutoModelForQuestionAnswering,
}
_LENGTHS = (9, 4, 1, 6)  # real tokens of each row; the rest is padding
_BERT = {
  "vocab_size": 60,
  "hidden_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "intermediate_size": 24,
  "max_position_embeddings": 20,
  "layer_norm_eps": 1e-2,  # large enough to show when it is not read
  "num_labels": 3,
}
_DISTIL = {
  "vocab_size": 60,
  "dim": 16,
  "n_layers": 2,
  "n_heads": 2,
  "hidden_dim": 24,
  "max_position_embeddings": 20,
  "num_labels": 3,
}
# As version 3 has it, with few buckets, so that some positions share one.
DEBERTA = {
  "relative_attention": True,
  "pos_att_type": ["p2c", "c2p"],
  "share_att_key": True,
  "norm_rel_ebd": "layer_norm",
  "position_buckets": 6,
  "position_biased_input": False,
  "type_vocab_size": 0,
}

# By the name of the directory: model type, what the head labels, fields.
CASES = {
  "encoder_bert_token": ("bert", "token", _BERT),
  "encoder_xlm_roberta": ("xlm-roberta", "text", _BERT),
  "encoder_camembert_token": ("camembert", "token", {**_BERT, "type_vocab_size": 1}),
  "encoder_electra": ("electra", "text", {**_BERT, "embedding_size": 10}),
  "encoder_distilbert": ("distilbert", "text", _DISTIL),
  "encoder_deberta": ("deberta-v2", "text", {**_BERT, **DEBERTA}),
  "encoder_bert_span": ("bert", "span", {**_BERT, "num_labels": 2}),
}


def draw(model: torch.nn.Module, seed: int) -> None:
  """Redraws all parameters: N(0, 0.2), the weights of norms around 1."""
  rng = np.random.default_rng(seed)
  with torch.no_grad():
    for name, value in sorted(model.named_parameters()):
      drawn = 0.2 * rng.standard_normal(tuple(value.shape), dtype=np.float32)
      value.copy_(torch.from_numpy(drawn + (value.ndim == 1 and name.endswith("weight"))))


def batch(config: AutoConfig, seed: int, lengths=_LENGTHS, left: bool = False) -> dict:
  """`tokens`, `mask`, `types`: int32 [rows, longest], padded on the right or on the left."""
  rng = np.random.default_rng(seed)
  longest = max(lengths)
  mask = (np.arange(longest) < np.array(lengths)[:, None]).astype(np.int32)
  mask = mask[:, ::-1] if left else mask
  drawn = rng.integers(5, config.vocab_size, mask.shape)
  types = rng.integers(0, max(getattr(config, "type_vocab_size", 1), 1), mask.shape) * mask
  tokens = np.where(mask, drawn, config.pad_token_id)
  made = {"tokens": tokens, "mask": mask, "types": types}
  return {name: np.ascontiguousarray(x, np.int32) for name, x in made.items()}


def run(model: torch.nn.Module, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """`inputs` with `logits` and `hidden`."""
  given = {name: torch.from_numpy(x) for name, x in inputs.items()}
  names = {"tokens": "input_ids", "mask": "attention_mask", "types": "token_type_ids"}
  if model.config.model_type == "distilbert":
    names.pop("types")
  with torch.no_grad():
    out = model.eval()(**{b: given[a] for a, b in names.items()}, output_hidden_states=True)
  logits = out.logits if "logits" in out else torch.stack([out.start_logits, out.end_logits], -1)
  return {**inputs, "logits": logits.numpy(), "hidden": out.hidden_states[-1].numpy()}


def make(kind: str, labels_of: str, fields: dict, seed: int) -> torch.nn.Module:
  """A model with every weight drawn."""
  model = CLASSES[labels_of].from_config(
    AutoConfig.for_model(kind, **fields), attn_implementation="eager"
  )
  draw(model, seed)
  return model


def main() -> None:
  for seed, (name, (kind, labels_of, fields)) in enumerate(CASES.items()):
    shutil.rmtree(GOLDEN / name, ignore_errors=True)
    make(kind, labels_of, fields, seed).save_pretrained(GOLDEN / name)
    # From a fresh load, so that the values are what the files give.
    loaded = CLASSES[labels_of].from_pretrained(GOLDEN / name, attn_implementation="eager")
    save_file(run(loaded, batch(loaded.config, seed)), GOLDEN / name / "expected.safetensors")


if __name__ == "__main__":
  main()
