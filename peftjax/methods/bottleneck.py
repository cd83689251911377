"""The bottleneck of an adapter, beside the parameters of the module it follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax

from peftjax.core.attachment import Attachment
from peftjax.core.einsum import linear
from peftjax.nn.ffn import ACTIVATIONS


class Bottleneck(Attachment):
  """f(u) = s · (W_up φ(W_down u + b_down) + b_up), added to a module's result or input.

  Attributes:
    down, down_bias: `[*stack, D_in, M]` and `[*stack, M]`, M the bottleneck's size.
    up, up_bias: `[*stack, M, D]` and `[*stack, D]`.
    scale: `[*stack]` float32, s.
    activation: φ, a name of `nn.ffn.ACTIVATIONS`.
    reads: number of the argument that u is; None if u is the module's result.
    again: instead of adding f(u) to the module's result, call it again with f(u) added to its
      first argument (Pfeiffer's adapter, between two uses of one LayerNorm).
  """

  down: Any
  down_bias: Any
  up: Any
  up_bias: Any
  scale: Any
  activation: str = flax.struct.field(pytree_node=False, default="relu")
  reads: int | None = flax.struct.field(pytree_node=False, default=None)
  again: bool = flax.struct.field(pytree_node=False, default=False)

  @jax.named_scope("adapter")
  def __call__(self, u: jax.Array) -> jax.Array:
    """Computes f(u), `[..., D_in]` to `[..., D]`, in the dtype of u."""
    row = lambda bias: bias.astype(u.dtype).reshape((1,) * (u.ndim - 1) + (-1,))
    z = linear(u, self.down) + row(self.down_bias)
    y = linear(ACTIVATIONS[self.activation](z), self.up) + row(self.up_bias)
    return self.scale.astype(u.dtype) * y

  def true_size(self) -> int:
    """The size of the matrices and biases that are here."""
    return Attachment.true_size(self.replace(scale=None))

  def around(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
    """See `Attachment.around`; if a module returns several values, the first is adapted."""
    reads = -1 if self.reads is None else self.reads
    if len(args) <= max(reads, 0 if self.again else -1):
      raise ValueError(
        "this adapter reads an argument of its module, which was called with keywords alone; call "
        "it with positions, module(x), or place the adapter where it reads the result"
      )
    result = call(*args, **kwargs)
    first, *rest = result if isinstance(result, tuple) else (result,)
    added = self(first if self.reads is None else args[self.reads])
    if self.again:
      return call(args[0] + added, *args[1:], **kwargs)
    return (first + added, *rest) if isinstance(result, tuple) else first + added
