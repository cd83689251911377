"""AdamW whose moments take one byte each."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from peftjax.core.ranges import Count, Fraction, NotNegative, checked
from peftjax.optim.base import Epsilon, check_rate, decay_mask
from peftjax.quant import blockwise, codebooks

BLOCK = 256  # entries that share a scale
LARGE = 2**22  # entries from which temporaries are worth a loop


class Moment(flax.struct.PyTreeNode):
  """A moment of one array, quantised: value(codes) · absmax of the block.

  `codes`, uint8, has the parameter's own shape, so it takes the parameter's sharding. `absmax`,
  float32 [⌈n/256⌉], one for every 256 entries of the flattened parameter, is replicated.
  """

  codes: Any
  absmax: Any


class ScaleByAdam8bitState(flax.struct.PyTreeNode):
  """The state: `count` int32 []; `mu` and `nu` like the parameters, each a `Moment` or float32."""

  count: Any
  mu: Any
  nu: Any


@checked
def adamw8bit(
  learning_rate: optax.ScalarOrSchedule,
  b1: Fraction = 0.9,
  b2: Fraction = 0.999,
  eps: Epsilon = 1e-8,
  weight_decay: NotNegative = 0.0,
  *,
  min_8bit_size: Count = 4096,
) -> optax.GradientTransformation:
  """AdamW with block-wise 8-bit moments (Dettmers et al. 2022, arXiv 2110.02861, section 2).

  Every step dequantises m and v, computes in float32

      m ← b1 m + (1 − b1) g,  v ← b2 v + (1 − b2) g²,
      w ← w − lr · ((m / (1 − b1ᵗ)) / (√v / √(1 − b2ᵗ) + eps) + weight_decay · w)

  and quantises m to the nearest value of the signed dynamic map and v of the unsigned one, in
  blocks of 256 entries of the flattened array. Neither biases nor norm scales decay (`decay_mask`).
  The state takes two bytes and 1/32 per parameter, where AdamW's takes eight.

  It is bitsandbytes' `AdamW8bit`, except that its CPU library rounds to 65536 steps of [−1, 1]
  before it looks for the nearest value. That loses all magnitudes under 1.5e-5 of the block's
  largest, zero too: a row that never had a gradient would start to move. Here zero stays zero, as
  the padding rows of stacked adapters need.

  A parameter split over its last axis is gathered for its blocks; one split over its first axis
  is not, if a shard is a whole number of blocks.

  Args:
    learning_rate, b1, b2, eps, weight_decay: as in `optax.adamw`.
    min_8bit_size: arrays of fewer entries keep float32 moments.

  Raises:
    ValueError: on a number out of range, such as a `b1` or `b2` outside [0, 1).
  """
  check_rate(learning_rate)
  return optax.chain(
    _scale_by_adam8bit(b1, b2, eps, min_8bit_size),
    optax.add_decayed_weights(weight_decay, decay_mask),
    optax.scale_by_learning_rate(learning_rate),
  )


def quantize(x: jax.Array, *, signed: bool) -> Moment:
  """The nearest value of the dynamic map to each entry over its block's absmax, below on a tie."""
  blocks = _blocks(x.astype(jnp.float32))
  absmax = jnp.abs(blocks).max(1)
  inverse = 1.0 / jnp.maximum(absmax, blockwise.TINY)
  values = codebooks.dynamic_map(signed)
  between = (values[1:] + values[:-1]) / np.float32(2)
  codes = blockwise.nearest(blocks * inverse[:, None], between)
  return Moment(_unblock(codes, x.shape), absmax)


def dequantize(moment: Moment, *, signed: bool) -> jax.Array:
  """The values as float32, in the shape of the codes."""
  values = jnp.take(jnp.asarray(codebooks.dynamic_map(signed)), moment.codes, mode="clip")
  return _unblock(_blocks(values) * moment.absmax[:, None], moment.codes.shape)


def _scale_by_adam8bit(
  b1: float, b2: float, eps: float, min_8bit_size: int
) -> optax.GradientTransformation:
  """The update m̂ / (√v̂ + eps), float32."""

  def zero(param: jax.Array) -> Any:
    if param.size < min_8bit_size:
      return jnp.zeros(param.shape, jnp.float32)
    blocks = -(-param.size // BLOCK)
    return Moment(jnp.zeros(param.shape, jnp.uint8), jnp.zeros(blocks, jnp.float32))

  def init(params: Any) -> ScaleByAdam8bitState:
    zeros = lambda: jax.tree.map(zero, params)
    return ScaleByAdam8bitState(jnp.zeros([], jnp.int32), zeros(), zeros())

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, ScaleByAdam8bitState]:
    count = optax.safe_increment(state.count)
    correct1, correct2 = _correction(b1, count), _correction(b2, count)

    def step(g: jax.Array, mu: Any, nu: Any) -> tuple[jax.Array, Any, Any]:
      g = g.astype(jnp.float32)
      m, store_m = _opened(mu, signed=True)
      v, store_v = _opened(nu, signed=False)
      m = b1 * m + (1 - b1) * g
      v = b2 * v + (1 - b2) * g * g
      new = (m / correct1) / (jnp.sqrt(v) / jnp.sqrt(correct2) + eps)
      return new, store_m(m), store_v(v)

    steps = jax.tree.map(functools.partial(_by_layer, step), updates, state.mu, state.nu)
    part = lambda i: jax.tree.map(lambda _, three: three[i], updates, steps)
    return part(0), ScaleByAdam8bitState(count, part(1), part(2))

  return optax.GradientTransformation(init, update)


def _by_layer(step: Callable[..., Any], g: jax.Array, mu: Any, nu: Any) -> Any:
  """`step(g, mu, nu)`; a large stack of layers goes one after the other, in the memory of `g`.

  A step takes many temporaries, each as large as the array that is stepped.
  """
  layers, entries = g.shape[0] if g.ndim > 2 else 1, g.size
  if entries < LARGE or not isinstance(mu, Moment) or entries // layers % BLOCK:
    return step(g, mu, nu)
  split = lambda moment: moment.replace(absmax=moment.absmax.reshape(layers, -1))
  join = lambda moment: moment.replace(absmax=moment.absmax.reshape(-1))

  def body(i: jax.Array, carry: Any) -> Any:
    stepped = step(*jax.tree.map(lambda x: x[i], carry))
    return jax.tree.map(lambda whole, x: whole.at[i].set(x), carry, stepped)

  start = (g.astype(jnp.float32), split(mu), split(nu))
  new, mu, nu = jax.lax.fori_loop(0, layers, body, start)
  return new, join(mu), join(nu)


def _correction(b: float, count: jax.Array) -> jax.Array:
  """1 − bᵗ, without the cancellation that 1 − 0.999 has in float32."""
  return -jnp.expm1(count * np.float32(math.log(b))) if b else jnp.ones([])


def _opened(moment: Any, *, signed: bool) -> tuple[jax.Array, Any]:
  """A moment in float32, and the way its successor is stored."""
  if not isinstance(moment, Moment):
    return moment, lambda new: new
  return dequantize(moment, signed=signed), lambda new: quantize(new, signed=signed)


def _blocks(x: jax.Array) -> jax.Array:
  """Cuts `[...]` to `[blocks, 256]`, the last block filled up with zeros."""
  return jnp.pad(x.reshape(-1), (0, -x.size % BLOCK)).reshape(-1, BLOCK)


def _unblock(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  return blocks.reshape(-1)[: int(np.prod(shape))].reshape(shape)
