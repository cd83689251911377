"""IA3: the formula with biases, in our modules and in linen's, and its errors."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import peftjax as pj
from peftjax.nn.linear import Linear

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (2, 5, 12))


def scaled(model, method, *args):
  """Attached parameters with random scales and biases, and the base's."""
  base = model.init(KEY, *args)["params"]
  base = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(KEY, x.shape), base)
  params = method.attach(KEY, base, pj.linen.layout(model, *args))
  mask = method.trainable(params)
  draw = lambda on, x: 1.0 + jax.random.normal(jax.random.key(1), x.shape) if on else x
  return jax.tree.map(draw, mask, params), base


@pytest.mark.parametrize("make", [lambda: Linear(8), lambda: nn.Dense(8)], ids=["ours", "linen"])
def test_outputs_are_scaled_with_their_bias_and_inputs_before_the_product(make):
  """h = l ⊙ (W x + b), and h = W (l ⊙ x) + b."""
  model = make()
  params, base = scaled(model, pj.ia3(outputs="kernel"), X)
  scales = params["kernel"].l
  assert scales.shape == (8,) and params["bias"].l is None
  bias = jnp.broadcast_to(base["bias"], (2, 5, 8))
  want = jnp.einsum("bto,o->bto", X @ base["kernel"] + bias, scales)
  chex.assert_trees_all_close(pj.apply(model, params, X), want, atol=1e-5)
  params, base = scaled(model, pj.ia3(inputs="kernel"), X)
  scales = params["kernel"].l
  assert scales.shape == (12,) and isinstance(params["bias"], jax.Array)
  want = jnp.einsum("bti,i->bti", X, scales) @ base["kernel"] + bias
  chex.assert_trees_all_close(pj.apply(model, params, X), want, atol=1e-5)


@pytest.mark.parametrize(
  "model",
  [
    nn.DenseGeneral((4, 2), axis=-1),
    nn.DenseGeneral(6, axis=(-2, -1)),
    nn.Einsum((12, 8), "btd,df->btf"),
    nn.MultiHeadDotProductAttention(num_heads=4),
  ],
  ids=lambda m: type(m).__name__,
)
@pytest.mark.parametrize("side", ["outputs", "inputs"])
def test_third_party_modules_compute_what_the_merged_tree_does(model, side):
  args = (X, X) if isinstance(model, nn.MultiHeadDotProductAttention) else (X,)
  params, base = scaled(model, pj.ia3(**{side: "kernel"}), *args)
  got = pj.apply(model, params, *args)
  merged = pj.merge(params)
  chex.assert_trees_all_close(got, model.apply({"params": merged}, *args), atol=1e-4)
  assert np.abs(got - model.apply({"params": base}, *args)).max() > 0.1
  chex.assert_trees_all_close(pj.merge(pj.tree.unmerge(merged, params)), merged, atol=1e-5)


def test_a_bias_has_no_scales_of_its_own():
  """Its gradient goes into its kernel's; read alone it says so."""
  model = Linear(8)
  params, base = scaled(model, pj.ia3(outputs="kernel"), X)

  def total(scales):
    kernel = params["kernel"].replace(l=scales)
    return pj.apply(model, {**params, "kernel": kernel}, X).sum()

  want = (X @ base["kernel"]).sum((0, 1)) + 10 * base["bias"]
  chex.assert_trees_all_close(jax.grad(total)(params["kernel"].l), want, rtol=1e-4, atol=1e-4)
  with pytest.raises(ValueError, match="the bias of kernel has no scales of its own"):
    params["bias"].materialize()


def test_errors():
  tree = {"key": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}}
  with pytest.raises(ValueError, match="ia3 scales nothing"):
    pj.ia3()
  with pytest.raises(ValueError, match="key/kernel is named by outputs and by inputs"):
    pj.ia3("key", "key/kernel").attach(KEY, tree)
  with pytest.raises(ValueError, match="value"):
    pj.ia3("value").attach(KEY, tree)
  attached = pj.ia3("key").attach(KEY, tree)
  with pytest.raises(ValueError, match="key/bias has an adapter already"):
    pj.ia3("key").attach(KEY, attached)
  with pytest.raises(ValueError, match="words/embedding is a table.*target kernels"):
    pj.ia3("words").attach(KEY, {"words": {"embedding": jnp.ones((9, 4))}})
  with pytest.raises(ValueError, match="two methods claim key/bias"):
    pj.chain(pj.ia3("key"), pj.unfreeze("key/bias")).attach(KEY, tree)


def test_attach_opens_a_box_and_keeps_its_names():
  boxed = {
    "kernel": nn.Partitioned(jnp.ones((12, 8)), names=("fsdp", "tensor")),
    "bias": nn.Partitioned(jnp.ones(8), names=("tensor",)),
  }
  params = pj.ia3(outputs="kernel").attach(KEY, boxed)
  assert params["kernel"].names == ("fsdp", "tensor") and params["bias"].names == ("tensor",)
  assert all(isinstance(leaf.base, jax.Array) for leaf in params.values())
  assert nn.get_partition_spec(params)["kernel"].l == P("tensor")
