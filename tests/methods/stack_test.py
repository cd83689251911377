"""Rows of one batch with an adapter each: values, gradients, generation, and what is refused."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj
from peftjax.core import paths
from peftjax.core.per_row import PerRow
from peftjax.methods.lora_weight import LoRA
from peftjax.methods.stack import unstack_adapters
from tests.core.programs import equations, jit, producers

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENS = np.array([[5, 6, 7, 8], [9, 10, 11, 12], [5, 6, 7, 8], [1, 2, 3, 4]], np.int32)
ROWS = [2, 0, 2, 1]
_FFN = r".*/layers(_\d+)?/output/dense/kernel"
_TABLES = ["query", "word_embeddings", "position_embeddings"]


def attached(method, params, layout, seed):
  """`params` with a method whose trained arrays are stirred; ranks are cut to each layer's."""
  made = method.attach(jax.random.key(seed), params, layout)
  rng = np.random.default_rng(seed)
  stir = lambda on, x: x + jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype) if on else x
  made = jax.tree.map(stir, method.trainable(made), made)

  def cut(leaf):
    if not isinstance(leaf, LoRA):
      return leaf
    kept = np.arange(leaf.a.shape[-2]) < np.asarray(leaf.rank)[..., None]
    return leaf.replace(a=leaf.a * kept[..., :, None], b=leaf.b * kept[..., None, :])

  return jax.tree.map(cut, made, is_leaf=paths.is_leaf)


def three(methods, name="llama3_tiny", scan=True, fmt=None):
  """A model and its parameters with each of the methods, on one base."""
  labels = {"num_labels": 3} if "bert" in name else {}
  model, params = pj.load_pretrained(GOLDEN / name, scan_layers=scan, **labels)
  layout = pj.linen.layout(model, TOKENS)
  params = pj.quantize(params, fmt, layout=layout) if fmt else params
  return model, [attached(method, params, layout, i) for i, method in enumerate(methods)]


def _loras(targets=("q_proj", "down_proj"), **options):
  pairs = ((2, 4, False), (4, 8, False), (3, 9, True))
  return [pj.lora(r, alpha, targets, rslora=rs, **options) for r, alpha, rs in pairs]


_slow = lambda *case: pytest.param(*case, marks=pytest.mark.slow(reason="repeats a law"))
_dora = lambda **more: [pj.dora(rank, 8, "all-linear", **more) for rank in (2, 3, 4)]
_adalora = lambda: [pj.adalora(r, 400.0, "all-linear", target_rank=2) for r in (4, 3, 5)]
_vera = lambda: [pj.vera(6, "all-linear")] * 3
_ia3 = lambda: [pj.ia3(["key", "value"], _FFN)] * 3
_embed = lambda: [pj.lora(rank, 8, _TABLES) for rank in (2, 3, 4)]


@pytest.mark.fast_for("<lambda>-bert.*")
@pytest.mark.parametrize(
  "methods, name, scan, fmt",
  [
    (_loras, "llama3_tiny", True, pj.quant.nf4(32)),
    _slow(_ia3, "bert_tiny", False, None),
    (_ia3, "bert_tiny", True, None),
    _slow(_loras, "llama3_tiny", False, None),
    _slow(lambda: _loras("all-linear"), "gpt2_tiny", True, None),
    _slow(_dora, "llama3_tiny", True, None),
    _slow(lambda: _dora(from_quantised=True), "llama3_tiny", False, pj.quant.nf4(32)),
    _slow(_adalora, "llama3_tiny", True, None),
    _slow(_vera, "llama3_tiny", True, None),
    _slow(_vera, "llama3_tiny", False, None),
    _slow(_embed, "bert_tiny", True, None),
  ],
)
def test_each_row_has_its_adapter(methods, name, scan, fmt):
  """The logits of a row are those of its own tree, and all trees come out as they went in."""
  model, trees = three(methods(), name, scan, fmt)
  stacked = pj.stack_adapters(trees)
  forward = jit(lambda p, t: pj.apply(model, p, t))
  got = jit(lambda p, t, rows: pj.apply(model, p, t, rows=rows))(stacked, TOKENS, jnp.array(ROWS))
  alone = [np.asarray(forward(tree, TOKENS)) for tree in trees]
  want = np.stack([alone[adapter][i] for i, adapter in enumerate(ROWS)])
  np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max(), rtol=0)
  assert np.abs(alone[0] - alone[1]).max() > 1e-2
  for tree, again in zip(trees, unstack_adapters(stacked), strict=True):
    jax.tree.map(np.testing.assert_array_equal, tree, again)


