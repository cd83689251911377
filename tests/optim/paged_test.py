"""Optimizer state in host memory."""

from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import peftjax as pj
from peftjax import optim
from peftjax.optim import decide_paging, paged
from tests.core.programs import jit

_SCHEDULE = optim.schedule("cosine", 1e-2, 10, 2)
OPTIMIZERS = {
  "adamw": lambda: optim.adamw(_SCHEDULE, weight_decay=0.1),
  "adamw8bit": lambda: optim.adamw8bit(_SCHEDULE, weight_decay=0.1),
  "labelled": lambda: optax.multi_transform(
    {"a": optax.adam(1e-2), "b": optax.sgd(1e-1, momentum=0.9)},
    {"first": {"kernel": "a", "bias": "b"}, "hole": "b", "second": {"kernel": "b", "scale": "a"}},
  ),
  # One call, in another, that all leaves go through; since jax 0.11 so are some of optax.
  "calls": lambda: optax.GradientTransformation(
    optax.adam(1e-2).init, jax.jit(jax.jit(optax.adam(1e-2).update))
  ),
}


def _params():
  """One kernel of more than 4096 entries, a scalar, a hole."""
  rng = np.random.default_rng(0)
  return {
    "first": {
      "kernel": jnp.asarray(rng.standard_normal((80, 64), np.float32) / 9),
      "bias": jnp.zeros(64),
    },
    "hole": None,
    "second": {
      "kernel": jnp.asarray(rng.standard_normal((64, 3), np.float32) / 8),
      "scale": jnp.ones(()),
    },
  }


def _loss(params, x, y):
  first, second = params["first"], params["second"]
  hidden = jnp.tanh(x @ first["kernel"] + first["bias"].reshape(1, -1))
  return jnp.square(hidden @ second["kernel"] * second["scale"] - y).mean()


def _train(tx):
  """Parameters, state and loss after ten steps, each one program that takes over its buffers."""

  def step(params, state, x, y):
    loss, grads = jax.value_and_grad(_loss)(params, x, y)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  step = jit(step, donate_argnums=(0, 1))
  params = _params()
  state = jax.jit(tx.init)(params)
  rng = np.random.default_rng(1)
  for _ in range(10):
    x, y = (jnp.asarray(rng.standard_normal((16, n), np.float32)) for n in (80, 3))
    params, state, loss = step(params, state, x, y)
  return params, state, loss


