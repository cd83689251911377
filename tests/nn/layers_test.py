"""Layer normalisation, GELU, attention: values and gradients against plain implementations."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftjax.core.dropout import drop, keep_level, random_bytes
from peftjax.nn.attention import attention, kernel_name
from peftjax.nn.ffn import ACTIVATIONS, gelu
from peftjax.nn.linear import Embedding, Linear
from peftjax.nn.mask import AttentionMask
from peftjax.nn.norm import LayerNorm, layer_norm
from tests.core.programs import jit

B, T, S, N, D = 3, 7, 5, 4, 24
rng = np.random.default_rng(0)


def draw(*shape, dtype=jnp.float32):
  return jnp.asarray(rng.standard_normal(shape), dtype)


def value_and_gradients(fn, weights, *args):
  """`fn(*args)` and the gradient of its product with `weights` in each argument."""

  @jit
  def both(weights, *args):
    y, pull = jax.vjp(fn, *args)
    return y, pull(weights)

  return both(weights, *args)


def plain_norm(x, scale, bias, eps=1e-5):
  mean = x.mean(-1, keepdims=True)
  deviation = jnp.sqrt(jnp.square(x - mean).mean(-1, keepdims=True) + eps)
  row = lambda v: v.reshape((1,) * (x.ndim - 1) + (-1,))
  return (x - mean) / deviation * row(scale) + row(bias)


def plain_attention(q, k, v, bias, keep=None):
  """Softmax of scores, times kept probabilities, head by head."""
  heads = lambda x: x.reshape(*x.shape[:2], N, -1)
  scores = jnp.einsum("btnh,bsnh->bnts", heads(q), heads(k)) / jnp.sqrt(D // N) + bias
  p = jax.nn.softmax(scores)
  p = p if keep is None else p * keep
  return jnp.einsum("bnts,bsnh->btnh", p, heads(v)).reshape(q.shape)


def mask_of(*lengths):
  return AttentionMask(jnp.asarray(np.arange(S) < np.array(lengths)[:, None]))


@pytest.mark.parametrize("shape", [(D,), (B, D), (B, T, D)])
def test_layer_norm_and_its_derivative(shape):
  """In x, scale and bias, with any number of leading axes."""
  args = 3 + 2 * draw(*shape), 1 + draw(D), draw(D)
  ours = value_and_gradients(lambda *a: layer_norm(*a, 1e-5), weights := draw(*shape), *args)
  chex.assert_trees_all_close(
    ours, value_and_gradients(plain_norm, weights, *args), rtol=2e-5, atol=2e-5
  )


def test_layer_norm_is_flaxs():
  x = draw(B, T, D)
  for eps in (1e-12, 1e-2):
    ours, theirs = LayerNorm(eps), nn.LayerNorm(eps, use_fast_variance=False)
    params = theirs.init(jax.random.key(0), x)
    params = jax.tree.map(lambda p: p + draw(*p.shape), params)
    np.testing.assert_allclose(ours.apply(params, x), theirs.apply(params, x), rtol=1e-5, atol=1e-5)


def test_layer_norm_of_bfloat16_has_float32_statistics():
  x = (300 + draw(B, D)).astype(jnp.bfloat16)
  y = layer_norm(x, jnp.ones(D), jnp.zeros(D), 1e-5)
  assert y.dtype == jnp.bfloat16
  want = plain_norm(x.astype(jnp.float32), jnp.ones(D), jnp.zeros(D))
  np.testing.assert_allclose(y.astype(jnp.float32), want, atol=0.02)
  dx, dscale, dbias = jax.vjp(lambda *a: layer_norm(*a, 1e-5), x, jnp.ones(D), jnp.zeros(D))[1](y)
  assert (dx.dtype, dscale.dtype, dbias.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)


def test_layer_norm_under_vmap_and_scan():
  x, scale, bias = draw(2, B, D), draw(2, D), draw(2, D)
  norm = lambda *a: layer_norm(*a, 1e-5)
  want = jnp.stack([norm(*a) for a in zip(x, scale, bias, strict=True)])
  # Where scale and bias cancel, rounding of the entries before them is all that is left.
  chex.assert_trees_all_close(jax.vmap(norm)(x, scale, bias), want, rtol=1e-6, atol=1e-6)
  got = jax.lax.scan(lambda c, a: (c, norm(*a)), 0, (x, scale, bias))[1]
  chex.assert_trees_all_close(got, want, rtol=1e-6, atol=1e-6)
  grad = jax.grad(lambda x: norm(x, scale[0], bias[0])[0, 0])
  chex.assert_trees_all_close(jax.vmap(grad)(x)[1], grad(x[1]), rtol=1e-5, atol=1e-7)


def test_gelu_and_its_derivative_in_float32_and_tightly_in_float64():
  """The exact one, by erf."""
  x = jnp.linspace(-6, 6, 101)
  ours = value_and_gradients(gelu, jnp.ones_like(x), x)
  exact = lambda x: jax.nn.gelu(x, approximate=False)
  chex.assert_trees_all_close(ours, value_and_gradients(exact, jnp.ones_like(x), x), atol=1e-6)
  with jax.enable_x64(True):
    x = jnp.linspace(-6, 6, 101, dtype=jnp.float64)
    ours, theirs = (value_and_gradients(fn, jnp.ones_like(x), x) for fn in (gelu, exact))
    assert ours[0].dtype == jnp.float64
    chex.assert_trees_all_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_gelu_keeps_its_dtype():
  x = draw(5, dtype=jnp.bfloat16)
  y, (dx,) = value_and_gradients(gelu, x, x)
  assert y.dtype == dx.dtype == jnp.bfloat16


def test_activations_have_hugging_faces_names():
  """gelu is exact; gelu_new and gelu_pytorch_tanh are its tanh approximation."""
  x = jnp.array([-1.0, 0.5, 2.0])
  exact, tanh = (jax.nn.gelu(x, approximate=a) for a in (False, True))
  assert np.abs(exact - tanh).max() > 1e-4
  want = {"gelu": exact, "gelu_new": tanh, "gelu_pytorch_tanh": tanh}
  want |= {"relu": jax.nn.relu(x), "silu": jax.nn.silu(x), "swish": jax.nn.silu(x)}
  assert set(ACTIVATIONS) == set(want)
  for name, y in want.items():
    np.testing.assert_allclose(ACTIVATIONS[name](x), y, atol=1e-6)


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_attention_and_its_derivative(rate):
  """In q, k and v, with padding and with the dropout of known bytes."""
  q, k, v, weights = draw(B, T, D), draw(B, S, D), draw(B, S, D), draw(B, T, D)
  mask, key = mask_of(5, 2, 1), jax.random.key(3)
  keep = None
  if rate:
    keep = drop(jnp.ones((B, N, T, S)), random_bytes(key, (B, N, T, S)), rate)
    assert {0.0} < set(np.unique(keep))
  ours = value_and_gradients(
    lambda q, k, v: attention(q, k, v, mask, N, key=key, rate=rate), weights, q, k, v
  )
  theirs = value_and_gradients(
    lambda q, k, v: plain_attention(q, k, v, mask.bias(T), keep), weights, q, k, v
  )
  chex.assert_trees_all_close(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kv_heads", [N, 1])
def test_attention_with_a_bias_and_its_derivative(kv_heads):
  """In the bias too, which all texts share; many scores take whole rows as well."""
  wide = D * kv_heads // N
  q, k, v, weights = draw(B, T, D), draw(B, S, wide), draw(B, S, wide), draw(B, T, D)
  mask, bias = mask_of(5, 2, 1), draw(N, T, S)
  repeat = lambda x: jnp.repeat(x.reshape(B, S, kv_heads, -1), N // kv_heads, 2).reshape(B, S, D)
  ours = value_and_gradients(
    lambda q, k, v, b: attention(q, k, v, mask, N, kv_heads, bias_NTS=b), weights, q, k, v, bias
  )
  theirs = value_and_gradients(
    lambda q, k, v, b: plain_attention(q, repeat(k), repeat(v), mask.bias(T) + b[None]),
    *(weights, q, k, v, bias),
  )
  chex.assert_trees_all_close(ours, theirs, rtol=2e-5, atol=2e-5)
  long = AttentionMask(jax.ShapeDtypeStruct((1, 4096), bool))
  assert kernel_name(long, 4096) == "blockwise" and kernel_name(long, 4096, biased=True) == "dense"


def test_attention_is_flaxs():
  q, k, v, mask = draw(B, T, D), draw(B, S, D), draw(B, S, D), mask_of(5, 2, 1)
  heads = lambda x: x.reshape(*x.shape[:2], N, -1)
  want = nn.dot_product_attention(heads(q), heads(k), heads(v), bias=mask.bias(T)).reshape(B, T, D)
  np.testing.assert_allclose(attention(q, k, v, mask, N), want, rtol=2e-5, atol=2e-5)


def test_a_row_without_any_token_attends_evenly():
  """As in the reference implementation: not NaN."""
  q, k, v = draw(B, T, D), draw(B, S, D), draw(B, S, D)
  y = attention(q, k, v, mask_of(0, 5, 5), N)
  np.testing.assert_allclose(y[0, 0], v[0].mean(0), rtol=1e-5, atol=1e-6)


def test_attention_without_a_key_or_a_rate_drops_nothing():
  q, k, v, mask = draw(B, T, D), draw(B, S, D), draw(B, S, D), mask_of(5, 2, 1)
  plain = attention(q, k, v, mask, N)
  np.testing.assert_array_equal(attention(q, k, v, mask, N, rate=0.5), plain)
  np.testing.assert_array_equal(attention(q, k, v, mask, N, key=jax.random.key(0)), plain)
  one, two = (attention(q, k, v, mask, N, key=jax.random.key(i), rate=0.5) for i in (0, 1))
  assert np.abs(one - plain).max() > 0.05 and np.abs(one - two).max() > 0.05


def test_the_mean_of_dropped_attention_is_the_undropped():
  q, k, v, mask = draw(1, 2, D), draw(1, S, D), draw(1, S, D), mask_of(5)
  fn = lambda key: attention(q, k, v, mask, N, key=key, rate=0.2)
  many = jit(jax.vmap(fn))(jax.random.split(jax.random.key(0), 4000))
  error = many.std(0) / np.sqrt(4000)
  assert (np.abs(many.mean(0) - attention(q, k, v, mask, N)) < 6 * error + 1e-6).all()
  assert keep_level(0.2) == 205


def test_bfloat16_attention_scores_in_float32():
  q, k, v = (draw(B, S, D, dtype=jnp.bfloat16) for _ in range(3))
  y, grads = value_and_gradients(lambda *a: attention(*a, mask_of(5, 2, 1), N), q, q, k, v)
  assert {x.dtype for x in (y, *grads)} == {jnp.dtype(jnp.bfloat16)}
  want = plain_attention(*(x.astype(jnp.float32) for x in (q, k, v)), mask_of(5, 2, 1).bias(S))
  np.testing.assert_allclose(y.astype(jnp.float32), want, atol=0.03)


def test_attention_under_vmap():
  q, k, v, mask = draw(2, B, T, D), draw(2, B, S, D), draw(2, B, S, D), mask_of(5, 2, 1)
  grad = jax.grad(lambda q, k, v: jnp.square(attention(q, k, v, mask, N)).sum(), (0, 1, 2))
  together = jit(jax.vmap(grad))(q, k, v)
  alone = jit(grad)(q[1], k[1], v[1])
  chex.assert_trees_all_close(jax.tree.map(lambda x: x[1], together), alone, rtol=1e-5, atol=1e-5)


def test_linear_and_embedding_are_flaxs():
  x, ids = draw(B, T, D), np.array([[0, 3], [4, 4]])
  dense, table = nn.Dense(6), nn.Embed(5, 6)
  params = dense.init(jax.random.key(0), x)
  np.testing.assert_allclose(Linear(6).apply(params, x), dense.apply(params, x), rtol=1e-6)
  half = Linear(6).apply(params, x.astype(jnp.bfloat16))
  assert half.dtype == jnp.bfloat16
  params = table.init(jax.random.key(0), ids)
  np.testing.assert_array_equal(Embedding(5, 6).apply(params, ids), table.apply(params, ids))
  shapes = jax.tree.map(jnp.shape, Embedding(5, 6, jnp.bfloat16).init(jax.random.key(0), ids))
  assert shapes == {"params": {"embedding": (5, 6)}}
