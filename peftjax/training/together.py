"""Runs that differ in rank, alpha, learning rate or seed: one base, one compiled step."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from peftjax.core import paths, tree
from peftjax.methods.swap import align_ranks, cut_ranks
from peftjax.training import lock, resume, state, step
from peftjax.training import workdir as workdirs
from peftjax.training.checkpoint import Checkpoints
from peftjax.training.finish import finish
from peftjax.training.logs import Bar, Logs, write_atomic
from peftjax.training.peers import Peers
from peftjax.training.process import Clock
from peftjax.training.run import Run
from peftjax.training.settings import from_config

# Fields in which runs of one group may differ, beside those of `Method.varies`: arrays in the
# compiled step.
VARIES = ("seed", "optimizer.learning_rate")


def free(config: Mapping[str, Any]) -> set[str]:
  """The fields in which a config may differ from others it is trained together with."""
  settings = from_config(ConfigDict(config))
  varies = {f"method.{name}" for name in settings.own_method().varies()}
  if settings.optimizer.name == "adamw8bit":  # which moments take a byte, and in what blocks
    varies -= {"method.rank"}
  return {*VARIES, *varies}


def group_of(config: Mapping[str, Any]) -> str:
  """The values that two configs must have in common to be trained together."""
  apart = {*resume.FREE, *free(config)}
  own = {key: x for key, x in resume.flat(dict(config)).items() if key not in apart}
  return json.dumps(own, sort_keys=True)


class Together:
  """The stacked adapters of several runs, and the step that trains them all.

  Attributes:
    runs: each with its own data and keys; their base is the first one's.
    states: the states of all, stacked along a first axis.
    chunk: how many are computed at once, by `vmap`; the chunks follow one another.
  """

  def __init__(self, configs: Sequence[ConfigDict], chunk: int | None = None):
    """Loads the base once.

    Args:
      configs: see `train_together`.
      chunk: by default 1 on a CPU, where one product over the activations of several runs falls out
        of the cache, and 1 where batches are of several lengths; else all of them. Each run has its
        batches in an order of its own, so that several lengths mean that a chunk of more than one
        computes its steps at every length, of which each run takes that of its own batch.

    Raises:
      ValueError: configs that cannot be trained together.
    """
    self.runs: list[Run] = []
    adapters = []
    for config in configs:
      run = Run(from_config(config), None, rate_in_state=True)
      adapter, base = _split(run)
      if not self.runs:
        self._base = base  # and of the others it is let go at once
      self.runs.append(run)
      adapters.append(adapter)
    first = self.runs[0]
    self.total = first.total
    for run in self.runs:
      if (run.total, run.stream.steps_per_epoch) != (self.total, first.stream.steps_per_epoch):
        raise ValueError(
          f"runs of {first.total} and {run.total} steps, {first.stream.steps_per_epoch} and "
          f"{run.stream.steps_per_epoch} an epoch, cannot be trained together; write "
          "data.split_seed=0 and train.steps"
        )
    made, states = [], []
    for run, adapter in zip(self.runs, align_ranks(*adapters), strict=True):
      params = tree.combine(adapter, self._base)
      train, run.frozen = tree.partition(params, run.mask)
      own = jax.tree.map(lambda on, trained: on and not trained, _own(run, params), run.mask)
      made.append(tree.partition(params, own)[0])
      states.append(state.init(run.tx, train))
    self._made = _stack(made)
    self.states = _stack(states)
    self._keys = jnp.stack([run.dropout_key for run in self.runs])
    self._predict = first._predict
    self._lengths = first.task.lengths
    if chunk is None:
      at_once = len(self._lengths) == 1 and jax.default_backend() != "cpu"
      chunk = len(configs) if at_once else 1
    self.chunk = chunk
    model = functools.partial(step.train_step, first.module, first.tx, first.task.kind)
    # Columns of each array of a batch by bucket; "" has those of arrays that are not named.
    self._widths = {"": self._lengths, **first.task.widths}
    self._step = jax.jit(functools.partial(_all, model, self._widths, chunk), donate_argnums=0)

  def steps(self) -> Any:
    """Dispatches the steps, one per iteration, and yields its number and each run's result."""
    streams = [run.stream.iterate(0, self.total) for run in self.runs]
    for number, batches in enumerate(zip(*streams, strict=True), 1):
      which = [self._lengths.index(batch["tokens"].shape[1]) for batch in batches]
      rows = [_pad(batch, self._widths) for batch in batches]
      stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
      self.states, out = self._step(
        self.states, self._base, self._made, stacked, jnp.asarray(which, jnp.int32), self._keys
      )
      yield number, out

  def take(self, i: int) -> None:
    """Puts the state of run i where its `evaluate` and `adapter` look for it."""
    self.runs[i].state = jax.tree.map(lambda x: x[i], self.states)
    self.runs[i]._predict = self._predict  # one program for all


