"""Reads and writes the safetensors files of a Hugging Face directory.

Invariants:
- Opening reads headers only; `TensorDir.read` holds one tensor at a time, so a caller can stream.
- Nothing of a file is trusted before its header is checked here: the safetensors library checks
  most of it too, but does not say which tensor is wrong and lets a repeated name pass.
- Pickle (`pytorch_model.bin`) is never read.

Every fault of the input is a `ValueError` that names the file and, where there is one, the tensor.
"""

import difflib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from peftjax.io import records
from peftjax.io.records import clip

MAX_NAME = 255  # characters of a file's name, the limit of file systems
MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit

DTYPES = {
  "BOOL": np.dtype(np.bool_),
  "U8": np.dtype(np.uint8),
  "I8": np.dtype(np.int8),
  "U16": np.dtype(np.uint16),
  "I16": np.dtype(np.int16),
  "U32": np.dtype(np.uint32),
  "I32": np.dtype(np.int32),
  "U64": np.dtype(np.uint64),
  "I64": np.dtype(np.int64),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F32": np.dtype(np.float32),
  "F64": np.dtype(np.float64),
}

_CONVERT = {
  "model": (
    'python -c "import sys, transformers as t; old, new = sys.argv[1:]; '
    "kind = t.AutoConfig.from_pretrained(old).architectures[0]; "
    'getattr(t, kind).from_pretrained(old).save_pretrained(new)" {directory} NEW_DIRECTORY\n'
    "and copy the tokenizer's files."
  ),
  "adapter_model": (
    'python -c "import sys, torch, safetensors.torch as s; old, new = sys.argv[1:]; '
    "s.save_file(torch.load(old, weights_only=True), new, {{'format': 'pt'}})\" "
    "{directory}/adapter_model.bin {directory}/adapter_model.safetensors"
  ),
}


class TensorInfo(NamedTuple):
  """A header's entry for one tensor."""

  shape: tuple[int, ...]
  dtype: np.dtype


class TensorDir:
  """The tensors of `{stem}.safetensors`, or of the shards `{stem}.safetensors.index.json` lists.

  The single file wins when both are there, as in transformers. Every tensor of every shard is
  offered; the index only says which shards there are and what they must hold.

  Raises ValueError when there is no such file, when a header is damaged (truncated, too long, not
  JSON, an unknown dtype, a size that is not shape times itemsize, ranges that overlap or leave
  holes, a repeated name), and when an index names a path, a missing shard, a tensor its shard
  does not hold, or shards that hold the same tensor twice.
  """

  def __init__(self, directory: str | os.PathLike, stem: str = "model"):
    self.directory = _directory(directory)
    self._info: dict[str, TensorInfo] = {}
    self._file: dict[str, Path] = {}
    single = self.directory / f"{stem}.safetensors"
    index = self.directory / f"{stem}.safetensors.index.json"
    if single.is_file():
      self._add(single)
    elif index.is_file():
      self._add_shards(index)
    else:
      raise ValueError(_no_tensors(self.directory, stem))

  def names(self) -> tuple[str, ...]:
    """The names of all tensors, sorted."""
    return tuple(sorted(self._info))

  def info(self, name: str) -> TensorInfo:
    """`(shape, dtype)` of one tensor, from the header. Raises ValueError for an unknown name."""
    if name not in self._info:
      near = difflib.get_close_matches(name, self._info, n=3) or list(self.names()[:3])
      raise ValueError(
        f"{self.directory} holds no tensor {name!r} (it holds {len(self._info)}).\n"
        f"Near: {', '.join(near) or 'none'}. names() lists all."
      )
    return self._info[name]

  def file_of(self, name: str) -> Path:
    """The file that holds a tensor; for an unknown name, the directory."""
    return self._file.get(name, self.directory)

  def read(self, name: str) -> np.ndarray:
    """One tensor as a fresh C-ordered array of its own shape and dtype.

    Raises ValueError for an unknown name, or when the file changed since it was opened.
    """
    info, path = self.info(name), self._file.get(name)
    try:
      # pread, not the default mmap: mapped pages would count as a second copy of the model in the
      # process's memory, and a file truncated while it is mapped kills the process.
      with safe_open(path, framework="np", backend="pread") as file:
        array = file.get_tensor(name)
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
      raise ValueError(f"{path}: tensor {name!r} cannot be read: {error}") from error
    if TensorInfo(array.shape, array.dtype) != info:
      raise ValueError(f"{path}: tensor {name!r} changed while the file was in use: open it again.")
    return array

  def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
    """`read(name)[start:stop]`, reading no more than that: safetensors' own slices read it all.

    Raises ValueError as `read` does.
    """
    info, path = self.info(name), self._file[name]
    row = math.prod(info.shape[1:]) * info.dtype.itemsize
    try:
      with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(length))[name]["data_offsets"]
        file.seek(8 + length + begin + start * row)
        data = np.fromfile(file, np.uint8, (stop - start) * row)
    except (OSError, ValueError, KeyError) as error:
      raise ValueError(f"{path}: tensor {name!r} cannot be read: {error}") from error
    if end - begin != info.shape[0] * row or len(data) != (stop - start) * row:
      raise ValueError(f"{path}: tensor {name!r} changed while the file was in use: open it again.")
    return data.view(info.dtype).reshape(stop - start, *info.shape[1:])

  def _add(self, path: Path) -> None:
    """Takes the tensors of one checked file; refuses names another shard already gave."""
    header = read_header(path)
    for name in header:
      if name in self._file:
        raise ValueError(
          f"{path}: tensor {clip(name)} is also in {self._file[name].name}: which is meant?\n"
          "Save the model again into an empty directory."
        )
    self._info.update(header)
    self._file.update(dict.fromkeys(header, path))

  def _add_shards(self, index: Path) -> None:
    """Takes the tensors of every shard of an index, which must hold what the index promises."""
    weight_map = _read_weight_map(index)
    for shard in sorted(set(weight_map.values())):
      if not (self.directory / shard).is_file():
        raise ValueError(
          f"{index} lists the shard {clip(shard)}, which is not there: download it.\n"
          f"{_listing(self.directory)}"
        )
      self._add(self.directory / shard)
    for name, shard in weight_map.items():
      if name not in self._file or self._file[name].name != shard:
        raise ValueError(
          f"{index} says that {shard} holds the tensor {clip(name)}, and it does not.\n"
          "Index and shards are not of one save: download or save all of them again."
        )


