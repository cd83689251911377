"""A run killed at any moment and started again ends in the same bits.

PEFTJAX_KILLS says how often `kill -9` strikes.
"""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests import tiny
from tests.training import runs

ROOT = pathlib.Path(__file__).parents[2]
KILLS = int(os.environ.get("PEFTJAX_KILLS", "7"))
EPOCHS, STEPS = 4, 16  # of the run, and of an epoch


_SLOW = pytest.mark.slow(reason="some 5 s for each process")


@pytest.fixture(scope="module")
def command(tmp_path_factory):
  """Makes the command of a run in `workdir`: one bucket, saved every 4 steps."""
  folder = tmp_path_factory.mktemp("kill")
  model, corpus = tiny.model_dir(folder / "model"), tiny.corpus(folder / "corpus.csv", 160)

  def make(workdir):
    return [
      *(sys.executable, "-m", "experiments.train", f"--workdir={workdir}"),
      f"--config={ROOT / 'configs' / 'classify.py'}:method=lora,data=files",
      f"--config.model.directory={model}",
      f"--config.data.train_file={corpus}",
      "--config.data.max_length=16",
      "--config.train.batch_size=8",
      f"--config.train.epochs={EPOCHS}",
      "--config.train.log_every=2",
      "--config.train.save_every=4",
      f"--config.compilation_cache={folder / 'programs'}",
    ]

  return make


def start(command):
  """The process of a run, on one CPU device, its output in a pipe."""
  one = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
  env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": one, "PYTHONPATH": str(ROOT)}
  return subprocess.Popen(
    command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )


def finish(process):
  """Its output, once it has ended by itself and well."""
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 0, output
  return output


def wait_for(process, condition):
  """Polls until the condition holds (true) or the process has ended (false)."""
  while process.poll() is None:
    if condition():
      return True
    time.sleep(0.001)
  return False


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
  """The workdir of an uninterrupted run, and how many seconds one takes that need not compile."""
  workdir, begun = tmp_path_factory.mktemp("whole") / "run", time.monotonic()
  finish(start(command(workdir)))
  return workdir, 0.7 * (time.monotonic() - begun)


def metrics_text(workdir):
  path = workdir / "metrics.jsonl"
  return path.read_text() if path.exists() else ""


def last_step(workdir):
  """The newest that is logged, 0 at the start."""
  return max(map(int, re.findall(r'"step": (\d+)', metrics_text(workdir))), default=0)


def saving(workdir, since=0.0):
  """Whether a checkpoint is half written, by a process that began not before `since`."""
  for path in (workdir / "checkpoints").glob("*/*orbax-checkpoint-tmp*"):
    try:
      if path.stat().st_mtime > since:
        return True
    except FileNotFoundError:  # just renamed: it is whole
      continue
  return False


def moment(kind, workdir, rng, seconds):
  """A condition that comes true at a moment of the given kind, still to come, drawn from `rng`."""
  now, step = time.time(), last_step(workdir)
  epochs = [e * STEPS for e in range(1, EPOCHS + 1) if e * STEPS > step]
  if kind == "any" or not epochs:
    at = now + float(rng.uniform(0, seconds))
    return lambda: time.time() > at
  if kind == "saving":
    target = min(step + int(rng.integers(2 * STEPS)), EPOCHS * STEPS)
    return lambda: last_step(workdir) >= target and saving(workdir, since=now)
  epoch = rng.choice(epochs[:2])
  if kind == "evaluating":  # the row of an epoch's last step is there, its scores are not yet
    return lambda: f'"step": {epoch},' in metrics_text(workdir)
  return lambda: f'"step": {epoch}, "epoch"' in metrics_text(workdir)


@_SLOW
def test_killed_run_ends_in_the_same_bits(command, whole, tmp_path):
  """kill -9 at start, mid-epoch, while saving, while evaluating: the end is the same.

  Some kills come at moments drawn evenly over the time of a run, the others when the files show
  what the run is at. A run that gets through is compared, and a new one begun.
  """
  rng = np.random.default_rng(0)
  kinds = ("saving", "evaluating", "any", "evaluated", "any", "saving", "any")
  struck: list[tuple[str, int, bool]] = []
  number = 0
  while len(struck) < KILLS or (tmp_path / str(number)).exists():
    workdir, kind = tmp_path / str(number), kinds[len(struck) % len(kinds)]
    begun, process = time.time(), start(command(workdir))
    when = moment(kind, workdir, rng, whole[1])
    if len(struck) < KILLS and wait_for(process, when):
      process.kill()
      process.communicate()
      struck.append((kind, last_step(workdir), saving(workdir, since=begun)))
    else:
      finish(process)
      runs.assert_same(workdir, whole[0])
      number += 1
  print(f"{number} runs; kind of kill, last step logged, checkpoint half written: {struck}")
  assert any(half for _, _, half in struck) and any(0 < step for _, step, _ in struck)


@_SLOW
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_asked_to_stop_it_saves_and_goes_on(name, command, whole, tmp_path):
  """SIGTERM and Ctrl-C: exit code 0, the step that was saved is named, the end is the same."""
  process = start(command(tmp_path))
  assert wait_for(process, lambda: metrics_text(tmp_path).count("\n") > 12)
  process.send_signal(signal.Signals[name])
  output = finish(process)
  [step] = re.findall(rf"{name}: saved step (\d+) of {EPOCHS * STEPS}", output)
  assert "Traceback" not in output
  assert runs.arrays(tmp_path, "latest")[0] == int(step)
  assert not (tmp_path / "result.json").exists()
  finish(start(command(tmp_path)))
  runs.assert_same(tmp_path, whole[0])
