"""Attention block by block: equal to that over whole rows, and linear in memory."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from peftjax import sharding
from peftjax.nn.attention import MANY_SCORES, attention, kernel_name
from peftjax.nn.blockwise import blockwise_attention
from peftjax.nn.dense_attention import dense_attention
from peftjax.nn.mask import AttentionMask
from tests.core.programs import fused, jit

B, N, K, H = 2, 6, 2, 8
SMALL = dict(rows=8, columns=16)  # blocks
rng = np.random.default_rng(0)


def draw(*shape, dtype=jnp.float32):
  return jnp.asarray(rng.standard_normal(shape), dtype)


def inputs(length, source, dtype=jnp.float32):
  """q, k, v and the weights of the result."""
  shapes = (length, N * H), (source, K * H), (source, K * H), (length, N * H)
  return [draw(B, *shape, dtype=dtype) for shape in shapes]


def padding(source, before=0, behind=0):
  """The first row of the batch padded on both sides, the second not at all."""
  valid = np.ones((B, source), bool)
  valid[0, :before] = valid[0, source - behind :] = False
  return jnp.asarray(valid)


def documents(*lengths):
  """Segments and positions of rows that hold texts of these lengths."""
  segments = np.repeat(np.arange(len(lengths)), lengths)
  positions = np.concatenate([np.arange(n) for n in lengths])
  return (jnp.asarray(np.tile(x, (B, 1))) for x in (segments, positions))


def masks():
  """Queries and a mask for every kind of sight; 37 is no multiple of a block."""
  segments, positions = documents(5, 20, 12)
  decoder = AttentionMask.of_decoder
  yield "causal", 37, decoder(padding(37, 3, 9))
  yield "encoder", 21, AttentionMask(padding(37, 3, 9))
  both = dict(segments=segments, positions=positions, window=6)
  yield "all", 37, decoder(padding(37, 0, 2), **both, common=4).behind_prefix(11)
  yield "window", 37, decoder(padding(37, 3), window=10)
  yield "segments", 37, decoder(padding(37), segments=segments)
  yield "prefix", 32, decoder(padding(32)).behind_prefix(40)
  yield "cached", 9, decoder(padding(40, 3), first=jnp.int32(13), window=20)
  yield "one block", 5, decoder(padding(5))


def both(mask, q, k, v, weights):
  """Values and gradients of both kernels, of the queries that see a key."""
  seen = (mask.bias(q.shape[1])[:, 0] == 0).any(-1)[..., None]

  def of(kernel, **how):
    fn = lambda *a: jnp.where(seen, kernel(*a, mask, N, K, None, 0.0, **how), 0)
    y, pull = jax.vjp(fn, q, k, v)
    return y, *pull(weights)

  return of(blockwise_attention, **SMALL), of(dense_attention)


CASES = list(masks())
RARE = pytest.mark.slow(reason="more kinds of sight")


@pytest.mark.parametrize(
  "name, length, mask",
  [
    pytest.param(*case, id=case[0], marks=[RARE] if i not in (0, 2) else [])
    for i, case in enumerate(CASES)
  ],
)
def test_values_and_gradients_are_those_of_whole_rows(name, length, mask):
  ours, theirs = jit(both)(mask, *inputs(length, mask.valid.shape[1]))
  chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.slow(reason="the same law in another dtype")
def test_bfloat16_keeps_its_dtype_and_sums_in_float32():
  mask = CASES[0][2]
  given = inputs(37, 37, jnp.bfloat16)
  ours = jit(both)(mask, *given)[0]
  exact = jit(both)(mask, *(x.astype(jnp.float32) for x in given))[1]
  assert {x.dtype for x in ours} == {jnp.dtype(jnp.bfloat16)}
  for one, two in zip(ours, exact, strict=True):
    np.testing.assert_allclose(one.astype(jnp.float32), two, atol=0.04, rtol=0.04)


def test_packed_documents_see_nothing_of_each_other():
  """Other keys and values in the other document change nothing, and have no gradient from it."""
  segments, _ = documents(19, 18)
  q, k, v, weights = inputs(37, 37)
  second = (segments == 1)[..., None]

  def of_second(mask):
    fn = lambda k, v: blockwise_attention(q, k, v, mask, N, K, **SMALL)
    y, pull = jax.vjp(fn, k, v)
    other = fn(jnp.where(second, k, 3 - k), jnp.where(second, v, 3 - v))
    return jnp.where(second, y - other, 0), *pull(jnp.where(second, weights, 0))

  packed, mixed = (
    jit(of_second)(AttentionMask.of_decoder(padding(37), seen)) for seen in (segments, None)
  )
  assert all((x[:, :19] == 0).all() for x in packed[1:]) and (packed[0] == 0).all()
  assert all((x[:, :19] != 0).any() for x in mixed[1:]) and (mixed[0] != 0).any()


def test_blocks_that_nobody_sees_are_not_computed():
  """Later ones, and other documents' where a whole block is theirs: NaN in them does no harm."""
  segments, _ = documents(16, 21)
  q, k, v, _ = inputs(37, 37)

  @jit
  def result(where, segments):
    mask = AttentionMask.of_decoder(padding(37), segments)
    spoilt = jnp.where(where[:, None], jnp.nan, v)
    fn = lambda q: blockwise_attention(q, k, spoilt, mask, N, K, **SMALL)
    y, pull = jax.vjp(fn, q)
    return jnp.isfinite(y).all((0, 2)), jnp.isfinite(pull(jnp.ones_like(y))[0]).all((0, 2))

  at = np.arange(37)
  for finite in result(at >= 16, None):
    assert finite.tolist() == (at < 16).tolist()
  for finite in result(at < 16, segments):
    assert finite.tolist() == (at >= 16).tolist()


