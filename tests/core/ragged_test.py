"""Products of groups of rows under `vmap`, whichever operands it maps, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftjax.core import ragged

_SIZES = jnp.array([[1, 2, 0, 3], [2, 2, 2, 0]])
_rng = np.random.default_rng(0)
_X, _W = (jnp.asarray(_rng.standard_normal(s, np.float32)) for s in ((2, 6, 3), (2, 4, 3, 5)))


def _dense(x, w, sizes):
  """Each row by the matrix of its group."""
  of_row = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(x)), side="right")
  return jnp.einsum("mi,mio->mo", x, w[of_row])


@pytest.mark.parametrize("axes", [(0, None, None), (0, None, 0), (None, 0, None), (0, 0, 0)])
def test_mapped_products_and_gradients_are_those_of_each_alone(axes):
  args = [x if axis == 0 else x[0] for x, axis in zip((_X, _W, _SIZES), axes, strict=True)]
  loss = lambda product: lambda *args: jnp.sin(product(*args)).sum()

  @jax.jit
  def both(*args):
    of = lambda fn: jax.vmap(jax.value_and_grad(loss(fn), (0, 1)), axes)(*args)
    return of(ragged.product), of(_dense)

  for got, want in zip(*map(jax.tree.leaves, both(*args)), strict=True):
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_only_what_a_gradient_needs_is_kept():
  x, w, sizes = _X[0], _W[0], _SIZES[0]
  kept = lambda fn, x: [r.shape for r in jax.tree.leaves(jax.vjp(fn, x)[1])]
  assert x.shape not in kept(lambda x: ragged.product(x, w, sizes), x)
  assert w.shape not in kept(lambda w: ragged.product(x, w, sizes), w)
