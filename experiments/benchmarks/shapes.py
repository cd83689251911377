"""The models of the QLoRA step, and the operations that its time on a GPU is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftjax.data import samples
from peftjax.models import configuration
from peftjax.models.llama import LlamaConfig


def llama(
  width: int,
  layers: int,
  heads: int,
  ffn: int,
  positions: int = 2048,
  vocab: int = 32_000,
  kv_heads: int | None = None,
) -> Mapping[str, Any]:
  """A Hugging Face configuration."""
  return {
    "model_type": "llama",
    "vocab_size": vocab,
    "hidden_size": width,
    "num_hidden_layers": layers,
    "num_attention_heads": heads,
    "num_key_value_heads": kv_heads or heads,
    "intermediate_size": ffn,
    "max_position_embeddings": positions,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
  }


# Hugging Face configurations of models with random weights.
RANDOM: Mapping[str, Mapping[str, Any]] = {
  "llama-1.3b": llama(2048, 24, 16, 5504, 2048),
  "llama-7b": llama(4096, 32, 32, 11008, 4096),
}
MODELS = ("smollm2", *RANDOM)


def config(model: str) -> Mapping[str, Any]:
  """The Hugging Face configuration of one of `MODELS`."""
  return RANDOM.get(model) or configuration.config_of(samples.model(model))


def step_flops(config: Mapping[str, Any], batch: int, length: int) -> float:
  """Floating-point operations that a LoRA step needs.

  A token takes 2 N forward and 2 N backward, N the weights of the linear layers and the head: their
  inputs have a gradient, the frozen weights none. Attention takes 2 T D per token and layer in the
  forward pass, q kᵀ and p v over the T/2 places that causal attention sees on average, and twice
  that backward. Recomputation under gradient checkpointing does not count, nor do dequantisation,
  norms and the small products with LoRA's factors.
  """
  c = LlamaConfig.from_hf(config)
  queries, keys = c.heads * c.head_size, c.kv_heads * c.head_size
  layer = c.width * (2 * queries + 2 * keys + 3 * c.ffn)
  weights = c.layers * layer + c.vocab * c.width
  attention = 2 * length * queries * c.layers
  return batch * length * (4 * weights + 3 * attention)
