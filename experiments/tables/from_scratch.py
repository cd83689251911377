"""A small byte-level decoder with any feed-forward block, trained from scratch on BBC news."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from peftjax import data, optim
from peftjax.core.einsum import attend
from peftjax.models.cache import causal_bias
from peftjax.nn.attention import attention
from peftjax.nn.feed_forward import VARIANTS, FeedForward, gated_width
from peftjax.nn.linear import Embedding, Linear
from peftjax.nn.norm import RMSNorm

WIDTH, LAYERS, HEADS, FFN = 192, 3, 6, 768  # D, L, N, F of an ungated block
LENGTH, BATCH, STEPS = 256, 4, 250  # bytes of a row, rows of a step
EVAL_ROWS = 128
LEARNING_RATE = 3e-3


class Decoder(nn.Module):
  """Pre-norm blocks without biases, learned positions, and a head that is the table of bytes."""

  variant: str

  @nn.compact
  def __call__(self, bytes_BT: jax.Array) -> jax.Array:
    """Logits of the next byte, `[B, T, 256]`."""
    gated = VARIANTS[self.variant][1]
    embed = Embedding(256, WIDTH, name="bytes")
    x = embed(bytes_BT) + Embedding(LENGTH, WIDTH, name="places")(jnp.arange(LENGTH)[None])
    bias = causal_bias(jnp.ones((1, LENGTH), bool))
    for i in range(LAYERS):
      h = RMSNorm(1e-6, name=f"attention_norm_{i}")(x)
      q, k, v = (Linear(WIDTH, False, name=f"{name}_{i}")(h) for name in ("q", "k", "v"))
      x = x + Linear(WIDTH, False, name=f"out_{i}")(attention(q, k, v, bias, HEADS))
      h = RMSNorm(1e-6, name=f"ffn_norm_{i}")(x)
      width = gated_width(FFN) if gated else FFN
      x = x + FeedForward(self.variant, width, use_bias=False, name=f"ffn_{i}")(h)
    return attend(embed.table(), RMSNorm(1e-6, name="norm")(x))


def loss(model: Decoder, params: Any, rows: jax.Array) -> jax.Array:
  """Mean negative log-likelihood of a byte given those before it in its row, in nats."""
  logits: Any = model.apply({"params": params}, rows)
  errors = optax.losses.softmax_cross_entropy_with_integer_labels(logits[:, :-1], rows[:, 1:])
  return errors.mean()


def train(variant: str, seed: int) -> dict[str, Any]:
  """Held-out loss after `STEPS` steps; the seed draws the weights and the order of the rows."""
  train_rows, test_rows = corpus()
  model = Decoder(variant)
  params = model.init(jax.random.key(seed), train_rows[:1])["params"]
  schedule = optim.schedule("linear", LEARNING_RATE, STEPS, STEPS // 10)
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params: Any, state: Any, rows: jax.Array) -> tuple[Any, Any]:
    grads = jax.grad(functools.partial(loss, model))(params, rows)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state, rng = tx.init(params), np.random.default_rng(seed)
  for _ in range(STEPS):
    params, state = step(params, state, train_rows[rng.integers(len(train_rows), size=BATCH)])
  score = jax.jit(functools.partial(loss, model))
  batches = np.split(test_rows, len(test_rows) // BATCH)
  return {
    "variant": variant,
    "seed": seed,
    "loss": float(np.mean([score(params, rows) for rows in batches])),
    "parameters": sum(x.size for x in jax.tree.leaves(params)),
  }


@functools.cache
def corpus() -> tuple[np.ndarray, np.ndarray]:
  """Rows of bytes of the training texts, and of the first test texts."""
  splits = data.load("bbc", seed=0).splits
  rows = {part: _rows("\n".join(splits[part].texts)) for part in ("train", "test")}
  return rows["train"], rows["test"][:EVAL_ROWS]


def _rows(text: str) -> np.ndarray:
  raw = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
  return raw[: len(raw) // LENGTH * LENGTH].reshape(-1, LENGTH)
