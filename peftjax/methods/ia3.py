"""IA3 (Liu et al. 2022, arXiv 2205.05638): learned scales of activations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from peftjax.core import paths
from peftjax.core.adapted import axis_names, bare, check_bare
from peftjax.core.layout import Axes, Layout, axes_of
from peftjax.core.params import Mask, Params
from peftjax.core.ranges import DType
from peftjax.core.stacks import of_stacks
from peftjax.methods.base import Method, trainable_mask
from peftjax.methods.ia3_codec import IA3Codec
from peftjax.methods.ia3_weight import IA3


@dataclasses.dataclass(frozen=True)
class IA3Method(Method):
  """IA3: h = l ⊙ (W x + b), or h = W (l ⊙ x) + b (Liu et al. 2022, section 3.3).

  The paper scales the outputs of the projections to keys and values, and the inputs of the second
  feed-forward matrix: `pj.ia3(["key", "value"], [r".*/layers(_\\d+)?/output/dense/kernel"])` for
  BERT, `pj.ia3(["k_proj", "v_proj"], ["down_proj"])` for Llama.

  Args:
    outputs, inputs: module names or regexes of the kernels that are scaled on either side.
    dtype: dtype of l.

  Raises:
    ValueError: if both are empty.
  """

  codec = IA3Codec()

  outputs: str | Sequence[str] = ()
  inputs: str | Sequence[str] = ()
  _: dataclasses.KW_ONLY
  dtype: DType = jnp.float32

  def __post_init__(self) -> None:
    super().__post_init__()
    if not self.outputs and not self.inputs:
      raise ValueError(
        'ia3 scales nothing; write e.g. pj.ia3(["key", "value"], [r".*/output/dense/kernel"])'
      )

  def claims(self, params: Params, layout: Layout | None = None) -> list[str]:
    flat, (outs, ins) = paths.leaves(params), self._kernels(params, layout)
    if both := set(outs) & set(ins):
      raise ValueError(f"{sorted(both)[0]} is named by outputs and by inputs: choose one")
    biases = [bias for path in outs if (bias := _bias(path)) in flat]
    return [*outs, *ins, *biases]

  def attach(self, key: jax.Array, params: Params, layout: Layout | None = None) -> Params:
    """Puts an `IA3` around every named kernel, with l = 1, so outputs stay.

    A bias beside a kernel whose outputs are scaled is scaled with them.

    Args:
      key: not used; nothing is random.
      params: plain, quantised or abstract (`jax.ShapeDtypeStruct`).
      layout: axes of kernels with more than two axes; see `peftjax.linen.layout`.

    Raises:
      ValueError: a name that matches nothing or no kernel, or matches both ways; a leaf that has
        an adapter already; a kernel of more than two axes without `layout`.
    """
    flat = paths.leaves(params)
    claimed = self.claims(params, layout)
    outs, ins = self._kernels(params, layout)
    shapes = {path: tuple(bare(flat[path]).shape) for path in (*outs, *ins)}
    layout = of_stacks(params, layout)
    axes = {path: axes_of(path, shape, layout) for path, shape in shapes.items()}
    for path in axes:
      if path.split("/")[-1] == "embedding":
        raise ValueError(f"{path} is a table, which IA3 is not made for; target kernels")
    kernel_of = {_bias(path): path for path in outs}

    def wrap(path: str, leaf: Any) -> Any:
      if path not in claimed:
        return leaf
      check_bare(path, leaf)
      if path in axes:
        return self._kernel(leaf, axes[path], path in ins)
      count = len(axes[kernel_of[path]].outs)
      own = Axes((), tuple(range(-count, 0)))
      return IA3(base=bare(leaf), l=None, axes=own, of=kernel_of[path], names=axis_names(leaf))

    return paths.map_leaves(wrap, params)

  def trainable(self, params: Params) -> Mask:
    return trainable_mask(params, set(self.claims(params)))

  def _kernels(self, params: Any, layout: Layout | None) -> tuple[list[str], list[str]]:
    """Paths whose outputs, and paths whose inputs, are scaled."""
    select = lambda x: paths.select(params, x, layout=layout) if x else []
    return select(self.outputs), select(self.inputs)

  def _kernel(self, leaf: Any, axes: Axes, inputs: bool) -> IA3:
    base = bare(leaf)
    stack = axes.stack(tuple(base.shape))
    size = math.prod(base.shape[axis] for axis in (axes.ins if inputs else axes.outs))
    make = lambda: jnp.ones((*stack, size), self.dtype)
    abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(base))
    scales = jax.eval_shape(make) if abstract else make()
    return IA3(base=base, l=scales, axes=axes, inputs=inputs, names=axis_names(leaf))


ia3 = IA3Method


def _bias(path: str) -> str:
  head, slash, _ = path.rpartition("/")
  return f"{head}{slash}bias"
