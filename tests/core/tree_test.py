"""Splitting a tree, and the two routes of training it."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import peftjax as pj
from peftjax.core import paths
from peftjax.core.layout import Axes, Site
from peftjax.models.bert import BertClassifier
from tests.core.programs import equations, optimised
from tests.models import tiny

METHOD = pj.chain(pj.lora(3, 6, "body"), pj.unfreeze("head/.*"))
X = np.random.default_rng(1).standard_normal((5, 12), np.float32)


class Model(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(4, name="head")(jnp.tanh(nn.Dense(9, name="body")(x)))


@pytest.fixture(scope="module")
def params():
  """With a base that holds -0.0 and an integer that float32 does not hold."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
  kernel = draw(12, 9).at[0, :4].set(-0.0)
  tree = {
    "body": {"kernel": kernel, "bias": draw(9).at[1].set(-0.0)},
    "head": {"kernel": draw(9, 4), "bias": draw(4)},
    "table": {"codes": jnp.array([2**24 + 1, 7, -(2**30) - 1], jnp.int32)},
  }
  return METHOD.attach(jax.random.key(0), tree)


def loss_fn(params, x):
  gain = 1 + 1e-9 * params["table"]["codes"][1]
  params = {name: params[name] for name in ("body", "head")}
  return 9 * jnp.square(pj.apply(Model(), params, x) * gain).mean()


def optimizer():
  return METHOD.optimizer(optax.adamw(1e-2, weight_decay=0.1), total_steps=10, clip_norm=0.5)


def two_trees(params, steps=10):
  train, frozen = pj.partition(params, METHOD.trainable(params))
  tx = optimizer()

  @optimised
  def step(train, frozen, state, x):
    loss, grads = jax.value_and_grad(lambda t: loss_fn(pj.combine(t, frozen), x))(train)
    updates, state = tx.update(grads, state, train)
    return optax.apply_updates(train, updates), state, loss

  state, losses = tx.init(train), []
  for _ in range(steps):
    train, state, loss = step(train, frozen, state, X)
    losses.append(loss)
  return pj.combine(train, frozen), losses, state


def one_tree(params, steps=10):
  mask = METHOD.trainable(params)
  tx = pj.optim.freeze(optimizer(), mask)

  @optimised
  def step(params, state, x):
    loss, grads = pj.value_and_grad(loss_fn, mask)(params, x)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  state, losses = tx.init(params), []
  for _ in range(steps):
    params, state, loss = step(params, state, X)
    losses.append(loss)
  return params, losses, state


@pytest.fixture(scope="module")
def runs(params):
  return one_tree(params), two_trees(params)


def test_one_tree_and_two_trees_have_the_same_trajectory_bit_for_bit(runs):
  """Ten steps of AdamW with decay and global-norm clipping."""
  one, two = runs
  assert [x.tobytes() for x in map(np.asarray, one[1])] == [np.asarray(x).tobytes() for x in two[1]]
  assert len({float(x) for x in one[1]}) == 10
  assert jax.tree.structure(one[0]) == jax.tree.structure(two[0])
  for a, b in zip(*map(jax.tree.leaves, (one[0], two[0])), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_the_base_is_the_same_bytes_after_ten_steps(runs, params):
  """Decay and clipping touch no frozen leaf; -0.0 and large integers stay as they are."""
  mask = METHOD.trainable(params)
  for after, _, _ in runs:
    for old, new, trained in zip(*map(jax.tree.leaves, (params, after, mask)), strict=True):
      assert old.dtype == new.dtype
      assert (np.asarray(old).tobytes() == np.asarray(new).tobytes()) != trained


def test_optimizer_state_is_twice_the_trained_bytes(runs, params):
  """Adam's two moments of the trained arrays, and scalars."""
  train, _ = pj.partition(params, METHOD.trainable(params))
  size = sum(x.nbytes for x in jax.tree.leaves(train))
  for _, _, state in runs:
    arrays = [x for x in jax.tree.leaves(state) if x.ndim]
    assert sum(x.nbytes for x in arrays) == 2 * size
    assert sum(x.nbytes for x in jax.tree.leaves(state)) <= 2 * size + 16


def test_the_clip_norm_is_over_trained_leaves_only():
  """A huge gradient of a frozen leaf neither shrinks the others nor passes through."""
  params = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
  grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.full(3, 1e9)}
  tx = pj.optim.freeze(optax.clip_by_global_norm(1.0), {"a": True, "b": False})
  updates, _ = tx.update(grads, tx.init(params), params)
  new = optax.apply_updates(params, updates)
  np.testing.assert_allclose(new["a"], [0.6, 0.8], rtol=1e-6)
  np.testing.assert_array_equal(new["b"], 0)


