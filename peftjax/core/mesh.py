"""The mesh that a program is traced for, and where its arrays are asked to lie on it.

`jax.set_mesh`, or `sharding.on` inside a jitted function, names the mesh; without one, and for axes
that it does not have, everything here is the identity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

# Rows of a batch are split over both; a parameter, if it is split, over "fsdp" alone.
DATA = ("data", "fsdp")
SEQUENCE = "sequence"
ANYHOW = P.UNCONSTRAINED  # an entry of a spec that leaves an axis as it is


def group(names: Any) -> tuple[str, ...]:
  """The mesh axes of one entry of a spec: None, a name or a tuple of them."""
  return () if names is None else names if isinstance(names, tuple) else (names,)


def ambient() -> Any:
  """The mesh of the program that is being traced; None if it has one device or there is none."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.size == 1 else mesh


def constrain(x: jax.Array, spec: Sequence[Any]) -> jax.Array:
  """x, laid out on the mesh as `spec` says; a mesh axis that does not divide is left out."""
  if (mesh := ambient()) is None:
    return x
  auto = {
    name
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    if kind == jax.sharding.AxisType.Auto
  }
  known = lambda names: tuple(name for name in group(names) if name in auto)
  kept = [names if names is ANYHOW else known(names) for names in spec]
  return jax.lax.with_sharding_constraint(x, divisible(P(*kept), x.shape, mesh))


def rows(x_BTD: jax.Array) -> jax.Array:
  """Activations with their rows split over the data axes, and their tokens over "sequence".

  Without it XLA spreads the width of the residual stream over "fsdp", as the parameters are, and
  each device computes the rows of all its peers.
  """
  return constrain(x_BTD, (DATA, SEQUENCE, None))


def whole(x: jax.Array) -> jax.Array:
  """A small array, all of it on every device.

  Each then reads the part that it multiplies with. Left to itself XLA moves the activations to
  where the parts lie, and its code for an axis over "tensor" and "fsdp" is slow, or wrong: the
  gradients of factors on a mesh of data:2,fsdp:2,tensor:2 (jaxlib 0.10.2).
  """
  return constrain(x, [None] * x.ndim)


def divisible(spec: P, shape: Sequence[int], mesh: Any) -> P:
  """The spec, keeping for each array axis as many of its mesh axes as divide it."""

  def keep(names: Any, size: int) -> Any:
    kept: tuple[str, ...] = ()
    for name in group(names):
      if size % ways((*kept, name), mesh) == 0:
        kept = (*kept, name)
    return (kept if len(kept) > 1 else kept[0]) if kept else None

  sized = zip(spec, shape, strict=False)
  return P(*[names if names is ANYHOW else keep(names, size) for names, size in sized])


def ways(names: Any, mesh: Any) -> int:
  """The number of devices that one entry of a spec splits an axis over."""
  return math.prod(mesh.shape[name] for name in group(names))