def file_of(tensors: Any, name: str) -> Path:
  """The file of a tensor, for messages, whatever the kind of the files."""
  return tensors.file_of(name) if hasattr(tensors, "file_of") else tensors.path


def read_config(directory: str | os.PathLike, name: str = "config.json") -> dict[str, Any]:
  """The JSON object in `directory/name`. Raises ValueError when it is missing or is not one."""
  path = _directory(directory) / name
  if not path.is_file():
    raise ValueError(f"no {name} in {path.parent}: it must be there.\n{_listing(path.parent)}")
  return records.read_object(path)


def read_header(path: Path) -> dict[str, TensorInfo]:
  """Shape and dtype of every tensor of one safetensors file, checked against the file's size.

  Raises ValueError naming the file and the tensor for whatever the format does not allow.
  """
  with open(records.regular(path), "rb") as file:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
      raise _damaged(
        path,
        f"the file has {size} bytes and asks for a header of {length if size >= 8 else '?'} "
        f"(allowed: at most {MAX_HEADER_BYTES}, and it must fit the file)",
      )
    header = records.parse_object(file.read(length), f"the header of {path}")
  header.pop("__metadata__", None)
  found, spans = {}, []
  for name, entry in header.items():
    found[name], span = _check_entry(path, name, entry)
    spans.append((*span, name))
  _check_cover(path, sorted(spans), size - 8 - length)
  try:
    with safe_open(path, framework="np", backend="pread"):
      pass  # the library's own checks of the same header, here rather than in the middle of a load
  except (SafetensorError, OSError) as error:
    raise _damaged(path, str(error)) from error
  return found


