"""A tiny decoder with experts that scores texts; as `tiny`, with the same batch."""

import functools
import zlib

import jax.numpy as jnp
import numpy as np

from peftjax.core import paths
from peftjax.models.llama import LlamaConfig, LlamaForSequenceClassification
from peftjax.models.pretrained import abstract_params
from tests.models.tiny import CLASSES, LABELS, MASK, TOKENS, stacked

__all__ = ["CLASSES", "MASK", "TOKENS"]


def model(**overrides):
  """D = 32, L = 2, E = 4, of which each token takes two."""
  said = dict(model_type="qwen3_moe", vocab_size=120, hidden_size=32, num_hidden_layers=2)
  said |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=42)
  said |= dict(moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2)
  return LlamaForSequenceClassification(LlamaConfig.from_hf(said, labels=LABELS, **overrides))


@functools.cache
def params():
  """Parameters of the unrolled model, all drawn, from their paths."""

  def draw(path, leaf):
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    return jnp.asarray(0.2 * rng.standard_normal(leaf.shape, np.float32) + path.endswith("scale"))

  return paths.map_leaves(draw, abstract_params(model()))


@functools.cache
def scanned_params():
  """The same parameters for the scanned model."""
  return {**params(), "model": stacked(params()["model"])}
