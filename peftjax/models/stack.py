"""The layers of a model one after the other, unrolled or as one scanned layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from peftjax.core import mesh, ranges
from peftjax.nn.linear import PRODUCT

_INPUT = "layer_input"
_policies = jax.checkpoint_policies

# The values that are kept of a layer for the backward pass, which computes the rest again: its
# input; also the results of its products with weights; its input, in host memory.
REMAT: Mapping[str, Callable[..., Any] | None] = {
  "layer": None,
  "products": _policies.save_only_these_names(PRODUCT),
  "offload": _policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[_INPUT],
    offload_src="device",
    offload_dst="pinned_host",
  ),
}


def run_layers(
  layer: type[nn.Module],
  config: Any,
  x: jax.Array,
  own: Sequence[Any],
  shared: Sequence[Any],
  *,
  remat: bool | str = False,
) -> tuple[jax.Array, Any]:
  """x through `config.layers` layers, submodules `layers_0`, `layers_1`, ... or, scanned, `layers`.

  Args:
    layer: made with the config; takes `(x, *own, *shared)` to `(x, y)`. It first calls
      `layer_input(x)`.
    own: arguments of each single layer, indexed or stacked by layer, or None.
    shared: arguments that all layers share.
    remat: compute each layer's activations again in the backward pass, except those that the policy
      of this name keeps; True is "layer".

  Returns:
    x, and the y of every layer: a tuple, or stacked.

  Raises:
    ValueError: no policy has that name.
  """
  x = mesh.rows(x)
  block = layer
  if remat:
    name = "layer" if remat is True else remat
    ranges.one_of("remat", name, REMAT)
    block = nn.remat(layer, prevent_cse=not config.scan_layers, policy=REMAT[name])
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


def layer_input(x: jax.Array) -> jax.Array:
  """The identity, which names the part of a layer that a policy of `REMAT` may move elsewhere."""
  return checkpoint_name(x, _INPUT)


def layer_keys(key: jax.Array | None, layers: int) -> jax.Array | None:
  """A key per layer.

  It depends on the layer's number alone, so scanned and unrolled draw the same masks.
  """
  if key is None:
    return None
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(layers))
