"""Capped scores and logits: values and gradients of the plain formulas."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from peftjax.nn import chunked_loss
from peftjax.nn.attention import KERNELS, kernel_name
from peftjax.nn.linear import Head
from peftjax.nn.mask import AttentionMask
from tests.core.programs import jit

B, T, N, K, H, CAP = 2, 21, 4, 2, 6, 1.5
_rng = np.random.default_rng(0)


def draw(*shape):
  return jnp.asarray(2 * _rng.standard_normal(shape), jnp.float32)


def test_attention_of_capped_scores():
  """Whole rows and blocks, with a window and padding; far from the scores without a cap."""
  given = [draw(B, T, n * H) for n in (N, K, K, N)]
  mask = AttentionMask.of_decoder(jnp.ones((B, T), bool).at[0, :3].set(False), window=9)

  def plain(q, k, v, cap):
    q, k, v = (x.reshape(B, T, -1, H) for x in (q, k, v))
    k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * H**-0.5
    scores = cap * jnp.tanh(scores / cap) + mask.bias(T)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v).reshape(B, T, -1)

  @jit
  def of_all(q, k, v, weights):
    seen = jnp.ones((B, T, 1)).at[0, :3].set(0)
    run = lambda fn: jax.vjp(lambda *a: fn(*a) * seen, q, k, v)
    kernel = lambda name, **how: lambda *a: KERNELS[name](*a, mask, N, K, None, 0.0, **how)
    blocks = kernel("blockwise", cap=CAP, rows=8, columns=8)
    fns = (lambda *a: plain(*a, CAP), kernel("dense", cap=CAP), blocks, kernel("dense"))
    return [(y, pull(weights)) for y, pull in map(run, fns)]

  want, whole, blocks, uncapped = of_all(*given)
  chex.assert_trees_all_close(whole, want, rtol=1e-5, atol=1e-5)
  chex.assert_trees_all_close(blocks, want, rtol=1e-5, atol=1e-5)
  assert np.abs(uncapped[0] - want[0]).max() > 0.1
  long = AttentionMask.of_decoder(jax.ShapeDtypeStruct((1, 2048), bool))
  assert kernel_name(long, 2048, size=64, dtype=jnp.bfloat16, capped=True) == "blockwise"


def test_the_loss_of_capped_logits(monkeypatch):
  """In chunks as at once."""
  monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 1)
  monkeypatch.setattr(chunked_loss, "CHUNK_TOKENS", 4)
  head, x, table = Head(30, "table", CAP), draw(B, 9, 8), draw(30, 8)
  tokens = _rng.integers(0, 30, (B, 9))
  weights = jnp.ones((B, 9))

  def at_once(x, table):
    logits = CAP * jnp.tanh(x @ table.T / CAP)
    p = jax.nn.log_softmax(logits)[:, :-1]
    return -jnp.take_along_axis(p, tokens[:, 1:, None], -1).sum(), logits

  def in_chunks(x, table):
    total, _ = head.apply({}, x, table, tokens, weights, method="sums")
    return total, head.apply({}, x, table)

  both = jit(
    lambda *a: [jax.value_and_grad(f, (0, 1), has_aux=True)(*a) for f in (at_once, in_chunks)]
  )
  want, got = both(x, table)
  chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)
