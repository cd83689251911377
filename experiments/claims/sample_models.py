"""The pretrained sample models and some batches of real text, each loaded once."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import peftjax as pj
from peftjax import data
from peftjax.data import samples

LENGTH = 32  # tokens per text, for MiniLM
BATCH = 16


class Classes(NamedTuple):
  """Texts as tokens: int32 `[N, LENGTH]`, bool `[N, LENGTH]` and int32 `[N]`."""

  tokens: jax.Array
  mask: jax.Array
  labels: jax.Array


@functools.cache
def minilm() -> tuple[nn.Module, Any]:
  """MiniLM, 22.7 M true float32 parameters, with a new head for the five classes of the news."""
  return pj.load_pretrained(samples.model("minilm"), num_labels=5)


@functools.cache
def news(part: str) -> Classes:
  """BBC news, the first tokens of each article."""
  corpus = data.load("bbc", seed=0)
  tokenizer = data.load_tokenizer(str(samples.model("minilm")))
  tokens = data.encode(tokenizer, corpus.splits[part], LENGTH)
  ids = np.zeros((len(tokens), LENGTH), np.int32)
  mask = np.arange(LENGTH) < tokens.lengths[:, None]
  ids[mask] = tokens.ids
  labels = jnp.asarray(corpus.splits[part].labels)
  return Classes(jnp.asarray(ids), jnp.asarray(mask), labels)


def batch(step: int) -> Classes:
  """The training batch of a step: the same for every method."""
  whole = news("train")
  rows = np.random.default_rng(step).integers(0, len(whole.labels), BATCH)
  return Classes(*(x[rows] for x in whole))


def class_loss(params: Any, rows: Classes) -> jax.Array:
  """Mean cross entropy of MiniLM on some news, without dropout."""
  logits = pj.apply(minilm()[0], params, rows.tokens, rows.mask)
  return optax.losses.softmax_cross_entropy_with_integer_labels(logits, rows.labels).mean()


@functools.cache
def smollm2() -> tuple[nn.Module, Any]:
  """SmolLM2-135M, its layers scanned; its weights come from a 4-bit file, widened to float32."""
  return pj.load_pretrained(samples.model("smollm2"), scan_layers=True)


@functools.cache
def prose() -> jax.Array:
  """Held-out news for SmolLM2, int32 `[4, 128]`."""
  texts = data.load("bbc", seed=0).splits["test"].texts[:8]
  tokenizer = data.load_tokenizer(str(samples.model("smollm2")))
  rows = [tokenizer.encode(text).ids for text in texts]
  return jnp.asarray([row[:128] for row in rows if len(row) >= 128][:4], jnp.int32)


def text_loss(params: Any, tokens_BT: jax.Array) -> jax.Array:
  """Mean cross entropy of the next token, for SmolLM2."""
  logits = pj.apply(smollm2()[0], params, tokens_BT)[:, :-1]
  return optax.losses.softmax_cross_entropy_with_integer_labels(logits, tokens_BT[:, 1:]).mean()


_compiled_loss = jax.jit(text_loss)


def perplexity(params: Any) -> float:
  """The perplexity of SmolLM2 with these parameters on `prose`."""
  return float(jnp.exp(_compiled_loss(params, prose())))


def perplexity_now(params: Any) -> float:
  """The same, traced anew: for modules whose calls are intercepted."""
  return float(jnp.exp(jax.jit(lambda *args: text_loss(*args))(params, prose())))
