"""Checkpoints by Orbax: the latest to go on from, the best to score and use."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from peftjax import sharding
from peftjax.core import paths
from peftjax.io import disk, records

_SUMS = "sha256"  # digests, of the JSON saved beside the arrays and of the arrays


class Checkpoints:
  """`<directory>/latest` and `<directory>/best`, each one step of arrays and a JSON `meta`.

  A save is written in the background to a temporary folder and renamed when complete, so a kill
  at any moment leaves the previous one. Both carry their digests, which Orbax's files do not: a
  byte that has changed on the disk is an error and not another parameter.

  Raises:
    ValueError: there is a pipe or a device among the files, for which Orbax would wait.
  """

  def __init__(self, directory: Path, *, read_only: bool = False, alone: bool = False):
    """Opens the checkpoints: all processes that share a run do, unless one is `alone` with it."""
    self._directory = directory
    for folder, _, names in os.walk(directory):
      for path in (Path(folder, name) for name in names):
        if path.exists() and not path.is_file():
          records.regular(path)
    if alone and not read_only:  # Orbax refuses to
      for name in ("latest", "best"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    # One may still be written while the other is begun, and their barriers need other names then.
    together = lambda name: ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=name)
    options = lambda name: ocp.CheckpointManagerOptions(
      max_to_keep=1,
      create=not (read_only or alone),
      read_only=read_only,
      cleanup_tmp_directories=not read_only,  # folders that a kill left half written
      multiprocessing_options=_alone() if alone else together(name),
    )
    with disk.told(directory):
      self._managers = {
        name: ocp.CheckpointManager((directory / name).absolute(), options=options(name))
        for name in ("latest", "best")
      }

  def save(self, name: str, step: int, arrays: Any, meta: Mapping[str, Any]) -> None:
    """Starts saving; a checkpoint of this step (by an earlier, killed run) stays.

    Raises:
      disk.DiskError: here, in `wait` or in `close`: it could not be written.
    """
    manager = self._managers[name]
    if step in manager.all_steps():
      return
    nested = to_nested(arrays)
    sums = {"meta": _sum_of_meta(meta), "arrays": _sum_of_arrays(nested)}
    items = ocp.args.Composite(
      arrays=ocp.args.StandardSave(nested), meta=ocp.args.JsonSave({**meta, _SUMS: sums})
    )
    with disk.told(self._directory / name):
      manager.save(step, args=items)

  def wait(self, name: str | None = None) -> None:
    for key, manager in self._managers.items():
      if name in (None, key):
        with disk.told(self._directory / key):
          manager.wait_until_finished()

  def step(self, name: str) -> int | None:
    """The newest step; None if there is none."""
    return self._managers[name].latest_step()

  def meta(self, name: str) -> dict[str, Any] | None:
    """The JSON that was saved beside the arrays; None if nothing was.

    Raises:
      ValueError: it is damaged.
    """
    saved = self._saved(name)
    return saved and saved[0]

  def arrays(self, name: str, like: Any) -> Any:
    """The saved arrays in the structure, dtypes and shardings of `like`.

    Raises:
      ValueError: they are damaged, or others than these.
    """
    saved = self._saved(name)
    if saved is None:
      raise ValueError(f"{self._directory / name} holds no checkpoint")
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, to_nested(like))
    args = ocp.args.Composite(arrays=ocp.args.StandardRestore(target))
    restored = self._restore(name, lambda manager, step: manager.restore(step, args=args).arrays)
    wanted, found = saved[1].get("arrays"), _sum_of_arrays(restored)
    if wanted and found and wanted != found:
      raise self._damaged(name, "other arrays than were saved")
    flat = traverse_util.flatten_dict(restored, sep="/")
    return jax.tree_util.tree_map_with_path(lambda path, _: flat[paths.name(path)], like)

  def _saved(self, name: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The JSON that was saved beside the arrays, and the digests."""
    if self.step(name) is None:
      return None
    args = ocp.args.Composite(meta=ocp.args.JsonRestore())
    meta = self._restore(name, lambda manager, step: manager.restore(step, args=args).meta)
    sums = meta.pop(_SUMS, {}) if isinstance(meta, dict) else None
    if not isinstance(sums, dict) or sums.get("meta", "") not in ("", _sum_of_meta(meta)):
      raise self._damaged(name, "its record differs from the saved one")
    return meta, sums

  def _restore(self, name: str, read: Callable[[Any, int], Any]) -> Any:
    """The result of `read` on the newest step; any error of the libraries means damaged files."""
    manager = self._managers[name]
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None  # a reader of an array that did not come to its end
    try:
      try:
        return read(manager, manager.latest_step())
      except Exception as error:
        refused = disk.cause(error)
        told = disk.sentence(refused) if refused else f"{type(error).__name__}: {error}"
      gc.collect()
    finally:
      sys.unraisablehook = hook
    raise self._damaged(name, told)

  def _damaged(self, name: str, told: str) -> ValueError:
    told = records.clip(" ".join(told.split()), 300, quote=False)
    folder = self._directory / name / str(self.step(name))
    return ValueError(
      f"{folder} cannot be read: {told}\nPut this folder back from a copy, or start anew in another"
      " --workdir."
    )

  def close(self) -> None:
    for key, manager in self._managers.items():
      with disk.told(self._directory / key):
        manager.close()


def _alone() -> ocp.options.MultiprocessingOptions:
  me = jax.process_index()
  return ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})


def to_nested(arrays: Any) -> Any:
  """Plain nested dicts by path: files that name their contents and need no class to be read."""
  flat, _ = jax.tree_util.tree_flatten_with_path(arrays)
  return traverse_util.unflatten_dict({paths.name(path): leaf for path, leaf in flat}, sep="/")


def _sum_of_meta(meta: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(dict(meta), sort_keys=True).encode()).hexdigest()


def digest_of(params: Any) -> str:
  """SHA-256 of all paths, dtypes, shapes and bytes of a tree of arrays."""
  return _sum_of_arrays(to_nested(params))


def _sum_of_arrays(nested: Any) -> str:
  """SHA-256 of all paths, dtypes, shapes and bytes."""
  total = hashlib.sha256()
  for path, leaf in sorted(traverse_util.flatten_dict(nested, sep="/").items()):
    array = np.ascontiguousarray(sharding.gathered(leaf))
    total.update(f"{path} {array.dtype} {array.shape}\n".encode())
    total.update(array.reshape(-1).view(np.uint8).data)
  return total.hexdigest()


def digest(model: Path) -> str:
  """SHA-256 over `config.json` and the safetensors files of a model directory, or over a file.

  Raises:
    ValueError: one of them is missing, cannot be read or is not a regular file.
  """
  total = hashlib.sha256()
  files = sorted([model / "config.json", *model.glob("*.safetensors")])
  for path in files if model.is_dir() else [model]:
    try:
      with records.regular(path).open("rb") as file:
        total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
      raise ValueError(disk.sentence(error, path)) from None
  return total.hexdigest()
