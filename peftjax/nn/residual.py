"""The residual addition of a block."""

import flax.linen as nn
import jax

from peftjax.core import mesh


class Residual(nn.Module):
  """stream + update: a module without parameters, so that an adapter can name the place."""

  @nn.compact
  def __call__(self, update: jax.Array, stream: jax.Array) -> jax.Array:
    return mesh.rows(stream + mesh.rows(update))
