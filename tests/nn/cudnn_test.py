"""What is asked of cuDNN, computed by XLA in its place: as attention over whole rows."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftjax.nn import attention, cudnn
from peftjax.nn.dense_attention import dense_attention
from peftjax.nn.mask import AttentionMask
from tests.core.programs import jit

B, T, N, K, H = 3, 12, 4, 2, 8
rng = np.random.default_rng(0)
VALID = np.ones((B, T), bool)
VALID[0, 9:] = VALID[1, :3] = VALID[2, 4:6] = False  # behind, before and between


@pytest.mark.parametrize("causal", [True, False])
def test_values_and_gradients_are_those_of_whole_rows(causal):
  mask = AttentionMask(jnp.asarray(VALID), causal=causal)
  q, k, v, weights = (
    jnp.asarray(rng.standard_normal((B, T, n * H)), jnp.float32) for n in (N, K, K, N)
  )

  def of(kernel, **how):
    fn = lambda *a: jnp.where(VALID[..., None], kernel(*a, mask, N, K, None, 0.0, **how), 0)
    y, pull = jax.vjp(fn, q, k, v)
    return y, *pull(weights)

  ours, whole = jit(
    lambda: (of(cudnn.cudnn_attention, implementation="xla"), of(dense_attention))
  )()
  chex.assert_trees_all_close(ours, whole, rtol=1e-5, atol=1e-5)


def test_what_cudnn_cannot_say_is_left_to_the_blocks():
  valid, segments = jnp.asarray(VALID), jnp.zeros((B, T), jnp.int32)
  decoder = AttentionMask.of_decoder
  can = lambda mask, length=T, size=H, dtype=jnp.bfloat16, **how: cudnn.fits(
    mask, length, size=size, dtype=dtype, **how
  )
  assert can(decoder(valid)) and can(decoder(valid, window=T)) and can(AttentionMask(valid))
  for how in (
    dict(length=T - 1),
    dict(size=256),
    dict(size=12),
    dict(dtype=jnp.float32),
    dict(dropout=True),
  ):
    assert not can(decoder(valid), **how), how
  assert not can(decoder(valid).behind_prefix(2))
  for how in (dict(window=9), dict(segments=segments), dict(first=jnp.int32(0))):
    assert not can(decoder(valid, **how)), how


def test_it_is_chosen_on_ampere_and_later(monkeypatch):
  n = int(attention.MANY_SCORES**0.5)
  mask = AttentionMask(jax.ShapeDtypeStruct((1, n), bool), causal=True)
  name = lambda: attention.kernel_name(mask, n, size=64, dtype=jnp.bfloat16)
  assert name() == "blockwise"

  class GPU:
    compute_capability = "8.0"

  monkeypatch.setattr(jax, "devices", lambda: [GPU])
  assert name() == "cudnn"
  for older in ("7.5", "gfx90a"):
    GPU.compute_capability = older
    assert name() == "blockwise"
