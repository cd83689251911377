"""`Linear` and `Embedding`, whose weights may be any `Weight`."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from peftjax.core.einsum import linear, take

normal = nn.initializers.normal(0.02)


def weight(module: nn.Module, name: str, init: Any, shape: tuple[int, ...]) -> Any:
  """The parameter as it is in the tree. (`Module.param` would unbox, so materialise, it.)"""
  if module.has_variable("params", name):
    return module.get_variable("params", name)
  return module.param(name, init, shape, jnp.float32)


class Linear(nn.Module):
  """y = x W + b with W `[in, out]`, in the dtype of x."""

  features: int
  use_bias: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = weight(self, "kernel", normal, (x.shape[-1], self.features))
    if not self.use_bias:
      return linear(x, kernel)
    bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
    y = linear(x, kernel)
    return y + bias.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


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
