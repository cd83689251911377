"""`Linear` and `Embedding`, whose weights may be any `Weight`."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from peftjax.core.adapted import Adapted
from peftjax.core.einsum import attend, linear, shift, take
from peftjax.core.per_row import PerRow
from peftjax.core.tied import Tied
from peftjax.core.weight import warn_unbridged
from peftjax.losses import Sums, next_token_sums
from peftjax.nn.chunked_loss import chunk_length, chunked_sums
from peftjax.nn.soft_cap import soft_cap

normal = nn.initializers.normal(0.02)

PRODUCT = "product"  # policies of rematerialisation know the result of a `Linear` by this name


def weight(module: nn.Module, name: str, init: Any, shape: tuple[int, ...]) -> Any:
  """The parameter as it is in the tree. (`Module.param` would unbox, so materialise, it.)"""
  if module.has_variable("params", name):
    found: Any = module.get_variable("params", name)
    if isinstance(found, Adapted):  # codes alone are computed with as they should be
      warn_unbridged(found, f"of {'/'.join(module.path)}")
    return found
  return module.param(name, init, shape, jnp.float32)


class Linear(nn.Module):
  """y = x W + b with W `[in, out]`, in the dtype of x."""

  features: int
  use_bias: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = weight(self, "kernel", normal, (x.shape[-1], self.features))
    y = checkpoint_name(linear(x, kernel), PRODUCT)
    if not self.use_bias:
      return y
    return shift(y, weight(self, "bias", nn.initializers.zeros, (self.features,)))


class Embedding(nn.Module):
  """Rows of a `[V, D]` table, in `dtype`."""

  vocab: int
  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, ids: jax.Array) -> jax.Array:
    return take(self.table(), ids).astype(self.dtype)

  @nn.nowrap
  def table(self) -> Any:
    """The table itself, for a tied head."""
    return weight(self, "embedding", normal, (self.vocab, self.features))


class Head(nn.Module):
  """Logits x W with W `[D, V]`, or, where the tree has a `Tied` in its place, x Eᵀ.

  E is the table `[V, D]` that the module is given. A tree with nothing in that place is tied too.
  With a cap, `soft_cap` of these, in float32.
  """

  vocab: int
  of: str = ""  # the path of the table, if `init` shall tie it
  cap: float | None = None

  @nn.compact
  def __call__(self, x: jax.Array, table: Any) -> jax.Array:
    if self._bare():
      return self._capped(attend(table, x))
    init = (lambda *_: Tied(self.of)) if self.of else normal
    kernel = weight(self, "kernel", init, (x.shape[-1], self.vocab))
    return self._capped(attend(table, x) if isinstance(kernel, Tied) else linear(x, kernel))

  def sums(
    self,
    x_BTD: Float[Array, "B T D"],
    table: Any,
    tokens: Int[Array, "B T"],
    weights: Float[Array, "B T"],
  ) -> Sums:
    """`losses.next_token_sums` of the logits, a chunk of which exists at a time.

    Raises:
      ValueError: if there is not a weight for every token.
    """
    if weights.shape != tokens.shape:
      raise ValueError(
        f"loss_weights {weights.shape} for tokens {tokens.shape}; give every token a weight"
      )
    batch, length = tokens.shape
    size = chunk_length(batch, length, self.vocab)
    # A few logits take one product. An adapter beside the module needs them whole: it changes what
    # the module's call returns. One that differs by row needs the rows, and chunks have none.
    by_row = isinstance(self.get_variable("params", "kernel", None), PerRow)
    beside = self.has_variable("params", "adapter")
    if size >= length or self.is_initializing() or beside or by_row:
      return next_token_sums(self(x_BTD, table), dict(tokens=tokens, weights=weights))
    kernel = None if self._bare() else self.get_variable("params", "kernel")
    if kernel is None or isinstance(kernel, Tied):
      logits_of, head = (lambda w, x: self._capped(attend(w, x))), table
    else:
      logits_of, head = (lambda w, x: self._capped(linear(x, w))), kernel
    return chunked_sums(logits_of, head, x_BTD, tokens, weights, size)

  def _capped(self, logits: jax.Array) -> jax.Array:
    return logits if self.cap is None else soft_cap(logits.astype(jnp.float32), self.cap)

  def _bare(self) -> bool:
    """True if the tree has nothing in the place of a kernel."""
    has = self.is_initializing() or self.has_variable("params", "kernel")
    return bool(self.of) and not has
