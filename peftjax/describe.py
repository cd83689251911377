"""`describe`: a table of every leaf of a parameter tree, and of how the model uses it."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from peftjax.core import given, paths, tracing, tree
from peftjax.core.adapted import bare
from peftjax.core.params import Mask, Params
from peftjax.core.view import Uses
from peftjax.core.weight import is_weight
from peftjax.linen import apply


class Leaf(NamedTuple):
  """One row of a description."""

  path: str
  type: str
  shape: tuple[int, ...]
  dtype: str
  bytes: int
  trainable: int  # parameters that are trained
  # "factored", "materialised" (with the cause, where known), "unused", or "" for an array.
  computed: str


class Description(tuple[Leaf, ...]):
  """Rows of `Leaf`; prints as a table with totals.

  Attributes:
    attention: the kernels that compute the traced model's attention, as keys of
      `nn.attention.KERNELS`.
  """

  attention: tuple[str, ...] = ()

  def __str__(self) -> str:
    table = Table(box=None, pad_edge=False)
    for column in Leaf._fields:
      table.add_column(column, justify="right" if column in ("bytes", "trainable") else "left")
    for row in self:
      table.add_row(*(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row))
    totals = (sum(row.bytes for row in self), sum(row.trainable for row in self))
    table.add_row("total", "", "", "", f"{totals[0]:,}", f"{totals[1]:,}", "", style="bold")
    text = io.StringIO()
    Console(file=text, width=160).print(table)
    kernels = f"attention: {', '.join(self.attention)}\n" if self.attention else ""
    return text.getvalue() + kernels


def describe(
  params: Params,
  trainable: Mask | None = None,
  *,
  model: Any | None = None,
  example: Sequence[Any] = (),
) -> Description:
  """Path, type, shape, dtype, bytes and trained parameters of every leaf.

  Args:
    params: a parameter tree of arrays or `jax.ShapeDtypeStruct`.
    trainable: a mask, as `method.trainable(params)` gives it.
    model, example: a linen module and inputs for it. They are traced once, abstractly, to tell for
      every `Weight` whether the model computes with its factors or with the dense array, and for
      attention which kernel rows of that length use.
  """
  given.check_params(params)
  flags = trainable if trainable is not None else jax.tree.map(lambda _: False, params)
  chosen = tree.restore_ranks(tree.partition(params, flags)[0], params)
  counts = {p: _count(bare(leaf)) for p, leaf in paths.leaves(chosen).items()}
  kernels: set[str] = set()
  with tracing.within(kernels=kernels):
    computed = _trace(model, params, example) if model is not None else {}
  flat = {path: bare(leaf) for path, leaf in paths.leaves(params).items()}
  heads = [
    Leaf(path, f"tied to {head.of}", tuple(table.shape[::-1]), str(table.dtype), 0, 0, "")
    for path, head in paths.tied(params).items()
    if (table := flat.get(head.of)) is not None
  ]
  rows = [
    Leaf(
      path,
      _type_name(leaf),
      tuple(leaf.shape),
      str(leaf.dtype),
      sum(_bytes(x) for x in jax.tree.leaves(leaf)),
      counts.get(path, 0),
      computed.get(path, "unused" if model is not None and is_weight(leaf) else ""),
    )
    for path, leaf in flat.items()
  ]
  description = Description((*rows, *heads))
  description.attention = tuple(sorted(kernels))
  return description


def _count(leaf: Any) -> int:
  return leaf.true_size() if is_weight(leaf) else getattr(leaf, "size", 0)  # a box may be empty


def _bytes(x: Any) -> int:
  return x.size * np.dtype(x.dtype).itemsize


def _type_name(leaf: Any) -> str:
  """The type of a leaf: `array`, or the nesting of weights, such as `LoRA(NF4)`."""
  if not is_weight(leaf):
    return "array"
  name = type(leaf).__name__
  base = getattr(leaf, "base", None)
  return f"{name}({_type_name(base)})" if is_weight(base) else name


class _Probe:
  """Stands in for a weight's `einsum`, `take` and `materialize`, and notes which was used."""

  def __init__(self) -> None:
    self.seen: dict[str, str] = {}

  def wrap(self, path: str, leaf: Any) -> Any:
    if not is_weight(leaf):
      return leaf
    seen = self.seen

    class Probed(type(leaf)):  # type: ignore[misc]
      def materialize(self) -> jax.Array:
        seen[path] = "materialised"
        return super().materialize()

      def einsum(self, eqn: str, x: jax.Array) -> jax.Array:
        seen.setdefault(path, "factored")  # a fall-back to the dense array overwrites it
        return super().einsum(eqn, x)

      def take(self, ids: jax.Array) -> jax.Array:
        seen.setdefault(path, "factored")
        return super().take(ids)

      def conv(self, x: jax.Array, **how: Any) -> jax.Array:
        seen.setdefault(path, "factored")
        return super().conv(x, **how)

      def ragged_dot(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        seen.setdefault(path, "factored")
        return super().ragged_dot(x, group_sizes)

    return Probed(**{f.name: getattr(leaf, f.name) for f in dataclasses.fields(leaf)})


def _trace(model: Any, params: Any, example: Iterable[Any]) -> dict[str, str]:
  probe, uses = _Probe(), Uses()
  with tracing.within(uses=uses):
    jax.eval_shape(
      lambda p, *a: apply(model, p, *a), paths.map_leaves(probe.wrap, params), *example
    )
  named = {path: sorted(by - {"factored"}) for path, by in uses.by_path.items()}
  return {
    path: f"{how} ({', '.join(by)})" if (by := named.get(path)) and how != "factored" else how
    for path, how in probe.seen.items()
  }
