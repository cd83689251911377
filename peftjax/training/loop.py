"""`train_and_evaluate`: the one function with side effects."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from peftjax.training import build, process, resume
from peftjax.training.checkpoint import Checkpoints
from peftjax.training.finish import finish
from peftjax.training.logs import Bar, Logs, write_atomic
from peftjax.training.process import Clock
from peftjax.training.run import Run
from peftjax.training.settings import from_config


class Stopped(Exception):
  """A signal asked the run to stop, and it has saved."""


def train_and_evaluate(
  config: ConfigDict, workdir: str | Path, *, mesh: str = "", started: float | None = None
) -> dict[str, Any]:
  """Fine-tunes as `config` says and returns what `workdir/result.json` holds.

  Evaluates on the validation split after every epoch, keeps the best (of AdaLoRA: of those within
  the final budget), and scores the test split
  once, with the best. Run again with the same arguments it goes on where it was stopped, to the
  same bits, or returns the result if it had finished.

  Args:
    config: see `configs/classify.py`.
    workdir: gets `config.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`,
      `result.json` and, for LoRA, `peft/` in the Hugging Face layout.
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
  resume.check_config(workdir / "config.json", settings_json)
  if (workdir / "result.json").exists():
    return json.loads((workdir / "result.json").read_text())
  run = Run(settings, mesh)
  meta = run.identity()
  saved = resume.latest_meta(workdir)
  resume.check_inputs(workdir, saved, meta)

  workdir.mkdir(parents=True, exist_ok=True)
  write_atomic(workdir / "config.json", json.dumps(settings_json, indent=2, sort_keys=True) + "\n")
  if saved is None:  # a best alone cannot be gone on from, and would stay where a step ties with it
    shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
  checkpoints = Checkpoints(workdir / "checkpoints")
  if saved is not None:
    run.restore(checkpoints)
  logs = Logs(workdir, run.steps_done if saved else -1)
  best: dict[str, Any] = saved["best"] if saved else {}
  untrained: dict[str, Any] = saved["before"] if saved else {}
  before = saved["seconds"] if saved else 0.0
  every = settings.train
  try:
    with Bar(settings.method["name"], run.steps_done, run.total) as bar:
      with process.stop_signals() as stop:
        run.announce(bar)
        if not saved:
          untrained = {part: run.evaluate(part) for part in run.task.before}
          for part, scores in untrained.items():
            bar.scores(f"{part}, before", scores)
            logs.write({"step": 0, **{f"{part}_{key}": x for key, x in scores.items()}})
        for done in run.steps():
          asked = stop.asked  # once: what is saved below has been fetched and checked
          log = done % every.log_every == 0 or done == run.total
          evaluate = done % run.stream.steps_per_epoch == 0 or done == run.total
          save = evaluate or bool(every.save_every and done % every.save_every == 0)
          rows = run.fetch(all_of_them=log or save or bool(asked))
          if rows:
            row = rows[-1]
            rate = clock.rate(row["step"], every.batch_size)
            bar.update(row["step"], row["loss"], rate)
          if log:
            row["learning_rate"] = run.learning_rate(done)
            logs.write({**row, "examples_per_second": rate})
          if evaluate:
            scores = run.evaluate("validation")
            epoch = done / run.stream.steps_per_epoch
            named = {f"validation_{key}": value for key, value in scores.items()}
            logs.write({"step": done, "epoch": epoch, **named})
            bar.scores(f"epoch {epoch:.4g}", scores)
            value = run.task.criterion(scores)
            # One that is larger than the method leaves it in the end is no candidate.
            if done >= run.settled and (not best or value > best["value"]):
              best = {"step": done, "value": value, "metrics": scores}
              checkpoints.save("best", done, run.adapter(), meta)
              checkpoints.wait("best")  # the latest must never name a best that is not there
          if save or asked:
            extra = {"best": best, "before": untrained, "seconds": before + clock.seconds()}
            checkpoints.save("latest", done, run.everything(), {**meta, **extra})
          if asked and done < run.total:
            checkpoints.wait()
            raise Stopped(f"{asked}: saved step {done} of {run.total}; run again to go on")
      checkpoints.wait()
      params = run.best(checkpoints)
      return finish(
        run,
        params,
        workdir,
        bar,
        settings_json,
        best,
        untrained,
        seconds_to_first_step=clock.first_step,
        seconds=before + clock.seconds(),
      )
  finally:
    logs.close()
    checkpoints.close()
