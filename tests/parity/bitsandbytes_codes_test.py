"""Codes and scales are those of bitsandbytes' CPU kernels."""

import functools

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import peftjax as pj
from peftjax.quant import blockwise, codebooks
from tests.golden.make_bnb import KINDS, weights

pytestmark = pytest.mark.parity

_SHAPE = (24, 8192)  # [out, in]
_BLOCKS = (32, 64, 256, 4096)


@functools.cache
def _both(kind, name, block_size, nested):
  """Our quantised kernel, their packed codes and state, of the same weights."""
  w = weights(kind, _SHAPE)
  fmt = pj.quant.nf4(block_size, nested) if name == "nf4" else pj.quant.fp4(block_size, nested)
  ours = pj.quantize({"kernel": jnp.asarray(w.T)}, fmt)["kernel"]
  theirs = bnb.quantize_4bit(
    torch.from_numpy(w), blocksize=block_size, compress_statistics=nested, quant_type=name
  )
  return ours, *theirs


# A compiler may fuse what is rounded in two steps.
_compiled = jax.jit(lambda leaf: leaf.materialize())


def _turned(flat, outs=_SHAPE[0]):
  """Their order, one output after the other, as ours: [..., out]."""
  return flat.numpy().reshape(outs, -1).T


@pytest.mark.parametrize("block_size", _BLOCKS)
@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_scales_and_values(kind, name, block_size):
  """Identical; FP4's two zeros, codes 0 and 8, count as one."""
  ours, packed, state = _both(kind, name, block_size, False)
  got = np.asarray(blockwise.unpack(ours.codes, -2))
  want = np.asarray(blockwise.unpack(jnp.asarray(_turned(packed)), -2))
  if name == "fp4":
    got, want = np.where(got == 8, 0, got), np.where(want == 8, 0, want)
  np.testing.assert_array_equal(got, want)
  np.testing.assert_array_equal(ours.scales, _turned(state.absmax))
  dense = bnb.dequantize_4bit(packed, state).numpy().T
  np.testing.assert_array_equal(_compiled(ours), dense)


@pytest.mark.parametrize("block_size", _BLOCKS)
@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("kind", KINDS)
def test_their_double_quantised_state_dequantises_to_their_numbers(kind, name, block_size):
  """Bit for bit, from their codes, group scales and mean."""
  ours, packed, state = _both(kind, name, block_size, True)
  scales = ours.scales.replace(
    codes=jnp.asarray(_turned(state.absmax)),
    group=jnp.asarray(state.state2.absmax.numpy()),
    offset=jnp.asarray(state.offset.numpy()),
  )
  leaf = ours.replace(codes=jnp.asarray(_turned(packed)), scales=scales)
  for got in (leaf.materialize(), _compiled(leaf)):
    np.testing.assert_array_equal(got, bnb.dequantize_4bit(packed, state).numpy().T)


@pytest.mark.parametrize("block_size", [32, 64, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_scales_in_eight_bits(kind, block_size):
  """Their CPU kernel finds codes in a table of 65536 entries: it may round to a neighbour.

  So ours are theirs, or the number lies within 1.6e-5 of the threshold between the two codes. The
  mean, and with it the groups, may differ in the last bits, which shifts the number by as much.
  """
  ours, _, state = _both(kind, "nf4", block_size, True)
  mean, group = np.asarray(ours.scales.offset), np.asarray(ours.scales.group)
  shift = abs(float(mean) - float(state.offset))
  assert shift <= 8 * np.spacing(mean)
  np.testing.assert_allclose(group, state.state2.absmax.numpy(), rtol=2e-7, atol=shift)
  got = np.asarray(ours.scales.codes).T.reshape(-1).astype(int)
  want = state.absmax.numpy().reshape(-1).astype(int)
  plain = np.asarray(_both(kind, "nf4", block_size, False)[0].scales).T.reshape(-1)
  groups = np.repeat(group, 256)[: len(plain)]
  x = (plain - mean) / groups
  table = codebooks.dynamic_map().astype(np.float64)
  bounds = (table[1:] + table[:-1]) / 2
  off = got != want
  assert (np.abs(got - want) <= 1).all()
  away = np.abs(x[off] - bounds[np.minimum(got, want)[off]])
  assert (away <= 1.6e-5 + 2 * shift / groups[off]).all()


def test_the_maps():
  """Codebook and dynamic map are theirs to the last bit."""
  for name in ("nf4", "fp4"):
    np.testing.assert_array_equal(codebooks.four_bits(name), bnb.get_4bit_type(name, "cpu").numpy())
  for signed in (True, False):
    np.testing.assert_array_equal(
      codebooks.dynamic_map(signed), bnb.create_dynamic_map(signed).numpy()
    )
