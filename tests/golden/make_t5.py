"""Writes tiny random encoder-decoders and what transformers computes from them.

Run:   python -m tests.golden.make_t5
With:  torch 2.13.0 (CPU), transformers 5.23.0, safetensors 0.8.0, numpy 2.4.6

Each directory is as `save_pretrained` writes it, and holds `expected.safetensors` besides:
`tokens`, `mask` int32 [4, 14]; `targets`, `target_mask` int32 [4, 9], each padded on both sides;
`logits` float32 [4, 9, 96], in evaluation mode with eager attention; `new` int32 [4, 8], what
follows the start of a target, greedily.

Every weight is drawn, so that a dropped or swapped one shows.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from tests.golden.make_decoders import draw

GOLDEN = Path(__file__).parent
_T5 = {
  "vocab_size": 96,
  "d_model": 24,
  "d_kv": 10,  # no divisor of the width
  "d_ff": 40,
  "num_layers": 3,
  "num_decoder_layers": 2,
  "num_heads": 3,
  "relative_attention_num_buckets": 8,  # few, so that distances share one
  "relative_attention_max_distance": 10,
  "layer_norm_epsilon": 1e-2,  # large enough to show when it is not read
  "decoder_start_token_id": 0,
}
# By the name of the directory: model type, fields, whether the head is its own.
CASES = {
  "t5_tiny": ("t5", _T5, False),
  "t5_gated_tiny": (
    "t5",
    {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    True,
  ),
}


def make(kind: str, fields: dict, own_head: bool, seed: int) -> torch.nn.Module:
  """A model with every weight drawn."""
  model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **fields))
  if own_head:  # transformers ties it whatever the configuration says, but not if files have two
    model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
  draw(model, seed)
  return model


def load(directory: Path) -> torch.nn.Module:
  """With its attention written out."""
  return AutoModelForSeq2SeqLM.from_pretrained(directory, attn_implementation="eager").eval()


def batch(seed: int, vocab: int = 96) -> dict[str, np.ndarray]:
  """`tokens`, `mask`, `targets`, `target_mask`: rows that are whole, or padded on either side."""
  rng = np.random.default_rng(seed)
  made = {}
  sides = {"tokens": ("mask", 14, (0, 0, 4, 2)), "targets": ("target_mask", 9, (0, 2, 0, 0))}
  for name, (mask, length, before) in sides.items():
    at = np.arange(length)[None]
    ends = length - np.array([[0], [5], [0], [3]])
    there = (at >= np.array(before)[:, None]) & (at < ends)
    made[mask] = there.astype(np.int32)
    made[name] = np.where(there, rng.integers(1, vocab, there.shape), 0).astype(np.int32)
  return made


def run(model: torch.nn.Module, inputs: dict[str, np.ndarray]) -> np.ndarray:
  """Logits of the targets."""
  given = {name: torch.from_numpy(x).long() for name, x in inputs.items()}
  with torch.no_grad():
    return model(
      input_ids=given["tokens"],
      attention_mask=given["mask"],
      decoder_input_ids=given["targets"],
      decoder_attention_mask=given["target_mask"],
    ).logits.numpy()


def write(model: torch.nn.Module, inputs: dict[str, np.ndarray], count: int = 8) -> np.ndarray:
  """`count` tokens of a target, the likeliest each time."""
  config = model.config
  with torch.no_grad():
    made = model.generate(
      input_ids=torch.from_numpy(inputs["tokens"]).long(),
      attention_mask=torch.from_numpy(inputs["mask"]).long(),
      max_new_tokens=count,
      do_sample=False,
      eos_token_id=None,
      # Its cache has as many layers as the encoder.
      use_cache=config.num_decoder_layers <= config.num_layers,
    )
  return made[:, 1:].numpy().astype(np.int32)


def main() -> None:
  for seed, (name, case) in enumerate(CASES.items()):
    shutil.rmtree(GOLDEN / name, ignore_errors=True)
    make(*case, seed=seed).save_pretrained(GOLDEN / name)
    # From a fresh load, so that the values are what the files give.
    loaded, inputs = load(GOLDEN / name), batch(seed)
    made = {**inputs, "logits": run(loaded, inputs), "new": write(loaded, inputs)}
    save_file(made, GOLDEN / name / "expected.safetensors")


if __name__ == "__main__":
  main()
