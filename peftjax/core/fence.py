"""Barriers against XLA computing things twice, too early, or keeping them too long."""

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
  wide intermediates, and it moves transposes into products (six BERT layers with LoRA, per step:
  650 ms without, 590 with). The barrier is gone before fusion, so cheap producers are still copied
  into their consumers. Other backends decide well and get no fence.
  """
  return jax.lax.platform_dependent(
    tree, cpu=jax.lax.optimization_barrier, default=lambda values: values
  )


def zero(witness: jax.Array, dtype: Any) -> jax.Array:
  """An integer 0 that depends on `witness`: nothing that uses it can start before that is there.

  Its value is whether the first entry is one certain NaN, which no arithmetic yields.
  """
  return (_first_bits(witness) == jnp.uint32(0x7FC12345)).astype(dtype)


def _first_bits(x: jax.Array) -> jax.Array:
  """The bits of an entry of x as float32; on a mesh each device reads its own, and none is sent.

  A TPU's compiler cannot partition it for us; there x is small, and every device has all of it.
  """
  if not mesh.ambient():
    return _bits(x)
  return jax.lax.platform_dependent(x, tpu=_bits, default=_bits_of_shard)


def _bits(x: jax.Array) -> jax.Array:
  return jax.lax.bitcast_convert_type(x.reshape(-1)[0].astype(jnp.float32), jnp.uint32)


# For XLA this is one number that is the same everywhere. It is not, and need not be: all that is
# made of it gives the same for any device's number.
_bits_of_shard = custom_partitioning(_bits)
_bits_of_shard.def_partition(
  partition=lambda mesh, args, result: (mesh, _bits, NamedSharding(mesh, P()), (args[0].sharding,)),
  decode_shardings=False,  # XLA may split an axis that the devices do not divide
  sharding_rule="... -> ",
)


@jax.custom_batching.custom_vmap
def tied(arrays: Any, witness: jax.Array) -> Any:
  """The arrays, to a compiler functions of `witness`: none is used before that is there.

  Mapped over many witnesses, they stay unmapped: any one of them will do.
  """
  return _after(arrays, witness)


@tied.def_vmap
def _tied_vmap(axis_size: int, in_batched: Any, arrays: Any, witness: jax.Array) -> Any:
  batched, witness_batched = in_batched
  return tied(arrays, witness[0] if witness_batched else witness), batched


def _after(arrays: Any, witness: jax.Array) -> Any:
  plus_zero = lambda arrays, witness: jax.tree.map(lambda x: x + zero(witness, x.dtype), arrays)
  if not mesh.ambient():
    return plus_zero(arrays, witness)
  # XLA:TPU keeps barriers while it moves computations, if not while it schedules them.
  behind = lambda arrays, witness: jax.lax.optimization_barrier((arrays, witness))[0]
  return jax.lax.platform_dependent(arrays, witness, tpu=behind, default=plus_zero)


def cast(w: jax.Array, x: jax.Array) -> jax.Array:
  """w in the dtype of x; if that is a different dtype, the cast waits for x.

  Otherwise XLA:TPU would cast all layers of a scan at once, and hold them for the whole step.
  """
  if w.dtype == x.dtype:
    return w
  return _after(w, jax.lax.stop_gradient(x)).astype(x.dtype)


def computed_once(x: jax.Array) -> jax.Array:
  """The identity; XLA:CPU computes its operand once, however many read it.

  XLA:CPU copies cheap producers into every consumer. In a backward pass the gradient of the
  residual stream is a chain of them through all layers, and each consumer recomputed the chain:
  fusions of 37 operands, 65 ms of a step of 600 (six BERT layers). The result of a conditional
  cannot be copied, and the compiler cannot know that this one's predicate always holds.
  """

  def on_cpu(x: jax.Array) -> jax.Array:
    return jax.lax.cond((_first_bits(x) | jnp.uint32(1)) != 0, lambda v: v, jnp.zeros_like, x)

  return jax.lax.platform_dependent(x, cpu=on_cpu, default=lambda v: v)
