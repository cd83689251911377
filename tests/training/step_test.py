"""The training step as a pure function."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import peftjax as pj
from peftjax.models import bert
from peftjax.training import state, step
from peftjax.training.classification import CLASSES
from tests import tiny

CONFIG = {**tiny.HF_CONFIG, "vocab_size": 50, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def model():
  return bert.BertClassifier(bert.BertConfig.from_hf(CONFIG, labels=3))


@pytest.fixture(scope="module")
def split(model):
  """The trained and the frozen half of a LoRA model."""
  tokens = jnp.zeros((1, 4), jnp.int32)
  params = jax.jit(lambda key: model.init(key, tokens)["params"])(jax.random.key(0))
  method = pj.chain(pj.lora(rank=2, alpha=4, targets=["query", "value"]), pj.unfreeze("head/.*"))
  params = method.attach(jax.random.key(1), params)
  return pj.partition(params, method.trainable(params))


def batch_of(rows, length, seed=0):
  rng = np.random.default_rng(seed)
  return {
    "tokens": rng.integers(1, 50, (rows, length), np.int32),
    "mask": np.ones((rows, length), bool),
    "types": np.zeros((rows, length), np.int32),
    "labels": rng.integers(0, 3, rows, np.int32),
    "weights": np.ones(rows, np.float32),
  }


def compiled(model, tx):
  """The step as the loop compiles it (the old state is given away) and its list of traces."""
  traces = []

  def run(current, frozen, batch, key):
    traces.append(batch["tokens"].shape)
    return step.train_step(model, tx, CLASSES, current, frozen, batch, key)

  return jax.jit(run, donate_argnums=0), traces


def start(tx, train):
  """A state of its own, so that giving it away takes nothing from another test."""
  return state.init(tx, jax.tree.map(jnp.array, train))


@pytest.fixture(scope="module")
def adam():
  return pj.optim.wrap(pj.optim.adamw(3e-2), clip_norm=1.0, accumulate=1)


@pytest.fixture(scope="module")
def run_and_traces(model, adam):
  return compiled(model, adam)


@pytest.fixture(scope="module")
def run(run_and_traces):
  return run_and_traces[0]


def test_step_is_pure(run, adam, split):
  """The same arguments give the same bits; only the donated state is used up."""
  train, frozen = split
  before = jax.tree.map(np.array, frozen)
  args = frozen, batch_of(8, 12), jax.random.key(2)
  given = start(adam, train)
  first, second = run(given, *args), run(start(adam, train), *args)
  chex.assert_trees_all_equal(first, second)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given.train))
  chex.assert_trees_all_equal(jax.tree.map(np.array, frozen), before)
  assert int(first[0].step) == 1


def test_loss_decreases(run, adam, split):
  """Sixty steps on one batch bring its loss down."""
  current, losses = start(adam, split[0]), []
  for _ in range(60):
    current, out = run(current, split[1], batch_of(8, 12), jax.random.key(2))
    losses.append(float(out["loss"]))
  assert np.mean(losses[-3:]) < 0.8 * losses[0]


def test_every_step_draws_its_own_dropout(run, adam, split):
  """The number of the step is folded into the key of the run."""
  later = start(adam, split[0]).replace(step=jnp.int32(1))
  args = split[1], batch_of(8, 12), jax.random.key(2)
  losses = [run(current, *args)[1]["loss"] for current in (start(adam, split[0]), later)]
  assert losses[0] != losses[1]


def test_gradients_and_state_are_of_the_trained_arrays_only(model, run, adam, split):
  """No gradient of a frozen array: parameters and moments have the trained tree's holes."""
  train, frozen = split
  after, _ = run(start(adam, train), frozen, batch_of(8, 12), jax.random.key(2))
  chex.assert_trees_all_equal_structs(after.train, train)
  for old, new in zip(jax.tree.leaves(train), jax.tree.leaves(after.train), strict=True):
    assert old.shape == new.shape and old.dtype == new.dtype
  pairs = zip(jax.tree.leaves(train), jax.tree.leaves(after.train), strict=True)
  moved = [bool((old != new).any()) for old, new in pairs]
  # A has no gradient in the first step because B is zero; B and the head have.
  assert sum(moved) == len(moved) - 2
  trained = sum(leaf.nbytes for leaf in jax.tree.leaves(train))
  moments = [leaf.nbytes for leaf in jax.tree.leaves(after.opt_state) if leaf.ndim]
  assert sum(moments) == 2 * trained


