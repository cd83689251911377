"""A model small enough to train in seconds on real text: the next character from the last sixteen.

An embedding of each character, one feed-forward block with a residual, logits:
h = x + down(act(up x)), or down(act(gate x) · up x), with x [B, 256]. The texts are the sample
corpora's, in lower case.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import peftjax as pj
from peftjax import data
from peftjax.core.einsum import take
from peftjax.nn import feed_forward, ffn

ALPHABET = " abcdefghijklmnopqrstuvwxyz0123456789.,'\"-?!:;()@#/&$%"
CONTEXT, EMBED = 16, 16
WIDTH = CONTEXT * EMBED
HIDDEN = 2 * WIDTH
BATCH = 256

# By name: the activation, and whether it is applied to a gate.
VARIANTS: dict[str, tuple[Callable[[jax.Array], jax.Array], bool]] = {
  "relu": (jax.nn.relu, False),
  "gelu": (ffn.gelu, False),
  "swiglu": (jax.nn.silu, True),
}


class Texts(NamedTuple):
  """Characters as numbers, int32 `[n]`; unknown ones are blanks."""

  train: np.ndarray
  test: np.ndarray


@functools.cache
def texts(name: str) -> Texts:
  """A sample corpus, with at most a million characters to train on."""
  corpus = data.load(name, seed=0)
  table = np.zeros(256, np.int32)
  table[np.frombuffer(ALPHABET.encode(), np.uint8)] = np.arange(len(ALPHABET))
  number = lambda part, n: table[
    np.frombuffer(
      "\n".join(corpus.splits[part].texts).lower().encode("ascii", "replace")[:n], np.uint8
    )
  ]
  return Texts(number("train", 1_000_000), number("test", 100_000))


def hidden_of(variant: str) -> int:
  """Width of the hidden layer: gated ones have two thirds, for three matrices instead of two."""
  return feed_forward.gated_width(HIDDEN) if VARIANTS[variant][1] else HIDDEN


def init(variant: str, seed: int = 0) -> dict[str, Any]:
  keys = iter(jax.random.split(jax.random.key(seed), 5))
  hidden = hidden_of(variant)
  kernel = lambda n, m: {"kernel": jax.random.normal(next(keys), (n, m)) * (2 / n) ** 0.5}
  block = {
    "up": {**kernel(WIDTH, hidden), "bias": jnp.zeros(hidden)},
    "down": {"kernel": kernel(hidden, WIDTH)["kernel"] * 0.5},
  }
  if VARIANTS[variant][1]:
    block["gate"] = kernel(WIDTH, hidden)
  table = jax.random.normal(next(keys), (len(ALPHABET), EMBED))
  out = kernel(WIDTH, len(ALPHABET))["kernel"] * 0.1
  return {"embed": {"embedding": table}, "block": block, "out": {"kernel": out}}


def features(params: Any, ids_BT: jax.Array) -> jax.Array:
  """x [B, 256]: the embeddings of the context, one beside the other."""
  return take(params["embed"]["embedding"], ids_BT).reshape(ids_BT.shape[0], -1)


def before_activation(params: Any, x_BD: jax.Array) -> jax.Array:
  """The input of the activation, `[B, F]`."""
  block = params["block"]
  if "gate" in block:
    return pj.einsum("bd,df->bf", x_BD, block["gate"]["kernel"])
  return pj.einsum("bd,df->bf", x_BD, block["up"]["kernel"]) + block["up"]["bias"][None]


def logits(variant: str, params: Any, ids_BT: jax.Array) -> jax.Array:
  act, gated = VARIANTS[variant]
  x = features(params, ids_BT)
  h = act(before_activation(params, x))
  if gated:
    up = params["block"]["up"]
    h = h * (pj.einsum("bd,df->bf", x, up["kernel"]) + up["bias"][None])
  x = x + pj.einsum("bf,fd->bd", h, params["block"]["down"]["kernel"])
  return pj.einsum("bd,dv->bv", x, params["out"]["kernel"])


def loss(variant: str, params: Any, rows: jax.Array) -> jax.Array:
  """Mean cross entropy, nats per character, of rows `[B, 17]`."""
  given = logits(variant, params, rows[:, :-1])
  return optax.losses.softmax_cross_entropy_with_integer_labels(given, rows[:, -1]).mean()


def rows_of(ids: np.ndarray, count: int, seed: int) -> jax.Array:
  """`count` random windows, int32 `[count, 17]`."""
  starts = np.random.default_rng(seed).integers(0, len(ids) - CONTEXT, count)
  return jnp.asarray(ids[starts[:, None] + np.arange(CONTEXT + 1)])


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(
  variant: str, tx: Any, train: Any, frozen: Any, state: Any, rows_SBT: jax.Array
) -> tuple[Any, Any, jax.Array]:
  """One step for each of S batches; the trained half, the optimizer state and the S losses."""

  def step(carry: Any, rows: jax.Array) -> Any:
    train, state = carry
    objective = lambda t: loss(variant, pj.combine(t, frozen), rows)
    value, grads = jax.value_and_grad(objective)(train)
    updates, state = tx.update(grads, state, train)
    return (optax.apply_updates(train, updates), state), value

  (train, state), losses = jax.lax.scan(step, (train, state), rows_SBT)
  return train, state, losses


def batches(corpus: str, steps: int, seed: int, size: int = BATCH) -> jax.Array:
  """Batches of rows, int32 `[steps, size, 17]`."""
  return rows_of(texts(corpus).train, steps * size, seed).reshape(steps, size, CONTEXT + 1)


@functools.cache
def trained(variant: str, rate: float = 3e-3, steps: int = 400, seed: int = 0) -> Any:
  """Parameters after `steps` of Adam on the news."""
  tx = adam(rate)
  params = init(variant, seed)
  whole, frozen = pj.partition(params, jax.tree.map(lambda _: True, params))
  return run(variant, tx, whole, frozen, tx.init(whole), batches("bbc", steps, seed))[0]


@functools.cache
def adam(rate: float) -> optax.GradientTransformation:
  """The same object for the same rate, so that `run` compiles once."""
  return optax.adam(rate)


test_loss = jax.jit(loss, static_argnums=0)