def _all(
  model: Any,
  widths: Mapping[str, tuple[int, ...]],
  chunk: int,
  states: Any,
  base: Any,
  made: Any,
  batches: Any,
  which: jax.Array,
  keys: jax.Array,
) -> Any:
  """`train_step` of each run at the length of its own batch, `chunk` of them at once."""

  def one(args: Any) -> Any:
    own, adapter, batch, index, key = args
    frozen = tree.combine(adapter, base)
    at = [
      functools.partial(lambda n, s, f, b, k: model(s, f, _cut(b, widths, n), k), bucket)
      for bucket in range(len(widths[""]))
    ]
    return jax.lax.switch(index, at, own, frozen, batch, key)

  size = None if chunk == 1 else chunk
  return jax.lax.map(one, (states, made, batches, which, keys), batch_size=size)


def _cut(
  batch: Mapping[str, jax.Array], widths: Mapping[str, tuple[int, ...]], bucket: int
) -> dict[str, jax.Array]:
  """The columns that a bucket has, of each array with rows of tokens."""
  width = lambda name: widths.get(name, widths[""])[bucket]
  return {name: x[:, : width(name)] if x.ndim > 1 else x for name, x in batch.items()}


def _pad(
  batch: Mapping[str, np.ndarray], widths: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
  """With the most columns of any bucket."""

  def widen(name: str, x: np.ndarray) -> np.ndarray:
    most = max(widths.get(name, widths[""]))
    return np.pad(x, ((0, 0), (0, most - x.shape[1]))) if x.ndim > 1 else x

  return {name: widen(name, np.asarray(x)) for name, x in batch.items()}


def _own(run: Run, params: Any) -> Any:
  """True on arrays that a run does not share: those made, trained, or new in the model."""
  mask = tree.adapter_mask(params, run.mask)
  new = set(run.new)
  return paths.map_leaves(lambda path, on: jax.tree.map(lambda x: x or path in new, on), mask)


def _split(run: Run) -> tuple[Any, Any]:
  """The run's own arrays, and the pretrained ones; the run lets go of both."""
  params = tree.combine(run.state.train, run.frozen)
  run.state = run.frozen = None
  return tree.partition(params, _own(run, params))


def _stack(trees: Sequence[Any]) -> Any:
  return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def train_together(
  configs: Sequence[ConfigDict], folders: Sequence[str | Path]
) -> list[dict[str, Any] | FloatingPointError]:
  """Trains every config as `train_and_evaluate` would, all in one compiled step over one base.

  Parameters differ from those of single runs by rounding, of which Adam makes whole steps where a
  gradient is no larger than its eps. Nothing is saved on the way: a group that
  was interrupted starts anew. Every folder gets what a single run's has, less the latest checkpoint
  and TensorBoard's events; its result says `together`, the number of runs.

  Args:
    configs: configs that agree in all fields that `group_of` gives.
    folders: a workdir for each.

  Returns:
    The results; in the place of a run that diverged, its error.

  Raises:
    ValueError: configs that cannot be trained together, or a folder that another process has.
  """
  if jax.process_count() > 1:
    raise ValueError(
      "runs are trained together in one process; give each of several its own trials"
    )
  as_json = [json.loads(config.to_json()) for config in configs]
  if len(set(map(group_of, as_json))) != 1:
    names = ", ".join(sorted({*VARIES}.union(*map(free, as_json))))
    raise ValueError(f"configs trained together may differ in {names} alone")
  with contextlib.ExitStack() as stack:
    paths = [Path(folder) for folder in folders]
    held = [stack.enter_context(lock.hold(path)) for path in paths]
    return _train(configs, paths, held)


def _train(
  configs: Sequence[ConfigDict], folders: Sequence[Path], held: Sequence[lock.Lock]
) -> list[dict[str, Any] | FloatingPointError]:
  """`train_together` in folders that belong to this process."""
  clock = Clock(None)
  group = Together(configs)
  runs = group.runs
  as_json = [json.loads(config.to_json()) for config in configs]
  logs, failed = [], {}
  best: list[dict[str, Any]] = [{} for _ in runs]
  untrained: list[dict[str, Any]] = [{} for _ in runs]
  kept: list[Any] = [None for _ in runs]
  for folder, config, own in zip(folders, as_json, held, strict=True):
    own.kept = True
    workdirs.clear_checkpoints(folder / "checkpoints")  # from a group that was interrupted
    write_atomic(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    logs.append(Logs(folder, -1))
  every = runs[0].settings.train
  with Bar(f"{len(runs)} together", 0, group.total) as bar:
    for i, run in enumerate(runs):
      if run.task.before:
        group.take(i)
        untrained[i] = {part: run.evaluate(part) for part in run.task.before}
    for number, out in group.steps():
      evaluate = number % runs[0].stream.steps_per_epoch == 0 or number == group.total
      if not (evaluate or number % every.log_every == 0):
        continue
      values = {name: np.asarray(x, np.float64) for name, x in jax.device_get(out).items()}
      rate = clock.rates({"examples": number * every.batch_size})["examples_per_second"]
      bar.update(number, float(np.nanmean(values["loss"])), rate)
      for i, run in enumerate(runs):
        if i in failed:
          continue
        row = {name: float(x[i]) for name, x in values.items()}
        if not all(map(math.isfinite, row.values())):
          failed[i] = FloatingPointError(f"step {number}: loss {row['loss']} not finite")
          continue
        logs[i].write({"step": number, **row, "learning_rate": run.learning_rate(number)})
        if evaluate and number >= run.settled:
          group.take(i)
          run.steps_done = number
          try:
            scores = run.evaluate("validation")
          except FloatingPointError as error:
            failed[i] = error
            continue
          named = {f"validation_{key}": value for key, value in scores.items()}
          logs[i].write({"step": number, **named})
          value = run.task.criterion(scores)
          if not best[i] or value > best[i]["value"]:
            best[i] = {"step": number, "value": value, "metrics": scores}
            kept[i] = jax.device_get(run.adapter()["adapter"])
    results: list[Any] = []
    seconds = clock.seconds()
    for i, run in enumerate(runs):
      logs[i].close()
      if i in failed:
        results.append(failed[i])
        continue
      adapter = cut_ranks(kept[i])
      checkpoints = Checkpoints(folders[i] / "checkpoints")
      meta = run.identity()
      checkpoints.save("best", best[i]["step"], {"adapter": adapter}, meta)
      checkpoints.close()
      measured: dict[str, Any] = dict(
        together=len(runs), seconds=seconds / len(runs), seconds_of_all=seconds
      )
      params = tree.combine(jax.tree.map(jnp.asarray, adapter), group._base)
      known = best[i], untrained[i], Peers()
      try:
        results.append(finish(run, params, folders[i], bar, as_json[i], *known, **measured))
      except FloatingPointError as error:
        results.append(error)
  return results
