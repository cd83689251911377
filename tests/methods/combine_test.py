"""One adapter from several; tests/parity/combine_test.py compares all kinds with peft's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj
from peftjax.methods import arithmetic
from peftjax.methods.lora_weight import LoRA

_WEIGHTS = np.array([0.7, -0.4], np.float32)


def _leaf(seed, base, ranks=(2, 3), scale=(2.0, 0.5), dtype=np.float32):
  """Two stacked layers, A and B drawn, padded to the larger rank."""
  rng, width = np.random.default_rng(seed), max(ranks)
  kept = np.arange(width) < np.array(ranks)[:, None]
  a = rng.standard_normal((2, width, 6)) * kept[..., None]
  b = rng.standard_normal((2, 8, width)) * kept[:, None]
  return LoRA(base, a.astype(dtype), b.astype(dtype), np.float32(scale), np.int32(ranks))


_BASE = np.random.default_rng(9).standard_normal((2, 6, 8)).astype(np.float32)
_tree = lambda leaf, **more: {"layers": {"query": {"kernel": leaf}, **more}}
_ONE, _TWO = (_leaf(i, _BASE) for i in (0, 1))
_WIDE = _leaf(2, _BASE, (4, 1))


def _delta(leaf):
  scaled = np.asarray(leaf.b, np.float32) * np.asarray(leaf.scale)[:, None, None]
  return np.swapaxes(scaled @ np.asarray(leaf.a, np.float32), 1, 2)


def _combined(trees, *args, **options):
  return pj.combine_adapters(list(map(_tree, trees)), *args, **options)["layers"]["query"]["kernel"]


@pytest.mark.parametrize("options", [{"kind": "cat"}, {"kind": "svd", "rank": 6}])
def test_the_exact_sum(options):
  """Of layers whose ranks differ; what is beyond the rank of a layer is zero."""
  made = _combined([_ONE, _WIDE], [0.7, -0.4], **options)
  want = 0.7 * _delta(_ONE) - 0.4 * _delta(_WIDE)
  np.testing.assert_allclose(_delta(made), want, atol=1e-5)
  assert np.all(np.asarray(made.scale) == 1)
  if options["kind"] == "cat":
    assert made.rank.tolist() == [6, 4] and made.a.shape == (2, 6, 6)
    assert not np.any(made.a[1, 4:]) and not np.any(made.b[1, :, 4:])


def test_svd_is_the_nearest_of_its_rank():
  made = _combined([_ONE, _TWO], [0.7, 0.4], rank=2)
  assert made.rank.tolist() == [2, 2]
  for got, exact in zip(_delta(made), 0.7 * _delta(_ONE) + 0.4 * _delta(_TWO), strict=True):
    lost = np.linalg.svd(exact, compute_uv=False)[2:]
    np.testing.assert_allclose(np.linalg.norm(got - exact), np.linalg.norm(lost), rtol=1e-4)


def test_an_adapter_that_lacks_a_matrix_counts_as_none():
  """Which of the trees has it makes no difference, and dtypes are those of the adapter."""
  half = _leaf(0, _BASE, dtype=jnp.bfloat16)
  other = {"query": {"kernel": _BASE}, "value": {"kernel": _ONE}}
  trees = [_tree(half, value={"kernel": _BASE}), {"layers": other}]
  made = pj.combine_adapters(trees, [2.0, -1.0], kind="linear")["layers"]
  np.testing.assert_allclose(
    _delta(made["query"]["kernel"]), 2 * _delta(half), rtol=0.05, atol=0.05
  )
  np.testing.assert_allclose(_delta(made["value"]["kernel"]), -_delta(_ONE), rtol=1e-5, atol=1e-6)
  assert made["query"]["kernel"].a.dtype == jnp.bfloat16


def test_pruning_and_the_majoritys_sign_by_hand():
  x = np.array([[3.0, -1.0, 2.0, 0.5], [-1.0, -4.0, 1.0, -3.0]], np.float32)
  kept = arithmetic.trimmed(x, 0.5)
  np.testing.assert_array_equal(kept, [[3, 0, 2, 0], [0, -4, 0, -3]])
  np.testing.assert_allclose(
    arithmetic.elected(x, _WEIGHTS), [0.7 * 3, (-0.7 + 1.6) / 2, (1.4 - 0.4) / 2, 1.2], rtol=1e-6
  )


def test_dare_depends_on_the_key_alone_and_keeps_all_at_one():
  draw = lambda density, seed: _combined(
    [_ONE, _TWO], [0.7, 0.4], kind="dare_linear", density=density, key=jax.random.key(seed)
  )
  one, again, other = draw(0.5, 0), draw(0.5, 0), draw(0.5, 1)
  np.testing.assert_array_equal(one.a, again.a)
  assert np.any(one.a != other.a) and np.mean(np.asarray(one.a) == 0) > 0.05
  linear = _combined([_ONE, _TWO], [0.7, 0.4], kind="linear")
  np.testing.assert_allclose(draw(1.0, 0).b, linear.b, rtol=1e-6)


_DORA = lambda: pj.dora(2, 4, "query").attach(
  jax.random.key(0), {"query": {"kernel": jnp.ones((6, 8))}}
)
_trees = lambda *leaves: list(map(_tree, leaves))


@pytest.mark.parametrize(
  "trees, options, message",
  [
    (lambda: [], {"weights": []}, "takes a list of parameter trees, at least one, and got none"),
    (lambda: _tree(_ONE), {}, "got a dict"),
    (lambda: _trees(_ONE, _TWO), {"weights": [1.0]}, "1 weights for 2 adapters"),
    (lambda: _trees(_ONE, _TWO), {"weights": [1.0, float("nan")]}, "weights"),
    (lambda: _trees(_ONE, _TWO), {"kind": "mean"}, "kind 'mean' is not one of svd, cat, linear"),
    (lambda: _trees(_ONE, _TWO), {"kind": "ties"}, "write density=0.5"),
    (lambda: _trees(_ONE, _TWO), {"kind": "ties", "density": 0.0}, "write density=0.5"),
    (lambda: _trees(_ONE, _TWO), {"kind": "cat", "density": 0.5}, "takes no density"),
    (lambda: _trees(_ONE, _TWO), {"kind": "cat", "rank": 2}, "leave rank out"),
    (lambda: _trees(_ONE, _TWO), {"kind": "dare_ties", "density": 0.5}, "pass key="),
    (lambda: _trees(_ONE, _TWO), {"key": jax.random.key(0)}, "takes no key"),
    (
      lambda: _trees(_ONE, _WIDE),
      {"kind": "linear"},
      "layers_0/query/kernel has ranks 2, 4, and 'linear' adds row to row",
    ),
    (lambda: [_DORA(), _DORA()], {}, "tree 1 has adapters of the kind DoRA"),
    (lambda: _trees(_ONE, _BASE), {}, "tree 2 has no adapters"),
    (lambda: _trees(_ONE, _ONE.replace(base=None)), {}, "tree 2 lacks the base of layers/query"),
    (lambda: _trees(_ONE, _leaf(1, _BASE + 1)), {}, "at layers/query/kernel tree 2 has other pre"),
    (lambda: [_tree(_ONE), {"other": _ONE}], {}, "the first tree has .* and tree 2"),
    (
      lambda: [_tree(_ONE), jax.eval_shape(lambda: _tree(_ONE))],
      {},
      "tree 2 has no numbers: call combine_adapters outside jit",
    ),
  ],
)
def test_what_cannot_be_combined_is_refused(trees, options, message):
  with pytest.raises(ValueError, match=message):
    pj.combine_adapters(**{"adapters": trees(), "weights": [1.0, 1.0], **options})