@pytest.mark.fast_for("adamw-bare|adamw8bit-mean|labelled-clip|calls-mean")
@pytest.mark.parametrize("around", [(None, 1), (0.3, 1), (0.3, 2)], ids=["bare", "clip", "mean"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_trajectory_is_the_same_bit_for_bit(name, around):
  """Schedule, decay, masks, holes, a scalar leaf, clipping and accumulation outside."""
  clip, accumulate = around
  wrap = lambda tx: optim.wrap(tx, clip_norm=clip, accumulate=accumulate)
  want = _train(wrap(OPTIMIZERS[name]()))
  got = _train(wrap(paged(OPTIMIZERS[name]())))
  chex.assert_trees_all_equal(got, want)
  assert np.any(got[0]["first"]["kernel"] != _params()["first"]["kernel"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_arrays_are_in_host_memory_and_scalars_are_not(name):
  """After init, after an update in a program, and after one outside."""
  params, tx = _params(), paged(OPTIMIZERS[name]())
  grads = jax.tree.map(jnp.ones_like, params)
  first = tx.init(params)
  updates, second = tx.update(grads, first, params)
  third = jit(tx.update)(grads, second, params)[1]
  for state in (first, second, third, jit(tx.init)(params)):
    for x in jax.tree.leaves(state):
      assert x.sharding.memory_kind == ("pinned_host" if x.ndim else "device")
  assert {x.sharding.memory_kind for x in jax.tree.leaves(updates)} == {"device"}


def test_the_structure_of_the_state_is_that_of_the_optimizer():
  """So a checkpoint of either continues as the other; without arrays too."""
  shapes = jax.eval_shape(_params)
  tx = optim.adamw(1e-2)
  chex.assert_trees_all_equal_shapes_and_dtypes(
    jax.eval_shape(paged(tx).init, shapes), jax.eval_shape(tx.init, shapes)
  )


@pytest.mark.parametrize(
  "mixing",
  [
    lambda: optax.clip_by_global_norm(1.0),
    lambda: optax.apply_if_finite(optax.sgd(1.0), 3),
    lambda: optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation(),
  ],
  ids=["clip", "finite", "accumulate"],
)
def test_what_mixes_leaves_raises(mixing):
  """It names two leaves that move together, and says where to clip."""
  tx = paged(optax.chain(mixing(), optax.adam(1e-2)))
  params = _params()
  with pytest.raises(ValueError, match=r"first/bias and first/kernel move together.*optim\.wrap"):
    tx.update(params, tx.init(params), params)


def test_without_leaves_or_state_or_parameters():
  """Nothing to visit, nothing to fetch, nothing to decay."""
  empty = paged(optax.adam(1.0))
  assert empty.update({"x": None}, empty.init({"x": None}))[0] == {"x": None}
  tx = paged(optax.sgd(0.5))
  updates, _ = tx.update({"x": jnp.ones(2)}, tx.init({"x": jnp.ones(2)}))
  np.testing.assert_array_equal(updates["x"], [-0.5, -0.5])
  tx = paged(optax.trace(0.5))
  updates, state = tx.update({"x": jnp.ones(2)}, tx.init({"x": jnp.ones(2)}))
  updates, state = tx.update({"x": jnp.ones(2)}, state)
  np.testing.assert_array_equal(updates["x"], [1.5, 1.5])


def test_extra_arguments_reach_the_optimizer():
  """A value that an update is scaled by."""
  inner = optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(),
    lambda u, s, p=None, *, value: (jax.tree.map(lambda x: x * value, u), s),
  )
  updates, _ = paged(inner).update({"x": jnp.ones(2)}, optax.EmptyState(), value=jnp.float32(3.0))
  np.testing.assert_array_equal(updates["x"], [3.0, 3.0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -1e30, 1e30, 0.5])
def test_every_gradient_gets_its_visit(bad):
  """No sum of gradients, be it no number, makes a visit be left out."""
  params = {"x": jnp.ones(3), "y": jnp.ones(3)}
  grads = {"x": jnp.full(3, bad), "y": jnp.ones(3)}
  tx = optax.adam(0.1)
  want = jit(tx.update)(grads, tx.init(params))
  got = jit(paged(tx).update)(grads, paged(tx).init(params))
  chex.assert_trees_all_equal(got, want)


def test_sharded_equals_unsharded_and_stays_in_host_memory():
  """Moments of split parameters are split alike, on a 2x4 mesh."""
  mesh = pj.sharding.make_mesh("fsdp:2,tensor:4")
  tx = paged(optim.adamw(_SCHEDULE, weight_decay=0.1))
  params = {"kernel": jnp.arange(64.0).reshape(8, 8), "bias": jnp.ones(8)}
  spread = {
    "kernel": jax.device_put(params["kernel"], NamedSharding(mesh, P("fsdp", "tensor"))),
    "bias": jax.device_put(params["bias"], NamedSharding(mesh, P())),
  }
  state, spread_state = tx.init(params), tx.init(spread)
  places = optim.state_shardings(spread_state, spread, mesh)
  assert places[0].mu["kernel"].spec == P("fsdp", "tensor")
  assert places[0].mu["kernel"].memory_kind == "pinned_host"
  spread_state = jax.device_put(spread_state, places)
  grads = jax.tree.map(jnp.sin, params)
  for _ in range(2):
    updates, state = jit(tx.update)(grads, state, params)
    new, spread_state = jax.jit(tx.update, out_shardings=(None, places))(
      jax.tree.map(lambda g, p: jax.device_put(g, p.sharding), grads, spread), spread_state, spread
    )
    chex.assert_trees_all_close((new, spread_state), (updates, state), rtol=1e-5, atol=1e-8)


def _device(limit):
  stats = None if limit is None else {"bytes_limit": limit}
  return SimpleNamespace(memory_stats=lambda: stats, device_kind="some chip")


def test_paging_is_decided_by_what_the_program_needs():
  """Arguments, outputs that are not aliased, temporaries and code, against what is reported."""
  tx = optim.adamw(1e-2)
  params = {"kernel": jax.ShapeDtypeStruct((256, 256), jnp.float32)}
  state = jax.eval_shape(tx.init, params)
  compiled = jax.jit(tx.update, donate_argnums=1).lower(params, state, params).compile()
  array = 256 * 256 * 4
  small = decide_paging(compiled, _device(4 * array))
  assert small == (True, "paged: the step would need 0.00 of 0.00 GiB on some chip")
  assert decide_paging(compiled, _device(8 * array))[0] is False
  assert decide_paging(compiled, _device(None), 4 * array)[0] is True
  assert decide_paging(compiled, _device(8 * array), 4 * array)[0] is False
  nothing = decide_paging(compiled, jax.devices()[0])
  assert nothing[0] is False and "pass device_memory_bytes" in nothing[1]
