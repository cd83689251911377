"""`pj.unfreeze` and `pj.chain`: masks and nothing attached."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import peftjax as pj
from peftjax.core import paths
from tests.models import tiny

KEY = jax.random.key(0)


def test_train_attaches_nothing():
  attached = pj.unfreeze("head/.*").attach(KEY, tiny.params())
  assert all(a is b for a, b in zip(*map(jax.tree.leaves, (attached, tiny.params())), strict=True))


def test_train_refuses_what_is_no_float_array():
  """An adapter or a packed integer: named, with what to write instead."""
  tree = {"a": {"kernel": jnp.ones((4, 4))}, "codes": jnp.ones(3, jnp.uint8)}
  with pytest.raises(ValueError, match="pj.unfreeze cannot train codes"):
    pj.unfreeze(".*").attach(KEY, tree)
  lora = pj.lora(2, targets="a").attach(KEY, tree)
  with pytest.raises(ValueError, match="pj.unfreeze cannot train a/kernel: it is LoRA"):
    pj.unfreeze("a/.*").attach(KEY, lora)


def test_train_looks_into_a_box_and_leaves_it():
  """With its names, which are where the array and its moments lie."""
  box = nn.Partitioned(jnp.ones((12, 8)), names=("fsdp", "tensor"))
  codes = nn.Partitioned(jnp.ones(3, jnp.uint8), names=(None,))
  tree = {"a": {"kernel": box, "bias": jnp.ones(8)}, "codes": codes}
  method = pj.unfreeze("a/.*")
  attached = method.attach(KEY, tree)
  assert attached["a"]["kernel"] is box
  mask = method.trainable(attached)
  train, _ = pj.partition(attached, mask)
  assert nn.get_partition_spec(train)["a"]["kernel"] == P("fsdp", "tensor")
  assert pj.count(attached, mask) == 12 * 8 + 8
  assert pj.tree.select(tree, "all-linear") == ["a/kernel"]
  with pytest.raises(ValueError, match="'b' matches no parameter"):
    pj.tree.select(tree, "b")
  with pytest.raises(ValueError, match="cannot train codes"):
    pj.unfreeze(".*").attach(KEY, tree)


def test_a_chain_trains_the_union_and_says_what_it_claims():
  method = pj.chain(
    pj.lora(2, targets="query"), pj.unfreeze("head/.*"), pj.unfreeze(".*/LayerNorm/.*")
  )
  params = method.attach(KEY, tiny.params())
  mask = method.trainable(params)
  on = {paths.name(p) for p, m in jax.tree_util.tree_flatten_with_path(mask)[0] if m}
  flat = paths.leaves(tiny.params())
  assert on == {p for p in flat if p.startswith("head/") or "LayerNorm" in p} | {
    f"{p}/{child}" for p in flat if p.endswith("query/kernel") for child in "ab"
  }
  assert len(method.claims(params)) == 2 + 2 + 10


def test_the_order_of_a_chain_does_not_matter():
  lora, head = pj.lora(2, targets="query"), pj.unfreeze("head/.*")
  one, two = (pj.chain(*ms).attach(KEY, tiny.params()) for ms in ((lora, head), (head, lora)))
  assert jax.tree.structure(one) == jax.tree.structure(two)
  assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (one, two)), strict=True))
