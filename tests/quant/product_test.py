"""The product with a quantised weight, as each platform computes it."""

import chex
import jax
import jax.numpy as jnp
import pytest

import peftjax as pj
from peftjax.quant.weight import Quantized

KEY = jax.random.key(0)
# An equation, the shapes of x and W, and the axis that blocks and pairs run along.
CASES = {
  "kernel": ("ti,io->to", (5, 192), (192, 24), -2),
  "any leading axes": ("...i,io->...o", (2, 3, 64), (64, 8), -2),
  "a short last block": ("ti,io->to", (5, 96), (96, 24), -2),
  "transposed": ("to,io->ti", (5, 24), (192, 24), -2),
  "table": ("...d,vd->...v", (2, 3, 128), (40, 128), -1),
  "head of a table": ("td,dv->tv", (3, 128), (128, 40), -2),
  "a stack": ("lti,lio->lto", (3, 4, 64), (3, 64, 8), -2),
}


_SLOW = pytest.mark.slow(reason="the same law for more equations; several seconds each")


def on_tpu(*args, default, tpu=None, cpu=None):
  del cpu
  return (tpu or default)(*args)


@pytest.mark.fast_for("kernel.*nf4.*|table.*int4.*")
@pytest.mark.parametrize(
  "fmt", [pj.quant.nf4(), pj.quant.int4(32, double_quant=False), pj.quant.int8()], ids=str
)
@pytest.mark.parametrize(
  "case",
  [case if case in ("kernel", "table") else pytest.param(case, marks=_SLOW) for case in CASES],
)
def test_no_platform_has_another_product(case, fmt, monkeypatch):
  """Value and gradient, against the product with the dequantised array."""
  eqn, x_shape, w_shape, axis = CASES[case]
  w = jax.random.normal(KEY, w_shape)
  codes, scales = fmt.quantize(w, axis)
  weight = Quantized(codes, scales, fmt=fmt, axis=axis)
  x = jax.random.normal(jax.random.key(1), x_shape)
  dense = weight.materialize()

  def both(fn):
    y, back = jax.vjp(fn, x)
    return y, back(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

  want = both(lambda x: jnp.einsum(eqn, x, dense))
  chex.assert_trees_all_close(both(lambda x: weight.einsum(eqn, x)), want, rtol=1e-5, atol=1e-5)
  monkeypatch.setattr(jax.lax, "platform_dependent", on_tpu)
  chex.assert_trees_all_close(both(lambda x: weight.einsum(eqn, x)), want, rtol=1e-5, atol=1e-5)
