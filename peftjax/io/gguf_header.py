"""The header of a GGUF file: its metadata and the places of its tensors; nothing in it is trusted.

Invariants:
- Time and memory are linear in the header's bytes, of which there are at most `MAX_HEADER_BYTES`;
  no count is believed before that many bytes are there, and nothing recurses.
- The tensors lie one after the other, as llama.cpp demands: none overlaps another or ends after
  the file, and each has the size that its shape and type mean.
- Weights stay on disk: the file is mapped.
"""

from __future__ import annotations

import functools
import math
import mmap
import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from peftjax.io import records
from peftjax.io.records import clip

MAX_HEADER_BYTES = 2**25  # the largest vocabularies, of 262,144 tokens, take some 2^24
MAX_ENTRIES = 2**16  # limit for the metadata, and for the tensors

_NUMBERS = {
  0: ("uint8", "<B"),
  1: ("int8", "<b"),
  2: ("uint16", "<H"),
  3: ("int16", "<h"),
  4: ("uint32", "<I"),
  5: ("int32", "<i"),
  6: ("float32", "<f"),
  7: ("bool", "<B"),
  10: ("uint64", "<Q"),
  11: ("int64", "<q"),
  12: ("float64", "<d"),
}
_TEXT, _ARRAY = 8, 9


class Tensor(NamedTuple):
  """The place of a tensor in the file.

  Attributes:
    shape: in NumPy's order, the contiguous axis last.
    kind: ggml's name of its type, such as "Q4_K".
    start: its first byte in the file.
    size: bytes.
  """

  name: str
  shape: tuple[int, ...]
  kind: str
  start: int
  size: int


class Header(NamedTuple):
  """A file's metadata (texts, numbers, booleans, and lists of one kind of them) and tensors."""

  metadata: Mapping[str, Any]
  tensors: Mapping[str, Tensor]
  data: np.ndarray  # uint8, all bytes of the file, mapped


def read(path: str | Path) -> Header:
  """The header of a GGUF file; the last one is kept, unless the file was just written.

  Raises:
    ValueError: if the file is no GGUF, damaged, cut short, big-endian or of another version; if
      it nests arrays, repeats a name, or has a tensor of no size or of an unknown type.
  """
  path = records.regular(path)
  found = path.stat()
  state = (found.st_ino, found.st_size, found.st_mtime_ns)
  # Two writes within one tick of the file system's clock leave the same state.
  just_written = time.time_ns() - found.st_mtime_ns < 10**9
  return _read(path) if just_written else _kept(path, state)


@functools.lru_cache(maxsize=1)
def _kept(path: Path, state: tuple[int, ...]) -> Header:  # `state`: a changed file is another one
  return _read(path)


def _read(path: Path) -> Header:
  try:
    with path.open("rb") as file:
      size = os.fstat(file.fileno()).st_size
      mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
  except OSError as error:
    raise ValueError(f"{path} cannot be read ({error.strerror}).") from None
  try:
    metadata, tensors = _parse(mapped)
  except ValueError as error:
    raise ValueError(
      f"{path} is not a sound GGUF file: {error}. Download it again, or convert the model again."
    ) from None
  return Header(metadata, tensors, np.frombuffer(mapped, np.uint8))


class _Cursor:
  """A place in the header, which moves as values are read."""

  def __init__(self, data: Any):
    self.data, self.at, self.end = data, 0, min(len(data), MAX_HEADER_BYTES)

  def need(self, size: int, what: str) -> None:
    """Refuses a value that is longer than the rest of the header."""
    if size <= self.end - self.at:
      return
    if self.end < len(self.data):
      raise ValueError(f"its header has more than {MAX_HEADER_BYTES} bytes, at {what}")
    raise ValueError(f"it ends after {len(self.data)} bytes, within {what}")

  def number(self, code: str, what: str) -> Any:
    self.need(struct.calcsize(code), what)
    [value] = struct.unpack_from(code, self.data, self.at)
    self.at += struct.calcsize(code)
    return value

  def text(self, what: str) -> str:
    return self.texts(1, what)[0]

  def texts(self, count: int, what: str) -> list[str]:
    """Reads texts; each is its length in bytes, as uint64, and UTF-8."""
    self.need(8 * count, what)
    data, at, end = self.data, self.at, self.end
    unpack, found = struct.Struct("<Q").unpack_from, []
    try:
      for _ in range(count):  # up to a million, so nothing is called that need not be
        start = at + 8
        at = start + unpack(data, at)[0] if start <= end else start
        if at > end:
          self.need(at - self.at, what)
        found.append(str(data[start:at], "utf-8"))
    except UnicodeDecodeError:
      raise ValueError(f"{what} has bytes that are not UTF-8 text") from None
    self.at = at
    return found

  def value(self, what: str) -> Any:
    """Reads a value after its type; an array's has its elements' type and number, too."""
    kind = self.number("<I", what)
    if kind == _TEXT:
      return self.text(what)
    if kind != _ARRAY:
      return self.numbers(kind, 1, what)[0]
    kind, count = self.number("<I", what), self.number("<Q", what)
    if kind == _ARRAY:
      raise ValueError(f"{what} is an array of arrays, which llama.cpp does not write")
    return self.texts(count, what) if kind == _TEXT else self.numbers(kind, count, what)

  def numbers(self, kind: int, count: int, what: str) -> list[Any]:
    if kind not in _NUMBERS:
      raise ValueError(f"{what} has a value of type {kind}; there are 0 to 12")
    name, code = _NUMBERS[kind]
    size = struct.calcsize(code) * count
    self.need(size, what)
    found = np.frombuffer(self.data[self.at : self.at + size], np.dtype(code[1:]).newbyteorder("<"))
    self.at += size
    if name == "bool" and (found > 1).any():
      raise ValueError(f"{what} has the byte {found.max()} for true or false, which are 1 and 0")
    return found.astype(name).tolist()


