"""Text generation: one program that reads the prompts and writes token after token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from peftjax.core import per_row
from peftjax.core.params import Params
from peftjax.linen import apply
from peftjax.models import limits
from peftjax.models.cache import Cache
from peftjax.nn import virtual


def generate(
  model: nn.Module,
  params: Params,
  tokens: Int[Array, "B T"],
  mask: Bool[Array, "B T"] | None = None,
  *,
  max_new_tokens: int,
  temperature: float = 0.0,
  top_p: float = 1.0,
  stop: Sequence[int] = (),
  pad_id: int = 0,
  key: jax.Array | None = None,
  rows: Any | None = None,
) -> tuple[Int[Array, "B N"], Int[Array, " B"]]:
  """Continues each prompt, or answers it, until a stop token or for `max_new_tokens`.

  Args:
    model: a decoder of this library, or an encoder-decoder, whose encoder reads the prompts.
    params: dense, quantised, with or without adapters.
    tokens: prompts, padded on the left.
    mask: true on their tokens; by default all true.
    temperature: 0 takes the likeliest token; else tokens are drawn from softmax(logits / t).
    top_p: draw only among the likeliest tokens whose probabilities sum up to it
      (Holtzman et al. 2020, arXiv 1904.09751, section 3.1).
    stop: ids that end a text; they are part of the result.
    pad_id: fills the places after an ended text.
    key: for drawing.
    rows: `[B]` int, the adapter of `pj.stack_adapters` for each prompt.

  Returns:
    The new tokens, N = `max_new_tokens`, and how many of them each text has.

  Raises:
    ValueError: if prompt and new tokens exceed the model's positions, an id its table, or a number
      is out of range; if `rows` do not fit the adapters or the prompts.
  """
  length = tokens.shape[1] + max_new_tokens + virtual.length(params)
  if max_new_tokens < 1 or length > model.config.max_length:
    raise ValueError(
      f"{tokens.shape[1]} tokens of prompt and {max_new_tokens} new ones do not fit in the "
      f"{model.config.max_length} positions of this model"
    )
  if not 0 <= temperature < math.inf:
    raise ValueError(f"temperature {temperature} is not a number of at least 0")
  if not 0 < top_p <= 1:
    raise ValueError(f"top_p {top_p} is not above 0 and at most 1")
  if temperature and key is None:
    raise ValueError("temperature above 0 draws tokens: pass key=jax.random.key(...)")
  limits.check(model.config, tokens, what="the prompts")
  index = None if rows is None else per_row.checked(params, rows)
  mask = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask, bool)
  return _generate(
    model,
    params,
    jnp.asarray(tokens),
    mask,
    jax.random.key(0) if key is None else key,
    jnp.float32(temperature),
    jnp.float32(top_p),
    index,
    max_new_tokens=max_new_tokens,
    stop=tuple(stop),
    pad_id=pad_id,
    greedy=not temperature,
  )


@partial(jax.jit, static_argnames=("model", "max_new_tokens", "stop", "pad_id", "greedy"))
def _generate(
  model: nn.Module,
  params: Any,
  tokens: jax.Array,
  mask: jax.Array,
  key: jax.Array,
  temperature: jax.Array,
  top_p: jax.Array,
  rows: jax.Array | None,
  *,
  max_new_tokens: int,
  stop: tuple[int, ...],
  pad_id: int,
  greedy: bool,
) -> tuple[jax.Array, jax.Array]:
  if rows is not None:
    params = per_row.pick(params, rows)  # once, and not for each token
  batch, length = tokens.shape
  stops = jnp.asarray(stop or (-1,), jnp.int32)
  pick = lambda logits, i: (
    logits.argmax(-1).astype(jnp.int32)
    if greedy
    else draw(jax.random.fold_in(key, i), logits, temperature, top_p)
  )

  def going_on(carry: Any) -> jax.Array:
    i, _, _, ended, *_ = carry
    return (i < max_new_tokens) & ~ended.all()

  def one(carry: Any) -> Any:
    i, new, lengths, ended, logits, cache = carry
    token = jnp.where(ended, pad_id, pick(logits, i))
    new = jax.lax.dynamic_update_slice(new, token[:, None], (jnp.int32(0), i))
    lengths += (~ended).astype(jnp.int32)
    ended |= (token[:, None] == stops[None, :]).any(1)
    logits, cache = apply(model, params, token[:, None], cache=cache)
    return i + 1, new, lengths, ended, logits[:, -1], cache

  decoder = getattr(model.config, "decoder", None)  # of a model that reads the prompts before
  read = virtual.prompt_length(params) + length if decoder is None else 1
  cache = Cache.empty(decoder or model.config, batch, read + max_new_tokens)
  logits, cache = apply(model, params, tokens, mask, cache=cache)
  carry = (
    jnp.int32(0),
    jnp.full((batch, max_new_tokens), pad_id, jnp.int32),
    jnp.zeros(batch, jnp.int32),
    jnp.zeros(batch, bool),
    logits[:, -1],
    cache,
  )
  _, new, lengths, *_ = jax.lax.while_loop(going_on, one, carry)
  return new, lengths


def draw(key: jax.Array, logits_BV: jax.Array, temperature: Any, top_p: Any) -> jax.Array:
  """Tokens `[B]` from softmax(logits / temperature), among the likeliest of total `top_p`."""
  logits_BV = logits_BV / temperature
  order = jnp.argsort(-logits_BV, axis=-1)
  ranked = jnp.take_along_axis(logits_BV, order, axis=-1)
  probability = jax.nn.softmax(ranked)
  before = jnp.cumsum(probability, axis=-1) - probability  # the likeliest one is always in
  chosen = jax.random.categorical(key, jnp.where(before < top_p, ranked, -jnp.inf))
  return jnp.take_along_axis(order, chosen[:, None], axis=-1)[:, 0].astype(jnp.int32)
