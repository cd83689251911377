"""Axes of kernels: contracted, outputs, stacked layers; and the widths of modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P


class Axes(NamedTuple):
  """Contracted and output axes of a kernel, counted from the end; all axes before are a stack."""

  ins: tuple[int, ...] = (-2,)
  outs: tuple[int, ...] = (-1,)

  def stack(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[: len(shape) - len(self.ins) - len(self.outs)])

  def as_kernel(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`[*stack, out, in]` as a kernel of `shape`."""
    groups = (*self.outs, *self.ins)
    x = x.reshape(*self.stack(shape), *(shape[axis] for axis in groups))
    order = [*range(len(shape) - len(groups)), *(len(shape) + axis for axis in groups)]
    return x.transpose([order.index(i) for i in range(len(shape))])

  def places(self, spec: P, ndim: int) -> tuple[tuple[Any, ...], Any, Any]:
    """The parts of a kernel's spec for the stack, the inputs and the outputs, for `ndim` axes.

    A flattened group of several axes has the part of its first one; a group without axes has None.
    """
    full = (*spec, *[None] * (ndim - len(spec)))
    first = lambda group: full[group[0]] if group else None
    return full[: ndim - len(self.ins) - len(self.outs)], first(self.ins), first(self.outs)


class ConvAxes(Axes):
  """Axes of the kernel of a convolution: it contracts the window and the channels."""


class TableAxes(Axes):
  """Axes of a table whose rows are looked up; a tied head may multiply by it too."""


class Site(NamedTuple):
  """A module: the widths (last axes) of its arguments and of its result, and its stack of layers.

  A width is None where the value is not an array of floats.
  """

  reads: tuple[int | None, ...]
  returns: int | None
  stack: tuple[int, ...] = ()


# Axes of every kernel and table, and every module's site, by path; `peftjax.linen.layout` makes it.
Layout = Mapping[str, Axes | Site]


def axes_of(path: str, shape: tuple[int, ...], layout: Layout | None) -> Axes:
  """The axes of the kernel at `path`.

  A matrix contracts its first axis. A kernel of more axes is ambiguous, as `(4, 64, 64)` may be
  four layers or four heads, so it has to be in `layout`; see `of_stacks`.

  Raises:
    ValueError: on a vector, or a kernel of more than two axes that `layout` does not know.
  """
  if len(shape) < 2:
    raise ValueError(f"{path} {shape} is not a matrix; target kernels or embedding tables")
  if layout and isinstance(axes := layout.get(path), Axes):
    return axes
  if len(shape) == 2:
    return Axes()
  why = "is in no module that layout() knows" if layout else "may be stacked layers or heads"
  raise ValueError(
    f"{path} {shape} has more than two axes and {why}.\n"
    "Write layout = peftjax.linen.layout(model, *example_inputs) and "
    "method.attach(key, params, layout); for a module of your own, add its path to the layout: "
    "{**layout, path: peftjax.core.layout.Axes(ins=(-2,), outs=(-1,))}."
  )
