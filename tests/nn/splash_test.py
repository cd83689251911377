"""JAX's TPU kernel, interpreted: as attention over whole rows."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from peftjax import sharding
from peftjax.nn import splash
from peftjax.nn.dense_attention import dense_attention
from peftjax.nn.mask import AttentionMask
from tests.core.programs import jit

B, T, N, K, H = 2, 100, 4, 2, 64  # T is no multiple of a block
rng = np.random.default_rng(0)
VALID = np.ones((B, T), bool)
VALID[0, 90:] = VALID[1, :7] = False
SEGMENTS = np.repeat([[0, 1]], [40, 60], axis=1).repeat(B, 0)


def given():
  return [jnp.asarray(rng.standard_normal((B, T, n * H)), jnp.float32) for n in (N, K, K, N)]


def both(mask, q, k, v, weights):
  """Values at tokens and gradients, by splash and over whole rows."""

  def of(kernel, **how):
    fn = lambda *a: jnp.where(VALID[..., None], kernel(*a, mask, N, K, None, 0.0, **how), 0)
    y, pull = jax.vjp(fn, q, k, v)
    return y, *pull(weights)

  return of(splash.splash_attention, interpret=True), of(dense_attention)


@pytest.mark.slow(reason="interprets the kernel, 4 s each")
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one text", "packed"])
@pytest.mark.parametrize("causal", [True, False])
def test_values_and_gradients_are_those_of_whole_rows(causal, segments):
  segments = None if segments is None else jnp.asarray(segments)
  mask = AttentionMask(jnp.asarray(VALID), segments, causal=causal)
  chex.assert_trees_all_close(*jit(both)(mask, *given()), rtol=1e-3, atol=1e-3)


@pytest.mark.slow(reason="interprets the kernel on eight devices")
def test_on_a_mesh_every_device_has_its_rows_and_heads():
  args, mask = given(), AttentionMask.of_decoder(jnp.asarray(VALID), jnp.asarray(SEGMENTS))
  mesh = sharding.make_mesh("data:2,fsdp:1,tensor:2", jax.devices()[:4])
  with jax.set_mesh(mesh):
    rows = [jax.device_put(x, NamedSharding(mesh, PartitionSpec(("data", "fsdp")))) for x in args]
    ours = jit(lambda *a: both(mask, *a)[0])(*rows)
  assert ours[0].addressable_shards[0].data.shape == (B // 2, T, N * H // 2)
  chex.assert_trees_all_close(
    jax.tree.map(np.asarray, ours), jit(both)(mask, *args)[1], rtol=1e-3, atol=1e-3
  )


def test_what_the_kernel_cannot_say_is_left_to_the_blocks():
  valid, segments = jnp.asarray(VALID), jnp.asarray(SEGMENTS)
  decoder = AttentionMask.of_decoder
  for mask in (decoder(valid), decoder(valid, segments), decoder(valid, common=3)):
    assert splash.fits(mask, T)
    assert not splash.fits(mask, T, dropout=True)
    assert not splash.fits(mask, T - 1)
    assert not splash.fits(mask.behind_prefix(2), T)
  assert splash.fits(decoder(valid, window=T), T)
  for how in (dict(window=9), dict(segments=segments, common=3), dict(first=jnp.int32(0))):
    assert not splash.fits(decoder(valid, **how), T)
