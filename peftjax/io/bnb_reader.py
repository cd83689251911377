"""Reads bitsandbytes' 4-bit weights from the safetensors files transformers writes.

A weight `X` [out, in] is stored flat, row after row, two codes per byte; beside it lie `X.absmax`,
`X.quant_map`, and `X.quant_state.bitsandbytes__nf4` (or `fp4`), the UTF-8 bytes of a JSON object.
With double quantisation `X.absmax` is uint8 and there are `X.nested_absmax`, `X.nested_quant_map`.

Where `in` is a multiple of the block size, blocks and bytes are the same as ours: codes and scales
are transposed, and no number changes.
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from peftjax.io.safetensors_dir import TensorDir, TensorInfo
from peftjax.quant import codebooks, stream
from peftjax.quant.double import GROUP, DoubleScales
from peftjax.quant.formats import BLOCK_SIZES, Format
from peftjax.quant.transform import relative_error
from peftjax.quant.weight import Quantized

STATE = ".quant_state.bitsandbytes__"
TYPES = ("nf4", "fp4")
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_DTYPES = {
  "float32": np.dtype(np.float32),
  "float16": np.dtype(np.float16),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


class State(NamedTuple):
  """The description of one weight: its format, shape [out, in], dtype and mean of the scales."""

  fmt: Format
  shape: tuple[int, int]
  dtype: np.dtype
  offset: float

  @property
  def blocks(self) -> int:
    return -(-math.prod(self.shape) // self.fmt.block_size)


class BnbDir:
  """A `TensorDir` in which 4-bit weights appear under their own name, as `Quantized` kernels.

  Attributes:
    states: descriptions of the 4-bit weights, by name.

  Raises:
    ValueError: on opening, naming the tensor: a state that is not a JSON object or lacks a field;
      another code, block size or codebook than bitsandbytes'; a tensor missing or misshapen.
  """

  def __init__(self, tensors: TensorDir):
    self._tensors = tensors
    names = set(tensors.names())
    found = {name.partition(STATE)[0]: name for name in names if STATE in name}
    self.states = {weight: _state(tensors, weight, found[weight]) for weight in sorted(found)}
    self._hidden = {f"{w}.{part}" for w in found for part in _PARTS} | set(found.values())
    for name in sorted(names - self._hidden):
      weight, _, part = name.rpartition(".")
      if part in _PARTS and weight in names:
        raise _fault(tensors, weight, f"there is {name}, but no {weight}{STATE}nf4 or fp4")

  def names(self) -> tuple[str, ...]:
    """The names of the weights, sorted."""
    return tuple(name for name in self._tensors.names() if name not in self._hidden)

  def info(self, name: str) -> TensorInfo:
    """Shape and dtype; for a 4-bit weight, those it was quantised from."""
    if name in self.states:
      return TensorInfo(self.states[name].shape, self.states[name].dtype)
    return self._tensors.info(name)

  def file_of(self, name: str) -> Path:
    """The file of a tensor, as `TensorDir.file_of`."""
    return self._tensors.file_of(name)

  def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
    """Some rows, as `TensorDir.read_rows`, of a tensor that is not in four bits."""
    return self._tensors.read_rows(name, start, stop)

  def read(self, name: str) -> Any:
    """One tensor as it is; a 4-bit one as a `Quantized` kernel [in, out] of NumPy arrays.

    Where `in` is not a multiple of the block size, blocks run on from one output to the next, which
    ours do not: the weight is quantised again, and a warning gives the error that this adds.

    Raises:
      ValueError: scales that are negative, NaN or infinite.
    """
    if name not in self.states:
      return self._tensors.read(name)
    state = self.states[name]
    part = lambda p: self._tensors.read(f"{name}.{p}")
    codes = self._tensors.read(name).reshape(-1).view(np.uint8)
    absmax = part("absmax")
    group = part("nested_absmax") if state.fmt.double_quant else absmax
    if not (np.isfinite(group).all() and (group >= 0).all()):
      raise _fault(self._tensors, name, "its scales are not all finite and positive")
    if state.shape[1] % state.fmt.block_size:
      return _requantised(self.file_of(name), name, state, codes, absmax, group)
    scales: Any = _kernel(absmax, state.shape[0])
    if state.fmt.double_quant:
      scales = DoubleScales(scales, group, np.asarray(state.offset, np.float32))
    codes = _kernel(codes, state.shape[0])
    return Quantized(codes, scales, state.fmt, axis=-2, dense_dtype=state.dtype.name)


def open_dir(tensors: TensorDir) -> TensorDir | BnbDir:
  """`tensors`, or a reader that makes kernels of their 4-bit weights if there are any."""
  packed = any(
    name.endswith((".quant_map", *(STATE + t for t in TYPES))) for name in tensors.names()
  )
  return BnbDir(tensors) if packed else tensors


def _kernel(flat: np.ndarray, outs: int) -> np.ndarray:
  """Codes in bitsandbytes' order, one output after the other, as `[..., out]`."""
  turned = flat.reshape(outs, -1).T
  made = stream.aligned(turned.shape, turned.dtype)
  made[:] = turned
  return made


