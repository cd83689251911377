"""`train_and_evaluate`: the one function with side effects."""

from __future__ import annotations

import functools
import json
import math
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from peftjax import data, losses, optim, sharding
from peftjax.core import tree
from peftjax.train import build, evaluate, metrics, state, step
from peftjax.train.checkpoint import Checkpoints, digest
from peftjax.train.logs import Bar, Logs, write_atomic
from peftjax.train.settings import Settings, from_config

# Settings that may change between a run and its continuation: they change no number.
_FREE = ("compilation_cache", "train.log_every", "train.save_every", "train.eval_batch_size")


class Stopped(Exception):
  """A signal asked the run to stop, and it has saved."""


def train_and_evaluate(
  config: ConfigDict, workdir: str | Path, *, mesh: str = "", started: float | None = None
) -> dict[str, Any]:
  """Fine-tunes as `config` says and returns what `workdir/result.json` holds.

  Evaluates on the validation split after every epoch, keeps the best, and scores the test split
  once, with the best. Run again with the same arguments it goes on where it was stopped, to the
  same bits, or returns the result if it had finished.

  Args:
    config: see `configs/classify.py`.
    workdir: gets `config.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`, `result.json`.
    mesh: e.g. `"data:2,fsdp:2,tensor:2"`; by default all devices along data.
    started: `time.perf_counter()` at the start of the process, for "seconds to first step".

  Raises:
    ValueError: anything wrong with the config, the data, the model or what is in `workdir`;
      raised before `workdir` is touched.
    FloatingPointError: the loss or the gradient is not finite; the last good checkpoint stays.
    Stopped: after SIGTERM or Ctrl-C, with the state saved.
  """
  clock = Clock(started)
  settings = from_config(config)
  workdir = build.resolve(workdir)
  settings_json = json.loads(config.to_json())
  _check_same(workdir / "config.json", settings_json)
  if (workdir / "result.json").exists():
    return json.loads((workdir / "result.json").read_text())
  run = Run(settings, mesh)
  meta: dict[str, Any] = {"base": digest(settings.model.path()), "data": run.task.digest()}
  meta["labels"] = list(run.task.corpus.label_names)
  saved = _latest_meta(workdir)
  _check_base(workdir, saved, meta)

  workdir.mkdir(parents=True, exist_ok=True)
  write_atomic(workdir / "config.json", json.dumps(settings_json, indent=2, sort_keys=True) + "\n")
  checkpoints = Checkpoints(workdir / "checkpoints")
  if saved is not None:
    run.restore(checkpoints)
  logs = Logs(workdir, run.steps_done)
  best = saved["best"] if saved else None
  before = saved["seconds"] if saved else 0.0
  try:
    with (
      Bar(str(settings.method.get("name")), run.steps_done, run.total) as bar,
      _signals() as stop,
    ):
      run.announce(bar)
      for row in run.steps(clock, bar):
        done = row["step"]
        at_end = done == run.total
        if done % settings.train.log_every == 0 or at_end:
          logs.write(row)
        if done % run.stream.steps_per_epoch == 0 or at_end:
          scores = run.evaluate("validation")
          epoch = done / run.stream.steps_per_epoch
          logs.write(
            {"step": done, "epoch": epoch, **{f"validation_{k}": v for k, v in scores.items()}}
          )
          bar.print(f"epoch {epoch:g}  " + "  ".join(f"{k} {v:.4f}" for k, v in scores.items()))
          value = scores[run.task.corpus.metrics[0]]
          if best is None or value > best["value"]:
            best = {"step": done, "value": value, "metrics": scores}
            checkpoints.save("best", done, run.to_save(best=True), meta)
            checkpoints.wait("best")  # the latest must never point to a best that is not there
          saving = True
        else:
          saving = bool(settings.train.save_every) and done % settings.train.save_every == 0
        if saving or stop.asked:
          extra = {"best": best, "seconds": before + clock.seconds()}
          checkpoints.save("latest", done, run.to_save(), {**meta, **extra})
        if stop.asked and not at_end:
          checkpoints.wait()
          raise Stopped(f"{stop.asked}: saved step {done} of {run.total}; the same command goes on")
      checkpoints.wait()
      test = run.evaluate("test", checkpoints.arrays("best", run.to_save(best=True)))
      bar.print("test     " + "  ".join(f"{k} {v:.4f}" for k, v in test.items()))
  finally:
    logs.close()
    checkpoints.close()
  assert best is not None
  result = {
    "config": settings_json,
    "method": settings.method["name"],
    "trainable_params": run.trainable,
    "total_params": run.parameters,
    "metrics": {"validation": best["metrics"], "test": test},
    "best_step": best["step"],
    "steps": run.total,
    "labels": list(run.task.corpus.label_names),
    "examples": {part: len(t) for part, t in run.task.tokens.items()},
    "dropped": dict(run.task.corpus.dropped),
    "buckets": list(run.task.buckets),
    "seed": settings.seed,
    "commit": _commit(),
    "device": jax.devices()[0].device_kind,
    "seconds_to_first_step": clock.first_step,
    "seconds": before + clock.seconds(),
    "peak_memory_mb": _peak_memory_mb(),
  }
  write_atomic(workdir / "result.json", json.dumps(result, indent=2, sort_keys=True) + "\n")
  return result


