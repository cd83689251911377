"""Codebooks, blocks and double quantisation, against their definitions written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj
from peftjax.quant import blockwise, codebooks, double
from peftjax.quant.formats import BLOCK_SIZES, Format

NAMES = ("nf4", "nf4_textbook", "lloyd_max", "fp4", "fp4_e3m0", "int4")


def weights(kind, shape=(256, 48), seed=0):
  """Float32 weights of one kind; blocks of 64 run along the first axis."""
  rng = np.random.default_rng(seed)
  normal = rng.normal(0, 0.02, shape)
  w = {
    "normal": normal,
    "uniform": rng.uniform(-1, 1, shape),
    "heavy": rng.standard_t(2, shape),
    "zeros": normal * (np.arange(shape[0]) // 64 % 2)[:, None],
    "outlier": np.where(rng.random(shape) < 0.002, 50.0, normal),
  }[kind]
  return w.astype(np.float32)


def test_nf4_is_the_published_table():
  """Made again from its rule: normal quantiles, eight above and seven below zero."""
  from scipy.stats import norm

  above = norm.ppf(np.linspace(0.9677083, 0.5, 9)[:-1])
  below = -norm.ppf(np.linspace(0.9677083, 0.5, 8)[:-1])
  values = np.sort(np.concatenate([above, below, [0.0]]))
  np.testing.assert_allclose(codebooks.four_bits("nf4"), values / values.max(), atol=1e-6)


def test_textbook_and_lloyd_max_are_what_they_say():
  """Means of sixteen bins of equal probability; each level the mean of what is nearest to it."""
  x = np.random.default_rng(0).standard_normal(1_000_000)
  edges = np.quantile(x, np.linspace(0, 1, 17)[1:-1])
  means = np.array([x[np.digitize(x, edges) == i].mean() for i in range(16)])
  np.testing.assert_allclose(codebooks.four_bits("nf4_textbook"), means / means[-1], atol=5e-3)
  levels = codebooks.four_bits("lloyd_max").astype(np.float64) * 2.7326  # Max 1960, table I
  nearest = np.abs(x[:, None] - levels).argmin(1)
  means = np.array([x[nearest == i].mean() for i in range(16)])
  np.testing.assert_allclose(levels, means, atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_thresholds_give_the_nearest_value(name):
  """For numbers all over [-1, 1], ties aside."""
  x = np.random.default_rng(0).uniform(-1, 1, 4096).astype(np.float32)
  bounds, order = codebooks.thresholds(name)
  values = codebooks.four_bits(name)
  code = order[(x[:, None] > bounds).sum(1)]
  off = np.abs(x - values[code]) - np.abs(x[:, None] - values).min(1)
  assert off.max() <= 1e-7
  assert values.dtype == np.float32 and (np.diff(bounds) > 0).all()


def test_the_dynamic_map():
  """256 ascending values with 0 and 1 but not -1, each decade with twice the steps of the last."""
  signed, unsigned = codebooks.dynamic_map(True), codebooks.dynamic_map(False)
  for table in (signed, unsigned):
    assert len(table) == 256 and (np.diff(table) > 0).all() and table[-1] == 1 and 0 in table
  assert signed[0] == np.float32(-0.99296875) and signed[127] == 0
  np.testing.assert_array_equal(signed[128:-1], -signed[126::-1])
  assert ((signed > 0.1) & (signed < 1)).sum() == 64 and (unsigned[1:-1] > 0.1).sum() == 128


@pytest.mark.parametrize("kind", ["normal", "heavy", "zeros", "outlier"])
@pytest.mark.parametrize("name", [*NAMES, "int8"])
@pytest.mark.parametrize("block_size", [32, 64, 256])
def test_every_value_is_within_half_a_step(kind, name, block_size):
  """A weight comes back as its block's absmax times the nearest value, in any block size."""
  w = weights(kind)
  fmt = Format(name, block_size, False)
  codes, absmax = fmt.quantize(jnp.asarray(w))
  got = np.asarray(fmt.dequantize(codes, absmax, -2, jnp.float32))
  blocks = w.reshape(-1, block_size, w.shape[1])
  want_absmax = np.abs(blocks).max(1)
  np.testing.assert_array_equal(absmax, want_absmax)
  assert codes.shape == (256 if name == "int8" else 128, 48) and codes.dtype == jnp.uint8
  if name == "int8":
    step = want_absmax[:, None] / 127
    assert (np.abs(got.reshape(blocks.shape) - blocks) <= step * 0.501).all()
  else:
    values = codebooks.four_bits(name)
    x = blocks / np.maximum(want_absmax, 1e-30)[:, None]
    best = np.abs(x[..., None] - values).min(-1) * want_absmax[:, None]
    assert (np.abs(got.reshape(blocks.shape) - blocks) <= best + 1e-6 * want_absmax[:, None]).all()


@pytest.mark.fast_for("100-.*")
@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("size", [96, 100])
def test_a_short_last_block_has_its_own_scale(name, size):
  """Of a column of 96 or 100, the first 64 are one block and the rest another."""
  w = weights("normal", (size, 8))
  fmt = Format(name, 64, False)
  codes, absmax = fmt.quantize(jnp.asarray(w))
  assert absmax.shape == (2, 8)
  got = fmt.dequantize(codes, absmax, -2, jnp.float32)
  for part in (slice(0, 64), slice(64, size)):
    alone = fmt.quantize(jnp.asarray(w[part]))
    want = fmt.dequantize(*alone, -2, jnp.float32)
    np.testing.assert_array_equal(got[part], want)


