"""MiniLM fine-tuned on the news for 80 short steps, once by each method that a claim needs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import peftjax as pj
from experiments.claims import sample_models
from experiments.claims.sample_models import Classes
from peftjax.core import paths
from peftjax.methods.adalora_ranks import kept
from peftjax.methods.adalora_weight import SVDLoRA

STEPS = 80
HEAD = "head/.*"
TARGET = 2  # rank of each matrix in the mean, of LoRA and in the end of AdaLoRA

METHODS: Mapping[str, Callable[[], Any]] = {
  "small": lambda: pj.lora(rank=4, targets=["query", "value"]),
  "lora": lambda: pj.chain(pj.lora(rank=TARGET, targets="all-linear"), pj.train(HEAD)),
  "adalora": lambda: pj.chain(
    pj.adalora(rank=4, target_rank=TARGET, interval=5, targets="all-linear"), pj.train(HEAD)
  ),
  "full": lambda: pj.train(".*"),
}
RATES = {"lora": 2e-3, "adalora": 5e-3, "full": 2e-4}


class Run(NamedTuple):
  """A fine-tuned model.

  Attributes:
    start, params: attached, before and after.
    mask: what is trained.
    state: of the optimizer, after.
    history: of AdaLoRA: which triplets were on after each step, bool `[R]` by path.
    budgets: of AdaLoRA, after each step.
  """

  start: Any
  params: Any
  mask: Any
  state: Any
  history: list[dict[str, np.ndarray]]
  budgets: list[int]


@functools.cache
def loss_of(name: str) -> Callable[..., jax.Array]:
  return lambda train, frozen, rows: sample_models.class_loss(pj.combine(train, frozen), rows)


def step(tx: Any, loss: Any, train: Any, frozen: Any, state: Any, rows: Classes) -> Any:
  grads = jax.grad(loss)(train, frozen, rows)
  updates, state = tx.update(grads, state, train)
  return optax.apply_updates(train, updates), state


def minilm(name: str, rate: float | None = None) -> Run:
  """The run of a method, at its own learning rate or another."""
  return _run(name, rate or RATES[name])


@functools.cache
def _run(name: str, rate: float) -> Run:
  method = METHODS[name]()
  start = method.attach(jax.random.key(0), sample_models.minilm()[1])
  mask = method.trainable(start)
  train, frozen = pj.partition(start, mask)
  tx = method.optimizer(optax.adam(rate), total_steps=STEPS, clip_norm=1.0)
  state = tx.init(train)
  one = jax.jit(functools.partial(step, tx, loss_of(name)))
  history, budgets = [], []
  for i in range(STEPS):
    train, state = one(train, frozen, state, sample_models.batch(i))
    triplets = {p: x for p, x in paths.leaves(train).items() if isinstance(x, SVDLoRA)}
    if triplets:
      history.append({path: kept(x) for path, x in triplets.items()})
      budgets.append(int(pj.optim.allocator_state(state).budget))
  return Run(start, pj.combine(train, frozen), mask, state, history, budgets)


@functools.cache
def program() -> Any:
  """MiniLM, compiled: (params, tokens, mask) to logits."""
  model = sample_models.minilm()[0]
  return jax.jit(lambda params, tokens, mask: pj.apply(model, params, tokens, mask))


def logits(params: Any, rows: Classes) -> jax.Array:
  return program()(params, rows.tokens, rows.mask)


def untrained_logits(rows: Classes) -> jax.Array:
  return logits(sample_models.minilm()[1], rows)


def accuracy(params: Any) -> float:
  """On the test split, 223 texts."""
  rows = sample_models.news("test")
  return float((logits(params, rows).argmax(1) == rows.labels).mean())


def losses(params: Any, part: str = "test") -> np.ndarray:
  """Cross entropy of each text of a split."""
  rows = sample_models.news(part)
  given = logits(params, rows)
  each = optax.losses.softmax_cross_entropy_with_integer_labels(given, rows.labels)
  return np.asarray(each)
