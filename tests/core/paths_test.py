"""Rules select by full match, never silently nothing; keys come from paths alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj
from peftjax.core import paths
from peftjax.core.layout import Axes
from tests.models import tiny

SELF = "bert/encoder/layers_{}/attention/self/{}/kernel"


def test_a_plain_word_names_a_module_or_a_parameter():
  found = pj.tree.select(tiny.params(), ["query", "value"])
  assert found == [SELF.format(i, name) for i in (0, 1) for name in ("query", "value")]
  assert pj.tree.select(tiny.params(), "word_embeddings") == [
    "bert/embeddings/word_embeddings/embedding"
  ]
  assert all(p.endswith("/bias") for p in pj.tree.select(tiny.params(), "bias"))
  assert paths.matches("query", "query") and not paths.matches("query", "query/bias")
  assert not paths.matches("que", "a/query/kernel")


def test_a_regex_matches_the_whole_path():
  assert pj.tree.select(tiny.params(), r".*_1/.*/query/kernel") == [SELF.format(1, "query")]
  assert not paths.matches(r"query/kernel", "a/query/kernel")


def test_all_linear_is_every_kernel_of_the_body_but_embeddings_and_heads():
  found = pj.tree.select(tiny.params(), "all-linear")
  flat = paths.leaves(tiny.params())
  assert len(found) == 2 * 6 + 1  # and the pooler
  assert set(flat) - set(found) >= {"head/classifier/kernel"}
  assert all(p.startswith("bert/") and p.endswith("/kernel") for p in found)
  tree = {name: {"kernel": jnp.ones((2, 2))} for name in ("lm_head", "score", "a", "classifier")}
  assert pj.tree.select(tree, "all-linear") == ["a/kernel"]


def test_paths_come_in_tree_order_and_once():
  found = pj.tree.select(tiny.params(), [".*/value/kernel", "query", ".*layers_0/.*query/kernel"])
  assert found == [p for p in paths.leaves(tiny.params()) if p in found]
  assert len(found) == len(set(found)) == 4


@pytest.mark.parametrize("targets", ["qeury", ["query", "valeu"], ".*/keys/kernel", "all_linear"])
def test_a_target_that_matches_nothing_raises(targets):
  with pytest.raises(ValueError, match="matches no parameter"):
    pj.tree.select(tiny.params(), targets)


def test_near_misses_are_named():
  with pytest.raises(ValueError, match=r"'qeury' matches no parameter.\nDid you mean: query"):
    pj.lora(2, targets=["value", "qeury"]).attach(jax.random.key(0), tiny.params())
  with pytest.raises(ValueError, match="targets is empty"):
    pj.tree.select(tiny.params(), [])


def test_the_error_stays_on_one_screen():
  with pytest.raises(ValueError) as error:
    pj.tree.select(tiny.params(), "nothing like it")
  assert len(str(error.value).splitlines()) < 20


def test_layer_paths_name_scanned_layers_as_their_unrolled_twins():
  assert paths.layer_paths("a/layers/b/kernel", (2,)) == [
    "a/layers_0/b/kernel",
    "a/layers_1/b/kernel",
  ]
  assert paths.layer_paths("layers/kernel", (1,)) == ["layers_0/kernel"]
  assert paths.layer_paths("blocks/kernel", (2,)) == ["blocks/kernel[0]", "blocks/kernel[1]"]
  assert paths.layer_paths("e/kernel", (2, 2))[1:3] == ["e/kernel[0][1]", "e/kernel[1][0]"]
  assert paths.layer_paths("layers/kernel", ()) == ["layers/kernel"]


def test_keys_fold_the_crc32_of_the_path():
  """Known numbers: `hash` differs from process to process, and a resume would draw anew."""
  key = jax.random.key(0)
  want = jax.random.fold_in(key, 0xC42E29E4)
  assert jax.random.key_data(paths.fold_in_path(key, "query/kernel")).tolist() == (
    jax.random.key_data(want).tolist()
  )


def _a(params):
  return {p: np.asarray(leaf.a) for p, leaf in paths.leaves(params).items() if hasattr(leaf, "a")}


def test_a_second_rule_does_not_reshuffle_the_first_ones_a():
  key = jax.random.key(7)
  alone = _a(pj.lora(4, targets="query").attach(key, tiny.params()))
  both = _a(pj.lora(4, targets=["query", "value"]).attach(key, tiny.params()))
  chained = pj.chain(pj.lora(2, targets="value"), pj.lora(4, targets="query"))
  chained = _a(chained.attach(key, tiny.params()))
  for path, a in alone.items():
    np.testing.assert_array_equal(a, both[path])
    np.testing.assert_array_equal(a, chained[path])
  first, second = alone.values()
  assert not np.array_equal(first, second)


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_scanned_and_unrolled_layers_get_the_same_a(init):
  key, method = jax.random.key(7), pj.lora(4, targets="query", init=init)
  unrolled = _a(method.attach(key, tiny.params()))
  layout = {SELF.format(0, "query").replace("_0", ""): Axes()}
  (scanned,) = _a(method.attach(key, tiny.scanned_params(), layout)).values()
  np.testing.assert_array_equal(scanned, np.stack(list(unrolled.values())))


def test_a_pattern_that_matches_no_target_raises():
  for kind in ("rank_pattern", "alpha_pattern"):
    method = pj.lora(4, targets="query", **{kind: {"value": 2}})
    with pytest.raises(ValueError, match=f"{kind}: 'value' matches none of the targeted weights"):
      method.attach(jax.random.key(0), tiny.params())
