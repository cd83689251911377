"""safetensors files and the index of shards, against a parser of the format in thirty lines."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from peftjax.io.safetensors_dir import TensorDir
from tests.fuzz import damage

SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
SIZES |= {"F32": 4, "I32": 4, "U32": 4, "F64": 8, "I64": 8, "U64": 8}


def parse(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
  """Dtype, shape and bytes of every tensor; ValueError for whatever the format does not allow."""
  data = path.read_bytes()
  length = int.from_bytes(data[:8], "little")
  if len(data) < 8 or length > len(data) - 8:
    raise ValueError("no header")
  header = json.loads(data[8 : 8 + length].decode(), object_pairs_hook=unique)
  body, found, cursor = data[8 + length :], {}, 0
  header.pop("__metadata__", None)
  for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
    begin, end = entry["data_offsets"]
    shape = entry["shape"]
    if begin != cursor or any(type(n) is not int or n < 0 for n in (begin, end, *shape)):
      raise ValueError(f"{name}: a hole, or no numbers")
    if end - begin != math.prod(shape) * SIZES[entry["dtype"]] or end > len(body):
      raise ValueError(f"{name}: wrong size")
    found[name], cursor = (entry["dtype"], tuple(shape), body[begin:end]), end
  if cursor != len(body):
    raise ValueError("bytes of no tensor")
  return found


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  if len(dict(pairs)) != len(pairs):
    raise ValueError("a key twice")
  return dict(pairs)


def rewrite_header(rng: random.Random, path: Path) -> None:
  """Damages the header as JSON and gives it its right length, so that the damage is reached."""
  data = path.read_bytes()
  length = int.from_bytes(data[:8], "little")
  header = damage.dumps(rng, damage.of_json(rng, json.loads(data[8 : 8 + length])))
  path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


class Tensors:
  name, share = "safetensors", 25

  def prepare(self, folder: Path) -> None:
    rng = np.random.default_rng(0)
    made = {f"layer.{i}.weight": rng.normal(size=(3, 4)).astype(t) for i, t in enumerate("fdeiB")}
    save_file({**made, "empty": np.zeros((0, 4), "f")}, folder / "model.safetensors")

  def damage(self, rng: random.Random, folder: Path) -> None:
    path = folder / "model.safetensors"
    if rng.random() < 0.5:
      rewrite_header(rng, path)
    else:
      path.write_bytes(damage.of_bytes(rng, path.read_bytes()))

  def read(self, folder: Path) -> Any:
    tensors = TensorDir(folder)
    return {name: tensors.read(name) for name in tensors.names()}

  def check(self, folder: Path, got: Any) -> str:
    try:
      want = parse(folder / "model.safetensors")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
      return f"accepted, but {error!r}"
    return differs(got, want)


class Index:
  """Three shards and what lists them."""

  name, share = "index", 8

  def prepare(self, folder: Path) -> None:
    index = {}
    for i in range(3):
      shard = f"model-{i + 1:05}-of-00003.safetensors"
      save_file({f"{i}.weight": np.full((2, 2), i, "f")}, folder / shard)
      index[f"{i}.weight"] = shard
    whole = {"metadata": {"total_size": 48}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(whole))

  def damage(self, rng: random.Random, folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    shards = sorted(folder.glob("*.safetensors"))
    kind = rng.randrange(4)
    if kind == 0:
      rng.choice(shards).unlink()
    elif kind == 1:
      one, two = rng.sample(shards, 2)
      two.write_bytes(one.read_bytes())
    else:
      value = damage.of_json(rng, json.loads(path.read_text()))
      path.write_bytes(damage.dumps(rng, value))

  read = Tensors.read

  def check(self, folder: Path, got: Any) -> str:
    try:
      text = (folder / "model.safetensors.index.json").read_bytes().decode("utf-8-sig")
      listed = json.loads(text, object_pairs_hook=unique)["weight_map"]
      shards = {shard: parse(folder / shard) for shard in set(listed.values())}
      want = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
      for name, shard in listed.items():
        if name not in shards[shard]:
          return f"{name} is not where the index says"
      if sum(map(len, shards.values())) != len(want):
        return "a tensor is in two shards"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
      return f"accepted, but {error!r}"
    return differs(got, want)


def differs(got: Any, want: Any) -> str:
  if set(got) != set(want):
    return f"tensors {sorted(got)} instead of {sorted(want)}"
  for name, (_, shape, data) in want.items():
    if got[name].shape != shape or got[name].tobytes() != data:
      return f"{name} has other values than the file"
  return ""
