"""Runs that differ in rank, alpha, learning rate or seed: one base, one compiled step."""

from __future__ import annotations

import contextlib
import functools
import json
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
from peftjax.training.logs import Bar, Logs, write_json
from peftjax.training.peers import Peers
from peftjax.training.process import Clock
from peftjax.training.run import Run
from peftjax.training.scores import Scores
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
    runs: each with its own data and keys.
    base: the pretrained arrays that they share.
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
        self.base = base  # and of the others it is let go at once
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
      params = tree.combine(adapter, self.base)
      train, run.frozen = tree.partition(params, run.mask)
      own = jax.tree.map(lambda on, trained: on and not trained, _own(run, params), run.mask)
      made.append(tree.partition(params, own)[0])
      states.append(state.init(run.tx, train))
    self._made = _stack(made)
    self.states = _stack(states)
    self._keys = jnp.stack([run.dropout_key for run in self.runs])
    for run in self.runs:
      run.predict = first.predict  # one program for all
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
        self.states, self.base, self._made, stacked, jnp.asarray(which, jnp.int32), self._keys
      )
      yield number, out

  def take(self, i: int) -> None:
    """Puts the state of run i where its `evaluate` and `adapter` look for it."""
    run = self.runs[i]
    run.state = jax.tree.map(lambda x: x[i], self.states)
    run.steps_done = int(run.state.step)


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


class _Member:
  """One run of a group in its folder; `result` is its error once it has diverged."""

  def __init__(self, run: Run, folder: Path):
    self.run, self.folder = run, folder
    self.logs = Logs(folder, -1)
    self.scores = Scores(run, self.logs.write)
    self.result: Any = None
    self._best: Any = None

  def score(self, number: int) -> None:
    """Scores the state that the run has; keeps the adapter if it is the best so far."""
    if self.scores.take(number):
      self._best = jax.device_get(self.run.adapter()["adapter"])

  def finish(self, base: Any, bar: Bar, config: dict[str, Any], measured: dict[str, Any]) -> None:
    """Writes what is left in the folder of a single run."""
    adapter = cut_ranks(self._best)
    checkpoints = Checkpoints(self.folder / "checkpoints")
    step = self.scores.best["step"]
    checkpoints.save("best", step, {"adapter": adapter}, self.run.identity())
    checkpoints.close()
    params = tree.combine(jax.tree.map(jnp.asarray, adapter), base)
    known: Any = config, self.scores, Peers()
    try:
      self.result = finish(self.run, params, self.folder, bar, *known, **measured)
    except FloatingPointError as error:
      self.result = error


def _train(
  configs: Sequence[ConfigDict], folders: Sequence[Path], held: Sequence[lock.Lock]
) -> list[dict[str, Any] | FloatingPointError]:
  """`train_together` in folders that belong to this process."""
  clock = Clock(None)
  group = Together(configs)
  as_json = [json.loads(config.to_json()) for config in configs]
  members = [_Member(run, folder) for run, folder in zip(group.runs, folders, strict=True)]
  for member, config, own in zip(members, as_json, held, strict=True):
    own.kept = True
    workdirs.clear_checkpoints(member.folder / "checkpoints")  # from a group that was interrupted
    write_json(member.folder / "config.json", config)
  every = group.runs[0].settings.train
  with Bar(f"{len(members)} together", 0, group.total) as bar:
    for i, member in enumerate(members):
      if member.run.task.before:
        group.take(i)
        member.scores.start()
    for number, out in group.steps():
      ends = number % group.runs[0].stream.steps_per_epoch == 0 or number == group.total
      if not (ends or number % every.log_every == 0):
        continue
      values = {name: np.asarray(x, np.float64) for name, x in jax.device_get(out).items()}
      rate = clock.rates({"examples": number * every.batch_size})["examples_per_second"]
      bar.update(number, float(np.nanmean(values["loss"])), rate)
      for i, member in enumerate(members):
        if member.result is not None:
          continue
        try:
          row = member.run.row(number, {name: x[i] for name, x in values.items()})
          member.logs.write({**row, "learning_rate": member.run.learning_rate(number)})
          if ends:
            group.take(i)
            member.score(number)
        except FloatingPointError as error:
          member.result = error
    seconds = clock.seconds()
    measured = dict(together=len(members), seconds=seconds / len(members), seconds_of_all=seconds)
    for member, config in zip(members, as_json, strict=True):
      member.logs.close()
      if member.result is None:
        member.finish(group.base, bar, config, measured)
  return [member.result for member in members]
