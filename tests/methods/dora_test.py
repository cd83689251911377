"""DoRA: its formula, what its gradient leaves out, and where it starts."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj
from peftjax.core.layout import Axes

KEY = jax.random.key(0)


def drawn(shape=(12, 8), axes=None, **settings):
  """An attached weight of the base's shape, its factors and magnitudes drawn."""
  base = jax.random.normal(KEY, shape)
  method = pj.dora(3, 6, targets="w", **settings)
  weight = method.attach(KEY, {"w": base}, {"w": axes} if axes else None)["w"]
  keys = jax.random.split(jax.random.key(1), 2)
  return weight.replace(
    b=0.3 * jax.random.normal(keys[0], weight.b.shape),
    m=weight.m * (1.0 + 0.2 * jax.random.normal(keys[1], weight.m.shape)),
  )


def dense(weight, norm=lambda x: x):
  """Equation 5 on the dense sum."""
  v = weight.base + weight.delta()
  length = norm(jnp.sqrt(jnp.square(v).sum(weight.axes.ins, keepdims=True)))
  shape = [1 if i - v.ndim in weight.axes.ins else n for i, n in enumerate(v.shape)]
  return weight.m.reshape(shape) * v / length


@pytest.mark.parametrize(
  ("shape", "axes"),
  [
    ((12, 8), None),
    ((12, 4, 2), Axes((-3,), (-2, -1))),
    ((4, 3, 8), Axes((-3, -2), (-1,))),
    ((2, 12, 8), Axes()),
  ],
)
def test_the_weight_is_that_of_the_formula(shape, axes):
  """Also over several axes and stacked layers, and unmerging gives the base back."""
  weight = drawn(shape, axes)
  chex.assert_trees_all_close(weight.materialize(), dense(weight), rtol=1e-5, atol=1e-5)
  back = pj.tree.unmerge({"w": weight.materialize()}, {"w": weight})["w"]
  chex.assert_trees_all_close(back.base, weight.base, rtol=1e-4, atol=1e-4)
  flipped = weight.replace(m=-weight.m)
  chex.assert_trees_all_close(flipped.unmerged(-weight.materialize()), weight.base, atol=1e-4)


@pytest.mark.slow(reason="7 s")
def test_the_norm_is_a_constant_to_the_gradient():
  """Section 4.3; with a norm that is differentiated the gradient of B is another."""
  weight, x = drawn(), jax.random.normal(KEY, (5, 12))
  parts = {name: getattr(weight, name) for name in "abm"}
  loss = lambda y: jnp.sin(y).sum()
  got = jax.grad(lambda p: loss(pj.einsum("bi,io->bo", x, weight.replace(**p))))(parts)
  of = lambda norm: jax.grad(lambda p: loss(x @ dense(weight.replace(**p), norm)))(parts)
  chex.assert_trees_all_close(got, of(jax.lax.stop_gradient), rtol=1e-4, atol=1e-5)
  assert np.abs(got["b"] - of(lambda n: n)["b"]).max() > 0.01


def test_the_magnitude_starts_as_the_norm_of_each_output():
  weight = pj.dora(3, 6, targets="w").attach(
    KEY, {"w": jax.random.normal(KEY, (2, 12, 8))}, {"w": Axes()}
  )["w"]
  np.testing.assert_allclose(weight.m, np.linalg.norm(weight.base, axis=-2), rtol=1e-6)
  assert pj.count({"w": weight}) == 2 * (12 * 8 + 3 * 20 + 8)


def test_a_quantised_base_has_to_be_asked_for():
  tree = pj.quantize(
    {"w": {"kernel": jax.random.normal(KEY, (3, 64, 8))}}, pj.quant.nf4(), "w", {"w/kernel": Axes()}
  )
  layout = {"w/kernel": Axes()}
  with pytest.raises(ValueError, match=r"w/kernel is quantised, and DoRA.*from_quantised=True"):
    pj.dora(3, targets="w").attach(KEY, tree, layout)
  weight = pj.dora(3, targets="w", from_quantised=True).attach(KEY, tree, layout)["w"]["kernel"]
  norms = np.linalg.norm(tree["w"]["kernel"].materialize(), axis=-2)
  np.testing.assert_allclose(weight.m, norms, rtol=1e-5)


def test_a_table_is_refused():
  with pytest.raises(ValueError, match="words/embedding is a table, which DoRA is not made for"):
    pj.dora(3, targets="words").attach(KEY, {"words": {"embedding": jnp.ones((9, 8))}})
