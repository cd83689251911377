"""Adapters that take each other's place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj


def _tree(*shape):
  draw = lambda i, *size: jax.random.normal(jax.random.key(i), size)
  kernel = lambda i: {"kernel": draw(i, *shape, 6, 8), "bias": draw(i + 9, *shape, 8)}
  return {"layers": {"query": kernel(0), "value": kernel(1)}}


def _adapter(targets=("query",), params=None, method=pj.lora, **options):
  params = _tree() if params is None else params
  sizes = {"rank": 4, "target_rank": 2} if method is pj.adalora else {"rank": 3}
  made = method(**{"targets": targets, **sizes, **options})
  layout = {p: pj.core.layout.Axes() for p in ("layers/query/kernel", "layers/value/kernel")}
  attached = made.attach(jax.random.key(5), params, layout)
  return pj.partition(attached, pj.tree.adapter_mask(attached, made.trainable(attached)))[0]


def test_ranks_are_aligned_and_nothing_else():
  one, two = pj.tree.align_ranks(_adapter(rank=2), _adapter(rank=4))
  assert jax.tree.structure(one) == jax.tree.structure(two)
  a = one["layers"]["query"]["kernel"].a
  assert a.shape == (4, 6) and not np.any(a[2:])


_HALF = {"dtype": jnp.bfloat16}


@pytest.mark.parametrize(
  "other, message",
  [
    (
      lambda: _adapter(["value"]),
      "query/kernel the first adapter has a LoRA and adapter 2 nothing",
    ),
    (
      lambda: _adapter(["query", "value"]),
      "value/kernel the first .* nothing and adapter 2 a LoRA",
    ),
    (lambda: _adapter(method=pj.dora), "a LoRA and adapter 2 a DoRA"),
    (lambda: _adapter(method=pj.adalora), "a LoRA .* a SVDLoRA"),
    (lambda: _adapter(params=_tree(3)), r"differ in more .*\n.*\[3, \d, 6\]"),
    (lambda: _adapter(dropout=0.5), "differ in more .*\n.*dropout 0.0\n.*dropout 0.5"),
    (lambda: _adapter(**_HALF), "differ in more .*\n.*bfloat16"),
    (lambda: {"decoder": _adapter()["layers"]}, "layers/query/.* adapter 2 no such place"),
    (lambda: None, "the first adapter has nothing and adapter 2 no such place"),
  ],
)
def test_what_cannot_take_its_place_is_refused(other, message):
  with pytest.raises(ValueError, match=f"(?s){message}"):
    pj.tree.align_ranks(_adapter(rank=2), other())
