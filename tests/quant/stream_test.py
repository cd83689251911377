"""Quantising in pieces gives what quantising at once gives, and stacks fill up in place."""

import weakref

import jax
import ml_dtypes
import numpy as np
import pytest

import peftjax as pj
from peftjax.quant import stream
from peftjax.quant.transform import quantize_leaf

FORMATS = (
  pj.quant.nf4(),
  pj.quant.nf4(32, False),
  pj.quant.fp4(256),
  pj.quant.int4(),
  pj.quant.int8(),
)


def _weights(shape, dtype=np.float32):
  return np.random.default_rng(0).standard_t(3, shape).astype(dtype)


def _same(got, want):
  """Kinds, shapes, dtypes and every bit."""
  assert (got.fmt, got.axis, got.dense_dtype) == (want.fmt, want.axis, want.dense_dtype)
  pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
  for one, other in pairs:
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_pieces_are_the_whole(fmt, dtype, monkeypatch):
  """Of a kernel, of a transposed view, and of a table; the last piece is a part of one."""
  monkeypatch.setattr(stream, "PIECE", 3000)
  for path, w in (
    ("up/kernel", _weights((200, 100), dtype)),
    ("up/kernel", _weights((100, 200), dtype).T),
    ("embed/embedding", _weights((100, 200), dtype)),
  ):
    _same(stream.quantize_array(path, w, fmt), quantize_leaf(path, w, fmt))


def test_a_large_matrix_at_the_real_size_of_pieces():
  """Several pieces, double quantisation of 45056 scales: bit for bit."""
  w = _weights((2816, 1024))
  assert w.size > 5 * stream.PIECE
  _same(
    stream.quantize_array("k/kernel", w, pj.quant.nf4()),
    quantize_leaf("k/kernel", w, pj.quant.nf4()),
  )


@pytest.mark.parametrize("at", [(0, 0), (199, 99)])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_a_nan_in_any_piece_is_refused(at, bad, monkeypatch):
  monkeypatch.setattr(stream, "PIECE", 3000)
  w = _weights((200, 100))
  w[at] = bad
  with pytest.raises(ValueError, match="layers_3/up/kernel has NaN or infinite"):
    stream.quantize_array("layers_3/up/kernel", w, pj.quant.nf4())


def test_a_stack_is_filled_in_place():
  """Each layer is dropped before the next but one is made."""
  layers = [
    stream.quantize_array("k/kernel", _weights((64, 8)) * i, pj.quant.nf4()) for i in (1, 2, 3)
  ]
  whole = stream.stack("layers/k/kernel", layers, (3,))
  for i, layer in enumerate(layers):
    np.testing.assert_array_equal(whole.codes[i], layer.codes)
    np.testing.assert_array_equal(whole.scales.group[i], layer.scales.group)
    np.testing.assert_array_equal(whole.scales.offset[i], layer.scales.offset)
  alive = []

  def made():
    for i in range(5):
      assert sum(ref() is not None for ref in alive) <= 1
      array = np.full((4, 4), i, np.float32)
      alive.append(weakref.ref(array))
      yield array
      del array

  np.testing.assert_array_equal(stream.stack("layers/k", made(), (5,))[:, 0, 0], np.arange(5))


@pytest.mark.parametrize(
  "second",
  [
    stream.quantize_array("k/kernel", _weights((64, 8)), pj.quant.nf4(32)),
    stream.quantize_array("k/kernel", _weights((64, 8), np.float16), pj.quant.nf4()),
    _weights((64, 8)),
  ],
  ids=["block size", "dtype", "dense"],
)
def test_layers_that_differ_make_no_stack(second):
  first = stream.quantize_array("k/kernel", _weights((64, 8)), pj.quant.nf4())
  with pytest.raises(
    ValueError, match="layer 1 of layers/k/kernel has another .*scan_layers=False"
  ):
    stream.stack("layers/k/kernel", [first, second], (2,))


def test_aligned_arrays_are_taken_as_they_are():
  """On a CPU `device_put` copies none of them; they begin at 64 bytes and are written to."""
  array = stream.aligned((33, 7), np.uint8)
  array[:] = 5
  put = jax.device_put(array)
  assert put.unsafe_buffer_pointer() == array.ctypes.data and array.ctypes.data % 64 == 0
  assert stream.aligned((), np.float32).shape == () and stream.aligned((0, 3), np.float32).size == 0
