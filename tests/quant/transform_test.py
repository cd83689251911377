"""`pj.quantize`, what it leaves alone, what it refuses; requantising; quantised tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj
from peftjax.core import paths
from peftjax.core.einsum import attend, take
from peftjax.quant.weight import Quantized

KEY = jax.random.key(0)


def tree():
  """A stand-in for a model's parameters."""
  draw = lambda i, *shape: jax.random.normal(jax.random.fold_in(KEY, i), shape)
  return {
    "embed": {"embedding": draw(0, 10, 128)},
    "layers": {"up": {"kernel": draw(1, 2, 128, 96), "bias": draw(2, 2, 96)}},
    "down": {"kernel": draw(3, 96, 128)},
    "odd": {"kernel": draw(4, 63, 8), "offset": draw(6, 8)},
    "lm_head": {"kernel": draw(5, 128, 10)},
  }


def plain(names=("down", "embed")):
  return {name: leaf for name, leaf in tree().items() if name in names}


def layout():
  from peftjax.core.layout import Axes

  return {"layers/up/kernel": Axes()}


def test_all_linear_is_quantised_and_the_rest_left_alone():
  """Embeddings, biases and the head stay the very arrays they were."""
  params = {k: v for k, v in tree().items() if k != "odd"}
  quantised = pj.quantize(params, pj.quant.nf4(), layout=layout())
  flat, was = paths.leaves(quantised), paths.leaves(params)
  changed = {p for p, leaf in flat.items() if isinstance(leaf, Quantized)}
  assert changed == {"layers/up/kernel", "down/kernel"}
  assert all(flat[p] is was[p] for p in flat if p not in changed)
  for p in changed:
    assert flat[p].shape == was[p].shape and flat[p].dtype == was[p].dtype
    off = np.linalg.norm(flat[p].materialize() - was[p]) / np.linalg.norm(was[p])
    assert 0.05 < off < 0.12
  assert pj.count(quantised) == pj.count(params)


def test_abstract_is_concrete_without_numbers():
  """Shapes, dtypes and structure of `ShapeDtypeStruct`s."""
  params = plain()
  make = lambda p: pj.quantize(p, pj.quant.int4(32), ["down", "embed"])
  abstract = make(jax.eval_shape(lambda: params))
  concrete = make(params)
  assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
  shapes = lambda t: [(x.shape, x.dtype) for x in jax.tree.leaves(t)]
  assert shapes(abstract) == shapes(concrete)


@pytest.mark.parametrize(
  "fmt", [pj.quant.nf4(), pj.quant.fp4(32, False), pj.quant.int8(), pj.quant.nf4(128)]
)
def test_a_table_gives_its_rows_and_its_logits(fmt):
  """`take` and `attend` equal those of the dense table; blocks run along the features."""
  table = pj.quantize(plain(), fmt, "embed")["embed"]["embedding"]
  dense = table.materialize()
  ids = jnp.array([[0, 9, 3], [3, 3, 1]])
  np.testing.assert_array_equal(take(table, ids), dense[ids])
  x = jax.random.normal(KEY, (2, 3, 128))
  np.testing.assert_allclose(attend(table, x), x @ dense.T, rtol=1e-4, atol=1e-4)
  assert table.scales.shape[-1] == -(-128 // fmt.block_size)


def test_merging_says_what_it_does():
  """Never silently: dense on demand, requantised with the error of every weight."""
  params = pj.quantize(plain(), pj.quant.nf4(), "down")
  params = pj.lora(4, 8, "down").attach(KEY, params)
  leaf = params["down"]["kernel"]
  params["down"]["kernel"] = leaf.replace(b=jnp.full_like(leaf.b, 0.3))
  with pytest.raises(ValueError, match="dense=True.*requantize"):
    pj.merge(params)
  dense = pj.merge(params, dense=True)["down"]["kernel"]
  again, errors = pj.quant.requantize(params)
  assert type(again["down"]["kernel"]) is Quantized
  back = again["down"]["kernel"].materialize()
  assert errors == {
    "down/kernel": pytest.approx(np.linalg.norm(back - dense) / np.linalg.norm(dense), rel=1e-4)
  }
  assert 0.03 < errors["down/kernel"] < 0.2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("fmt", [pj.quant.nf4(), pj.quant.int8(), pj.quant.fp4(32, False)])
def test_weights_that_are_not_finite_are_refused(bad, fmt):
  params = plain()
  params["down"]["kernel"] = params["down"]["kernel"].at[70, 5].set(bad)
  with pytest.raises(ValueError, match="down/kernel has NaN or infinite"):
    pj.quantize(params, fmt, "down")


@pytest.mark.parametrize(
  "where, message",
  [
    ("odd", "odd contraction size 63.*int8"),
    ("offset", "is not a matrix"),
    ("nothing", "matches no parameter"),
  ],
)
def test_what_cannot_be_quantised_is_refused(where, message):
  with pytest.raises(ValueError, match=f"(?s){message}"):
    pj.quantize(tree(), pj.quant.nf4(), where)


def test_quantised_and_adapted_weights_are_not_quantised_again():
  params = plain()
  with pytest.raises(ValueError, match="is quantised already"):
    pj.quantize(pj.quantize(params, pj.quant.nf4(), "down"), pj.quant.nf4(), "down")
  with pytest.raises(ValueError, match="is a LoRA already"):
    pj.quantize(pj.lora(2, targets="down").attach(KEY, params), pj.quant.nf4(), "down")


@pytest.mark.parametrize(
  "method, message",
  [
    (lambda: pj.unfreeze("down"), "pj.unfreeze cannot train down/kernel"),
    (lambda: pj.lora(2, targets="down", init="pissa"), "attach before quantising"),
  ],
)
def test_methods_that_need_dense_weights_are_refused(method, message):
  """Full fine-tuning and PiSSA on four bits."""
  with pytest.raises(ValueError, match=message):
    method().attach(KEY, pj.quantize(plain(), pj.quant.nf4(), "down"))
