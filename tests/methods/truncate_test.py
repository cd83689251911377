"""`convert_to_lora`: the nearest LoRA to what an adapter changes, and how far that is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj
from peftjax.core.layout import Axes
from peftjax.methods.lora_weight import LoRA
from peftjax.methods.truncate import convert_to_lora

_METHODS = {
  "lora": pj.lora(3, 6, targets="w"),
  "dora": pj.dora(3, 6, targets="w"),
  "adalora": pj.adalora(3, 6, targets="w", target_rank=1.0),
  "loha": pj.loha(2, 4, targets="w"),
  "lokr": pj.lokr(2, 4, targets="w"),
  "vera": pj.vera(5, targets="w"),
  "ia3": pj.ia3(outputs="w"),
}


def _drawn(method, stack=()):
  """One weight whose trained arrays are drawn."""
  rng = np.random.default_rng(0)
  params = {"layers": {"w": {"kernel": jnp.asarray(rng.normal(size=(*stack, 32, 8)), jnp.float32)}}}
  axes = {"layers/w/kernel": Axes()} if stack else None
  attached = method.attach(jax.random.key(0), params, axes)
  draw = lambda m, x: jnp.asarray(rng.normal(size=x.shape), x.dtype) if m else x
  return jax.tree.map(draw, method.trainable(attached), attached)


def _delta(params):
  leaf = params["layers"]["w"]["kernel"]
  merged = pj.merge(params, dense=True)["layers"]["w"]["kernel"]
  return np.asarray(merged - jnp.asarray(getattr(leaf.base, "materialize", lambda: leaf.base)()))


@pytest.mark.fast_for(".*-stack")
@pytest.mark.parametrize("stack", [(), (2,)], ids=["matrix", "stack"])
@pytest.mark.parametrize("name", _METHODS)
def test_the_error_is_that_of_the_nearest_matrix_of_the_rank(name, stack):
  params = _drawn(_METHODS[name], stack)
  want = _delta(params)
  for rank in (2, 8):
    made, errors = convert_to_lora(params, rank)
    leaf = made["layers"]["w"]["kernel"]
    assert type(leaf) is LoRA and leaf.a.shape[-2] <= rank
    assert list(errors) == [f"layers_{i}/w/kernel" for i in range(2)] if stack else len(errors) == 1
    left = [np.linalg.svd(x, compute_uv=False) for x in want.reshape(-1, 32, 8)]
    off = want - _delta(made)
    for lost, s, layer in zip(errors.values(), left, off.reshape(-1, 32, 8), strict=True):
      nearest = np.linalg.norm(s[rank:]) / np.linalg.norm(s)
      assert abs(lost - nearest) < 1e-5
      assert abs(np.linalg.norm(layer) / np.linalg.norm(s) - nearest) < 1e-4


def test_what_has_no_larger_rank_is_kept():
  params = _drawn(_METHODS["lora"])
  same, errors = convert_to_lora(params, 3)
  assert same["layers"]["w"]["kernel"] is params["layers"]["w"]["kernel"]
  assert errors == {"layers/w/kernel": 0.0}


@pytest.mark.slow(reason="compiles the quantisation of a matrix")
def test_the_base_stays_quantised():
  base = {"layers": {"w": {"kernel": jnp.ones((32, 8))}}}
  four = pj.quantize(base, pj.quant.nf4(block_size=32), "w")
  attached = pj.dora(2, 4, targets="w", from_quantised=True).attach(jax.random.key(0), four)
  made, errors = convert_to_lora(attached, 4)
  assert made["layers"]["w"]["kernel"].base is four["layers"]["w"]["kernel"]
  assert list(errors) == ["layers/w/kernel"]


@pytest.mark.parametrize("rank", [0, 2.0, True])
def test_ranks_that_are_none(rank):
  with pytest.raises(ValueError, match="whole number from 1"):
    convert_to_lora({"w": jnp.ones((2, 2))}, rank)


def test_what_is_no_change_of_a_matrix_is_refused():
  bias = {"w": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}}
  attached = pj.ia3(outputs="w").attach(jax.random.key(0), bias)
  with pytest.raises(ValueError, match=r"w/bias is a vector with IA3"):
    convert_to_lora(attached, 2)