class Clock:
  """Seconds since the process started, and until its first step was done."""

  def __init__(self, started: float | None):
    self._started = time.perf_counter() if started is None else started
    self.first_step: float | None = None

  def seconds(self) -> float:
    return time.perf_counter() - self._started


class Run:
  """The compiled functions of a run and the state they pass on."""

  def __init__(self, settings: Settings, mesh_text: str):
    self.settings = settings
    self.mesh = build.mesh_of(mesh_text)
    self._check_batch("train.batch_size", settings.train.batch_size)
    self._check_batch("train.eval_batch_size", settings.train.eval_batch_size)
    self.task = build.task(settings)
    self.model = build.adapted(settings, self.task.outputs, self.mesh)
    train, self.frozen = self.model.split()
    self.parameters = tree.count(self.model.params)
    self.trainable = tree.count(self.model.params, self.model.mask)
    self.stream = data.Stream(
      self.task.tokens["train"],
      self.task.corpus.splits["train"].labels,
      self.task.buckets,
      settings.train.batch_size,
      settings.seed,
      pad_id=self.task.pad_id,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    self.total = settings.train.total_steps(self.stream.steps_per_epoch)
    self.schedule, tx = _optimizer(settings, self.model.method, self.total)
    self.state = jax.jit(functools.partial(state.init, tx))(train)
    places = None
    if self.mesh is not None:
      places = _state_shardings(tx, self.state, train, self.mesh)
      self.state = jax.device_put(self.state, places)
    loss = losses.classification if self.task.corpus.label_names else losses.regression
    self._step = jax.jit(
      functools.partial(step.train_step, self.model.module, tx, loss),
      donate_argnums=0,
      **({} if places is None else {"out_shardings": (places, None)}),
    )
    self._predict = jax.jit(functools.partial(step.eval_step, self.model.module))
    self._key = build.dropout_key(settings)
    self.steps_done = 0

  def announce(self, bar: Bar) -> None:
    c = self.task.corpus
    sizes = ", ".join(f"{len(t):,} {part}" for part, t in self.task.tokens.items())
    bar.print(f"{c.name}: {sizes}; dropped {c.dropped}; padded to {self.task.buckets}")
    share = 100 * self.trainable / self.parameters
    bar.print(f"training {self.trainable:,} of {self.parameters:,} parameters ({share:.2f} %)")
    if self.model.new:
      bar.print(f"new in this model: {', '.join(self.model.new)}")
    if self.steps_done:
      bar.print(f"going on after step {self.steps_done} of {self.total}")

  def steps(self, clock: Clock, bar: Bar) -> Iterator[dict[str, Any]]:
    """Runs the steps that are left and yields each one's numbers, checked to be finite."""
    batches = self.stream.iterate(self.steps_done, self.total)
    size, last = self.settings.train.batch_size, time.perf_counter()
    for batch in batches:
      self.state, out = self._step(self.state, self.frozen, self.place(batch), self._key)
      values = {name: float(value) for name, value in jax.device_get(out).items()}
      self.steps_done += 1
      if not all(map(math.isfinite, values.values())):
        raise FloatingPointError(
          f"step {self.steps_done}: loss {values['loss']}, gradient norm {values['grad_norm']}. "
          "The last good checkpoint is kept; try a lower --config.optimizer.learning_rate or a "
          "longer warm-up, in another --workdir."
        )
      now = time.perf_counter()
      clock.first_step = clock.first_step or clock.seconds()
      rate, last = size / (now - last), now
      bar.update(self.steps_done, values["loss"], rate)
      update = (self.steps_done - 1) // self.settings.optimizer.accumulate
      yield {
        "step": self.steps_done,
        **values,
        "learning_rate": float(self.schedule(update)),
        "examples_per_second": rate,
      }

  def place(self, batch: data.Batch) -> Any:
    if self.mesh is None:
      return batch
    rows = sharding.batch_sharding(self.mesh)
    return {k: jax.make_array_from_process_local_data(rows, v) for k, v in batch.items()}

  def evaluate(self, part: str, saved: Any = None) -> dict[str, float]:
    """Metrics of a split, with the current parameters or a saved adapter."""
    train, frozen = self.state.train, self.frozen
    if saved is not None:
      train, frozen = tree.partition(
        tree.combine(saved["adapter"], self.model.params), self.model.mask
      )
    t = self.task
    logits = evaluate.logits_of(
      lambda batch: self._predict(train, frozen, self.place(batch)),
      t.tokens[part],
      t.buckets,
      self.settings.train.eval_batch_size,
      t.pad_id,
    )
    labels = t.corpus.splits[part].labels
    return metrics.compute(t.corpus.metrics, logits, labels)

  def to_save(self, best: bool = False) -> dict[str, Any]:
    """Arrays that did not come from the pretrained files; for going on, the optimizer's too."""
    params = tree.combine(self.state.train, self.frozen)
    keep = tree.adapter_mask(params, self.model.mask)
    adapter = tree.partition(params, keep)[0]
    if best:
      return {"adapter": adapter}
    return {"adapter": adapter, "opt_state": self.state.opt_state, "step": self.state.step}

  def restore(self, checkpoints: Checkpoints) -> None:
    saved = checkpoints.arrays("latest", self.to_save())
    params = tree.combine(saved["adapter"], self.model.params)
    train, self.frozen = tree.partition(params, self.model.mask)
    self.state = state.TrainState(step=saved["step"], train=train, opt_state=saved["opt_state"])
    self.steps_done = int(saved["step"])

  def _check_batch(self, name: str, size: int) -> None:
    ways = 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]
    if size % ways:
      raise ValueError(f"{name}={size} cannot be split {ways} ways (data x fsdp of the mesh)")


