"""`of_stacks`: which kernels the tree alone says to be stacks of layers."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

import peftjax as pj
from peftjax.core.layout import Axes, axes_of
from peftjax.core.stacks import of_stacks
from peftjax.models import families

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
KEY = jax.random.key(0)


@pytest.mark.parametrize("name", ["bert_tiny", "roberta_tiny", "llama_tiny", "gpt2_tiny"])
def test_scanned_models_need_no_layout(name):
  """All kernels of three axes are what a trace of the model says; attaching is the same."""
  model, params = pj.load_pretrained(GOLDEN / name, scan_layers=True)
  traced = pj.linen.layout(model, jax.ShapeDtypeStruct((1, 4), jnp.int32))
  known = of_stacks(params, None)
  assert known and all(traced[path] == axes for path, axes in known.items())
  method = pj.lora(rank=2, targets="all-linear")
  make = lambda *layout: jax.eval_shape(lambda p: method.attach(KEY, p, *layout), params)
  assert jax.tree.structure(make()) == jax.tree.structure(make(traced))
  quantised = jax.eval_shape(lambda p: pj.quantize(p, pj.quant.int8()), params)
  assert any(
    leaf.quantised for leaf in jax.tree.leaves(quantised, is_leaf=_is_weight) if _is_weight(leaf)
  )


def _is_weight(leaf):
  return isinstance(leaf, pj.Weight)


def test_a_prefix_of_a_scanned_model_needs_none():
  model, params = pj.load_pretrained(GOLDEN / "llama_tiny", scan_layers=True)
  params = pj.prefix(length=2).attach(KEY, params)
  read = lambda p: pj.apply(model, p, jnp.ones((1, 4), jnp.int32))
  assert jax.eval_shape(read, params).shape[:2] == (1, 4)
  assert families.ours(model)


KERNEL = jnp.zeros((4, 8, 6))


@pytest.mark.parametrize(
  "layers, known",
  [
    ({"q": {"kernel": KERNEL, "bias": jnp.zeros((4, 6))}}, True),
    ({"q": {"kernel": KERNEL}, "norm": {"scale": jnp.zeros((4, 8))}}, True),
    ({"q": {"kernel": KERNEL}}, False),  # nothing tells four layers from four heads
    ({"q": {"kernel": KERNEL, "bias": jnp.zeros((8, 6))}}, False),  # heads of one layer
    ({"q": {"kernel": KERNEL}, "norm": {"scale": jnp.zeros(4)}}, False),
    ({"q": {"kernel": KERNEL}, "o": {"kernel": jnp.zeros((8, 4)), "bias": jnp.zeros(4)}}, False),
  ],
)
def test_what_does_not_tell_stays_ambiguous(layers, known):
  params = {"body": {"layers": layers}}
  found = of_stacks(params, None)
  assert found == ({"body/layers/q/kernel": Axes()} if known else {})
  if not known:
    with pytest.raises(ValueError, match="(?s)more than two axes.*layout"):
      axes_of("body/layers/q/kernel", KERNEL.shape, found)
  given = {"body/layers/q/kernel": Axes((-3, -2), (-1,))}
  assert of_stacks(params, given) == given  # what is given goes first
