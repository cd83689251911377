"""A tiny encoder and its batch, for whoever tests something on a whole model."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.core import paths
from peftjax.models.bert import BertClassifier, BertConfig

# No axis of the batch, nor rows times length, equals one of a weight, so that no activation has a
# weight's shape.
BATCH, LENGTH, LABELS = 4, 10, 3

_rng = np.random.default_rng(0)
TOKENS = _rng.integers(5, 120, (BATCH, LENGTH)).astype(np.int32)
MASK = np.arange(LENGTH) < np.array([10, 3, 7, 1])[:, None]
CLASSES = np.array([0, 2, 1, 2], np.int32)


def config(**overrides):
  """D = 64, L = 2, without dropout."""
  shape = dict(vocab=120, width=64, layers=2, heads=4, ffn=96, positions=42, types=2, labels=LABELS)
  rest = dict(family="bert", activation="gelu", eps=1e-6, pad_id=0)
  rates = dict(dropout=0.0, attention_dropout=0.0, head_dropout=0.0)
  return BertConfig(**{**shape, **rest, **rates, **overrides})


def model(**overrides):
  return BertClassifier(config(**overrides))


def dropout_config(**overrides):
  """The same with a dropout of 0.1 wherever the model has one."""
  return config(dropout=0.1, attention_dropout=0.1, head_dropout=0.1, **overrides)


@functools.cache
def params():
  """Parameters of the unrolled model, all drawn (biases and norms too), from their paths."""
  model = BertClassifier(config())
  abstract = jax.eval_shape(lambda: model.init(jax.random.key(0), TOKENS)["params"])

  def draw(path, leaf):
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    value = 0.15 * rng.standard_normal(leaf.shape, np.float32)
    return jnp.asarray(value + path.endswith("scale"))

  return paths.map_leaves(draw, abstract)


@functools.cache
def scanned_params():
  """The same parameters for the scanned model."""
  body = dict(params()["bert"])
  return {**params(), "bert": {**body, "encoder": stacked(body["encoder"])}}


def stacked(tree):
  """A tree in which `layers_0`, `layers_1`, ... are one `layers`."""
  rest = {name: x for name, x in tree.items() if not name.startswith("layers_")}
  layers = [tree[f"layers_{i}"] for i in range(len(tree) - len(rest))]
  return {**rest, "layers": jax.tree.map(lambda *xs: jnp.stack(xs), *layers)}
