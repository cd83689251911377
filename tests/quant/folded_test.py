"""Kernels of several input or output axes in four bits."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import peftjax as pj
from peftjax.core.layout import Axes, ConvAxes, TableAxes
from peftjax.quant.folded import Folded
from tests.core.programs import jit, producers

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
OUT, IN = Axes((-3,), (-2, -1)), Axes((-3, -2), (-1,))

# A kernel's shape and axes, an equation, and the operand's shape.
CASES = {
  "heads out": ((12, 4, 2), OUT, "...d,dnh->...nh", (2, 5, 12)),
  "heads in": ((4, 2, 12), IN, "btnh,nhd->btd", (2, 5, 4, 2)),
  "heads out, transposed": ((12, 4, 2), OUT, "btnh,dnh->btd", (2, 5, 4, 2)),
  "outputs first": ((8, 12), Axes((-1,), (-2,)), "btd,fd->fbt", (2, 5, 12)),
  "stack": ((3, 12, 4, 2), OUT, "bld,ldnh->blnh", (2, 3, 12)),
  "part of an input": ((4, 2, 12), IN, "btn,nhd->bthd", (2, 5, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_the_dense_kernel(name):
  shape, axes, eqn, of_x = CASES[name]
  params = {"w": jnp.asarray(RNG.standard_normal(shape), jnp.float32)}
  weight = pj.quantize(params, pj.quant.nf4(), "w", {"w": axes})["w"]
  assert isinstance(weight, Folded) and weight.shape == shape
  x = jnp.asarray(RNG.standard_normal(of_x), jnp.float32)
  got, want = jit(lambda w: (w.einsum(eqn, x), jnp.einsum(eqn, x, w.materialize())))(weight)
  chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)
  # The codes are those of the matrix.
  assert np.abs(weight.materialize() - params["w"]).max() < 0.5
  abstract = pj.quantize(jax.eval_shape(lambda: params), pj.quant.nf4(), "w", {"w": axes})["w"]
  chex.assert_trees_all_equal_shapes_and_dtypes(abstract, jax.eval_shape(lambda: weight))


def test_it_is_split_as_its_kernel_where_blocks_stay_whole():
  params = {"w": jnp.zeros((128, 4, 2))}
  weight = pj.quantize(params, pj.quant.nf4(), "w", {"w": OUT})["w"]
  assert weight.cuts == (2, 4, 1)
  assert weight.child_specs(P("fsdp", "tensor")).base.codes == P("fsdp", "tensor")


def test_adapters_fold_into_it():
  params = {"w": jnp.asarray(RNG.standard_normal((12, 4, 2)), jnp.float32)}
  params = pj.quantize(params, pj.quant.nf4(), "w", {"w": OUT})
  attached = pj.lora(2, targets=["w"]).attach(KEY, params, {"w": OUT})
  attached["w"] = attached["w"].replace(b=jnp.ones_like(attached["w"].b))
  folded, errors = pj.quant.requantize(attached)
  assert isinstance(folded["w"], Folded) and 0 < errors["w"] < 0.2


def test_a_table_of_any_name_is_looked_up_by_its_rows():
  """A layout knows it for one: blocks run along its features, and no other row is decoded."""
  params = {"words": jnp.asarray(RNG.standard_normal((21, 64)), jnp.float32)}
  layout = {"words": TableAxes()}
  weight = pj.quantize(params, pj.quant.nf4(), "words", layout)["words"]
  ids = jnp.array([3, 20])
  np.testing.assert_allclose(weight.take(ids), weight.materialize()[ids], rtol=1e-6)
  assert producers(weight.take, [weight.shape], ids) == []


def test_a_convolution_has_no_quantised_form():
  """Named, it is refused; "all-linear" leaves it out."""
  params = {"conv": {"kernel": jnp.zeros((3, 3, 4, 6))}, "dense": {"kernel": jnp.zeros((4, 6))}}
  layout = {"conv/kernel": ConvAxes((-4, -3, -2), (-1,)), "dense/kernel": Axes()}
  with pytest.raises(ValueError, match=r"conv/kernel \(3, 3, 4, 6\) is the kernel of a convol"):
    pj.quantize(params, pj.quant.nf4(), "conv", layout)
  made = pj.quantize(params, pj.quant.nf4(), layout=layout)
  assert isinstance(made["conv"]["kernel"], jax.Array)
