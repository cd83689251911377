"""`quantize`: arrays of a parameter tree to quantised weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peftjax.core import paths, shared, tied, tree
from peftjax.core.adapted import Adapted, bare, lender
from peftjax.core.layout import Axes, ConvAxes, Layout, TableAxes, axes_of
from peftjax.core.params import Params
from peftjax.core.stacks import of_stacks
from peftjax.core.weight import Weight
from peftjax.quant import blockwise, double, folded
from peftjax.quant.folded import Folded
from peftjax.quant.formats import Format
from peftjax.quant.weight import Quantized


def quantize(
  params: Params,
  fmt: Format,
  where: str | Sequence[str] = "all-linear",
  layout: Layout | None = None,
) -> Params:
  """`params` with the matrices that `where` selects in four or eight bits.

  Quantise first, then attach an adapter: a LoRA around a quantised base is QLoRA.

  Args:
    params: a tree of arrays, concrete or abstract (`jax.ShapeDtypeStruct`).
    fmt: `nf4(...)`, `fp4(...)`, `int4(...)` or `int8(...)`.
    where: module names, regexes of whole paths, or `"all-linear"` (no embeddings, no heads).
    layout: axes of kernels with more than two axes; see `peftjax.linen.layout`.

  Raises:
    ValueError: before anything is computed: a target that matches nothing, is not a matrix, is
      quantised or has an adapter already, or has an odd contraction size; and, before the tree is
      made, a weight with NaN or infinite entries.
  """
  flat, layout = paths.leaves(params), of_stacks(params, layout)
  chosen = paths.select(params, where, arrays=True, layout=layout)
  axes = {path: check(path, flat[path], fmt, layout) for path in sorted(chosen)}

  def make(path: str, leaf: Any) -> Any:
    return quantize_kernel(path, bare(leaf), fmt, axes[path]) if path in axes else leaf

  return paths.map_leaves(make, params)


def requantize(params: Params) -> tuple[Params, dict[str, float]]:
  """Folds adapters into the quantised weights around which they lie, in these weights' format.

  The sum W + ΔW falls between the codes again, so the outputs change, by more than an adapter's
  training may have changed them: look at the error, or merge into dense arrays instead
  (`pj.merge(params, dense=True)`).

  Returns:
    The tree with a quantised weight in place of each adapter on one, and ‖Q(W + ΔW) − (W + ΔW)‖ /
    ‖W + ΔW‖ (Frobenius) for each of their paths. Other leaves are as they were.
  """
  errors: dict[str, float] = {}
  flat, whole = paths.leaves(params), paths.leaves(tree.tie(params))
  folds = lambda leaf: isinstance(leaf, Adapted) and isinstance(leaf.base, Quantized | Folded)

  def fold(path: str, leaf: Any) -> Any:
    if folds(flat.get(lender(leaf))):
      return whole[path].materialize()  # IA3's bias goes with its kernel
    if not folds(leaf):
      return leaf
    base, dense = leaf.base, whole[path].materialize()
    axes, fmt = (base.axes, base.base.fmt) if isinstance(base, Folded) else (Axes(), base.fmt)
    weight = quantize_kernel(path, dense, fmt, axes)
    errors[path] = float(relative_error(weight, dense))
    return weight

  # A head that is tied to such a table is tied to its base, and stays.
  keeps = lambda path, head: tied.kernel(flat[head.of]) if folds(flat.get(head.of)) else head
  folded = tree.replace_tied(keeps, paths.map_leaves(fold, params))
  lent = {lender(leaf) for leaf in paths.leaves(folded).values()}
  return folded if lent & set(shared.nodes(folded)) else shared.without(folded), errors


@jax.jit
def relative_error(weight: Weight, dense: Float[Array, "..."]) -> Float[Array, ""]:
  """‖W_q − W‖ / ‖W‖ (Frobenius), float32."""
  dense = dense.astype(jnp.float32)
  off = weight.materialize().astype(jnp.float32) - dense
  return jnp.linalg.norm(off.ravel()) / jnp.linalg.norm(dense.ravel())


def check(path: str, leaf: Any, fmt: Format, layout: Layout | None = None) -> Axes:
  """The axes of the kernel at `path`; raises `ValueError` if it cannot be quantised."""
  leaf = bare(leaf)
  if isinstance(leaf, Weight):
    what = "quantised" if leaf.quantised else "a " + type(leaf).__name__
    raise ValueError(f"{path} is {what} already; quantise plain arrays, then attach adapters")
  axes = axes_of(path, tuple(leaf.shape), layout)
  if isinstance(axes, ConvAxes):
    raise ValueError(
      f"{path} {tuple(leaf.shape)} is the kernel of a convolution, which has no quantised form. "
      "Leave it out of `where`."
    )
  ins = (_axis_of(path, axes),) if axes == Axes() else axes.ins
  size = math.prod(leaf.shape[axis] for axis in ins)
  if fmt.bits == 4 and size % 2:
    raise ValueError(
      f"{path} {tuple(leaf.shape)} has the odd contraction size {size}: two codes share a byte. "
      "Use pj.quant.int8(), or leave it out of `where`."
    )
  return axes


def quantize_kernel(path: str, leaf: Any, fmt: Format, axes: Axes) -> Quantized | Folded:
  """The quantised weight of a kernel; with several input or output axes, of it as a matrix."""
  if axes == Axes():
    return quantize_leaf(path, leaf, fmt, axis=_axis_of(path, axes))
  sizes = tuple(leaf.shape[len(axes.stack(leaf.shape)) :])
  base = quantize_leaf(path, folded.matrix(leaf, axes), fmt)
  return Folded(base=base, axes=axes, sizes=sizes)


def quantize_leaf(path: str, leaf: Any, fmt: Format, axis: int | None = None) -> Quantized:
  """The quantised weight of an array; its blocks run along `axis`, by default that of `axis_of`.

  Raises:
    ValueError: if an entry is NaN or infinite.
  """
  axis, dtype = axis or axis_of(path), leaf.dtype.name
  if isinstance(leaf, jax.ShapeDtypeStruct):
    codes, scales = jax.eval_shape(lambda w: fmt.quantize(w, axis), leaf)
  else:
    codes, absmax = encode(path, leaf, fmt, axis)
    scales = finish_scales(absmax, fmt, axis)
  return Quantized(codes=codes, scales=scales, fmt=fmt, axis=axis, dense_dtype=dtype)


def encode(path: str, leaf: Any, fmt: Format, axis: int) -> tuple[jax.Array, jax.Array]:
  """Codes and float32 scales of an array, or of some of its outputs.

  Raises:
    ValueError: if an entry is NaN or infinite.
  """
  codes, absmax, finite = _encode(leaf, fmt, axis)
  if not isinstance(finite, jax.core.Tracer) and not finite:
    raise ValueError(
      f"{path} has NaN or infinite entries, which no quantised format holds. Mend the checkpoint."
    )
  return codes, absmax


def finish_scales(absmax: Any, fmt: Format, axis: int) -> Any:
  """The scales as the format keeps them.

  It is a program of its own: the mean is the same to the last bit however they were computed.
  """
  return _double(absmax, axis) if fmt.double_quant else absmax


def axis_of(path: str) -> int:
  """The contraction axis; for a table it is the axis of the features."""
  return -1 if path.split("/")[-1] == "embedding" else -2


def _axis_of(path: str, axes: Axes) -> int:
  """The axis as `axis_of` gives it, but a layout's lookups tell tables too."""
  return -1 if isinstance(axes, TableAxes) else axis_of(path)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _encode(leaf: Any, fmt: Format, axis: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  codes, absmax = blockwise.quantize(leaf, fmt.name, fmt.block_size, axis)
  return codes, absmax, jnp.isfinite(leaf).all()


_double = jax.jit(double.quantize, static_argnums=1)