def _parse(data: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
  if data[:4] != b"GGUF":
    raise ValueError(f"it does not begin with GGUF but with {bytes(data[:4])!r}")
  cursor = _Cursor(data)
  cursor.at = 4
  version = cursor.number("<I", "its version")
  if version & 0xFFFF == 0 and version:
    raise ValueError("it is big-endian, and only little-endian files are read")
  if version not in (2, 3):
    raise ValueError(f"it is of version {version}; 2 and 3 are read")
  counts = [cursor.number("<Q", f"its number of {what}") for what in ("tensors", "values")]
  for count, what, least in zip(counts, ("tensors", "values"), (32, 13), strict=True):
    if count > MAX_ENTRIES or count * least > len(data):
      most = min(MAX_ENTRIES, len(data) // least)
      raise ValueError(f"it claims to have {count} {what}; in {len(data)} bytes are at most {most}")
  metadata: dict[str, Any] = {}
  for _ in range(counts[1]):
    key = cursor.text("the name of a value")
    if key in metadata:
      raise ValueError(f"it has the value {clip(key)} twice")
    metadata[key] = cursor.value(clip(key))
  return metadata, _tensors(cursor, counts[0], _alignment(metadata))


def _alignment(metadata: Mapping[str, Any]) -> int:
  value = metadata.get("general.alignment", 32)
  if type(value) is not int or not 1 <= value <= 2**20 or value & (value - 1):
    raise ValueError(f"general.alignment is {clip(value)}; it must be a power of two up to 2^20")
  return value


def _tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, Tensor]:
  """Reads the header's entry for each tensor, then checks it against the file."""
  told = []
  for _ in range(count):
    name = cursor.text("the name of a tensor")
    what = f"tensor {clip(name)}"
    dims = cursor.number("<I", what)
    if not 1 <= dims <= 4:
      raise ValueError(f"{what} has {dims} dimensions; tensors have 1 to 4")
    shape = tuple(cursor.number("<Q", what) for _ in range(dims))[::-1]
    told.append((name, shape, cursor.number("<I", what), cursor.number("<Q", what)))
  data = -(-cursor.at // alignment) * alignment
  tensors: dict[str, Tensor] = {}
  end = 0
  for name, shape, code, offset in told:
    what = f"tensor {clip(name)}"
    if name in tensors:
      raise ValueError(f"it has {what} twice")
    kind, size = _size(what, shape, code)
    if offset != end:
      raise ValueError(f"{what} begins at byte {offset} of the data; those before it end at {end}")
    if data + end + size > len(cursor.data):
      raise ValueError(
        f"{what}, {kind} of shape {shape}, ends at byte {clip(data + end + size)}, and the file "
        f"has {len(cursor.data)}"
      )
    tensors[name] = Tensor(name, shape, kind, data + end, size)
    end += -(-size // alignment) * alignment
  return tensors


def _size(what: str, shape: tuple[int, ...], code: int) -> tuple[str, int]:
  """The name of a type and the bytes of a tensor."""
  from gguf import constants  # late: it takes a fifth of a second

  try:
    kind = constants.GGMLQuantizationType(code)
  except ValueError:
    raise ValueError(f"{what} has the type {code}, which the gguf package does not know") from None
  block, size = constants.GGML_QUANT_SIZES[kind]
  if min(shape) < 1:
    raise ValueError(f"{what} has shape {shape}; every dimension is at least 1")
  if shape[-1] % block:
    raise ValueError(f"{what}, {kind.name} of shape {shape}, has rows that {block} do not divide")
  return kind.name, math.prod(shape) // block * size
