"""What keeps XLA from computing things twice, too early, or from keeping them too long."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from peftjax.core import mesh

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
  return (_first_bits(witness) == jnp.uint32(0x7FC12345)).astype(dtype)


def _first_bits(x: jax.Array) -> jax.Array:
  """Of an entry of x as float32; on a mesh each device reads one of its own, and none is sent."""
  return _bits_of_shard(x) if mesh.ambient() else _bits(x)


def _bits(x: jax.Array) -> jax.Array:
  return jax.lax.bitcast_convert_type(x.reshape(-1)[0].astype(jnp.float32), jnp.uint32)


# For XLA one number that is everywhere the same. It is not, and need not be: all that is made of it
# is what any of the devices' numbers gives.
_bits_of_shard = custom_partitioning(_bits)
_bits_of_shard.def_partition(
  partition=lambda mesh, args, result: (mesh, _bits, NamedSharding(mesh, P()), (args[0].sharding,)),
  decode_shardings=False,  # XLA may split an axis that the devices do not divide
  sharding_rule="... -> ",
)


@jax.custom_batching.custom_vmap
def tied(arrays: Any, witness: jax.Array) -> Any:
  """The arrays, for a compiler functions of `witness`: none is used before that is there.

  Mapped over many witnesses, they stay unmapped: any one of them will do.
  """
  return jax.tree.map(lambda x: x + zero(witness, x.dtype), arrays)


@tied.def_vmap
def _tied_vmap(axis_size: int, in_batched: Any, arrays: Any, witness: jax.Array) -> Any:
  batched, witness_batched = in_batched
  return tied(arrays, witness[0] if witness_batched else witness), batched


def cast(w: jax.Array, x: jax.Array) -> jax.Array:
  """w in the dtype of x; where that is another one, not before x is there.

  XLA:TPU would else cast what a scan takes of all layers at once, and hold it for the whole step.
  """
  if w.dtype == x.dtype:
    return w
  return (w + zero(jax.lax.stop_gradient(x), w.dtype)).astype(x.dtype)


def computed_once(x: jax.Array) -> jax.Array:
  """The identity, whose operand XLA:CPU computes once, however many read it.

  XLA:CPU copies cheap producers into every consumer. In a backward pass the gradient of the
  residual stream is a chain of them through all layers, and each consumer recomputed the chain:
  fusions of 37 operands, 65 ms of a step of 600 (six BERT layers). The result of a conditional
  cannot be copied, and the compiler cannot know that this one's predicate always holds.
  """

  def on_cpu(x: jax.Array) -> jax.Array:
    return jax.lax.cond((_first_bits(x) | jnp.uint32(1)) != 0, lambda v: v, jnp.zeros_like, x)

  return jax.lax.platform_dependent(x, cpu=on_cpu, default=lambda v: v)
