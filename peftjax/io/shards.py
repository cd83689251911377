"""Writes tensors as safetensors files of a bounded size, one tensor in memory after the other."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from peftjax.io import safetensors_dir
from peftjax.io.records import clip

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class Tensor(NamedTuple):
  """A tensor that is made when it is written."""

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  make: Callable[[], np.ndarray]

  @property
  def bytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def bytes_of(size: int | str) -> int:
  """The number of bytes in "5GB", or a number itself.

  Raises:
    ValueError: it is neither, or not positive.

  >>> bytes_of("1.5KiB")
  1536
  """
  match = re.fullmatch(rf"(\d+(?:\.\d+)?) ?({'|'.join(_UNITS)})", str(size))
  found = int(float(match[1]) * _UNITS[match[2]]) if match else size
  if type(found) is not int or found < 1:
    raise ValueError(
      f'shard_size is {clip(size)}; write a number of bytes or, with {", ".join(_UNITS)}, "5GB"'
    )
  return found


def write(directory: Path, tensors: Sequence[Tensor], size: int) -> None:
  """Writes `model.safetensors`, or shards and their index if it would exceed `size` bytes.

  No more than one shard is in memory. A tensor that is larger than `size` has a file of its own.
  """
  groups: list[list[Tensor]] = [[]]
  room = size
  for tensor in tensors:
    if groups[-1] and tensor.bytes > room:
      groups.append([])
      room = size
    groups[-1].append(tensor)
    room -= tensor.bytes
  if len(groups) == 1:
    return _write(directory / "model.safetensors", groups[0])
  weight_map = {}
  for i, group in enumerate(groups, 1):
    name = f"model-{i:05}-of-{len(groups):05}.safetensors"
    _write(directory / name, group)
    weight_map.update({tensor.name: name for tensor in group})
  index = {"metadata": {"total_size": sum(x.bytes for x in tensors)}, "weight_map": weight_map}
  text = json.dumps(index, indent=2, sort_keys=True)
  (directory / "model.safetensors.index.json").write_text(text + "\n")


def _write(path: Path, tensors: Sequence[Tensor]) -> None:
  safetensors_dir.write(path, {tensor.name: tensor.make() for tensor in tensors})
