"""Checkpoints of several processes that see no folder in common: one of them has it for all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from peftjax import sharding
from peftjax.training.checkpoint import Checkpoints
from peftjax.training.peers import Peers


class Relayed(Checkpoints):
  """`Checkpoints` in a directory of the main process, to which all give and of which all get.

  Each process calls the same methods in the same order. Arrays split over them are gathered to be
  saved, as their digest needs it anyway, and read arrays are sent to all, one at a time. Orbax
  would have each process write its part, and wants one folder for that.

  Raises:
    The errors of `Checkpoints`, in all processes.
  """

  def __init__(self, directory: Path, peers: Peers, *, read_only: bool = False):
    self._peers = peers

    def make() -> None:
      self._own = Checkpoints(directory, read_only=read_only, alone=True)

    peers.told(make)

  def save(self, name: str, step: int, arrays: Any, meta: Mapping[str, Any]) -> None:
    whole = jax.tree.map(sharding.gathered, arrays)
    self._peers.told(lambda: self._own.save(name, step, whole, meta))

  def wait(self, name: str | None = None) -> None:
    self._peers.told(lambda: self._own.wait(name))

  def step(self, name: str) -> int | None:
    return self._peers.told(lambda: self._own.step(name))

  def meta(self, name: str) -> dict[str, Any] | None:
    return self._peers.told(lambda: self._own.meta(name))

  def arrays(self, name: str, like: Any) -> Any:
    leaves, structure = jax.tree.flatten(like)
    whole = [np.zeros(leaf.shape, leaf.dtype) for leaf in leaves]

    def read() -> None:
      found = self._own.arrays(name, jax.tree.unflatten(structure, whole))
      whole[:] = map(np.asarray, jax.tree.leaves(found))

    self._peers.told(read)
    return jax.tree.unflatten(structure, map(_sent, whole, leaves))

  def close(self) -> None:
    self._peers.told(lambda: self._own.close())


def _sent(whole: np.ndarray, like: jax.Array) -> jax.Array:
  """The main process's array, bit for bit, where `like` is."""
  flat = np.ascontiguousarray(whole).reshape(-1).view(np.uint8)
  got = np.asarray(multihost_utils.broadcast_one_to_all(flat)).astype(np.uint8)
  host = got.view(whole.dtype).reshape(whole.shape)
  return jax.make_array_from_callback(like.shape, like.sharding, lambda index: host[index])
