"""What keeps XLA from computing things twice, too early, or from keeping them too long."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")


def fence(tree: T) -> T:
  """The identity, across which XLA:CPU neither merges nor moves computations.

  Without fences it merges what a backward pass would recompute with the forward pass, so it keeps
  wide intermediates, and it moves transposes into products (six BERT layers with LoRA, a step:
  650 ms without, 590 with). The barrier is gone before fusion, so cheap producers are still copied
  into their consumers. Other backends decide well and get no fence.
  """
  return jax.lax.platform_dependent(
    tree, cpu=jax.lax.optimization_barrier, default=lambda values: values
  )


def zero(witness: jax.Array, dtype: Any) -> jax.Array:
  """An integer 0 that depends on `witness`: what uses it cannot be started before that is there.

  It is whether the first entry is one certain NaN, which no arithmetic yields.
  """
  bits = jax.lax.bitcast_convert_type(witness.reshape(-1)[0].astype(jnp.float32), jnp.uint32)
  return (bits == jnp.uint32(0x7FC12345)).astype(dtype)


@jax.custom_batching.custom_vmap
def tied(x: jax.Array, witness: jax.Array) -> jax.Array:
  """x, for a compiler a function of `witness`: what is made of it cannot be before that is there.

  Mapped over many witnesses, x stays unmapped: any one of them will do.
  """
  return x + zero(witness, x.dtype)


@tied.def_vmap
def _tied_vmap(axis_size: int, in_batched: Any, x: jax.Array, witness: jax.Array) -> Any:
  x_batched, witness_batched = in_batched
  return tied(x, witness[0] if witness_batched else witness), x_batched


def computed_once(x: jax.Array) -> jax.Array:
  """The identity, whose operand XLA:CPU computes once, however many read it.

  XLA:CPU copies cheap producers into every consumer. In a backward pass the gradient of the
  residual stream is a chain of them through all layers, and each consumer recomputed the chain:
  fusions of 37 operands, 65 ms of a step of 600 (six BERT layers). The result of a conditional
  cannot be copied, and the compiler cannot know that this one's predicate always holds.
  """

  def on_cpu(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x.reshape(-1)[0].astype(jnp.float32), jnp.uint32)
    return jax.lax.cond((bits | jnp.uint32(1)) != 0, lambda v: v, jnp.zeros_like, x)

  return jax.lax.platform_dependent(x, cpu=on_cpu, default=lambda v: v)
