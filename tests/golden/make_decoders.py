"""Writes tiny random decoders of each family and what transformers computes from them.

Run:   python -m tests.golden.make_decoders
With:  torch 2.13.0 (CPU), transformers 5.23.0, safetensors 0.8.0, numpy 2.4.6

Each directory is as `save_pretrained` writes it, and holds `expected.safetensors` besides:
`tokens`, `mask` int32 [4, 14], padded on the left, and `logits` float32 [4, 14, 96], in evaluation
mode with eager attention.

Every weight is drawn, biases and norms too, so that a dropped or swapped one shows.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModelForCausalLM

GOLDEN = Path(__file__).parent
_LENGTHS = (14, 3, 9, 1)  # real tokens of each row; the padding lies before them
_LLAMA = {
  "vocab_size": 96,
  "hidden_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "intermediate_size": 80,
  "max_position_embeddings": 32,
  "rms_norm_eps": 1e-2,  # large enough to show when it is not read
}
# A window shorter than the texts, in one of the layers.
_MIXED = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 500.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8,
}
_YARN = {
  "rope_type": "yarn",
  "rope_theta": 100.0,
  "factor": 4.0,
  "original_max_position_embeddings": 8,
}
_PHI3 = {
  "sliding_window": 4,
  "pad_token_id": 0,
  "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
}
_GEMMA = {
  **_LLAMA,
  **_MIXED,
  "head_dim": 10,
  "query_pre_attn_scalar": 5,
  "final_logit_softcapping": 3.0,
}
_EXPERTS = {"head_dim": 10, "moe_intermediate_size": 24, "num_experts": 5, "num_experts_per_tok": 2}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

CASES = {
  "llama_tiny": ("llama", {**_LLAMA, "num_key_value_heads": 6}),
  "llama3_tiny": (
    "llama",
    {**_LLAMA, "rope_parameters": _LLAMA3, "tie_word_embeddings": True, "head_dim": 12},
  ),
  "llama_linear_tiny": (
    "llama",
    {**_LLAMA, "rope_parameters": _LINEAR, "attention_bias": True, "mlp_bias": True},
  ),
  "llama_yarn_tiny": ("llama", {**_LLAMA, "rope_parameters": _YARN}),
  "mistral_tiny": ("mistral", {**_LLAMA, "sliding_window": 4}),
  "qwen2_tiny": ("qwen2", {**_LLAMA, "tie_word_embeddings": True}),
  "gpt2_tiny": (
    "gpt2",
    {
      "vocab_size": 96,
      "n_embd": 48,
      "n_layer": 2,
      "n_head": 4,
      "n_positions": 32,
      "layer_norm_epsilon": 1e-2,
    },
  ),
  "qwen3_tiny": ("qwen3", {**_LLAMA, **_MIXED, "head_dim": 10, "use_sliding_window": True}),
  "gemma2_tiny": ("gemma2", {**_GEMMA, "attn_logit_softcapping": 2.0}),
  "gemma3_tiny": (
    "gemma3_text",
    {
      **_GEMMA,
      "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
      },
    },
  ),
  "phi3_tiny": ("phi3", {**_LLAMA, **_PHI3}),
  "qwen3_moe_tiny": ("qwen3_moe", {**_LLAMA, **_EXPERTS}),
  "mixtral_tiny": (
    "mixtral",
    {**_LLAMA, "intermediate_size": 24, "num_local_experts": 3, "sliding_window": 4},
  ),
}


def draw(model: torch.nn.Module, seed: int) -> None:
  """Redraws all parameters: N(0, 0.2), the weights of norms around 1."""
  rng = np.random.default_rng(seed)
  with torch.no_grad():
    for name, value in sorted(model.named_parameters()):
      drawn = 0.2 * rng.standard_normal(tuple(value.shape), dtype=np.float32)
      value.copy_(torch.from_numpy(drawn + (value.ndim == 1 and name.endswith("weight"))))


def batch(seed: int, vocab: int = 96) -> dict[str, np.ndarray]:
  """`tokens`, `mask`: int32 [4, 14], rows of different lengths, padded on the left."""
  rng = np.random.default_rng(seed)
  mask = (np.arange(14) >= 14 - np.array(_LENGTHS)[:, None]).astype(np.int32)
  tokens = np.where(mask, rng.integers(1, vocab, (4, 14)), 0)
  return {"tokens": tokens.astype(np.int32), "mask": mask}


def run(model: torch.nn.Module, inputs: dict[str, np.ndarray]) -> np.ndarray:
  """Logits; positions count from the first real token."""
  mask = torch.from_numpy(inputs["mask"])
  with torch.no_grad():
    return model.eval()(
      input_ids=torch.from_numpy(inputs["tokens"]),
      attention_mask=mask,
      position_ids=(mask.cumsum(1) - 1).clamp(min=0),
    ).logits.numpy()


def make(kind: str, fields: dict, seed: int) -> torch.nn.Module:
  """A model with every weight drawn."""
  model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))
  draw(model, seed)
  return model


def write(name: str) -> None:
  """The directory of one of `CASES`."""
  seed, (kind, fields) = list(CASES).index(name), CASES[name]
  shutil.rmtree(GOLDEN / name, ignore_errors=True)
  make(kind, fields, seed).save_pretrained(GOLDEN / name)
  # From a fresh load, so that the values are what the files give.
  loaded = AutoModelForCausalLM.from_pretrained(GOLDEN / name, attn_implementation="eager")
  inputs = batch(seed)
  save_file({**inputs, "logits": run(loaded, inputs)}, GOLDEN / name / "expected.safetensors")


def main() -> None:
  for name in CASES:
    write(name)


if __name__ == "__main__":
  main()
