"""A tiny encoder-decoder, its batch and its loss, by the names that `tiny` has for an encoder's."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

import peftjax as pj
from peftjax.core import paths
from peftjax.models.t5 import T5Config, T5ForConditionalGeneration
from tests.models.tiny import BATCH, MASK, TOKENS

TARGETS = np.random.default_rng(1).integers(5, 120, (BATCH, 7)).astype(np.int32)
INPUTS = TOKENS, MASK, TARGETS


def model(**overrides):
  """D = 64, H = 20, L = 2 in the decoder and 3 before, without dropout."""
  shape = dict(vocab=120, width=64, layers=3, decoder_layers=2, heads=4, head_size=20, ffn=96)
  rest = dict(activation="gelu_tanh", gated=True, buckets=8, farthest=10, eps=1e-6, start_id=0)
  return T5ForConditionalGeneration(
    T5Config(**{**shape, **rest, **dict(dropout=0.0, scaled=True), **overrides})
  )


@functools.cache
def params():
  """Parameters of the unrolled model, all drawn, from their paths."""
  abstract = jax.eval_shape(lambda: model().init(jax.random.key(0), TOKENS)["params"])

  def draw(path, leaf):
    value = np.random.default_rng(zlib.crc32(path.encode())).standard_normal(leaf.shape, np.float32)
    return jnp.asarray(0.15 * value + path.endswith("scale"))

  return paths.map_leaves(draw, abstract)


@functools.cache
def scanned_params():
  """The same parameters for the scanned model."""
  tree = dict(params())
  for name in ("encoder", "decoder"):
    stack = dict(tree[name])
    count = sum(key.startswith("layers_") for key in stack)
    layers = [stack.pop(f"layers_{i}") for i in range(count)]
    tree[name] = {**stack, "layers": jax.tree.map(lambda *xs: jnp.stack(xs), *layers)}
  return tree


def loss(logits):
  batch = {"tokens": TARGETS, "weights": jnp.ones(TARGETS.shape)}
  return pj.losses.next_token(logits, batch)