def test_a_byte_holds_two_codes_the_even_one_high():
  """As bitsandbytes packs them; unpacking undoes it along either axis."""
  codes = jnp.asarray(np.random.default_rng(0).integers(0, 16, (3, 6, 4)), jnp.uint8)
  for axis in (-2, -1):
    packed = blockwise.pack(codes, axis)
    even = jnp.moveaxis(codes, axis, 0)[::2]
    odd = jnp.moveaxis(codes, axis, 0)[1::2]
    np.testing.assert_array_equal(jnp.moveaxis(packed, axis, 0), (even << 4) | odd)
    np.testing.assert_array_equal(blockwise.unpack(packed, axis), codes)


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("stack", [(), (3,)])
def test_double_quantisation_by_its_definition(axis, stack):
  """Each scale is its group's absmax times the nearest of the 256 values, plus the mean."""
  absmax = np.random.default_rng(0).uniform(0.5, 2, (*stack, 10, 60)).astype(np.float32)
  scales = double.quantize(jnp.asarray(absmax), axis)
  assert scales.codes.shape == absmax.shape and scales.codes.dtype == jnp.uint8
  assert scales.group.shape == (*stack, 3) and scales.offset.shape == stack
  got = np.asarray(scales.dequantize(axis)).reshape(-1, 10, 60)
  table = codebooks.dynamic_map()
  for one, back in zip(absmax.reshape(-1, 10, 60), got, strict=True):
    flat = (one.T if axis == -2 else one).reshape(-1)
    centred = flat - flat.mean()
    group = np.concatenate(
      [np.full(len(g), np.abs(g).max()) for g in np.split(centred, [256, 512])]
    )
    nearest = np.abs((centred / group)[:, None] - table).argmin(1)
    want = table[nearest] * group + flat.mean()
    want = want.reshape(60, 10).T if axis == -2 else want.reshape(10, 60)
    np.testing.assert_allclose(back, want, rtol=1e-5)


def test_a_stack_is_its_layers():
  """Codes and scales of a stack are those of each layer alone."""
  w = jnp.asarray(np.stack([weights("normal", seed=i) for i in range(3)]))
  fmt = pj.quant.nf4(64)
  stacked = jax.tree.leaves(fmt.quantize(w))
  for i in range(3):
    for all_of_them, one in zip(stacked, jax.tree.leaves(fmt.quantize(w[i])), strict=True):
      np.testing.assert_array_equal(all_of_them[i], one)


def test_bits_per_weight():
  """4.127 with double quantisation at block 64, counting every array; 4.5 without."""
  w = jax.ShapeDtypeStruct((4096, 1024), jnp.float32)
  made = lambda fmt: jax.tree.leaves(jax.eval_shape(fmt.quantize, w))
  bits = lambda fmt: sum(8 * x.size * x.dtype.itemsize for x in made(fmt)) / w.size
  assert abs(bits(pj.quant.nf4()) - 4.127) < 0.001
  assert bits(pj.quant.nf4(double_quant=False)) == 4.5 and bits(pj.quant.int8()) == 8.5
  assert abs(bits(pj.quant.fp4(256)) - 4.0318) < 0.001


def test_the_product_of_a_scale_is_rounded_before_the_sum():
  """A fused multiply-add would round once: bit for bit the two-step result, jitted or not."""
  rng = np.random.default_rng(0)
  absmax = jnp.asarray(rng.uniform(0.5, 2, (64, 64)), jnp.float32)
  scales = double.quantize(absmax, -1)
  table = codebooks.dynamic_map()[np.asarray(scales.codes)]
  group = np.repeat(np.asarray(scales.group), 256).reshape(64, 64)
  two_steps = (table * group).astype(np.float32) + np.asarray(scales.offset)
  np.testing.assert_array_equal(jax.jit(lambda s: s.dequantize(-1))(scales), two_steps)
  once = (table.astype(np.float64) * group + np.asarray(scales.offset)).astype(np.float32)
  assert (once != two_steps).any()  # it matters


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_block_sizes(block_size):
  assert pj.quant.nf4(block_size).block_size == block_size


def test_unknown_formats_are_refused():
  """With what there is."""
  with pytest.raises(ValueError, match="block_size 48 is not one of 32, 64"):
    pj.quant.nf4(48)
  with pytest.raises(ValueError, match="'published', 'textbook', 'lloyd_max'"):
    pj.quant.nf4(codebook="best")
  with pytest.raises(ValueError, match="'e2m1', 'e3m0'"):
    pj.quant.fp4(layout="e1m2")


@pytest.mark.fast_for("float32")
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_both_ways_to_look_codes_up_give_the_table(dtype, monkeypatch):
  """The gather of CPUs and the selects of other devices, which are run here in its place."""
  table = np.random.default_rng(0).integers(-99, 99, 16).astype(dtype)
  index = jnp.arange(16, dtype=jnp.uint8)
  np.testing.assert_array_equal(blockwise.lookup(table, index), table)
  monkeypatch.setattr(jax.lax, "platform_dependent", lambda x, cpu, default: default(x))
  np.testing.assert_array_equal(blockwise.lookup(table, index), table)
