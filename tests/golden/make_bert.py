"""Writes the tiny random BERT and RoBERTa directories and what transformers computes from them.

Run:   python -m tests.golden.make_bert
With:  torch 2.13.0 (CPU), transformers 5.23.0, safetensors 0.8.0, numpy 2.4.6

Each directory is as `save_pretrained` writes it, and holds `expected.safetensors` besides:
`tokens`, `mask`, `types` int32 [5, 12]; `logits` float32 [5, labels]; `hidden` float32 [5, 12, 64],
the last hidden state, in evaluation mode with eager attention.

Every weight is drawn, biases and LayerNorms too, so that a dropped or swapped one shows.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import (
  BertConfig,
  BertForSequenceClassification,
  BertModel,
  PreTrainedModel,
  RobertaConfig,
  RobertaForSequenceClassification,
)

GOLDEN = Path(__file__).parent
_LENGTHS = (12, 3, 7, 1, 10)  # real tokens of each row; the rest is padding
_TINY = {
  "vocab_size": 120,
  "hidden_size": 64,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "intermediate_size": 128,
}


def draw(model: torch.nn.Module, seed: int, names: str = "") -> None:
  """Redraws the parameters whose name contains `names`: N(0, 0.2), LayerNorm weights around 1."""
  rng = np.random.default_rng(seed)
  with torch.no_grad():
    for name, value in sorted(model.named_parameters()):
      if names in name:
        drawn = 0.2 * rng.standard_normal(tuple(value.shape), dtype=np.float32)
        value.copy_(torch.from_numpy(drawn + ("LayerNorm.weight" in name)))


def batch(pad: int, types: int, seed: int) -> dict[str, np.ndarray]:
  """`tokens`, `mask`, `types`: int32 [5, 12], rows of different lengths, padded on the right."""
  rng = np.random.default_rng(seed)
  mask = (np.arange(12) < np.array(_LENGTHS)[:, None]).astype(np.int32)
  tokens = np.where(mask, rng.integers(5, _TINY["vocab_size"], (5, 12)), pad)
  kinds = rng.integers(0, types, (5, 12)) * mask
  return {"tokens": tokens.astype(np.int32), "mask": mask, "types": kinds.astype(np.int32)}


def run(model: torch.nn.Module, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """`inputs` with what the model computes from them: `hidden`, and `logits` or `pooled`."""
  with torch.no_grad():
    out = model.eval()(
      input_ids=torch.from_numpy(inputs["tokens"]),
      attention_mask=torch.from_numpy(inputs["mask"]),
      token_type_ids=torch.from_numpy(inputs["types"]),
      output_hidden_states=True,
    )
  result = {"logits": out.logits} if "logits" in out else {"pooled": out.pooler_output}
  result["hidden"] = out.hidden_states[-1]
  return {**inputs, **{name: value.numpy() for name, value in result.items()}}


def save(model: PreTrainedModel, name: str, inputs: dict[str, np.ndarray], **how) -> None:
  """Writes `GOLDEN/name` anew, as transformers does, and the expected values into it."""
  shutil.rmtree(GOLDEN / name, ignore_errors=True)
  model.save_pretrained(GOLDEN / name, **how)
  # From a fresh load, so that the values are what the files give.
  loaded = type(model).from_pretrained(GOLDEN / name, attn_implementation="eager")
  save_file(run(loaded, inputs), GOLDEN / name / "expected.safetensors")


def main() -> None:
  bert = BertConfig(**_TINY, max_position_embeddings=40, num_labels=3, hidden_act="gelu")
  model = BertForSequenceClassification(bert)
  draw(model, seed=0)
  inputs = batch(pad=0, types=2, seed=1)
  save(model, "bert_tiny", inputs)
  save(model, "bert_tiny_sharded", inputs, max_shard_size="150KB")
  bare = BertModel(bert)
  bare.load_state_dict(model.bert.state_dict())
  save(bare, "bert_tiny_bare", inputs)

  regression = BertConfig(
    **_TINY,
    max_position_embeddings=40,
    num_labels=1,
    problem_type="regression",
    hidden_act="gelu_new",
    layer_norm_eps=0.01,  # large enough to show when it is not read
  )
  model = BertForSequenceClassification(regression)
  draw(model, seed=2)
  save(model, "bert_tiny_regression", batch(pad=0, types=2, seed=3))

  # RoBERTa counts positions from pad_token_id + 1, so its table is two rows longer than its text.
  roberta = RobertaConfig(
    **_TINY,
    max_position_embeddings=42,
    type_vocab_size=1,
    layer_norm_eps=1e-5,
    pad_token_id=1,
    num_labels=3,
    hidden_act="gelu",
  )
  model = RobertaForSequenceClassification(roberta)
  draw(model, seed=4)
  save(model, "roberta_tiny", batch(pad=1, types=1, seed=5))


if __name__ == "__main__":
  main()
