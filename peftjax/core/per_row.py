"""`PerRow`: a weight that differs for each row of a batch, around one base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from peftjax.core import paths
from peftjax.core.adapted import Adapted
from peftjax.core.einsum import attend, split_subscripts
from peftjax.core.params import Params


class PerRow(Adapted):
  """Weights W_0, W_1, ... that N adapters make of one base: row i of a batch is multiplied by W_i.

  einsum(eqn, x)[i] = einsum(eqn, x[i], W_i), where the base multiplies all rows at once and the
  factors one row each. There are as many dense arrays as rows, so it stands for no single one.

  Attributes:
    base: the pretrained weight, an array or any `Weight`.
    adapters: an adapted weight without its base, whose children have an axis of the N adapters
      after those of the layers: A of LoRA is `[*stack, N, R, in]`.
    key: `[*stack]` keys of the dropout on the branch's input while training, else None.
  """

  adapters: Any
  key: Any = None

  @property
  def pretrained(self) -> frozenset[str]:  # type: ignore[override]
    return self.adapters.pretrained

  @property
  def owned(self) -> bool:  # type: ignore[override]
    return self.adapters.owned

  @property
  def dropout(self) -> float:  # type: ignore[override]
    return self.adapters.dropout

  @property
  def of(self) -> str:  # type: ignore[override]
    return self.adapters.of

  @property
  def stack(self) -> tuple[int, ...]:
    return self.adapters.axes.stack(self.shape)

  @property
  def count(self) -> int:
    """The number N of adapters."""
    return jax.tree.leaves(self.adapters)[0].shape[len(self.stack)]

  def true_size(self) -> int:
    return self.base_size() + self.adapters.true_size()

  def trained_mask(self, frozen: frozenset[str] = frozenset()) -> PerRow:
    mask = jax.tree.map(lambda _: False, self)
    return mask.replace(adapters=self.adapters.trained_mask(frozen))

  def at_own_rates(self) -> PerRow:
    return self.replace(adapters=self.adapters.at_own_rates())

  def with_ranks(self, part: Any) -> Any:
    return part.replace(adapters=self.adapters.with_ranks(part.adapters))

  def with_key(self, key: jax.Array, path: str) -> PerRow:
    keys = [paths.fold_in_path(key, p) for p in paths.layer_paths(path, self.stack)]
    return self.replace(key=jnp.stack(keys).reshape(self.stack))

  def borrow(self, lender: Any) -> PerRow:
    """This weight with another one's arrays, row by row; arrays of all rows stay there (`lent`)."""
    if not isinstance(lender, PerRow):
      return self
    return self.replace(adapters=self.adapters.borrow(lender.adapters))

  def taken(self, rows: jax.Array) -> PerRow:
    """This weight with adapter `rows[i]` for row i; NaN for an adapter that does not exist."""
    at = (slice(None),) * len(self.stack)
    # A negative number would count from the end.
    known = jnp.where(rows < 0, jnp.iinfo(jnp.int32).max, rows)
    own = jax.tree.map(lambda x: x.at[(*at, known)].get(mode="fill"), self.adapters)
    return self.replace(adapters=own)

  def one(self, i: int) -> Adapted:
    """The weight that adapter i makes of the base."""
    own = jax.tree.map(lambda x: jnp.take(x, i, axis=len(self.stack)), self.adapters)
    return own.replace(base=self.base)

  def materialize(self) -> jax.Array:
    """Raises ValueError: there is a dense array for each row."""
    raise ValueError(
      "a weight that differs by row was used as one dense array; take one adapter out "
      "(pj.tree.unstack_adapters), or let its module be nn.Dense, nn.DenseGeneral, "
      "nn.Einsum, nn.Embed or pj.nn.Linear"
    )

  def einsum(self, eqn: str, x: jax.Array) -> jax.Array:
    """Computes einsum(eqn, x[i], W_i) for each row i, the first axis of x.

    Raises:
      ValueError: if x has another number of rows, or the result has none.
    """
    x_s, w_s, out_s = split_subscripts(eqn)
    row, inner = x_s[0], eqn
    if row != ".":
      if row in w_s or row not in out_s or "." in out_s:
        raise ValueError(
          f"{eqn!r} has no rows, the first axis of the first operand, for which a weight could "
          "differ; write the batch first and leave it there, like 'bti,io->bto'"
        )
      inner = f"{x_s[1:]},{w_s}->{out_s.replace(row, '')}"
    at = 0 if row == "." else out_s.index(row)
    return self._by_row(lambda weight, x: weight.einsum(inner, x), x, at)

  def linear(self, x: jax.Array) -> jax.Array:
    return self.einsum("...i,io->...o", x)

  def shift(self, y: jax.Array) -> jax.Array:
    return self._by_row(lambda weight, y: weight.shift(y), y)

  def take(self, ids: jax.Array) -> jax.Array:
    """Rows `W_i[ids[i]]`; a single row of ids, as for positions, serves all rows."""
    if ids.shape[0] == 1:
      ids = jnp.broadcast_to(ids, (self.count, *ids.shape[1:]))
    return self._by_row(lambda weight, ids: weight.take(ids), ids)

  def attend(self, x: jax.Array) -> jax.Array:
    """Logits by the base table, as with `LoRA`."""
    return attend(self.base, x)

  def child_specs(self, spec: P) -> PerRow:
    """Specs as for a single adapter; the axis of the adapters is never split."""
    at = len(self.stack)
    one = self.adapters.replace(base=self.base).child_specs(spec)
    widen = lambda lies: P(*(*lies, *[None] * at)[:at], None, *lies[at:])
    is_spec = lambda node: isinstance(node, P)
    own = jax.tree.map(widen, one.replace(base=None), is_leaf=is_spec)
    key = None if self.key is None else P(*spec[:at])
    return self.replace(base=one.base, adapters=own, key=key)

  def _by_row(self, fn: Callable[..., jax.Array], x: jax.Array, at: int = 0) -> jax.Array:
    """`fn(W_i, x[i])` for each row, along axis `at` of the result."""
    if self.stack:
      raise ValueError("a whole stack of layers that differ by row cannot be used in one product")
    if x.ndim == 0 or x.shape[0] != self.count:
      raise ValueError(
        f"an input of shape {x.shape} and {self.count} adapters, which have to be one for each row "
        "(the first axis); write rows=[...], the number of each row's adapter: "
        "pj.apply(model, params, ..., rows=rows)"
      )
    own = self.adapters
    if self.key is not None:
      own = own.replace(key=jax.random.split(self.key, self.count))
    return jax.vmap(lambda own, x: fn(own.replace(base=self.base), x), out_axes=at)(own, x)