@pytest.mark.slow(reason="compiles gradients of several methods, 9 s")
def test_gradients_reach_the_adapters_that_rows_have():
  """They are those of each adapter's own rows, and zero where there are none."""
  methods = _loras()
  model, trees = three(methods, scan=True)
  stacked = pj.stack_adapters(trees)
  train, frozen = pj.partition(stacked, methods[0].trainable(stacked))
  weights = np.random.default_rng(0).standard_normal((4, 4, 1)).astype(np.float32)

  def loss(train, rows):
    logits = pj.apply(model, pj.combine(train, frozen), TOKENS, rows=rows)
    return (logits * weights).sum()

  grads = jit(jax.grad(loss))(train, jnp.array([2, 0, 2, 0]))

  def own(train, frozen, used):
    logits = pj.apply(model, pj.combine(train, frozen), TOKENS)
    return (logits * weights * used[:, None, None]).sum()

  for i, used in ((0, [0, 1, 0, 1]), (2, [1, 0, 1, 0])):
    split = pj.partition(trees[i], methods[i].trainable(trees[i]))
    want = jit(jax.grad(own))(*split, jnp.array(used, jnp.float32))
    _near(_of(grads, i), want)
  unused = [np.abs(x).max() for x in jax.tree.leaves(_of(grads, 1))]
  assert max(unused) == 0.0


def _of(grads, i):
  return jax.tree.map(lambda x: np.asarray(x)[:, i], grads)


def _near(got, want):
  for path, leaf in paths.leaves(want).items():
    if not isinstance(leaf, LoRA) or leaf.a is None:
      continue
    adapters = paths.leaves(got)[path].adapters
    for mine, theirs in ((adapters.a, leaf.a), (np.moveaxis(adapters.b, -1, -2), leaf.b.mT)):
      theirs = np.asarray(theirs)
      size = np.abs(theirs).max()
      np.testing.assert_allclose(mine[:, : theirs.shape[1]], theirs, atol=3e-5 * size, rtol=0)


@pytest.mark.parametrize("fmt", [None, _slow(pj.quant.nf4(32))])
def test_no_array_of_a_base_has_rows(fmt):
  """In the forward and the backward pass, and none is as large as a base with rows."""
  methods = _loras()
  model, trees = three(methods, scan=True, fmt=fmt)
  stacked = pj.stack_adapters(trees)
  train, frozen = pj.partition(stacked, methods[0].trainable(stacked))

  def loss(train, frozen, rows):
    return pj.apply(model, pj.combine(train, frozen), TOKENS, rows=rows).sum()

  bases = {leaf.shape for leaf in paths.leaves(stacked).values() if isinstance(leaf, PerRow)}
  args = (train, frozen, jnp.array(ROWS))
  for count in (3, 4):
    shapes = [s for base in bases for s in ((count, *base[-2:]), (base[0], count, *base[-2:]))]
    assert producers(jax.grad(loss), shapes, *args) == []
  made = [
    out.aval
    for eqn in equations(jax.make_jaxpr(jax.grad(loss))(*args))
    for out in eqn.outvars
    if np.dtype(out.aval.dtype).kind == "u" and out.aval.ndim > 2
  ]
  assert not [x.shape for x in made if x.shape[0] in (3, 4) and x.shape[0] != model.config.layers]


@pytest.mark.slow(reason="compiles decoding loops, 15 s")
def test_generation_with_a_cache():
  """Each prompt continues as with its own tree alone, dense or in four bits."""
  model, trees = three(_loras(), fmt=pj.quant.nf4(32))
  new, counts = pj.generate(model, pj.stack_adapters(trees), TOKENS, rows=ROWS, max_new_tokens=5)
  assert counts.tolist() == [5] * 4
  alone = [pj.generate(model, tree, TOKENS, max_new_tokens=5)[0] for tree in trees]
  assert new.tolist() == [alone[adapter][i].tolist() for i, adapter in enumerate(ROWS)]
  assert new[0].tolist() != new[2].tolist() or ROWS[0] == ROWS[2]


@pytest.mark.slow(reason="4 s")
def test_dropout_is_drawn_for_each_row():
  """Two rows of one text and one adapter differ while training, and not otherwise."""
  model, trees = three(_loras(dropout=0.5))
  stacked, rngs = pj.stack_adapters(trees), {"dropout": jax.random.key(0)}
  call = lambda train: pj.apply(model, stacked, TOKENS, rows=ROWS, train=train, rngs=rngs)
  still, moved = np.asarray(call(False)), np.asarray(call(True))
  np.testing.assert_allclose(still[0], still[2], atol=1e-5)
  assert np.abs(moved[0] - moved[2]).max() > 1e-3