def test_a_query_that_sees_nothing_has_the_result_0_and_no_gradient():
  mask = AttentionMask.of_decoder(padding(37, 20))
  q, k, v, weights = inputs(37, 37)
  blind = np.arange(37)[None, :, None] < np.array([20, 0])[:, None, None]

  @jit
  def both(*given):
    y, pull = jax.vjp(lambda *a: blockwise_attention(*a, mask, N, K, **SMALL), *given)
    return y, pull(weights), pull(jnp.where(blind, 0, weights))

  y, grads, of_seeing = jax.tree.map(np.asarray, both(q, k, v))
  assert (y[0, :20] == 0).all() and (grads[0][0, :20] == 0).all()
  assert all(np.isfinite(x).all() for x in (y, *grads))
  chex.assert_trees_all_equal(grads, of_seeing)


def test_dropout_is_the_same_forward_and_backward():
  """Values as the identity show the dropped probabilities; with them it is plain attention."""
  length, size, rate, key = 40, 40, 0.25, jax.random.key(5)
  mask = AttentionMask.of_decoder(jnp.ones((1, length), bool))
  q, k, v = (draw(1, length, n * size) for n in (4, 2, 2))
  weights = draw(1, length, 4 * size)
  run = lambda *a, key: blockwise_attention(*a, mask, 4, 2, key, rate, **SMALL)
  eye = jnp.tile(jnp.eye(length), (1, 1, 2))

  def plain(q, k, v, keep):
    q = q.reshape(length, 2, 2, size)
    k, v = (x.reshape(length, 2, size) for x in (k, v))
    scores = jnp.einsum("tkgh,skh->kgts", q, k) * size**-0.5 + mask.bias(length)
    y = jnp.einsum("kgts,skh->tkgh", jax.nn.softmax(scores) * keep, v)
    return y.reshape(1, length, -1)

  @jit
  def compare():
    dropped, whole = (run(q, k, eye, key=key) for key in (key, None))
    keep = jnp.where(whole > 0, dropped / jnp.where(whole > 0, whole, 1), 0)
    keep = keep.reshape(length, 2, 2, length).transpose(1, 2, 0, 3)
    ours, pull = jax.vjp(lambda *a: run(*a, key=key), q, k, v)
    theirs, pull_plain = jax.vjp(lambda *a: plain(*a, keep), q, k, v)
    return keep, (ours, pull(weights)), (theirs, pull_plain(weights))

  keep, ours, theirs = compare()
  chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=2e-5)
  kept = np.asarray(keep)[..., np.tril(np.ones((length, length), bool))]
  values = np.unique(kept.round(3))
  np.testing.assert_allclose(values, [0, 1 / (1 - rate)], rtol=2e-3)
  assert abs((kept == 0).mean() - rate) < 0.03
  # Every head and block has a mask of its own: these two blocks and others are seen whole.
  masks = [keep[..., rows, :16].reshape(4, -1) == 0 for rows in (slice(16, 24), slice(24, 32))]
  assert len(np.unique(np.concatenate(masks), axis=0)) == 8


