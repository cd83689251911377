"""Models that a config names by import path, and what is no such model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

VOCAB, WIDTH, CLASSES = 30522, 16, 3  # of MiniLM's tokenizer, which also stands for an LM's
LM_VOCAB = 17
IDS = jnp.ones((1, 4), jnp.int32)


def pooled(x, mask):
  weights = mask[..., None].astype(x.dtype)
  return (x * weights).sum(1) / weights.sum(1)


class Classifier(nn.Module):
  """The mean of a text's tokens through a layer with dropout."""

  @nn.compact
  def __call__(self, ids, mask, train):
    x = nn.Dense(WIDTH, name="hidden")(nn.Embed(VOCAB, WIDTH, name="embed")(ids))
    x = nn.Dropout(0.1, deterministic=not train)(nn.tanh(x))
    return nn.Dense(CLASSES, name="head")(pooled(x, mask))


class NnxClassifier(nnx.Module):
  """The same in NNX, its layers in a list."""

  def __init__(self, classes, rngs):
    self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
    self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(2)])
    self.dropout = nnx.Dropout(0.1, rngs=rngs)
    self.head = nnx.Linear(WIDTH, classes, rngs=rngs)

  def __call__(self, ids, mask=None):
    x = self.embed(ids)
    for layer in self.layers:
      x = self.dropout(nnx.tanh(layer(x)))
    return self.head(pooled(x, mask))


class Decoder(nn.Module):
  """The mean of what came before, which is causal, of ids alone."""

  @nn.compact
  def __call__(self, ids):
    x = nn.Embed(LM_VOCAB, WIDTH, name="embed")(ids)
    before = jnp.cumsum(x, 1) / jnp.arange(1, x.shape[1] + 1).reshape(1, -1, 1)
    x = nn.tanh(nn.Dense(WIDTH, name="hidden")(jnp.concatenate([x, before], -1)))
    return nn.Dense(LM_VOCAB, name="lm_head")(x)


class NnxDecoder(nnx.Module):
  def __init__(self, rngs):
    self.embed = nnx.Embed(LM_VOCAB, WIDTH, rngs=rngs)
    self.hidden = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

  def __call__(self, ids, segments):
    same = segments[:, :, None] == segments[:, None, :]
    weights = jnp.tril(same.astype(jnp.float32))
    x = weights @ self.embed(ids) / weights.sum(-1, keepdims=True)
    return self.embed.attend(nnx.tanh(self.hidden(x)))


def classifier():
  model = Classifier()
  return model, model.init(jax.random.key(0), IDS, IDS, False)["params"]


def another_seed():
  model = Classifier()
  return model, model.init(jax.random.key(1), IDS, IDS, False)["params"]


def nnx_classifier():
  return NnxClassifier(CLASSES, nnx.Rngs(0))


def decoder():
  model = Decoder()
  return model, model.init(jax.random.key(0), IDS)["params"]


def nnx_decoder():
  return NnxDecoder(nnx.Rngs(0))


def five_classes():
  return NnxClassifier(5, nnx.Rngs(0))


def variables():
  model = Classifier()
  return model, model.init(jax.random.key(0), IDS, IDS, False)


def needs_an_argument(path):
  return path


def a_dict():
  return {"params": np.ones(3)}


def fails():
  raise RuntimeError("no such file")


class NoParam(nnx.Module):
  def __init__(self):
    self.table = nnx.Variable(jnp.ones((VOCAB, CLASSES)))

  def __call__(self, ids, mask):
    return pooled(self.table[ids], mask)


def no_param():
  return NoParam()


class Normed(NnxClassifier):
  def __init__(self):
    super().__init__(CLASSES, nnx.Rngs(0))
    self.norm = nnx.BatchNorm(WIDTH, rngs=nnx.Rngs(0))

  def __call__(self, ids, mask):
    return self.head(pooled(self.norm(self.embed(ids)), mask))


def normed():
  return Normed()
