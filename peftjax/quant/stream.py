"""Quantises a matrix piece by piece, so that no dense copy of it need ever be there.

Everything here is in NumPy, aligned so that `jax.device_put` takes it as it is on a CPU.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from peftjax.quant import transform
from peftjax.quant.formats import Format
from peftjax.quant.weight import Quantized

PIECE = 2**18  # weights quantised at once: 1 MiB of float32, and several such arrays


def quantize_array(path: str, array: np.ndarray, fmt: Format) -> Quantized:
  """`transform.quantize_leaf`, bit for bit, for a kernel `[in, out]` or a table `[V, D]`."""
  on_last = transform.axis_of(path) == -2
  piece = lambda at: array[:, at] if on_last else array[at]
  return quantize_pieces(path, array.shape, array.dtype, piece, fmt)


def quantize_pieces(
  path: str,
  shape: tuple[int, ...],
  dtype: np.dtype,
  piece: Callable[[slice], np.ndarray],
  fmt: Format,
) -> Quantized:
  """The same for an array that is never there as a whole.

  Args:
    path: names the weight in errors; it is a table's if it ends in `embedding`.
    shape, dtype: shape and dtype of the array.
    piece: some outputs: `[in, n]` from a kernel's columns, `[n, D]` from a table's rows. Pieces may
      overlap.
    fmt: the format.

  Raises:
    ValueError: if an entry is NaN or infinite.
  """
  axis = transform.axis_of(path)
  n, outs = shape[axis], shape[-3 - axis]
  codes = aligned(_with(shape, axis, n * fmt.bits // 8), np.uint8)
  absmax = aligned(_with(shape, axis, -(-n // fmt.block_size)), np.float32)
  size = min(outs, max(1, PIECE // n))
  for start in range(0, outs, size):
    start = min(start, outs - size)  # the last piece overlaps: one shape is one program
    part = slice(start, start + size)
    to = (slice(None), part) if axis == -2 else part
    codes[to], absmax[to] = transform.encode(path, piece(part), fmt, axis)
  scales = transform.finish_scales(absmax, fmt, axis)
  return Quantized(codes=codes, scales=scales, fmt=fmt, axis=axis, dense_dtype=dtype.name)


def stack(path: str, layers: Iterable[Any], shape: tuple[int, ...]) -> Any:
  """The tree `[*shape, ...]` of as many trees, in C order, each written into place as it comes.

  Raises:
    ValueError: if the layers differ in format or dtype.
  """
  whole, first = None, None
  for i, layer in enumerate(layers):
    kind = jax.tree.structure(layer), [(x.shape, x.dtype) for x in jax.tree.leaves(layer)]
    if first is None:
      first = kind
      whole = jax.tree.map(lambda x: aligned((*shape, *x.shape), x.dtype), layer)
    if kind != first:
      raise ValueError(
        f"layer {i} of {path} has another format or dtype than layer 0, so they make no stack. "
        "Load with scan_layers=False."
      )
    for to, value in zip(jax.tree.leaves(whole), jax.tree.leaves(layer), strict=True):
      to[np.unravel_index(i, shape)] = value
  return whole


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
  """Zeros in pages of their own.

  They begin where XLA wants arrays to begin, and go back to the system when the array is dropped:
  blocks of malloc of many sizes would leave holes, of 60 MB in a model of 400.
  """
  size = math.prod(shape) * np.dtype(dtype).itemsize
  pages = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
  return np.frombuffer(pages, dtype, math.prod(shape)).reshape(shape)


def _with(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
  changed = list(shape)
  changed[axis] = size
  return tuple(changed)