def test_one_trace_a_bucket(run_and_traces, adam, split):
  """Each batch shape is traced once, however many batches have it."""
  run, traces = run_and_traces
  current = start(adam, split[0])
  for length in (12, 8, 12, 8, 12):
    current, _ = run(current, split[1], batch_of(8, length), jax.random.key(2))
  assert int(current.step) == 5
  assert sorted(traces) == [(8, 8), (8, 12)]


def test_two_accumulated_batches_equal_one_of_both(split):
  """accumulate=2 leaves the parameters after one batch and moves them by the mean gradient."""
  still = {**CONFIG, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
  model = bert.BertClassifier(bert.BertConfig.from_hf(still, labels=3))
  whole = batch_of(8, 12)
  halves = [{k: v[part] for k, v in whole.items()} for part in (slice(4), slice(4, 8))]
  make = lambda n: pj.optim.wrap(optax.sgd(0.1), clip_norm=0.05, accumulate=n)
  want, _ = compiled(model, make(1))[0](
    start(make(1), split[0]), split[1], whole, jax.random.key(2)
  )
  tx = make(2)
  run, current = compiled(model, tx)[0], start(tx, split[0])
  current, _ = run(current, split[1], halves[0], jax.random.key(2))
  chex.assert_trees_all_equal(current.train, split[0])
  current, _ = run(current, split[1], halves[1], jax.random.key(2))
  chex.assert_trees_all_close(current.train, want.train, rtol=1e-4, atol=1e-7)


def test_rows_of_weight_zero_change_nothing(run, adam, split):
  """A batch filled up with empty rows gives the gradients of its real rows."""
  train, frozen = split
  batch = batch_of(8, 12)
  batch["weights"][5:] = 0
  other = {name: array.copy() for name, array in batch.items()}
  other["tokens"][5:] = 7
  other["labels"][5:] = 0
  new = [run(start(adam, train), frozen, b, jax.random.key(2)) for b in (batch, other)]
  chex.assert_trees_all_close(*new, rtol=1e-6)


def test_evaluation_has_no_dropout(model, split):
  """Logits of the evaluation step are float32 and the same every time."""
  run = jax.jit(functools.partial(step.eval_step, model, CLASSES))
  first, second = (run(*split, batch_of(4, 12)) for _ in range(2))
  assert first.dtype == jnp.float32 and first.shape == (4, 3)
  np.testing.assert_array_equal(first, second)


def test_adalora_under_another_optimizer_raises(model, split):
  """Even one that was made by hand, and so never saw a method."""
  params = pj.merge(pj.combine(*split))
  method = pj.adalora(2, target_rank=1, targets=["query"])
  params = method.attach(jax.random.key(1), params)
  train, frozen = pj.partition(params, method.trainable(params))
  tx = optax.sgd(0.1)
  args = model, tx, CLASSES, state.init(tx, train), frozen, batch_of(2, 4), jax.random.key(2)
  with pytest.raises(ValueError, match=r"query/kernel \(SVDLoRA\) is to be trained by"):
    step.train_step(*args)


def test_accumulation_that_cannot_be_told_what_a_batch_counts_raises(model, split):
  """optax.MultiSteps would make a mean of means."""
  train, frozen = split
  tx = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
  args = model, tx, CLASSES, state.init(tx, train), frozen, batch_of(2, 4), jax.random.key(2)
  with pytest.raises(ValueError, match="weighs all batches alike; pass the inner optimizer and"):
    jax.eval_shape(lambda s: step.train_step(*args[:3], s, *args[4:]), args[3])
