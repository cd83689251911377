"""The common part of LoRA and its kin: a product of two thin factors beside a targeted weight."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from peftjax.core import paths
from peftjax.core.adapted import axis_names, bare, check_bare
from peftjax.core.layout import Axes, Layout, axes_of
from peftjax.core.params import Mask, Params
from peftjax.core.ranges import DType, Fraction, Positive, Size
from peftjax.core.stacks import of_stacks
from peftjax.methods import lora_init
from peftjax.methods.base import Method, trainable_mask
from peftjax.methods.lora_weight import LoRA


@dataclasses.dataclass(frozen=True)
class LowRank(Method):
  """h = W x + s B A x: the fields of every low-rank method, and how it attaches.

  Args:
    rank: r.
    alpha: α; the branch is scaled by s = α/r.
    targets: module names, regexes of whole paths, or `"all-linear"`.
    dropout: rate on the branch's input, rounded to 1/256.
    rank_pattern, alpha_pattern: patterns to another r or α; the first match wins. The layers of a
      scanned stack go by the unrolled model's names, and experts likewise: `.*/experts_3/.*`.
    divide_rank: each of E stacked experts has rank r/E, rounded down and 1 at least, so that all of
      them have as many parameters as one matrix; the scale is that of this rank.
    dtype: dtype of the trained arrays.
  """

  # The leaf that every targeted weight becomes.
  leaf: ClassVar[Any] = LoRA

  rank: Size = 8
  alpha: Positive = 16.0
  targets: str | Sequence[str] = ("query", "value")
  _: dataclasses.KW_ONLY
  dropout: Fraction = 0.0
  rank_pattern: Mapping[str, Size] = dataclasses.field(default_factory=dict)
  alpha_pattern: Mapping[str, Positive] = dataclasses.field(default_factory=dict)
  divide_rank: bool = False
  dtype: DType = jnp.float32

  def claims(self, params: Params, layout: Layout | None = None) -> list[str]:
    return paths.select(params, self.targets, layout=layout)

  def attach(self, key: jax.Array, params: Params, layout: Layout | None = None) -> Params:
    """Puts a `leaf` around every targeted weight; the branch is 0, so outputs stay.

    Args:
      key: folded with each leaf's path, so another rule elsewhere changes nothing here.
      params: plain, quantised or abstract (`jax.ShapeDtypeStruct`).
      layout: axes of kernels with more than two axes; see `peftjax.linen.layout`.

    Raises:
      ValueError: a target that matches nothing or is not a matrix; a rank above the matrix's; a
        pattern that matches no target; a leaf that has an adapter already; a kernel of more than
        two axes without `layout`; `divide_rank` without experts among the targets.
    """
    flat = paths.leaves(params)
    layout = of_stacks(params, layout)
    claimed = self.claims(params, layout)
    shapes = {p: tuple(bare(flat[p]).shape) for p in claimed}
    axes = {p: axes_of(p, shape, layout) for p, shape in shapes.items()}
    layers = {p: paths.layer_paths(p, a.stack(shapes[p])) for p, a in axes.items()}
    every = [layer for group in layers.values() for layer in group]
    paths.check_all_used(self.rank_pattern, every, "rank_pattern")
    paths.check_all_used(self.alpha_pattern, every, "alpha_pattern")
    if self.divide_rank and not any(paths.experts(p, a.stack(shapes[p])) for p, a in axes.items()):
      raise ValueError(
        "divide_rank=True divides the rank among stacked experts, and no target is a kernel of any "
        "(a path with a module called experts); leave it out, or target one"
      )

    def wrap(path: str, leaf: Any) -> Any:
      return self._wrap(key, path, leaf, axes[path], layers[path]) if path in axes else leaf

    return paths.map_leaves(wrap, params)

  def trainable(self, params: Params) -> Mask:
    return trainable_mask(params, set(self.claims(params)))

  def varies(self) -> frozenset[str]:
    return frozenset({"rank", "alpha"})

  def _factors(
    self, key: jax.Array, rank: int, n_in: int, n_out: int, is_table: bool
  ) -> dict[str, tuple[jax.Array, int | None]]:
    """The leaf's arrays for one layer beside its base, whose product is zero, with r's axis."""
    a, b = lora_init.factors(key, self._init(), rank, n_in, n_out, is_table, self.dtype)
    return {"a": (a, -2), "b": (b, -1)}

  def _init(self) -> str:
    """The initialisation of A and B; see `lora_init.factors`."""
    return "kaiming"

  def _scale(self, alpha: float, rank: int) -> float:
    return alpha / rank

  def _finish(self, path: str, weight: Any) -> Any:
    """The leaf with all that depends on its base or its kind."""
    return weight

  def _wrap(self, key: jax.Array, path: str, leaf: Any, axes: Axes, layers: list[str]) -> Any:
    check_bare(path, leaf)
    shape = tuple(bare(leaf).shape)
    stack = axes.stack(shape)
    n_in, n_out = (math.prod(shape[axis] for axis in group) for group in axes)
    ranks = [paths.first_match(self.rank_pattern, layer, self.rank) for layer in layers]
    if self.divide_rank and (experts := paths.experts(path, stack)):
      ranks = [max(1, rank // experts) for rank in ranks]
    for layer, rank in zip(layers, ranks, strict=True):
      if not 1 <= rank <= min(n_in, n_out):
        raise ValueError(
          f"{layer}: rank {rank} does not fit a {n_in} x {n_out} matrix; "
          f"write a rank between 1 and {min(n_in, n_out)}"
        )
    scales = [
      self._scale(paths.first_match(self.alpha_pattern, layer, self.alpha), rank)
      for layer, rank in zip(layers, ranks, strict=True)
    ]
    is_table = path.split("/")[-1] == "embedding"
    width = max(ranks)

    def make(key: jax.Array, base: Any) -> Any:
      drawn = [
        self._factors(paths.fold_in_path(key, layer), rank, n_in, n_out, is_table)
        for layer, rank in zip(layers, ranks, strict=True)
      ]

      def stacked(name: str) -> jax.Array:
        axis = drawn[0][name][1]
        pad = lambda x: jnp.pad(
          x, [(0, width - x.shape[i] if i == axis else 0) for i in range(-x.ndim, 0)]
        )
        rows = jnp.stack([pad(factors[name][0]) for factors in drawn])
        return rows.reshape(*stack, *rows.shape[1:])

      weight = self.leaf(
        base=base,
        **{name: stacked(name) for name in drawn[0]},
        scale=jnp.asarray(scales, jnp.float32).reshape(stack),
        rank=jnp.asarray(ranks, jnp.int32).reshape(stack),
        axes=axes,
        dropout=self.dropout,
        names=axis_names(leaf),
      )
      return self._finish(path, weight)

    base = bare(leaf)
    abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(base))
    return jax.eval_shape(make, key, base) if abstract else make(key, base)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankStabilized(LowRank):
  """A low-rank method whose scale may be that of rsLoRA.

  Args:
    rslora: scale by α/√r instead (Kalajdzievski 2023, arXiv 2312.03732, theorem 3.2).
  """

  rslora: bool = False

  def _scale(self, alpha: float, rank: int) -> float:
    return alpha / math.sqrt(rank) if self.rslora else super()._scale(alpha, rank)

  def peft_options(self) -> dict[str, Any]:
    return {"rslora": self.rslora}
