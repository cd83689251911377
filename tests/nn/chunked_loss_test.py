"""The loss in chunks: value and gradients of the plain one, of every kind of head."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj
from peftjax import losses
from peftjax.core import paths
from peftjax.nn import chunked_loss
from peftjax.nn.linear import Embedding, Head, Linear
from tests.core.programs import jit, producers

BATCH, LENGTH, VOCAB, WIDTH = 2, 11, 96, 64
KEY = jax.random.key(0)
TABLE = "embed/embedding"
_rng = np.random.default_rng(0)
TOKENS = _rng.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)
# Of four chunks the second has nothing to predict, and the last one is short.
WEIGHTS = (_rng.random((BATCH, LENGTH)) < 0.7).astype(np.float32)
WEIGHTS[:, 5:9] = 0


class Toy(nn.Module):
  """A table, something between, and a head: what a decoder has of them."""

  of: str

  @nn.compact
  def __call__(self, tokens, loss_weights=None):
    embed = Embedding(VOCAB, WIDTH, name="embed")
    x = jnp.sin(Linear(WIDTH, name="between")(embed(tokens)))
    head = Head(VOCAB, self.of, name="lm_head")
    if loss_weights is None:
      return head(x, embed.table())
    return head.sums(x, embed.table(), tokens, loss_weights)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 1)
  monkeypatch.setattr(chunked_loss, "CHUNK_TOKENS", 4)


def between(*more):
  return pj.chain(pj.unfreeze("between/.*"), *more)


def nf4(where):
  return lambda params: pj.quantize(params, pj.quant.nf4(32), where=where)


HEAD = "lm_head/kernel"
# Of which tied table the head is, what is done to the parameters, and the method.
HEADS = {
  "tied": (TABLE, None, between()),
  "tied trained": (TABLE, None, between(pj.unfreeze(TABLE))),
  "tied nf4": (TABLE, nf4(TABLE), between()),
  "tied lora": (TABLE, None, between(pj.lora(2, 4, [TABLE]))),
  "untied": ("", None, between()),
  "untied trained": ("", None, between(pj.unfreeze(HEAD))),
  "untied nf4": ("", nf4(HEAD), between()),
  "lora": ("", None, pj.lora(2, 4, [HEAD, "between/kernel"], dropout=0.3)),
  "lora nf4": ("", nf4(HEAD), pj.lora(2, 4, [HEAD], dropout=0.3)),
  "dora": ("", None, pj.dora(2, 4, [HEAD], dropout=0.3)),
  "dora nf4": ("", nf4(HEAD), pj.dora(2, 4, [HEAD], from_quantised=True)),
  "adalora": (
    "",
    None,
    pj.adalora(2, target_rank=1, targets=[HEAD], warmup=0, final=1, interval=1),
  ),
  "vera": ("", None, pj.vera(8, [HEAD], dropout=0.3)),
  "ia3": ("", None, pj.ia3([HEAD])),
  "bottleneck": ("", None, pj.adapters(4, targets=["lm_head"])),
}
_SLOW = pytest.mark.slow(reason="the same law for more heads; a second each")
_FAST = ("tied trained", "lora nf4")


def made(name):
  """The module and its two halves, all that a method made stirred."""
  of, change, method = HEADS[name]
  model = Toy(of)

  @jit
  def make(key):
    params = jax.tree.map(lambda x: 10 * x, model.init(key, TOKENS)["params"])
    params = change(params) if change else params
    layout = pj.linen.layout(model, TOKENS)
    return method.attach(jax.random.fold_in(key, 1), params, layout)

  params = make(KEY)
  train, frozen = pj.partition(params, method.trainable(params))
  stir = lambda path, x: x + 0.1 * np.cos(np.arange(x.size)).reshape(x.shape).astype(x.dtype)
  return model, paths.map_leaves(lambda p, w: jax.tree.map(lambda x: stir(p, x), w), train), frozen


def value_and_grad(sums):
  return jax.value_and_grad(lambda *given: losses.mean(*sums(*given)))


def ways(model, key=KEY, weights=WEIGHTS):
  """The loss of the two halves, plain and in chunks."""

  def run(train, frozen, **how):
    rngs = {"dropout": key}
    return pj.apply(model, pj.combine(train, frozen), TOKENS, train=True, rngs=rngs, **how)

  batch = dict(tokens=TOKENS, weights=weights)
  plain = lambda *halves: losses.next_token_sums(run(*halves), batch)
  chunked = lambda *halves: run(*halves, loss_weights=weights)
  return plain, chunked


def near(got, want, scale=1e-6):
  """Every entry to a millionth of the largest."""
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=scale * max(np.abs(y).max(), 1e-3))


@pytest.mark.parametrize("name", [n if n in _FAST else pytest.param(n, marks=_SLOW) for n in HEADS])
def test_value_and_gradients_are_those_of_the_plain_loss(name):
  """Dropout, chunks without a weight, a short last one; frozen heads have no gradient."""
  model, train, frozen = made(name)
  both = ways(model)
  plain, chunked, evaluated = jit(
    lambda *halves: (*(value_and_grad(way)(*halves) for way in both), both[1](*halves))
  )(train, frozen)
  assert jax.tree.structure(chunked) == jax.tree.structure(plain)
  near(chunked, plain, 2e-6)
  near(losses.mean(*evaluated), plain[0])
  assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(plain[1])) or name == "tied lora"


def test_a_frozen_head_has_no_gradient():
  """Nothing of its shape is computed; of a trained one there is."""

  def found(name):
    model, *halves = made(name)
    return producers(value_and_grad(ways(model)[1]), [(WIDTH, VOCAB)], *halves)

  assert found("untied") == []
  assert "add" in found("untied trained")


def test_trials_together_are_single_ones():
  """Mapped over factors, keys and weights, as where several runs are trained at once."""
  model, train, frozen = made("lora")
  trains = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), train)
  keys = jnp.stack([KEY, jax.random.key(5)])
  weights = np.stack([WEIGHTS, np.roll(WEIGHTS, 4, 1) * (np.arange(LENGTH) > 4)])

  def run(way):
    return lambda t, f, *own: value_and_grad(ways(model, *own)[way])(t, f)

  mapped, plain = jit(
    lambda *given: [jax.vmap(run(way), (0, None, 0, 0))(*given) for way in (1, 0)]
  )(trains, frozen, keys, weights)
  near(mapped, plain, 2e-6)
  assert np.abs(plain[0][0] - plain[0][1]) > 1e-3


def test_what_is_skipped_is_not_computed():
  """Of a chunk without weights not even NaN shows, which the plain loss would return."""
  x = jax.random.normal(KEY, (BATCH, 12, WIDTH)).at[:, 4:8].set(jnp.nan)
  weights = jnp.ones((BATCH, 12)).at[:, 5:9].set(0)
  tokens, kernel = jnp.ones((BATCH, 12), jnp.int32), jnp.ones((WIDTH, VOCAB))
  logits_of = lambda w, x: x @ w
  chunked = lambda x: chunked_loss.chunked_sums(logits_of, kernel, x, tokens, weights, 4)
  plain = lambda x: losses.next_token_sums(x @ kernel, dict(tokens=tokens, weights=weights))
  got, want = jit(lambda x: [value_and_grad(way)(x) for way in (chunked, plain)])(x)
  assert np.isfinite(got[0]) and np.isfinite(got[1]).all() and np.isnan(want[0])


def test_bfloat16_is_the_plain_loss_to_its_precision():
  """Logits are float32 in the loss, and gradients have the dtypes of what they are of."""
  x = jax.random.normal(KEY, (BATCH, LENGTH, WIDTH), jnp.bfloat16)
  kernel = 0.2 * jax.random.normal(KEY, (WIDTH, VOCAB))
  logits_of = lambda w, x: x @ w.astype(x.dtype)
  chunked = lambda both: chunked_loss.chunked_sums(logits_of, *both, TOKENS, WEIGHTS, 4)
  batch = dict(tokens=TOKENS, weights=WEIGHTS)
  plain = lambda both: losses.next_token_sums(logits_of(*both), batch)
  got, want = jit(lambda *both: [value_and_grad(way)(both) for way in (chunked, plain)])(kernel, x)
  as_float = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float32), tree)
  near(as_float(got), as_float(want), 1e-2)
  assert [g.dtype for g in got[1]] == [jnp.float32, jnp.bfloat16]


def test_the_length_of_a_chunk(monkeypatch):
  """By bytes, as even as it can be; of a row at least a few tokens; few logits are one chunk."""
  monkeypatch.undo()
  assert chunked_loss.chunk_length(1, 512, 49_152) == 171
  assert chunked_loss.chunk_length(64, 512, 49_152) == 64
  assert chunked_loss.chunk_length(8, 128, 512) == 128


def test_a_weight_for_every_token():
  """One that would be broadcast is refused."""
  model, train, frozen = made("untied")
  with pytest.raises(ValueError, match=r"loss_weights \(2, 1\) for tokens \(2, 11\)"):
    pj.apply(model, pj.combine(train, frozen), TOKENS, loss_weights=WEIGHTS[:, :1])
