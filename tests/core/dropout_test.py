"""Dropout by bytes, and the fence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftjax.core.dropout import dropout, keep_level, random_bytes
from peftjax.core.fence import computed_once, fence

KEY = jax.random.key(5)


def test_the_expectation_is_the_input():
  """Kept values are scaled by the rounded rate, so exactly; within four deviations of the mean."""
  n, rate = 400_000, 0.1
  y = np.asarray(dropout(KEY, jnp.ones(n), rate))
  keep = keep_level(rate) / 256
  assert set(np.unique(y)) == {0.0, np.float32(1 / keep)}
  assert abs((y > 0).mean() - keep) < 4 * (keep * (1 - keep) / n) ** 0.5


@pytest.mark.parametrize(
  "rate, level", [(0.0, 256), (0.001, 256), (0.002, 255), (0.1, 230), (0.5, 128), (0.9999, 1)]
)
def test_the_rate_is_rounded_to_a_byte(rate, level):
  assert keep_level(rate) == level


def test_no_key_or_a_rate_of_zero_is_the_identity():
  x = jnp.arange(6.0)
  assert dropout(None, x, 0.5) is x and dropout(KEY, x, 0.0) is x and dropout(KEY, x, 0.001) is x


def test_equal_keys_give_equal_masks_and_others_do_not():
  x = jnp.ones((32, 33))
  one, again = dropout(KEY, x, 0.5), dropout(KEY, x, 0.5)
  other = dropout(jax.random.key(6), x, 0.5)
  np.testing.assert_array_equal(one, again)
  assert abs((one == other).mean() - 0.5) < 0.1


def test_vmapped_keys_draw_what_each_key_draws_alone():
  keys = jax.random.split(jax.random.key(1), 3)
  x = jnp.ones((3, 5, 7))
  together = jax.vmap(lambda key, row: dropout(key, row, 0.5))(keys, x)
  np.testing.assert_array_equal(
    together, jnp.stack([dropout(k, r, 0.5) for k, r in zip(keys, x, strict=True)])
  )


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (4,), (5, 7), (2, 3, 11), (0, 4)])
def test_bytes_of_every_size_and_key_type(impl, shape):
  """Odd sizes too, and a key that is no threefry falls back to `jax.random.bits`."""
  bits = random_bytes(jax.random.key(0, impl=impl), shape)
  assert bits.shape == shape and bits.dtype == jnp.uint8


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_bytes_are_uniform_and_do_not_repeat(impl):
  """Chi-squared of the 256 values, and no visible correlation with the next byte or row."""
  bits = np.asarray(random_bytes(jax.random.key(2, impl=impl), (400, 512))).astype(float)
  counts = np.bincount(bits.astype(int).ravel(), minlength=256)
  chi = ((counts - bits.size / 256) ** 2 / (bits.size / 256)).sum()
  assert 150 < chi < 380  # mean 255, deviation 22.6
  for lag in (1, 2, 4, 8, 512):
    flat = bits.ravel() - 127.5
    assert abs((flat[lag:] * flat[:-lag]).mean() / flat.var()) < 0.02


def test_the_gradient_is_the_mask():
  x = jnp.linspace(1.0, 2.0, 50)
  grad = jax.grad(lambda x: dropout(KEY, x, 0.4).sum())(x)
  np.testing.assert_allclose(grad * x, dropout(KEY, x, 0.4), rtol=1e-6)


def test_bfloat16_stays_bfloat16():
  assert dropout(KEY, jnp.ones(9, jnp.bfloat16), 0.5).dtype == jnp.bfloat16


@jax.custom_vjp
def _double(x):
  return 2 * x


_double.defvjp(lambda x: (fence(2 * x), None), lambda _, g: (2 * fence(g),))


@pytest.mark.parametrize("wrap", ["eager", "jit", "vmap", "scan", "custom_vjp", "remat"])
def test_the_fence_is_the_identity(wrap):
  x = jnp.arange(12.0).reshape(3, 4)
  if wrap == "eager":
    y = fence(x)
  elif wrap == "jit":
    y = jax.jit(fence)(x)
  elif wrap == "vmap":
    y = jax.vmap(fence)(x)
  elif wrap == "scan":
    y = jax.lax.scan(lambda c, row: (c, fence(row)), 0, x)[1]
  elif wrap == "remat":
    y = jax.checkpoint(lambda x: _double(x) / 2)(x)
  else:
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda x: _double(x).sum()))(x), 2)
    y = jax.vmap(lambda row: jax.vjp(_double, row)[1](row)[0] / 2)(x)
  np.testing.assert_array_equal(y, x)


def test_the_fence_is_a_barrier_on_cpu_only_and_lowers_elsewhere():
  """A tree in, the same tree out, for any platform."""
  tree = {"a": jnp.ones(3), "b": (jnp.arange(2), None)}
  chosen = jax.jit(fence)(tree)
  assert jax.tree.structure(chosen) == jax.tree.structure(tree)
  lower = lambda *platforms: (
    jax.jit(lambda x: fence(x + 1) * 2).trace(jnp.ones(3)).lower(lowering_platforms=platforms)
  )
  assert "optimization_barrier" in lower("cpu").as_text()
  assert "optimization_barrier" not in lower("tpu").as_text()
  assert "optimization_barrier" not in lower("cuda").as_text()
  assert "optimization_barrier" in lower("cpu", "tpu").as_text()


@pytest.mark.parametrize("value", [1.5, -0.0, np.nan, np.inf, 0.0])
def test_computed_once_is_the_identity_bit_for_bit(value):
  """Whatever the first element, alone, jitted, mapped and in lower precision."""
  x = np.array([value, -2.0, 3.0], np.float32)
  for fn in (
    computed_once,
    jax.jit(computed_once),
    jax.vmap(lambda row: computed_once(row[None])[0]),
  ):
    assert np.asarray(fn(x)).tobytes() == x.tobytes()
  low = jnp.asarray(x, jnp.bfloat16)
  assert np.asarray(jax.jit(computed_once)(low)).tobytes() == np.asarray(low).tobytes()
