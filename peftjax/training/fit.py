"""`fit`: a run of `experiments.train` without a config, in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from peftjax.core import ranges, tree
from peftjax.core.params import Params
from peftjax.core.ranges import Count, Length, Positive, Size
from peftjax.methods.base import Chain, Method
from peftjax.models import families
from peftjax.training import build, settings
from peftjax.training.arrays import Arrays
from peftjax.training.finish import export
from peftjax.training.history import History
from peftjax.training.logs import Bar, Logs, Silent
from peftjax.training.process import Clock
from peftjax.training.run import Run
from peftjax.training.scores import Scores
from peftjax.training.texts import Labelled, Plain

Data = Labelled | Plain | tuple[Any, Any]


@ranges.checked
def fit(
  model: nn.Module,
  params: Params,
  method: Method,
  data: Data,
  *,
  eval_data: Data | None = None,
  epochs: Positive = settings.Train.epochs,
  steps: Size | None = None,
  batch_size: Length = settings.Train.batch_size,
  learning_rate: Positive = settings.Optimizer.learning_rate,
  seed: Count = 0,
  workdir: str | Path | None = None,
) -> tuple[Params, History]:
  """Fine-tunes a model in memory, by the steps, batches and scores of `experiments.train`.

  AdamW with clipping at 1, a warm-up over 6 % of the updates and linear decay, on one device. For
  more devices, checkpoints and other settings use `experiments.train` and its configs.

  Args:
    model: the result of `load_pretrained`, or any linen module, or one of NNX as
      `pj.nnx.split` gives it, if `data` are arrays.
    params: its parameters, dense or quantised; they stay usable. `fit` attaches the method. If they
      have its adapters already, as those that an earlier `fit` returned, it trains these further.
    method: the method to train; for an encoder with a new head also `pj.unfreeze("head/.*")`.
    data: the result of `pj.texts`, or arrays `(inputs, labels)` of as many rows: `model(inputs)`
      gives logits for int labels, or one number for float ones.
    eval_data: held-out data of the same kind, scored after every epoch. The parameters that are
      best on them are returned; without such data, the last ones.
    epochs: passes over `data`.
    steps: batches; goes before `epochs`.
    batch_size: rows per batch.
    learning_rate: rate after the warm-up.
    seed: seed of the order of the batches, of the method's random arrays, and of dropout.
    workdir: a new folder for `metrics.jsonl`, TensorBoard events and, where Hugging Face PEFT can
      hold the adapter, the directory `peft`.

  Returns:
    The parameters with the trained adapters, for `pj.apply`, `pj.generate`, `pj.merge` and
    `pj.save_peft`; and the numbers of the run, which a notebook draws.

  Raises:
    ValueError: a number out of range, data of another kind than the model takes, ids or texts that
      its tables or positions have no room for, a workdir that is not empty.
    FloatingPointError: the loss or a gradient is not finite.
  """
  _check_new(workdir)
  own = _known(data, "data")
  held_out = None if eval_data is None else _known(eval_data, "eval_data")
  _check_kinds(model, own, held_out)
  task: Any = own.task(held_out, seed)
  params = _attached(model, params, method, own, seed)
  mask = method.trainable(params)
  train, frozen = tree.partition(params, mask)
  # A step takes the memory of the arrays that it trains, which may be the caller's.
  params = tree.combine(jax.tree.map(jnp.copy, train), jax.tree.map(jnp.asarray, frozen))
  name = " + ".join(type(part).__name__.lower() for part in _parts(method))
  made = settings.Settings(
    seed=seed,
    model=settings.Model(directory=own.source),
    quant=settings.Quant(),
    data=settings.Data(max_length=task.lengths[-1]),
    method={"name": name},
    optimizer=settings.Optimizer(learning_rate=learning_rate),
    train=settings.Train(batch_size=batch_size, epochs=epochs, steps=steps),
    compilation_cache="",
  )
  run = Run(made, None, task=task, model=build.Attached(model, params, mask, method, ()))
  with _logs(workdir) as logs, Bar(name, 0, run.total) as bar:
    run.announce(bar)
    history, best = _train(run, bar, logs.write, scored=held_out is not None)
    params = tree.combine(best, run.frozen)
    if workdir is not None:
      export(run, params, build.resolve(workdir), bar)
  return params, history


def _train(
  run: Run, bar: Bar, write: Callable[[dict[str, Any]], None], *, scored: bool
) -> tuple[History, Any]:
  """All steps; the rows, and the trained arrays of the best scores or, without any, the last."""
  rows: list[dict[str, Any]] = []
  clock, best = Clock(None), None

  def keep(row: dict[str, Any]) -> None:
    rows.append(row)
    write(row)

  scores = Scores(run, keep, bar.scores)
  for done in run.steps():
    ends = done % run.stream.steps_per_epoch == 0 or done == run.total
    for row in run.fetch(all_of_them=ends):
      keep({**row, "learning_rate": run.learning_rate(row["step"])})
      bar.update(row["step"], row["loss"], clock.rates(run.done, run.peak)["examples_per_second"])
    if ends and scored:
      if scores.take(done):
        best = jax.tree.map(jnp.copy, run.state.train)
      clock.rest()
  run.check_finite()
  if best is None:
    return History(tuple(rows), run.total), run.state.train
  return History(tuple(rows), scores.best["step"]), best


def _known(data: Any, what: str) -> Any:
  """The data, arrays as a task has them."""
  if isinstance(data, Labelled | Plain):
    return data
  if isinstance(data, tuple) and len(data) == 2:
    return Arrays.of(*data, what=what)
  raise ValueError(
    f"{what} is a {type(data).__name__}; give the result of pj.texts(texts, labels, "
    "tokenizer=directory), or two arrays (inputs, labels)"
  )


def _check_kinds(model: nn.Module, data: Any, eval_data: Any) -> None:
  """Raises ValueError unless the model takes such data, and both are of one kind and classes."""
  config: Any = getattr(model, "config", None) if families.ours(model) else None
  if hasattr(config, "decoder"):
    raise ValueError(
      f"pj.fit has no data for a {type(model).__name__}, which makes texts of texts: write two "
      "columns into a file for python -m experiments.train --config=configs/seq2seq.py"
    )
  wanted = Arrays if config is None else Plain if hasattr(config, "tied") else Labelled
  if type(data) is not wanted:
    takes = {
      Arrays: "arrays (inputs, labels)",
      Plain: "texts without labels, pj.texts(texts, tokenizer=directory)",
      Labelled: "texts with labels, pj.texts(texts, labels, tokenizer=directory)",
    }[wanted]
    raise ValueError(f"data is {data!r}, and {type(model).__name__} takes {takes}")
  if isinstance(data, Labelled) and config.labels != (outputs := len(data.label_names) or 1):
    raise ValueError(
      f"the model has {config.labels} outputs, and the labels need {outputs}: write "
      f"pj.load_pretrained(directory, num_labels={outputs})"
    )
  if eval_data is None:
    return
  if type(eval_data) is not type(data):
    raise ValueError(f"data is {data!r}, but eval_data {eval_data!r}: give two of a kind")
  if eval_data.label_names != data.label_names:
    raise ValueError(
      f"data has the classes {list(data.label_names)}, but eval_data {list(eval_data.label_names)}:"
      " write pj.texts(..., label_names=data.label_names)"
    )


def _parts(method: Method) -> tuple[Method, ...]:
  return method.methods if isinstance(method, Chain) else (method,)


def _attached(model: nn.Module, params: Any, method: Method, data: Any, seed: int) -> Any:
  """`params` with the method's adapters: new ones, or those that they have."""
  layout = build.layout(model) if families.ours(model) else data.layout(model, params)
  if not any(jax.tree.leaves(tree.made_mask(params))):
    return method.attach(build.attach_key(seed), params, layout)
  for part in _parts(method):
    if not any(jax.tree.leaves(part.trainable(params))):
      raise ValueError(
        f"params have adapters already, but none of {part}: give those without any, as "
        "load_pretrained returns them, or with all that the method attaches"
      )
  return params


def _check_new(workdir: str | Path | None) -> None:
  folder = None if workdir is None else build.resolve(workdir)
  if folder and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ValueError(f"workdir={folder} is not an empty folder; name a new one")


@contextlib.contextmanager
def _logs(workdir: str | Path | None) -> Iterator[Logs | Silent]:
  """A context that writes rows into a new folder, if one is named."""
  if workdir is None:
    yield Silent()
    return
  folder = build.resolve(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  with contextlib.closing(Logs(folder, -1)) as logs:
    yield logs
