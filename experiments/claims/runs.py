"""MiniLM fine-tuned on the news for 80 short steps, once by each method that a claim needs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import peftjax as pj
from experiments.claims import cost, sample_models
from experiments.claims.cost import Cost
from experiments.claims.sample_models import Classes
from peftjax.core import paths
from peftjax.methods.adalora_weight import SVDLoRA
from peftjax.methods.allocator import AllocatorState

STEPS = 80
HEAD = "head/.*"
TARGET = 2  # mean rank per matrix, for LoRA and in the end for AdaLoRA

METHODS: Mapping[str, Callable[[], Any]] = {
  "small": lambda: pj.lora(rank=4, targets=["query", "value"]),
  "lora": lambda: pj.chain(pj.lora(rank=TARGET, targets="all-linear"), pj.unfreeze(HEAD)),
  "adalora": lambda: pj.chain(
    pj.adalora(rank=4, target_rank=TARGET, interval=5, targets="all-linear"), pj.unfreeze(HEAD)
  ),
  "full": lambda: pj.unfreeze(".*"),
}
RATES = {"lora": 2e-3, "adalora": 5e-3, "full": 2e-4}


class Trained(NamedTuple):
  """A fine-tuned model.

  Attributes:
    start, params: attached, before and after.
    mask: the mask of trained arrays.
    state: state of the optimizer, after.
    weights: for AdaLoRA, after each step: P, λ and Q by path.
    history: for AdaLoRA, after each step: the triplets that its allocator chose last, bool `[R]` by
      path. Until it chooses again the others learn too, so that their λ is not 0.
    budgets: for AdaLoRA, after each step.
  """

  start: Any
  params: Any
  mask: Any
  state: Any
  weights: list[dict[str, SVDLoRA]]
  history: list[dict[str, np.ndarray]]
  budgets: list[int]


def loss(train: Any, frozen: Any, rows: Classes) -> jax.Array:
  return sample_models.class_loss(pj.combine(train, frozen), rows)


def step(tx: Any, train: Any, frozen: Any, state: Any, rows: Classes) -> Any:
  grads = jax.grad(loss)(train, frozen, rows)
  updates, state = tx.update(grads, state, train)
  return optax.apply_updates(train, updates), state


@functools.cache
def minilm(name: str) -> Trained:
  """The run of a method."""
  method = METHODS[name]()
  start = method.attach(jax.random.key(0), sample_models.minilm()[1])
  mask = method.trainable(start)
  train, frozen = pj.partition(start, mask)
  tx = method.optimizer(optax.adam(RATES[name]), total_steps=STEPS, clip_norm=1.0)
  state = tx.init(train)
  one = jax.jit(functools.partial(step, tx))
  weights, history, budgets = [], [], []
  for i in range(STEPS):
    train, state = one(train, frozen, state, sample_models.batch(i))
    for allocator in pj.optim.nodes(state, AllocatorState):
      leaves = paths.leaves(train)
      weights.append({path: leaves[path] for path in allocator.kept})
      history.append({path: np.asarray(on) for path, on in allocator.kept.items()})
      budgets.append(int(allocator.budget))
  return Trained(start, pj.combine(train, frozen), mask, state, weights, history, budgets)


class Training(NamedTuple):
  """A compiled step of training, 16 x 32 tokens.

  Attributes:
    step: takes the step.
    cost: its cost.
    state: bytes of gradients and of Adam's state.
  """

  step: Callable[[], Any]
  cost: Cost
  state: int


def training(params: Any, mask: Any) -> Training:
  """The step of MiniLM with these parameters, trained where `mask` says."""
  train, frozen = pj.partition(params, mask)
  tx = optax.adam(1e-3)
  state = tx.init(train)
  args = (train, frozen, state, sample_models.batch(0))
  compiled = jax.jit(functools.partial(step, tx)).lower(*args).compile()
  size = sum(x.nbytes for x in jax.tree.leaves((train, state)))
  return Training(functools.partial(compiled, *args), cost.of(compiled), size)


@functools.cache
def full_training() -> Training:
  params = sample_models.minilm()[1]
  return training(params, jax.tree.map(lambda _: True, params))


@functools.cache
def program() -> Any:
  """MiniLM, compiled: (params, tokens, mask) to logits."""
  model = sample_models.minilm()[0]
  return jax.jit(lambda params, tokens, mask: pj.apply(model, params, tokens, mask))


def logits(params: Any, rows: Classes) -> jax.Array:
  return program()(params, rows.tokens, rows.mask)


def untrained_logits(rows: Classes) -> jax.Array:
  return logits(sample_models.minilm()[1], rows)


def losses(params: Any) -> np.ndarray:
  """Cross entropy of each text of the test split, 223."""
  rows = sample_models.news("test")
  given = logits(params, rows)
  each = optax.losses.softmax_cross_entropy_with_integer_labels(given, rows.labels)
  return np.asarray(each)
