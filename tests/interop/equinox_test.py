"""Equinox modules, their code untouched: adapted through `pj.factored`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj
from peftjax.core import paths
from peftjax.core.probe import layout
from peftjax.core.weight import is_weight
from tests.core.programs import producers

eqx = pytest.importorskip("equinox", reason="needs equinox")

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).standard_normal((5, 12)), jnp.float32)

# A module, and how it is called.
MODELS = {
  "mlp": (lambda: eqx.nn.MLP(12, 6, 16, 2, key=KEY), lambda m, x: jax.vmap(m)(x)),
  "attention": (lambda: eqx.nn.MultiheadAttention(3, 12, key=KEY), lambda m, x: m(x, x, x)),
  "gru": (
    lambda: eqx.nn.GRUCell(12, 8, key=KEY),
    lambda m, x: jax.lax.scan(lambda h, x: (m(x, h),) * 2, jnp.zeros(8), x)[1],
  ),
}


@pytest.mark.parametrize("name", MODELS)
def test_it_equals_the_merged_model_and_builds_no_dense_array(name):
  make, call = MODELS[name]
  arrays, static = eqx.partition(make(), eqx.is_array)
  run = lambda arrays, x: call(eqx.combine(arrays, static), x)
  axes = layout(run, arrays, X)
  targets = [p for p, x in paths.leaves(arrays).items() if x.ndim == 2]
  assert set(axes) == set(targets)
  method = pj.lora(2, 4, targets)
  params = method.attach(KEY, arrays, axes)
  rng = np.random.default_rng(1)
  draw = lambda w: w.replace(b=jnp.asarray(rng.standard_normal(w.b.shape), jnp.float32))
  params = jax.tree.map(lambda w: draw(w) if is_weight(w) else w, params, is_leaf=is_weight)
  got, want = pj.factored(run)(params, X), run(pj.merge(params), X)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  train, frozen = pj.partition(params, method.trainable(params))
  loss = lambda t, f: jnp.square(pj.factored(run)(pj.combine(t, f), X)).sum()
  shapes = [w.shape for w in paths.leaves(params).values() if is_weight(w)]
  assert producers(jax.value_and_grad(loss), shapes, train, frozen) == []
