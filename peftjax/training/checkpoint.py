"""Checkpoints by Orbax: the latest to go on from, the best to score and use."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import traverse_util

from peftjax.core import paths


class Checkpoints:
  """`<directory>/latest` and `<directory>/best`, each one step of arrays and a JSON `meta`.

  A save is written in the background to a temporary folder and renamed when complete, so a kill
  at any moment leaves the previous one.
  """

  def __init__(self, directory: Path, *, read_only: bool = False):
    options = ocp.CheckpointManagerOptions(
      max_to_keep=1,
      create=not read_only,
      read_only=read_only,
      cleanup_tmp_directories=not read_only,  # what a kill left half written
    )
    self._managers = {
      name: ocp.CheckpointManager((directory / name).absolute(), options=options)
      for name in ("latest", "best")
    }

  def save(self, name: str, step: int, arrays: Any, meta: Mapping[str, Any]) -> None:
    """Starts saving; what is there of this step already (by an earlier, killed run) stays."""
    manager = self._managers[name]
    if step in manager.all_steps():
      return
    items = ocp.args.Composite(
      arrays=ocp.args.StandardSave(to_nested(arrays)), meta=ocp.args.JsonSave(dict(meta))
    )
    manager.save(step, args=items)

  def wait(self, name: str | None = None) -> None:
    for key, manager in self._managers.items():
      if name in (None, key):
        manager.wait_until_finished()

  def meta(self, name: str) -> dict[str, Any] | None:
    """What was saved beside the arrays; None if nothing was."""
    manager = self._managers[name]
    if manager.latest_step() is None:
      return None
    return manager.restore(
      manager.latest_step(), args=ocp.args.Composite(meta=ocp.args.JsonRestore())
    ).meta

  def arrays(self, name: str, like: Any) -> Any:
    """The saved arrays in the structure, dtypes and shardings of `like`."""
    manager = self._managers[name]
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, to_nested(like))
    restored = manager.restore(
      manager.latest_step(), args=ocp.args.Composite(arrays=ocp.args.StandardRestore(target))
    ).arrays
    flat = traverse_util.flatten_dict(restored, sep="/")
    return jax.tree_util.tree_map_with_path(lambda path, _: flat[paths.name(path)], like)

  def close(self) -> None:
    for manager in self._managers.values():
      manager.close()


def to_nested(arrays: Any) -> Any:
  """Plain nested dicts by path: files that name what they hold and need no class to be read."""
  flat, _ = jax.tree_util.tree_flatten_with_path(arrays)
  return traverse_util.unflatten_dict({paths.name(path): leaf for path, leaf in flat}, sep="/")


def digest(model: Path) -> str:
  """SHA-256 over `config.json` and the safetensors files of a model directory, or over a file."""
  total = hashlib.sha256()
  files = sorted([model / "config.json", *model.glob("*.safetensors")])
  for path in files if model.is_dir() else [model]:
    with path.open("rb") as file:
      total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
  return total.hexdigest()
