"""The layers of a model one after the other, unrolled or as one scanned layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from peftjax.core import mesh


def run_layers(
  layer: type[nn.Module],
  config: Any,
  x: jax.Array,
  own: Sequence[Any],
  shared: Sequence[Any],
  *,
  remat: bool = False,
) -> tuple[jax.Array, Any]:
  """x through `config.layers` layers, submodules `layers_0`, `layers_1`, ... or, scanned, `layers`.

  Args:
    layer: made with the config; `(x, *own, *shared)` to `(x, y)`.
    own: what each layer has for itself, indexed or stacked by layer, or None.
    shared: what all have in common.
    remat: compute each layer's activations again in the backward pass.

  Returns:
    x, and the y of every layer: a tuple, or stacked.
  """
  x = mesh.rows(x)
  block = nn.remat(layer, prevent_cse=not config.scan_layers) if remat else layer
  if config.scan_layers:
    layers = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(*[0] * len(own), *[nn.broadcast] * len(shared)),
      length=config.layers,
    )
    return layers(config, name="layers")(x, *own, *shared)
  made = []
  for i in range(config.layers):
    mine = (None if values is None else values[i] for values in own)
    x, y = block(config, name=f"layers_{i}")(x, *mine, *shared)
    made.append(y)
  return x, tuple(made)


def layer_keys(key: jax.Array | None, layers: int) -> jax.Array | None:
  """A key a layer.

  It depends on the layer's number alone, so scanned and unrolled draw the same masks.
  """
  if key is None:
    return None
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(layers))
