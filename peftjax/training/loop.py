"""`train_and_evaluate`: the one function with side effects."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from peftjax.io import disk
from peftjax.training import lock, mirror, process, profile, resume
from peftjax.training import workdir as workdirs
from peftjax.training.finish import finish
from peftjax.training.logs import Bar, Logs, Silent, write_json
from peftjax.training.mirror import Here
from peftjax.training.peers import Peers
from peftjax.training.process import Clock
from peftjax.training.run import Run
from peftjax.training.scores import Scores
from peftjax.training.settings import Settings, from_config


class Stopped(Exception):
  """A signal asked the run to stop, and it has saved."""


def train_and_evaluate(
  config: ConfigDict,
  workdir: str | Path,
  *,
  mesh: str = "",
  started: float | None = None,
  traced: int = 0,
) -> dict[str, Any]:
  """Fine-tunes as `config` says and returns the contents of `workdir/result.json`.

  Evaluates on the validation split after every epoch, keeps the best parameters (among those
  at the final size that the method leaves), and scores the test split once, with the
  best. Run again with the same arguments it goes on where it was stopped, to the
  same bits, or returns the result if it had finished.

  Args:
    config: see `configs/classify.py`.
    workdir: gets `config.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`,
      `result.json` and, for LoRA, `peft/` in the Hugging Face layout; `profile/`, if `traced`. May
      be in a bucket (`gs://`, `s3://`), which gets them whenever a checkpoint is saved (see
      `mirror`).
    mesh: e.g. `"data:2,fsdp:2,tensor:2"`; by default all devices along data.
    started: `time.perf_counter()` at the start of the process, for "seconds to first step".
    traced: how many steps of this process to profile, once it is warm; see `profile.Trace`.

  Raises:
    ValueError: anything wrong with the config, the data, the model or the files in `workdir`;
      raised before `workdir` is touched.
    lock.Held: another process runs in `workdir`; for one in a bucket, has begun to since.
    disk.DiskError: something cannot be written, as on a full disk; the last checkpoint stays.
    FloatingPointError: the loss or the gradient is not finite; the last good checkpoint stays.
    Stopped: after SIGTERM, SIGHUP or Ctrl-C, with the state saved.
  """
  clock = Clock(started)
  settings_json = workdirs.as_json(config)
  settings = from_config(config)
  where = mirror.where(workdir)
  peers = Peers()
  peers.agree(config=settings_json, workdir=str(where), mesh=mesh, profile=traced)
  with mirror.opened(where, peers) as place, _told(place):
    finished = lambda: resume.finished(place.folder, settings_json)
    if (result := peers.told(finished)) is not None:
      return result
    with peers.hold(place.folder) as held:
      if (result := peers.told(finished)) is not None:
        return result  # another process has ended it since
      result = _train(settings, settings_json, place, mesh, clock, held, peers, traced)
      place.keep(lambda: None)
      return result


def _train(
  settings: Settings,
  settings_json: dict[str, Any],
  place: Here,
  mesh: str,
  clock: Clock,
  held: lock.Lock,
  peers: Peers,
  traced: int,
) -> dict[str, Any]:
  """`train_and_evaluate` in a workdir that belongs to these processes."""
  workdir = place.folder
  found = peers.told(lambda: _saved(workdir))
  saved = None if found is None else workdirs.Meta.of(found, workdir)
  run = Run(settings, mesh)
  profile.check(traced, run.total)
  meta = peers.told(run.identity)
  resume.check_inputs(workdir, saved, meta)
  if saved is not None:
    resume.restore(run, place)

  held.kept = True
  peers.told(lambda: _prepare(place, settings_json, anew=saved is None))
  checkpoints = place.checkpoints()
  lost = saved and saved.log and saved.log.rows and not (workdir / "metrics.jsonl").exists()
  logs = Logs(workdir, run.steps_done if saved else -1) if peers.main else Silent()
  best = dataclasses.asdict(saved.best) if saved and saved.best else {}
  before = saved.seconds if saved else 0.0
  every = settings.train
  try:
    with Bar(settings.method["name"], run.steps_done, run.total, shown=peers.main) as bar:
      scores = Scores(
        run, logs.write, bar.scores, untrained=saved.before if saved else {}, best=best
      )
      told = lambda text: bar.print(place.named(text))
      with (
        process.stop_signals(alone=peers.count == 1) as stop,
        profile.Trace(run, traced, workdir / "profile", told) as trace,
      ):
        run.announce(bar)
        if lost:
          bar.print(f"metrics.jsonl is gone, and with it its rows up to step {run.steps_done}")
        if logs.dropped and saved is None:
          bar.print(f"no checkpoint to go on from: {logs.dropped} rows of metrics are made again")
        if not saved:
          scores.start()
        for done in trace.steps():
          # Once: later checkpoints have been fetched and checked.
          asked = peers.asked(stop.asked, done)
          log = done % every.log_every == 0 or done == run.total
          evaluate = done % run.stream.steps_per_epoch == 0 or done == run.total
          save = evaluate or bool(every.save_every and done % every.save_every == 0)
          rows = run.fetch(all_of_them=log or save or bool(asked))
          if rows:
            row = rows[-1]
            rates = clock.rates(run.done, run.peak)
            bar.update(row["step"], row["loss"], rates["examples_per_second"])
          if log:
            row["learning_rate"] = run.learning_rate(done)
            logs.write({**row, **rates, **process.memory_in_use()})
          if evaluate and scores.take(done):
            checkpoints.save("best", done, run.adapter(), meta)
            checkpoints.wait("best")  # the latest must never name a best that is not there
          if save or asked:
            extra: dict[str, Any] = {"best": scores.best, "before": scores.untrained}
            extra |= {"seconds": before + clock.seconds(), "log": logs.mark()}
            checkpoints.save("latest", done, run.everything(), {**meta, **extra})
            place.keep(checkpoints.wait)
          if asked and done < run.total:
            checkpoints.wait()
            raise Stopped(f"{asked}: saved step {done} of {run.total}; run again to go on")
          if save:
            clock.rest()
      checkpoints.wait()
      params = run.best(checkpoints)
      return finish(
        run,
        params,
        workdir,
        bar,
        settings_json,
        scores,
        peers,
        seconds_to_first_step=clock.first_step,
        seconds=before + clock.seconds(),
      )
  finally:
    logs.close()
    checkpoints.close()


def _saved(workdir: Path) -> dict[str, Any] | None:
  """The latest checkpoint's record, for JSON; without one, that of readable rows."""
  saved = resume.latest_meta(workdir)
  if saved is not None:
    return dataclasses.asdict(saved)
  workdirs.metrics(workdir / "metrics.jsonl")
  return None


def _prepare(place: Here, config: dict[str, Any], *, anew: bool) -> None:
  place.claim()
  workdir = place.folder
  workdir.mkdir(parents=True, exist_ok=True)
  write_json(workdir / "config.json", config)
  if anew:  # a best alone cannot be continued from, and would stay where a step ties with it
    workdirs.clear_checkpoints(workdir / "checkpoints")


@contextlib.contextmanager
def _told(place: Here) -> Iterator[None]:
  """A context that adds to errors not due to the config which checkpoint is left."""
  try:
    yield
  except FloatingPointError as error:
    raise FloatingPointError(f"{error}{_left(place)}") from error
  except OSError as error:
    raise disk.refusal(error, place.folder, _left(place)) from error


def _left(place: Here) -> str:
  step = place.newest()
  return "" if step is None else f" The last good checkpoint, of step {step}, is kept."