@pytest.mark.slow(reason="compiles three programs")
def test_under_vmap_with_keys_and_masks_of_their_own():
  q, k, v, _ = (jnp.stack([x, 2 * x]) for x in inputs(20, 20))
  keys = jax.random.split(jax.random.key(0), 2)
  valid = jnp.stack([padding(20, 2), padding(20, 0, 3)])

  def grads(q, k, v, valid, key):
    mask = AttentionMask.of_decoder(valid, window=5)
    fn = lambda *a: jnp.square(blockwise_attention(*a, mask, N, K, key, 0.3, **SMALL)).sum()
    return jax.grad(fn, (0, 1, 2))(q, k, v)

  given = (q, k, v, valid, keys)
  together = jit(jax.vmap(grads))(*given)
  alone = [jit(grads)(*(x[i] for x in given)) for i in (0, 1)]
  chex.assert_trees_all_close(
    together, jax.tree.map(lambda *x: jnp.stack(x), *alone), rtol=1e-4, atol=1e-4
  )


def temporaries(length):
  """Bytes that value and gradients of one layer's attention take, of what users compile."""
  q, k = (jax.ShapeDtypeStruct((1, length, n * 64), jnp.float32) for n in (9, 3))
  mask = AttentionMask.of_decoder(jnp.ones((1, length), bool))
  fn = lambda *a: jnp.square(attention(*a, mask, 9, 3)).sum()
  program = fused(jax.value_and_grad(fn, (0, 1, 2))).lower(q, k, k).compile()
  return program.memory_analysis().temp_size_in_bytes


def test_memory_grows_linearly_with_length():
  short, long = temporaries(1024), temporaries(4096)
  assert long <= 4 * short, (short, long)
  scores = 9 * 4096 * 4096 * 4
  assert long < scores / 8


def test_long_rows_are_computed_in_blocks_and_short_and_cached_ones_whole():
  edge = int(MANY_SCORES**0.5)
  mask = lambda source, **how: AttentionMask.of_decoder(jnp.ones((1, source), bool), **how)
  used = [kernel_name(mask(n), n) for n in (1, edge - 1, edge, 8 * edge)]
  assert used == ["dense", "dense", "blockwise", "blockwise"]
  assert kernel_name(mask(edge).behind_prefix(2), edge - 1) == "blockwise"
  assert kernel_name(mask(8 * edge, first=jnp.int32(0)), 8 * edge) == "dense"


@pytest.mark.slow(reason="compiles for eight devices")
def test_on_a_mesh_rows_and_heads_stay_where_they_are():
  """The same gradients, and nothing is sent."""
  mesh = sharding.make_mesh("data:2,fsdp:2,tensor:2")
  rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
  args = [draw(4, 40, n * H) for n in (4, 2, 2, 4)]
  mask = AttentionMask.of_decoder(jnp.ones((4, 40), bool))
  run = lambda *a: blockwise_attention(*a, 4, 2, **SMALL)
  grads = jax.grad(lambda q, k, v, g, mask: (run(q, k, v, mask) * g).sum(), (0, 1, 2))
  heads = NamedSharding(mesh, PartitionSpec(*rows.spec, None, "tensor"))
  split = *(jax.device_put(x, heads) for x in args), jax.device_put(mask, rows)
  program = jit(grads).lower(*split).compile()
  chex.assert_trees_all_close(program(*split), jit(grads)(*args, mask), rtol=1e-5, atol=1e-5)
  assert not re.search(r"all-|collective-|reduce-scatter", program.as_text())