def write(
  path: str | os.PathLike,
  tensors: Mapping[str, np.ndarray],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes one safetensors file, whole or not at all: temporary file beside it, fsync, rename.

  `metadata` (strings; default `{"format": "pt"}`, which transformers and peft ask for) goes into
  the header. Raises ValueError for a folder that is not there and for a dtype `TensorDir` cannot
  read back; a file that was at `path` then stays as it was.
  """
  path = Path(path)
  _directory(path.parent)
  arrays = {name: _writable(name, value) for name, value in tensors.items()}
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    temporary.touch()
    mode = temporary.stat().st_mode  # what the umask asks for; the library makes 0600
    save_file(arrays, temporary, {"format": "pt"} if metadata is None else dict(metadata))
    temporary.chmod(mode)
    with open(temporary, "rb") as file:
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def _writable(name: str, value: np.ndarray) -> np.ndarray:
  # The library writes the buffer as it lies, so a transposed view would come out wrong.
  array = np.asarray(value, order="C")
  if array.dtype not in DTYPES.values():
    raise ValueError(
      f"tensor {name!r} is {array.dtype}, which is not written; allowed: "
      f"{', '.join(str(dtype) for dtype in DTYPES.values())}. Cast it first."
    )
  return array


def _check_entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
  """One header entry as `(info, (begin, end))`."""
  who = f"tensor {clip(name)}"
  if not isinstance(entry, dict) or not set(entry) >= {"dtype", "shape", "data_offsets"}:
    raise _damaged(path, f"{who} must have dtype, shape and data_offsets, and is {clip(entry)}")
  dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
  if not isinstance(dtype, str) or dtype not in DTYPES:
    raise ValueError(
      f"{path}: {who} has the dtype {clip(dtype)}, which is not read; allowed: "
      f"{', '.join(DTYPES)}.\nConvert the file to one of them, such as BF16, first."
    )
  if not _is_naturals(shape) or not _is_naturals(span) or len(span) != 2:
    raise _damaged(
      path,
      f"{who} needs whole numbers >= 0 in shape (at most 64) and in data_offsets [begin, end]; "
      f"it has shape {clip(shape)} and data_offsets {clip(span)}",
    )
  need = math.prod(shape) * DTYPES[dtype].itemsize
  begin, end = span
  if end - begin != need:
    raise _damaged(
      path,
      f"{who} of shape {clip(shape)} and dtype {dtype} needs {clip(need)} bytes, "
      f"and its data_offsets {clip(span)} hold {clip(end - begin)}",
    )
  return TensorInfo(tuple(shape), DTYPES[dtype]), (begin, end)


def _check_cover(path: Path, spans: list[tuple[int, int, str]], data_bytes: int) -> None:
  """Checks that the sorted `(begin, end, name)` follow each other and fill the data exactly."""
  cursor = 0
  for begin, end, name in spans:
    if begin != cursor:
      fault = "overlaps the one before it" if begin < cursor else "leaves a hole before it"
      raise _damaged(path, f"tensor {clip(name)} begins at byte {begin}, not {cursor}: it {fault}")
    if end > data_bytes:
      raise _damaged(path, f"tensor {clip(name)} ends at byte {end} of {data_bytes} bytes of data")
    cursor = end
  if cursor != data_bytes:
    raise _damaged(path, f"{data_bytes - cursor} bytes at the end of the file belong to no tensor")


def _is_naturals(values: Any) -> bool:
  """True for a list of at most 64 (NumPy's limit on axes) integers from 0 that fit 63 bits."""
  return (
    isinstance(values, list)
    and len(values) <= 64
    and all(type(value) is int and 0 <= value < 2**63 for value in values)
  )


def _damaged(path: Path, what: str) -> ValueError:
  return ValueError(
    f"{path} is not a sound safetensors file: {what}.\nIt is cut short, damaged, or was not "
    "written by safetensors: download it or save it again."
  )


def _read_weight_map(index: Path) -> dict[str, str]:
  """Shard file name by tensor name; file names must stay in the index's directory."""
  weight_map = records.read_object(index).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise ValueError(f'{index} must hold {{"weight_map": {{tensor name: shard file name}}}}.')
  for name, shard in weight_map.items():
    plain = isinstance(shard, str) and not set(shard) & set("/\\:\0") and shard.strip(". ")
    if not plain or len(shard) > MAX_NAME:
      raise ValueError(
        f"{index} places the tensor {clip(name)} in {clip(shard)}: only the plain name of a file "
        "beside the index is allowed, such as 'model-00001-of-00002.safetensors'."
      )
  return weight_map


def _directory(directory: str | os.PathLike) -> Path:
  path = Path(directory)
  if path.is_dir():
    return path
  if path.exists():
    raise ValueError(f"{path} is a file: give the directory that holds it, such as {path.parent}.")
  there = next(parent for parent in path.absolute().parents if parent.is_dir())
  raise ValueError(f"no directory {path}.\n{_listing(there)}")


def _listing(directory: Path, most: int = 20) -> str:
  names = sorted(child.name + "/" * child.is_dir() for child in directory.iterdir())
  more = f" and {len(names) - most} more" if len(names) > most else ""
  return f"{directory} holds: {', '.join(names[:most]) or 'nothing'}{more}"


def _no_tensors(directory: Path, stem: str) -> str:
  pickles = sorted(path.name for path in directory.glob("*model*.bin"))
  if not pickles:
    return (
      f"no {stem}.safetensors in {directory}, nor {stem}.safetensors.index.json.\n"
      f"{_listing(directory)}"
    )
  convert = _CONVERT["adapter_model" if stem == "adapter_model" else "model"]
  return (
    f"{directory} holds {', '.join(pickles)} and no {stem}.safetensors. A .bin file is a Python "
    "pickle, which can run code, so it is never read.\nIf you trust where it is from, convert it "
    f"once:\n  {convert.format(directory=directory)}"
  )