def checked(params: Params, rows: Any) -> jax.Array:
  """`rows`, the number of each batch row's adapter in `params`, as int32.

  Raises:
    ValueError: if there are no stacked adapters, `rows` is not a row of whole numbers, or one of
      them, where they are known, is not the number of an adapter.
  """
  found = [leaf for leaf in paths.leaves(params).values() if isinstance(leaf, PerRow)]
  if not found:
    raise ValueError(
      "rows= says which of several adapters each row has, and these parameters have none; write "
      "params = pj.stack_adapters([params_1, params_2])"
    )
  known = not isinstance(rows, jax.core.Tracer)
  given = np.asarray(rows) if known else rows
  if given.ndim != 1 or not jnp.issubdtype(given.dtype, jnp.integer):
    raise ValueError(
      f"rows is {given.dtype}{list(given.shape)}; write a whole number for each row of the batch"
    )
  # A bias that borrows its scales has no arrays to count.
  count = next(leaf.count for leaf in found if jax.tree.leaves(leaf.adapters))
  if known and (wrong := [int(i) for i in given if not 0 <= i < count]):
    raise ValueError(
      f"rows has adapter {wrong[0]}, and there are {count}: write numbers from 0 to {count - 1}"
    )
  return jnp.asarray(given, jnp.int32)


def pick(params: Params, rows: Any) -> Any:
  """`params` with adapter `rows[i]` for row i of a batch; see `checked` for what it raises."""
  index = checked(params, rows)
  take = lambda _, leaf: leaf.taken(index) if isinstance(leaf, PerRow) else leaf
  return paths.map_leaves(take, params)
