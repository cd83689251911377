"""VeRA (Kopiczko et al. 2023, arXiv 2310.11454): trained vectors around shared random factors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from peftjax.core import paths, shared
from peftjax.core.adapted import axis_names, bare, check_bare
from peftjax.core.layout import Axes, Layout, axes_of
from peftjax.core.params import Mask, Params
from peftjax.core.ranges import Count, DType, Finite, Fraction, Length
from peftjax.core.stacks import of_stacks
from peftjax.methods.base import Method, trainable_mask
from peftjax.methods.vera_codec import VeraCodec
from peftjax.methods.vera_weight import PAIR, Projections, VeRA


@dataclasses.dataclass(frozen=True)
class VeRAMethod(Method):
  """VeRA: h = W x + Λ_b B Λ_d A x, with W, A and B frozen (Kopiczko et al. 2023, eq. 2).

  One random pair A [r, in], B [out, r] serves all targets, each with as many of its columns and
  rows as it has inputs and outputs; the vectors d [r] and b [out] of each are trained. No α.

  Args:
    rank: r; it may be above a matrix's own.
    targets: module names, regexes of whole paths, or `"all-linear"`.
    d_initial: initial value of d, with b = 0; the paper's ablation advises 0.1 or less.
    dropout: rate on the branch's input, rounded to 1/256.
    projection_seed: seed of A and B, uniform as in He et al. 2015: runs of one seed share them.
    dtype: dtype of d, b, A and B.

  Raises:
    ValueError: on a rank, dropout or d_initial out of range.
  """

  codec = VeraCodec()

  rank: Length = 256
  targets: str | Sequence[str] = ("query", "value")
  _: dataclasses.KW_ONLY
  d_initial: Finite = 0.1
  dropout: Fraction = 0.0
  projection_seed: Count = 0
  dtype: DType = jnp.float32

  def __post_init__(self) -> None:
    super().__post_init__()
    if not self.d_initial:
      raise ValueError(
        "d_initial 0 leaves d and b both zero, which have no gradient then; write 0.1"
      )

  def claims(self, params: Params, layout: Layout | None = None) -> list[str]:
    return paths.select(params, self.targets, layout=layout)

  def attach(self, key: jax.Array, params: Params, layout: Layout | None = None) -> Params:
    """Puts a `VeRA` around every targeted kernel; b = 0, so outputs stay.

    Args:
      key: not used; A and B come from `projection_seed`.
      params: plain, quantised or abstract (`jax.ShapeDtypeStruct`).
      layout: axes of kernels with more than two axes; see `peftjax.linen.layout`.

    Returns:
      `params` with the pair, a `Projections`, at "shared/vera" beside the model's own.

    Raises:
      ValueError: a target that matches nothing or is no kernel; a leaf that has an adapter already;
        a second pair; a kernel of more than two axes without `layout`.
    """
    if PAIR in shared.nodes(params):
      raise ValueError(
        f"{PAIR} is there already, and VeRA is one pair of factors for all that it adapts; write "
        "one pj.vera with the targets of both, or merge the other first: pj.merge(params)"
      )
    flat = paths.leaves(params)
    claimed = self.claims(params, layout)
    bases = {path: bare(flat[path]) for path in claimed}
    layout = of_stacks(params, layout)
    axes = {path: axes_of(path, tuple(base.shape), layout) for path, base in bases.items()}
    for path, base in bases.items():
      if path.split("/")[-1] == "embedding":
        raise ValueError(f"{path} is a table, which VeRA is not made for; target kernels")
      check_bare(path, base)
    sizes = {path: _sizes(base.shape, axes[path]) for path, base in bases.items()}
    abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(bases))
    create = lambda fn: jax.eval_shape(fn) if abstract else fn()

    def wrap(path: str, leaf: Any) -> Any:
      if path not in axes:
        return leaf
      stack = axes[path].stack(tuple(bases[path].shape))
      return VeRA(
        base=bases[path],
        d=create(lambda: jnp.full((*stack, self.rank), self.d_initial, self.dtype)),
        b=create(lambda: jnp.zeros((*stack, sizes[path][1]), self.dtype)),
        axes=axes[path],
        dropout=self.dropout,
        of=PAIR,
        names=axis_names(leaf),
      )

    pair = create(lambda: self._pair(*map(max, zip(*sizes.values(), strict=True))))
    return shared.add(paths.map_leaves(wrap, params), {PAIR: pair})

  def trainable(self, params: Params) -> Mask:
    return trainable_mask(params, set(self.claims(params)))

  def _pair(self, n_in: int, n_out: int) -> Projections:
    """A pair of factors, uniform with He's gain: A within ±√(6/in_max), B within ±√(6/r)."""
    keys = jax.random.split(jax.random.key(self.projection_seed))
    draw = lambda key, rows, columns: jax.random.uniform(
      key, (rows, columns), self.dtype, -math.sqrt(6 / columns), math.sqrt(6 / columns)
    )
    return Projections(a=draw(keys[0], self.rank, n_in), b=draw(keys[1], n_out, self.rank))


vera = VeRAMethod


def _sizes(shape: Sequence[int], axes: Axes) -> tuple[int, int]:
  """The numbers of inputs and outputs of a kernel."""
  return math.prod(shape[axis] for axis in axes.ins), math.prod(shape[axis] for axis in axes.outs)
