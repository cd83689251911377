"""The loss of next tokens from the last hidden state, without all logits at any time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from peftjax.core import tree
from peftjax.core.adapted import Adapted
from peftjax.core.dropout import random_bytes
from peftjax.core.weight import Weight
from peftjax.losses import Sums
from peftjax.quant.product import opened
from peftjax.quant.weight import Quantized

Logits = Callable[[Any, jax.Array], jax.Array]  # takes a head and rows [M, D]; gives [M, V]

# Logits of a chunk, float32. Against all logits at once, on two cores at V = 49,152, D = 576 and
# 512 tokens: 32 MiB take 1.07 of the time, as the head is read for each chunk, and 0.26 of the
# temporaries; 40 MiB 1.00 and 0.35; 64 MiB 0.95 and 0.51.
CHUNK_BYTES = 40 * 2**20
# For each row, however many there are: on a mesh one row may be all that a device has, and products
# of fewer tokens leave it idle.
CHUNK_TOKENS = 64


class Chunk(NamedTuple):
  """M = B·C rows, C tokens of each text; `[n, ...]` of all chunks.

  Attributes:
    x: `[M, D]`.
    random: uint8 `[M, D]`, bytes of the head's dropout, or None.
    tokens: int `[M]`, to be predicted.
    weights: float32 `[M]`.
  """

  x: Any
  random: Any
  tokens: Any
  weights: Any


def chunk_length(batch: int, length: int, vocab: int) -> int:
  """C, how many tokens of each of `batch` texts make a chunk; chunks are as even as they can be."""
  most = max(CHUNK_BYTES // (4 * batch * vocab), CHUNK_TOKENS)
  return -(-length // -(-length // most))


def chunked_sums(
  logits_of: Logits,
  head: Any,
  x_BTD: Float[Array, "B T D"],
  tokens: Int[Array, "B T"],
  weights: Float[Array, "B T"],
  size: int,
) -> Sums:
  """`losses.next_token_sums` of z = head(x): Σ w (log Σ_v exp z_v − z_token) and Σ w.

  Logits exist for `size` tokens of each text at a time. Where the loss is differentiated, a chunk's
  gradients are computed beside its loss, so that no product is computed twice: with respect to x,
  `[B, T, D]`, and summed over the chunks, in float32, with respect to the head's trained leaves.
  Chunks without a weight are skipped. Texts are cut along T, since their rows may lie on several
  devices.

  Args:
    logits_of: `(head, rows)` to logits `[M, V]`.
    head: an array or any `Weight`; its dropout acts on x as it would on all rows at once.
    x_BTD: at place t, the features of token t + 1.
    tokens, weights: see `losses.next_token`.
    size: C.
  """
  head = _opened(head, x_BTD)
  after = lambda values: jnp.pad(values[:, 1:], ((0, 0), (0, 1)))  # the last place predicts nothing
  wanted = after(jnp.asarray(weights, jnp.float32))
  random = None
  if isinstance(head, Adapted) and head.key is not None:
    random, head = random_bytes(head.key, x_BTD.shape), head.replace(key=None)
  whole = Chunk(x_BTD, random, after(tokens), wanted)
  chunks = jax.tree.map(partial(_cut, size=size), whole)
  return _total(logits_of, head, chunks), wanted.sum()


def _opened(head: Any, x: jax.Array) -> Any:
  """The head in the dtype of x and, if quantised, dense: once, and not in each chunk.

  Not before x is there, or it would be held through the layers (see `quant.product`).
  """
  if isinstance(head, Adapted):
    return head.replace(base=_opened(head.base, x))
  if isinstance(head, Quantized):
    x = jax.lax.stop_gradient(x)
    return opened(head.fmt, head.axis, head.names or (), head.codes, head.scales, x)
  return head if isinstance(head, Weight) else head.astype(x.dtype)


def _cut(values: jax.Array, size: int) -> jax.Array:
  """Cuts `[B, T, ...]` to `[n, B·C, ...]`, filled up with zeros."""
  batch, length, *rest = values.shape
  count = -(-length // size)
  values = jnp.pad(values, ((0, 0), (0, count * size - length), *[(0, 0) for _ in rest]))
  values = jnp.moveaxis(values.reshape(batch, count, size, *rest), 1, 0)
  return values.reshape(count, batch * size, *rest)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(logits_of: Logits, head: Any, chunks: Chunk) -> jax.Array:
  """The total Σ w · loss."""

  def step(at: jax.Array, values: jax.Array, chunk: Chunk) -> jax.Array:
    logits = logits_of(_with(head, chunk.random), chunk.x).astype(jnp.float32)
    with jax.named_scope("loss"):
      found = optax.losses.softmax_cross_entropy_with_integer_labels(logits, chunk.tokens)
    return values.at[at].set(found)

  values = _over_used(step, jnp.zeros_like(chunks.weights), chunks)
  return (values * chunks.weights).sum()


def _over_used(step: Callable[..., Any], start: Any, chunks: Chunk) -> Any:
  """`start` after `step(number, it, chunk)` for every chunk that has a weight.

  The loop is over these chunks alone: out of a conditional in a loop over all chunks XLA moves
  nothing, so a head that is split over devices would be gathered anew for each.
  """
  used = (chunks.weights != 0).any(1)
  order = jnp.argsort(~used)

  def body(i: jax.Array, carry: Any) -> Any:
    at = order[i]
    return step(at, carry, jax.tree.map(lambda values: values[at], chunks))

  return jax.lax.fori_loop(0, used.sum(), body, start)


def _forward(logits_of: Logits, head: Any, chunks: Chunk) -> Any:
  """The total, and the gradients that a cotangent of 1 would have."""
  is_input = lambda x: isinstance(x, jax.custom_derivatives.CustomVJPPrimal)
  value, perturbed = (
    jax.tree.map(lambda x, name=name: getattr(x, name), (head, chunks), is_leaf=is_input)
    for name in ("value", "perturbed")
  )
  (head, chunks), (trained, moved) = value, perturbed
  own, frozen = tree.partition(head, trained)

  def step(at: jax.Array, carry: Any, chunk: Chunk) -> Any:
    sums, values, dx = carry

    def logits(own: Any, *x: jax.Array) -> jax.Array:
      return logits_of(_with(tree.combine(own, frozen), chunk.random), *x or (chunk.x,))

    z, back = jax.vjp(logits, own, *(chunk.x for _ in dx))
    found, dz = _cross_entropy(z, chunk)
    d_own, *d_x = back(dz)
    sums = jax.tree.map(lambda total, d: total + d.astype(jnp.float32), sums, d_own)
    return (
      sums,
      values.at[at].set(found),
      [old.at[at].set(d) for old, d in zip(dx, d_x, strict=True)],
    )

  zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), own)
  moving = [jnp.zeros_like(chunks.x)] if moved.x else []
  start = (zeros, jnp.zeros_like(chunks.weights), moving)
  sums, values, dx = _over_used(step, start, chunks)
  like = jax.tree.map(lambda p: jnp.zeros((), p.dtype), own)
  return (values * chunks.weights).sum(), (sums, like, dx, values)


def _backward(logits_of: Logits, saved: Any, g: jax.Array) -> Any:
  sums, like, dx, values = saved
  head = jax.tree.map(lambda d, p: (g * d).astype(p.dtype), sums, like)
  x = (g * dx[0].astype(jnp.float32)).astype(dx[0].dtype) if dx else None
  return head, Chunk(x, None, None, g * values)


_total.defvjp(_forward, _backward, symbolic_zeros=True)


@jax.named_scope("loss")
def _cross_entropy(logits: jax.Array, chunk: Chunk) -> tuple[jax.Array, jax.Array]:
  """−log softmax(z)[token] for each row, and w · (softmax(z) − onehot(token)) in the dtype of z."""
  z, tokens = logits.astype(jnp.float32), chunk.tokens[:, None]
  top = z.max(-1, keepdims=True)
  exp = jnp.exp(z - top)
  total = exp.sum(-1, keepdims=True)
  values = jnp.log(total) - (jnp.take_along_axis(z, tokens, axis=-1) - top)
  hit = jax.lax.broadcasted_iota(tokens.dtype, z.shape, 1) == tokens
  weights = chunk.weights[:, None]
  dz = exp * (weights / total) - hit * weights
  return values[:, 0], dz.astype(logits.dtype)


def _with(head: Any, random: jax.Array | None) -> Any:
  """The head with the bytes of its dropout that fall on a chunk."""
  return head if random is None else head.replace(key=random)
