"""`einsum`, `take` and `attend` on plain arrays, and subscripts."""

import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj
from peftjax.core.einsum import attend, free_letter, split_subscripts, take

W = jnp.arange(12.0).reshape(3, 4) / 7


def test_einsum_computes_in_the_dtype_of_x():
  x = jnp.ones((2, 3), jnp.bfloat16)
  y = pj.einsum("...i,io->...o", x, W)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y, x @ W.astype(jnp.bfloat16))


def test_take_gives_rows_and_nan_outside():
  np.testing.assert_array_equal(take(W, jnp.array([[2], [0]])), W[jnp.array([[2], [0]])])
  assert np.isnan(take(W, jnp.array(3))).all()


def test_attend_is_the_transposed_product_in_the_dtype_of_x():
  x = jnp.ones((2, 4), jnp.bfloat16)
  assert attend(W, x).dtype == jnp.bfloat16
  np.testing.assert_allclose(attend(W, jnp.ones((2, 4))), jnp.ones((2, 4)) @ W.T, rtol=1e-6)


@pytest.mark.parametrize("eqn", ["io->io", "bi,io", "a,b,c->abc"])
def test_a_weights_equation_has_two_operands_and_an_arrow(eqn):
  with pytest.raises(ValueError, match="two operands"):
    split_subscripts(eqn)


def test_subscripts():
  assert split_subscripts("... i, i o -> ... o") == ("...i", "io", "...o")
  assert free_letter("rR", "z") not in "rRz"