def _requantised(
  file: Path, name: str, state: State, codes: np.ndarray, absmax: np.ndarray, group: np.ndarray
) -> Quantized:
  n = math.prod(state.shape)
  if state.fmt.double_quant:
    groups = np.repeat(group, GROUP)[: len(absmax)]
    absmax = codebooks.dynamic_map()[absmax] * groups + np.float32(state.offset)
  values = codebooks.four_bits(state.fmt.name)
  flat = values[np.stack([codes >> 4, codes & 15], -1).reshape(-1)[:n]]
  flat *= np.repeat(absmax, state.fmt.block_size)[:n]
  dense = flat.astype(state.dtype).reshape(state.shape).T
  made = stream.quantize_array(name, dense, state.fmt)
  warnings.warn(
    f"{file}: {name} {state.shape}: rows of {state.shape[1]} are not a whole number of blocks of "
    f"{state.fmt.block_size}, so it was quantised again, with a relative error of "
    f"{float(relative_error(made, dense)):.4f}. Load the model it was made from for less.",
    stacklevel=2,
  )
  return made


def _state(tensors: TensorDir, weight: str, name: str) -> State:
  """The checked state of one weight."""
  kind = name.partition(STATE)[2]
  if kind not in TYPES:
    raise _fault(tensors, weight, f"its quant_type {kind!r} is not one of {', '.join(TYPES)}")
  fields = _fields(tensors, weight, tensors.read(name).tobytes())
  nested = f"{weight}.nested_absmax" in tensors.names() or "nested_offset" in fields
  need = {
    "quant_type": lambda v: v == kind,
    "blocksize": lambda v: type(v) is int and v in BLOCK_SIZES,
    "dtype": lambda v: isinstance(v, str) and v in _DTYPES,
    "shape": _is_shape,
  }
  if nested:
    need["nested_blocksize"] = lambda v: v == GROUP
    need["nested_dtype"] = lambda v: v == "float32"
    need["nested_offset"] = lambda v: type(v) in (int, float) and math.isfinite(v)
  for field, allowed in need.items():
    if field not in fields:
      raise _fault(tensors, weight, f"its state lacks {field}")
    if not allowed(fields[field]):
      raise _fault(tensors, weight, f"its state has {field} {str(fields[field])[:80]!r}")
  out, inner = fields["shape"]
  state = State(
    Format(kind, fields["blocksize"], nested),
    (out, inner),
    _DTYPES[fields["dtype"]],
    fields["nested_offset"] if nested else 0.0,
  )
  _check_tensors(tensors, weight, state)
  return state


def _fields(tensors: TensorDir, weight: str, data: bytes) -> dict[str, Any]:
  try:
    fields = json.loads(data.decode("utf-8"))
  except (ValueError, RecursionError) as error:
    raise _fault(tensors, weight, f"its state is not readable JSON ({error})") from error
  if not isinstance(fields, dict):
    raise _fault(tensors, weight, f"its state is a JSON {type(fields).__name__}, not an object")
  return fields


def _is_shape(value: Any) -> bool:
  """True for [out, in] with even in: two codes share a byte, and ours are of one output."""
  return (
    isinstance(value, list)
    and len(value) == 2
    and all(type(n) is int and 0 < n < 2**31 for n in value)
    and value[1] % 2 == 0
  )


def _check_tensors(tensors: TensorDir, weight: str, state: State) -> None:
  """Raises unless every tensor of the weight is there, of its shape, with bitsandbytes' values."""
  nested, float32 = state.fmt.double_quant, np.dtype(np.float32)
  info = tensors.info(weight) if weight in tensors.names() else TensorInfo((0,), float32)
  size, need = math.prod(info.shape) * info.dtype.itemsize, -(-math.prod(state.shape) // 2)
  if size != need:
    raise _fault(tensors, weight, f"it has {size} bytes, and the shape {state.shape} needs {need}")
  want = {
    "absmax": TensorInfo((state.blocks,), np.dtype(np.uint8) if nested else float32),
    "quant_map": TensorInfo((16,), float32),
  }
  tables = {"quant_map": codebooks.four_bits(state.fmt.name)}
  if nested:
    want["nested_absmax"] = TensorInfo((-(-state.blocks // GROUP),), float32)
    want["nested_quant_map"] = TensorInfo((256,), float32)
    tables["nested_quant_map"] = codebooks.dynamic_map()
  for part, should in want.items():
    if f"{weight}.{part}" not in tensors.names():
      raise _fault(tensors, weight, f"there is no {weight}.{part}")
    got = tensors.info(f"{weight}.{part}")
    if got != should:
      raise _fault(
        tensors,
        weight,
        f"{part} is {got.dtype} {got.shape}, and shape {state.shape} with blocks of "
        f"{state.fmt.block_size} means {should.dtype} {should.shape}",
      )
  for part, table in tables.items():
    if not np.allclose(tensors.read(f"{weight}.{part}"), table, rtol=0, atol=1e-6):
      raise _fault(
        tensors, weight, f"its {part} is not the one bitsandbytes has for {state.fmt.name}"
      )


def _fault(tensors: TensorDir, weight: str, what: str) -> ValueError:
  return ValueError(
    f"{tensors.file_of(weight)}: the 4-bit weight {weight} cannot be read: {what}.\nSave the model "
    "again with transformers and bitsandbytes >= 0.43, as nf4 or fp4 in blocks of 32, 64, ..., "
    "4096; or load the model it was made from, with quant=pj.quant.nf4()."
  )