@pytest.mark.parametrize("route", ["one tree", "two trees"])
@pytest.mark.parametrize(
  "method",
  [pj.unfreeze("head/.*"), pj.unfreeze([".*/bias", "head/.*"]), pj.lora(4, targets="query")],
)
def test_no_gradient_of_a_frozen_kernel_is_computed(method, route):
  """No product of the whole program has the shape of one."""
  model = BertClassifier(tiny.config())
  params = method.attach(jax.random.key(0), tiny.params())
  mask = method.trainable(params)
  train, frozen = pj.partition(params, mask)
  shapes = {x.shape for x in jax.tree.leaves(frozen) if x.ndim == 2} - {
    x.shape for x in jax.tree.leaves(train)
  }
  assert {(64, 64), (64, 96), (96, 64)} <= shapes
  loss = lambda p: pj.apply(model, p, tiny.TOKENS).sum()
  if route == "one tree":
    program = jax.make_jaxpr(pj.value_and_grad(loss, mask))(params)
  else:
    grad = jax.value_and_grad(lambda t, f: loss(pj.combine(t, f)))
    program = jax.make_jaxpr(grad)(train, frozen)
  full = jax.make_jaxpr(jax.grad(lambda p: loss(p)))(pj.merge(params))
  products = lambda jaxpr: {
    eqn.outvars[0].aval.shape for eqn in equations(jaxpr) if eqn.primitive.name == "dot_general"
  }
  assert not products(program) & shapes
  assert products(full) & shapes


def test_value_and_grad_passes_arguments_and_auxiliary_output_through():
  params = {"a": jnp.array(2.0), "n": jnp.array(3)}
  fn = lambda p, x, *, y: (p["a"] ** 2 * x + y, p["n"])
  (value, aux), grads = pj.value_and_grad(fn, {"a": True, "n": False}, has_aux=True)(
    params, 5.0, y=1.0
  )
  assert (value, aux, grads["a"], grads["n"]) == (21.0, 3, 20.0, None)


def test_combine_takes_the_first_that_is_there():
  assert pj.combine({"a": None, "b": 1}, {"a": 2, "b": 3}) == {"a": 2, "b": 1}
  assert pj.combine({"a": None}, {"a": None}) == {"a": None}


def test_adapter_mask_is_what_did_not_come_with_the_model(params):
  """Made or trained: factors, scale, rank and the head; not the base."""
  mask = pj.tree.adapter_mask(params, METHOD.trainable(params))
  chosen = {paths.name(p) for p, on in jax.tree_util.tree_flatten_with_path(mask)[0] if on}
  made = {f"body/kernel/{child}" for child in ("a", "b", "scale", "rank")}
  assert chosen == made | {"head/kernel", "head/bias"}


def test_adapter_mask_holds_the_base_that_pissa_changed(params):
  """The residual is no pretrained array: it has to be saved."""
  method = pj.lora(3, targets="kernel", init="pissa")
  attached = method.attach(jax.random.key(0), {"kernel": jnp.asarray(X)})
  mask = pj.tree.adapter_mask(attached, method.trainable(attached))
  assert mask["kernel"].base is True
  assert method.trainable(attached)["kernel"].base is False


def test_count_leaves_padding_scales_and_ranks_out(params):
  """Of a stack with ranks 1 and 3 the trained count is that of the two matrices."""
  kernel = jnp.ones((2, 12, 9))
  method = pj.lora(3, targets="kernel", rank_pattern={r"kernel\[0\]": 1})
  layout = {"kernel": Axes()}
  attached = method.attach(jax.random.key(0), {"kernel": kernel}, layout)
  mask = method.trainable(attached)
  assert pj.count(attached, mask) == (1 + 3) * (12 + 9)
  assert pj.count(attached) == kernel.size + (1 + 3) * (12 + 9)
  assert pj.count({"x": jnp.ones((2, 3))}) == 6


def test_count_leaves_the_scale_of_an_adapter_out():
  """Also of all parameters, as of every other method's."""
  model = nn.Dense(4)
  base = model.init(jax.random.key(0), X)["params"]
  outer = {"dense": base}
  method = pj.adapters(3, targets="dense", norms=False)
  attached = method.attach(jax.random.key(0), outer, {"dense": Site((12,), 4)})
  made = 4 * 3 + 3 + 3 * 4 + 4
  assert pj.count(attached, method.trainable(attached)) == made
  assert pj.count(attached) == pj.count(outer) + made


def test_merge_leaves_plain_arrays_alone(params):
  merged = pj.merge(params)
  assert merged["head"]["kernel"] is params["head"]["kernel"]
  chex.assert_trees_all_equal(merged["body"]["kernel"], params["body"]["kernel"].base)