def _optimizer(settings: Settings, method: Any, total: int) -> tuple[optax.Schedule, Any]:
  o = settings.optimizer
  updates = max(total // o.accumulate, 1)
  schedule = optim.schedule(o.schedule, o.learning_rate, updates, o.warmup_steps(updates))
  tx = optim.adamw(schedule, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay)
  return schedule, method.optimizer(tx, updates, clip_norm=o.clip_norm, accumulate=o.accumulate)


def _state_shardings(tx: Any, current: state.TrainState, train: Any, mesh: Any) -> Any:
  """Moments lie where their parameters do; counters everywhere."""
  everywhere = NamedSharding(mesh, P())
  places = jax.tree.map(lambda x: x.sharding, train)
  opt = optax.tree_utils.tree_map_params(
    tx,
    lambda _, place: place,
    current.opt_state,
    places,
    transform_non_params=lambda _: everywhere,
  )
  return state.TrainState(step=everywhere, train=places, opt_state=opt)


def _latest_meta(workdir: Path) -> dict[str, Any] | None:
  """What the latest checkpoint says of itself, without creating anything."""
  if not (workdir / "checkpoints" / "latest").is_dir():
    return None
  checkpoints = Checkpoints(workdir / "checkpoints")
  try:
    return checkpoints.meta("latest") if checkpoints.steps()["latest"] is not None else None
  finally:
    checkpoints.close()


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
  if not isinstance(config, dict):
    return {prefix[:-1]: config}
  return {k: v for key, sub in config.items() for k, v in _flat(sub, f"{prefix}{key}.").items()}


def _check_same(path: Path, config: dict[str, Any]) -> None:
  if not path.exists():
    return
  old, new = _flat(json.loads(path.read_text())), _flat(config)
  differ = [k for k in sorted({*old, *new} - {*_FREE}) if old.get(k) != new.get(k)]
  if differ:
    rows = "\n".join(f"  {k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in differ)
    raise ValueError(
      f"{path.parent} holds a run of another config:\n{rows}\n"
      "Give the same values to go on with it, or another --workdir."
    )


def _check_base(workdir: Path, saved: dict[str, Any] | None, now: dict[str, Any]) -> None:
  for name, what in (("base", "another pretrained model"), ("data", "other data")):
    if saved is not None and saved[name] != now[name]:
      raise ValueError(
        f"{workdir} was trained on {what}: digest {saved[name][:12]} there, {now[name][:12]} now. "
        "Put the same files back to go on with it, or give another --workdir."
      )


class _Stop:
  asked = ""


@contextmanager
def _signals() -> Iterator[_Stop]:
  """SIGTERM and the first Ctrl-C only ask; a second Ctrl-C interrupts at once."""
  stop = _Stop()
  main = signal.getsignal(signal.SIGINT)

  def ask(number: int, frame: Any) -> None:
    stop.asked = signal.Signals(number).name
    signal.signal(signal.SIGINT, main)

  previous = {n: signal.signal(n, ask) for n in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield stop
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


def _commit() -> str | None:
  here = Path(__file__).parent
  command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
  try:
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
  except (OSError, subprocess.CalledProcessError):
    return None
  return done.stdout.strip()


def _peak_memory_mb() -> float:
  """Peak of the device where it counts it, else of this process."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if "peak_bytes_in_use" in stats:
    return stats["peak_bytes_in_use"] / 2**20
  scale = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**20
