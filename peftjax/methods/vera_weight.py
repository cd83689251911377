"""The VeRA leaf: a weight plus a product of random factors that all weights share."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from peftjax.core import mesh, tracing
from peftjax.core.einsum import einsum, split_subscripts
from peftjax.core.layout import Axes
from peftjax.core.shared import GROUP, Shared
from peftjax.methods.lora_weight import AsLoRA, LoRA

# The path of the pair: there is one in a tree, as there is one in a PEFT directory.
PAIR = f"{GROUP}/vera"


class Projections(Shared):
  """The one frozen pair of random factors.

  Attributes:
    a: `[R, in_max]`, for the most inputs that an adapted matrix has.
    b: `[out_max, R]`, for the most outputs.
  """

  a: Any
  b: Any


class VeRA(AsLoRA):
  """W = base + (Λ_b B Λ_d A)ᵀ (Kopiczko et al. 2023, eq. 2), for a kernel `[*stack, in, out]`.

  A and B are the first columns and the first rows of the shared pair. A leaf has them only between
  `tree.tie` and its use; otherwise both are None, and a use in a call of a model finds what
  it lends (`core.tracing`).

  Attributes:
    d: `[*stack, R]`, the diagonal of Λ_d.
    b: `[*stack, out]`, the diagonal of Λ_b; several output axes are flattened into one.
    a: `[*stack, R, in]` or None; several input axes are flattened into one.
    b_proj: `[*stack, out, R]` or None.
    key: `[*stack]` keys of the dropout on the branch's input while training, else None.
    axes: which axes of the kernel are inputs and outputs.
    dropout: rate of that dropout.
    of: the path of the shared pair.
  """

  trained: ClassVar[frozenset[str]] = frozenset({"d", "b"})

  d: Any
  b: Any
  a: Any = None
  b_proj: Any = None
  key: Any = None
  axes: Axes = flax.struct.field(pytree_node=False, default=Axes())
  dropout: float = flax.struct.field(pytree_node=False, default=0.0)
  of: str = flax.struct.field(pytree_node=False, default=PAIR)

  @property
  def stack(self) -> tuple[int, ...]:
    return tuple(self.d.shape[:-1])

  def true_size(self) -> int:
    """The number of parameters of the base and the vectors here; borrowed ones count once."""
    return self.base_size() + sum(x.size for x in (self.d, self.b) if x is not None)

  def borrow(self, pair: Projections) -> VeRA:
    """This weight with its slices of the pair, one per layer: `nn.scan` slices every child."""
    n_in, n_out = (math.prod(self.shape[axis] for axis in axes) for axes in self.axes)
    spread = lambda x: jnp.broadcast_to(x, (*self.stack, *x.shape))
    return self.replace(a=spread(pair.a[:, :n_in]), b_proj=spread(pair.b[:n_out]))

  def as_lora(self) -> LoRA:
    """The same weight as a `LoRA` of Λ_d A and Λ_b B."""
    tied = self._tied()
    return tied._lora(tied.d[..., None] * tied.a, tied.b[..., None] * tied.b_proj)

  def einsum(self, eqn: str, x: jax.Array) -> jax.Array:
    """einsum(eqn, x, base) + b ⊙ B (d ⊙ A dropout(x)), in the dtype of `x`.

    The vectors scale activations, so that no gradient of the shape of A or B is computed.
    """
    tied = self._tied()
    pair = tied._lora(tied.a, tied.b_proj)
    branch = pair.branch(eqn)
    if branch is None or branch[2]:
      return self.as_lora().einsum(eqn, x)
    down, up, _ = branch
    _, w_s, out_s = split_subscripts(eqn)
    low_s = split_subscripts(down)[2]
    stack, outs = w_s[: len(self.stack)], "".join(w_s[axis] for axis in self.axes.outs)
    ins, dims = ([self.shape[axis] for axis in axes] for axes in self.axes)
    a = mesh.whole(tied.a).reshape(*self.d.shape, *ins)
    b_proj = mesh.whole(tied.b_proj).reshape(*self.stack, *dims, -1)
    with jax.named_scope("adapter"):
      low = jnp.einsum(down, pair.dropped(x), a.astype(x.dtype))
      low = jnp.einsum(f"{low_s},{stack}{low_s[-1]}->{low_s}", low, self.d.astype(x.dtype))
      high = jnp.einsum(up, low, b_proj.astype(x.dtype))
      b = mesh.whole(self.b).reshape(*self.stack, *dims).astype(x.dtype)
    y = einsum(eqn, x, self.base)
    with jax.named_scope("adapter"):
      return y + jnp.einsum(f"{out_s},{stack}{outs}->{out_s}", high, b)

  def child_specs(self, spec: P) -> VeRA:
    """Specs: b is split as the kernel's outputs are, d never."""
    stack, ins, out = self.axes.places(spec, self.ndim)
    given = lambda child, *lies: None if child is None else P(*stack, *lies)
    return self.replace(
      base=self.base_specs(spec),
      d=P(*stack, None),
      b=P(*stack, out),
      a=given(self.a, None, ins),
      b_proj=given(self.b_proj, out, None),
      key=given(self.key),
    )

  def _lora(self, a: jax.Array, b: jax.Array) -> LoRA:
    one = jnp.ones(self.stack, jnp.float32)
    return LoRA(self.base, a, b, one, None, self.key, axes=self.axes, dropout=self.dropout)

  def _tied(self) -> VeRA:
    """This weight with A and B."""
    if self.a is not None:
      return self
    pair: Any = tracing.current().lent.get(self.of)
    if pair is None:
      raise ValueError(
        f"a VeRA weight has no A and B of its own; use pj.apply or pj.merge on the whole tree, "
        f"which give it those of {self.of}"
      )
    return self.borrow(pair)
