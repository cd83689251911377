"""Prefix tuning (Li & Liang 2021, arXiv 2101.00190)."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from peftjax.core import given, paths
from peftjax.core.layout import Layout, axes_of
from peftjax.core.params import Mask, Params
from peftjax.core.ranges import DType, Length, NotNegative
from peftjax.core.stacks import of_stacks
from peftjax.methods.adapters import put
from peftjax.methods.base import Method, claimed_mask
from peftjax.nn.virtual import Prefix

# The kernels that make the keys of our models' attention, and how many times as wide they are.
_KEYS: Mapping[str, int] = {"self/key": 1, "self_attn/k_proj": 1, "attn/c_attn": 3}


@dataclasses.dataclass(frozen=True)
class PrefixMethod(Method):
  """Prefix tuning: softmax(q [P_k; K]ᵀ/√H) [P_v; V] (Li & Liang 2021, section 4.2).

  Every layer attends to P trained keys and values before those of the text, whose positions come
  after them. They are trained as they are; the paper's multilayer perceptron, which makes them
  from a smaller matrix and is thrown away afterwards, is left out (PEFT's prefix_projection=False).

  Not the identity at first: a prefix takes its share of every softmax.

  Args:
    length: P.
    deviation: standard deviation of the normal distribution of the initial keys and values.
    dtype: dtype of both.

  Raises:
    ValueError: on a number out of range.
  """

  length: Length = 20
  _: dataclasses.KW_ONLY
  deviation: NotNegative = 0.02
  dtype: DType = jnp.float32

  def claims(self, params: Params, layout: Layout | None = None) -> list[str]:
    return [p for p in paths.leaves(params) if re.fullmatch(r".*/prefix/(keys|values)", p)]

  def attach(self, key: jax.Array, params: Params, layout: Layout | None = None) -> Params:
    """`params` with the parameter `prefix` in every attention module.

    Args:
      key: folded with the path of each layer's module.
      params: parameters of an encoder or decoder of this library; plain, quantised or abstract.
        Another model's that names its modules alike is refused by `pj.apply`, as none of them reads
        a prefix.
      layout: axes where layers are scanned, if the tree does not tell; see `peftjax.linen.layout`.

    Raises:
      ValueError: the model has no attention module that reads a prefix, or one has a prefix.
    """
    given.check_params(params)
    flat, found, layout = paths.leaves(params), False, of_stacks(params, layout)
    if self.claims(params):
      raise ValueError(f"{self.claims(params)[0]}: this model has a prefix already")
    abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params))
    for path, leaf in flat.items():
      module, times = _attention(path)
      if not times:
        continue
      found = True
      shape = tuple(leaf.shape)
      stack = axes_of(path, shape, layout).stack(shape)
      make = functools.partial(self._make, module=module, stack=stack, width=shape[-1] // times)
      node = jax.eval_shape(make, key) if abstract else make(key)
      params = put(params, [*module.split("/"), "prefix"], node)
    if not found:
      raise ValueError(
        f"no attention of these parameters reads a prefix; those of this library do, whose keys "
        f"are made by {', '.join(f'.../{name}/kernel' for name in _KEYS)}"
      )
    return params

  def trainable(self, params: Params) -> Mask:
    return claimed_mask(self, params)

  def _make(self, key: jax.Array, module: str, stack: tuple[int, ...], width: int) -> Prefix:
    layers = paths.layer_paths(module, stack)
    keys = jnp.stack([paths.fold_in_path(key, layer) for layer in layers])
    draw = lambda k: self.deviation * jax.random.normal(k, (2, self.length, width), self.dtype)
    drawn = jax.vmap(draw)(keys).reshape(*stack, 2, self.length, width)
    return Prefix(keys=drawn[..., 0, :, :], values=drawn[..., 1, :, :])


prefix = PrefixMethod


def _attention(path: str) -> tuple[str, int]:
  """The attention module of a kernel that makes keys, and how many times as wide it is."""
  for name, times in _KEYS.items():
    if path.endswith(f"/{name}/kernel"):
      return path.removesuffix(f"/{name.split('/')[1]}/kernel"), times
  return "", 0
