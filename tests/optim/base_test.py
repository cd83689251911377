"""Schedules, decay masks, accumulation, freezing."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import peftjax as pj
from peftjax.core import paths
from peftjax.models.bert import BertClassifier
from peftjax.optim import adamw, decay_mask, freeze, schedule, wrap
from tests.core.programs import jit
from tests.models import tiny


@pytest.mark.parametrize(
  "kind, middle, end", [("linear", 0.5, 0.0), ("cosine", 0.5, 0.0), ("constant", 1.0, 1.0)]
)
def test_schedules_at_the_start_the_end_of_warm_up_and_the_end(kind, middle, end):
  fn = schedule(kind, 2e-3, total_steps=110, warmup_steps=10)
  got = [float(fn(step)) for step in (0, 5, 10, 60, 110, 500)]
  np.testing.assert_allclose(got, 2e-3 * np.array([0, 0.5, 1, middle, end, end]), atol=1e-9)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_without_warm_up_the_peak_comes_first(kind):
  np.testing.assert_allclose(schedule(kind, 3e-4, 100)(0), 3e-4)


def test_schedules_refuse_what_they_cannot_be():
  with pytest.raises(ValueError, match="schedule 'exp' is not one of"):
    schedule("exp", 1e-3, 10)
  for warmup in (10, 11, -1):
    with pytest.raises(ValueError, match=f"warm-up of {warmup} steps does not fit in 10 steps"):
      schedule("linear", 1e-3, 10, warmup)


@pytest.mark.parametrize(
  ("method", "off"),
  [
    (pj.adapters(4), {"down_bias", "up_bias", "scale", "bias"}),
    (pj.ia3(outputs=["key", "value"]), {"l"}),
    (pj.dora(2, targets=["query"]), {"m"}),
  ],
  ids=["adapters", "ia3", "dora"],
)
def test_biases_and_scales_of_adapters_do_not_decay(method, off):
  layout = pj.linen.layout(BertClassifier(tiny.config()), tiny.TOKENS)
  params = method.attach(jax.random.key(0), tiny.params(), layout)
  train, _ = pj.partition(params, method.trainable(params))
  flags = jax.tree_util.tree_flatten_with_path(decay_mask(train))[0]
  named = {(paths.name(path).split("/")[-1], on) for path, on in flags}
  assert {name for name, on in named if not on} <= off and {name for name, on in named if not on}
  assert not {name for name, on in named if on} & off


def test_decay_is_for_everything_but_biases_and_norm_scales():
  method = pj.chain(pj.lora(2, targets="query"), pj.unfreeze([".*/LayerNorm/.*", "head/.*"]))
  params = method.attach(jax.random.key(0), tiny.params())
  train, _ = pj.partition(params, method.trainable(params))
  mask = decay_mask(train)
  assert jax.tree.structure(mask) == jax.tree.structure(train)
  weight = mask["bert"]["encoder"]["layers_0"]["attention"]["self"]["query"]["kernel"]
  assert weight.a is True and weight.b is True
  norm = mask["bert"]["embeddings"]["LayerNorm"]
  assert norm == {"scale": False, "bias": False}
  assert mask["head"]["classifier"] == {"kernel": True, "bias": False}


def test_adamw_decays_kernels_and_not_biases():
  """One step without a gradient is the decay alone."""
  params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "scale": jnp.ones(2)}
  tx = adamw(0.1, weight_decay=0.5)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(zeros, tx.init(params), params)
  np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
  assert not np.any(updates["bias"]) and not np.any(updates["scale"])


def test_moments_of_bfloat16_parameters_are_float32():
  """The steps are those of float32 copies; in bfloat16 the second moment would never fall."""
  params = {"kernel": jnp.ones((2, 2), jnp.bfloat16), "norm": jnp.ones(2)}
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  tx = adamw(0.1, weight_decay=0.5)
  state, wide_state = tx.init(params), tx.init(wide)
  for grad in (1.0, *[0.0] * 30):
    grads = jax.tree.map(lambda x, grad=grad: jnp.full_like(x, grad), params)
    wide_grads = jax.tree.map(lambda x: x.astype(jnp.float32), grads)
    updates, state = tx.update(grads, state, params)
    wanted, wide_state = tx.update(wide_grads, wide_state, wide)
    chex.assert_trees_all_equal(updates, wanted)
  assert updates["kernel"].dtype == jnp.float32
  np.testing.assert_allclose(state[0].nu["kernel"], 1e-3 * 0.999**30, rtol=1e-5)
  assert optax.apply_updates(params, updates)["kernel"].dtype == jnp.bfloat16


def test_accumulating_small_batches_equals_one_large_batch():
  """The mean gradient of four calls moves the parameters, and is clipped, as one of four rows."""
  rng = np.random.default_rng(0)
  x, y = (jnp.asarray(rng.standard_normal((8, 3), np.float32)) for _ in range(2))
  loss = lambda p, x, y: jnp.square(x @ p["w"] + p["b"].reshape(1, -1) - y).mean()
  start = {"w": jnp.ones((3, 3)), "b": jnp.zeros(3)}
  make = lambda n: wrap(optax.adamw(0.1), clip_norm=0.3, accumulate=n)

  def run(tx, batches):
    @jit
    def step(params, state, x, y):
      grads = jax.grad(loss)(params, x, y)
      updates, state = tx.update(grads, state, params)
      return optax.apply_updates(params, updates), state, optax.tree.norm(grads)

    params, state = start, tx.init(start)
    for rows in batches:
      params, state, norm = step(params, state, x[rows], y[rows])
      assert norm > 0.3  # so that clipping matters
    return params

  eighths = [slice(i, i + 2) for i in (0, 2, 4, 6)]
  large = run(make(1), [slice(0, 8)] * 2)
  chex.assert_trees_all_close(run(make(4), eighths * 2), large, rtol=1e-5, atol=1e-6)
  chex.assert_trees_all_equal(run(make(4), eighths[:3]), start)
  assert np.abs(run(make(1), eighths * 2)["w"] - large["w"]).max() > 1e-2


def test_an_accumulated_gradient_is_the_mean():
  """Not the sum: adaptive optimizers and clipping would hide the difference."""
  tx = wrap(optax.sgd(1.0), clip_norm=None, accumulate=2)
  state = tx.init({"x": jnp.zeros(2)})
  for gradient in ([2.0, 4.0], [10.0, 12.0]):
    updates, state = tx.update({"x": jnp.array(gradient)}, state, None)
  np.testing.assert_allclose(updates["x"], [-6.0, -8.0], rtol=1e-6)


def test_every_method_wraps_alike():
  """clip, then accumulate; and a MultiSteps inside, whose calls would be miscounted, raises."""
  lora, head = pj.lora(2, targets="query"), pj.unfreeze("head/.*")
  hidden = optax.MultiSteps(optax.adam(1e-3), 4)
  for method in (lora, head, pj.chain(lora, head)):
    with pytest.raises(ValueError, match="accumulate=N instead of an optax.MultiSteps"):
      method.optimizer(hidden, 10)
    within = optax.chain(optax.identity(), hidden.gradient_transformation())
    with pytest.raises(ValueError, match="accumulate=N instead of an optax.MultiSteps"):
      method.optimizer(within, 10, accumulate=2).init({"x": jnp.zeros(2)})
    tx = method.optimizer(optax.sgd(1.0), 10, clip_norm=1.0, accumulate=2)
    params = {"x": jnp.zeros(2)}
    state = tx.init(params)
    first, state = tx.update({"x": jnp.array([0.0, 0.0])}, state, params)
    second, state = tx.update({"x": jnp.array([12.0, 16.0])}, state, params)
    assert not np.any(first["x"])
    np.testing.assert_allclose(second["x"], [-0.6, -0.8], rtol=1e-5)


def test_freeze_holds_no_state_and_updates_nothing_frozen():
  """Whatever the gradient tree has there: a number, a hole, an integer."""
  params = {"a": jnp.ones(2), "b": jnp.array([-0.0, 1.0]), "n": jnp.array([2**24 + 1], jnp.int32)}
  mask = {"a": True, "b": False, "n": False}
  tx = freeze(optax.adam(0.1), mask)
  state = tx.init(params)
  assert sum(x.size for x in jax.tree.leaves(state) if x.ndim) == 2 * 2
  for b, n in ((None, None), (jnp.ones(2), jnp.zeros(1))):
    updates, _ = tx.update({"a": jnp.ones(2), "b": b, "n": n}, state, params)
    new = optax.apply_updates(params, updates)
    for name in "bn":
      assert np.asarray(new[name]).tobytes() == np.asarray(params[name]).tobytes()
    assert np.all(new["a"] != params["a"])


def test_freeze_passes_extra_arguments_on():
  seen = []
  inner = optax.GradientTransformationExtraArgs(
    lambda params: (), lambda u, s, p=None, **extra: (seen.append(extra), (u, s))[1]
  )
  tx = freeze(inner, {"a": True})
  tx.update({"a": jnp.ones(1)}, tx.init({"a": jnp.ones(1)}), {"a": jnp.ones(1)}, value=3)
  assert seen == [{"value": 3}]


def test_batches_count_by_their_weight_or_alike():
  """Means over 1, 0 and 3 tokens; fewer batches at the end; nothing but empty ones is a zero."""
  params = {"x": jnp.zeros(2)}
  tx = wrap(optax.sgd(1.0), clip_norm=None, accumulate=3, batches=8)
  state, seen = tx.init(params), []
  for gradient, weight in [(1, 1), (9, 0), (5, 3), (9, 0), (9, 0), (9, 0), (2, 4), (8, 12)]:
    given = {"x": jnp.full(2, gradient, jnp.bfloat16)}
    updates, state = jit(lambda g, s, w: tx.update(g, s, weight=w))(given, state, weight)
    seen.append(float(updates["x"][0]))
    assert updates["x"].dtype == jnp.bfloat16 and state.acc_grads["x"].dtype == jnp.float32
  assert seen == [0, 0, -4.0, 0, 0, 0, 0, -6.5]
  assert (int(state.gradient_step), int(state.mini_step), float(state.weight)) == (3, 0, 0.0)
  np.testing.assert_allclose(state.norm, 6.5 * 2**0.5, rtol=1e-6)
  with pytest.raises(ValueError, match=r"weight is one number for the whole batch, not .* \(2,\)"):
    tx.update(params, state, weight=jnp.ones(2))


def test_without_accumulation_the_state_is_that_of_the_optimizer():
  """So old checkpoints go on, and no gradient is kept; a weight changes nothing."""
  params = {"x": jnp.ones(2)}
  tx, inner = wrap(optax.adam(0.1), clip_norm=None, accumulate=1, batches=5), optax.adam(0.1)
  chex.assert_trees_all_equal(tx.init(params), inner.init(params))
  want = inner.update(params, inner.init(params))
  chex.assert_trees_all_equal(tx.update(params, tx.init(params), weight=7.0), want)
