"""Trains a small byte-level decoder from scratch, with any feed-forward block, on BBC news.

  python -m experiments.from_scratch --config=configs/from_scratch.py --config.variant=swiglu

Prints the loss on held-out text. `experiments.tables ffn` compares the variants so.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Annotated, Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from ml_collections import ConfigDict, config_flags
from msgspec import Meta

from experiments import runtime
from peftjax import data, losses, optim
from peftjax.core import ranges
from peftjax.core.einsum import attend
from peftjax.core.ranges import Count, Length, Positive, Size
from peftjax.nn.attention import attention
from peftjax.nn.feed_forward import VARIANTS, FeedForward, gated_width
from peftjax.nn.linear import Embedding, Linear
from peftjax.nn.mask import AttentionMask
from peftjax.nn.norm import RMSNorm


class Fields(Protocol):
  """The numbers of a config."""

  seed: Count
  ffn: Size
  width: Size
  layers: Size
  heads: Size
  length: Annotated[int, Meta(ge=2, le=2**16)]
  batch_size: Length
  steps: Size
  learning_rate: Positive
  eval_rows: Size


class Decoder(nn.Module):
  """Pre-norm blocks, learned positions, and a head that is the table of bytes.

  Attributes:
    length: T, the most bytes in a row.
    feed_forward: fields of every block's `FeedForward`.
  """

  width: int
  layers: int
  heads: int
  length: int
  feed_forward: Mapping[str, Any]

  @nn.compact
  def __call__(self, bytes_BT: jax.Array) -> jax.Array:
    """Logits of the next byte, `[B, T, 256]`."""
    linear = functools.partial(Linear, self.width, False)
    embed = Embedding(256, self.width, name="bytes")
    places = Embedding(self.length, self.width, name="places")
    x = embed(bytes_BT) + places(jnp.arange(self.length)[None])
    mask = AttentionMask.of_decoder(jnp.ones((1, self.length), bool))
    for i in range(self.layers):
      h = RMSNorm(1e-6, name=f"attention_norm_{i}")(x)
      q, k, v = (linear(name=f"{name}_{i}")(h) for name in ("q", "k", "v"))
      x = x + linear(name=f"out_{i}")(attention(q, k, v, mask, self.heads))
      h = RMSNorm(1e-6, name=f"ffn_norm_{i}")(x)
      x = x + FeedForward(**self.feed_forward, name=f"ffn_{i}")(h)
    return attend(embed.table(), RMSNorm(1e-6, name="norm")(x))


def decoder(config: ConfigDict) -> Decoder:
  """The model of a config.

  Raises:
    ValueError: on an unknown variant.
  """
  if config.variant not in VARIANTS:
    raise ValueError(f"variant {config.variant!r} is none of {', '.join(VARIANTS)}")
  gated = VARIANTS[config.variant].gated
  ffn = dict(
    variant=config.variant,
    width=gated_width(config.ffn) if gated else config.ffn,
    use_bias=config.use_bias,
    beta=config.beta,
    learn_beta=config.learn_beta,
  )
  return Decoder(config.width, config.layers, config.heads, config.length, ffn)


def sums(model: Decoder, params: Any, rows: jax.Array) -> losses.Sums:
  """Negative log-likelihood of every byte given those before it in its row, in nats, and bytes."""
  logits: Any = model.apply({"params": params}, rows)
  return losses.next_token_sums(logits, {"tokens": rows, "weights": jnp.ones(rows.shape)})


def train(config: ConfigDict) -> dict[str, Any]:
  """The final loss on held-out text; the seed draws the weights and the order of the rows.

  Raises:
    ValueError: on a number out of range.
  """
  ranges.check(Fields, config, "--config.")
  train_rows, test_rows = corpus(config.length)
  test_rows = test_rows[: config.eval_rows]
  model, size = decoder(config), config.batch_size
  params = model.init(jax.random.key(config.seed), train_rows[:1])["params"]
  schedule = optim.schedule("linear", config.learning_rate, config.steps, config.steps // 10)
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params: Any, state: Any, rows: jax.Array) -> tuple[Any, Any]:
    grads = jax.grad(lambda params: losses.mean(*sums(model, params, rows)))(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state, rng = tx.init(params), np.random.default_rng(config.seed)
  for _ in range(config.steps):
    params, state = step(params, state, train_rows[rng.integers(len(train_rows), size=size)])
  score = jax.jit(functools.partial(sums, model))
  parts = [score(params, test_rows[i : i + size]) for i in range(0, len(test_rows), size)]
  total, count = (sum(map(float, x)) for x in zip(*parts, strict=True))
  return {
    "loss": total / count,
    "parameters": sum(x.size for x in jax.tree.leaves(params)),
    "seed": config.seed,
    "config": json.loads(config.to_json()),
  }


@functools.cache
def corpus(length: int) -> tuple[np.ndarray, np.ndarray]:
  """Rows of bytes of the training texts, and of the test texts."""
  splits = data.load("bbc", seed=0).splits
  train_rows, test_rows = (_rows(splits[part].texts, length) for part in ("train", "test"))
  return train_rows, test_rows


def _rows(texts: Any, length: int) -> np.ndarray:
  raw = np.frombuffer("\n".join(texts).encode(), np.uint8).astype(np.int32)
  return raw[: len(raw) // length * length].reshape(-1, length)


@runtime.readable_errors()
def main(argv: list[str]) -> None:
  runtime.set_up("~/.cache/peftjax")
  result = train(flags.FLAGS.config)
  print(json.dumps(result, indent=2))


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "configs/from_scratch.py[:VARIANT].")
  flags.mark_flag_as_required("config")
  app.run(main, flags_parser=runtime.parse_flags)