def test_a_module_of_flax_and_a_number_of_no_adapter():
  """`nn.Dense` of the bridge; a traced number outside gives NaN in its row alone."""
  model = nn.Dense(3)
  x = np.random.default_rng(0).standard_normal((4, 5, 6)).astype(np.float32)
  params = model.init(jax.random.key(0), x)["params"]
  methods = [pj.lora(2, 4, ["kernel"]), pj.lora(3, 9, ["kernel"])]
  trees = [attached(method, params, None, i) for i, method in enumerate(methods)]
  stacked = pj.stack_adapters(trees)
  got = jit(lambda p, x, rows: pj.apply(model, p, x, rows=rows))(
    stacked, x, jnp.array([1, 0, 7, -1])
  )
  for i, adapter in enumerate((1, 0)):
    want = pj.apply(model, trees[adapter], x)[i]
    np.testing.assert_allclose(got[i], want, atol=1e-5)
  assert np.isnan(got[2:]).all()
  # Without rows there is one for each adapter.
  np.testing.assert_allclose(
    pj.apply(model, stacked, x[:2])[1], pj.apply(model, trees[1], x)[1], atol=1e-5
  )


def _tree(**changes):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  return {"query": {"kernel": draw(6, 8)}, "value": {"kernel": draw(6, 8)}, **changes}


_PLAIN = _tree()
_attach = lambda method, params=_PLAIN: method.attach(jax.random.key(1), params)
_QUERY = pj.lora(2, 4, "query")
_ADAPTER = lambda p: pj.partition(p, pj.tree.adapter_mask(p, _QUERY.trainable(p)))[0]
_OTHER = {**_PLAIN, "query": {"kernel": _PLAIN["query"]["kernel"] + 1}}
_HEAD = {**_PLAIN, "value": {"kernel": _PLAIN["value"]["kernel"] + 1}}


@pytest.mark.parametrize(
  "adapters, message",
  [
    (lambda: [], "takes a list of two or more parameter trees and got 0"),
    (lambda: _attach(_QUERY), "takes a list .* got a dict"),
    (lambda: [_attach(_QUERY)], "got 1; a single one needs no stack"),
    (lambda: [_attach(_QUERY), _PLAIN], "tree 2 has no adapters"),
    (lambda: [_attach(_QUERY), _attach(_QUERY, _OTHER)], "at query/kernel tree 2 has other pre"),
    (lambda: [_attach(_QUERY), _attach(_QUERY, _HEAD)], "at value/kernel tree 2 has other pre"),
    (lambda: [_attach(_QUERY), _attach(pj.lora(2, 4, "value"))], "a LoRA and adapter 2 an array"),
    (lambda: [_attach(_QUERY), _attach(pj.dora(2, 4, "query"))], "a LoRA and adapter 2 a DoRA"),
    (lambda: [_attach(pj.loha(2, 4, ["query"]))] * 2, "tree 1 has adapters of the kind LoHa"),
    (lambda: [_attach(pj.lokr(2, 4, ["query"]))] * 2, "tree 1 has adapters of the kind LoKr"),
    (lambda: [_ADAPTER(_attach(_QUERY))] * 2, "tree 1 lacks the base of query/kernel"),
    (lambda: [pj.stack_adapters([_attach(_QUERY)] * 2)] * 2, "of the kind PerRow"),
  ],
)
def test_what_cannot_be_stacked_is_refused(adapters, message):
  with pytest.raises(ValueError, match=message):
    pj.stack_adapters(adapters())


@pytest.mark.parametrize(
  "rows, message",
  [
    ([0, 2, 1, 0], "rows has adapter 2, and there are 2: write numbers from 0 to 1"),
    ([0, -1, 1, 0], "rows has adapter -1"),
    ([0, 1], r"an input of shape \(4, 6\) and 2 adapters, .* write rows="),
    ([[0, 1]], r"rows is int64\[1, 2\]; write a whole number for each row"),
    ([0.0, 1.0, 1.0, 0.0], "rows is float64"),
  ],
)
def test_rows_that_do_not_fit_are_refused(rows, message):
  model, x = nn.Dense(8, use_bias=False), jnp.ones((4, 6))
  params = {"kernel": _PLAIN["query"]["kernel"]}
  trees = [_attach(pj.lora(2, 4, ["kernel"]), params)] * 2
  with pytest.raises(ValueError, match=message):
    pj.apply(model, pj.stack_adapters(trees), x, rows=rows)
  with pytest.raises(ValueError, match="these parameters have none; write"):
    pj.apply(model, trees[0], x, rows=[0, 0, 0, 0])
  with pytest.raises(ValueError, match="used as one dense array"):
    pj.merge(pj.stack_adapters(trees))
