"""One adapter a weight: what methods may be put around."""

import functools

import jax
import jax.numpy as jnp
import pytest

import peftjax as pj

KEY = jax.random.key(0)
BASE = {"query": {"kernel": jax.random.normal(KEY, (64, 8)), "bias": jnp.ones(8)}}
METHODS = {
  "lora": pj.lora(2, targets="query"),
  "dora": pj.dora(2, targets="query", from_quantised=True),
  "adalora": pj.adalora(2, target_rank=1, targets="query"),
  "ia3 of outputs": pj.ia3("query"),
  "ia3 of inputs": pj.ia3(inputs="query"),
  "vera": pj.vera(2, "query"),
}


@functools.cache
def attached(name, quantised):
  base = pj.quantize(BASE, pj.quant.nf4(), "query") if quantised else BASE
  return METHODS[name].attach(KEY, base)


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("name", METHODS)
def test_no_adapter_is_put_around_another(name, quantised):
  """Of whatever method, and whatever lies within; a quantised weight is none."""
  for first in METHODS:
    pair = first == name == "vera"  # of which there can be but one
    with pytest.raises(ValueError, match="is there already" if pair else "has an adapter already"):
      METHODS[name].attach(KEY, attached(first, quantised))
