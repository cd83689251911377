"""`experiments.sweep --executor`: who is replaced; a real Ray and a real SLURM, with kills."""

import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from experiments.sweeping import executor, plan, remote
from experiments.sweeping.executor import End
from experiments.sweeping.folder import Folder
from peftjax.training import loop
from tests import tiny
from tests.experiments import sweep_test
from tests.training import runs

ROOT = pathlib.Path(__file__).parents[2]


class Silent:
  begins = ends = apart = lambda self, *told: None


class Fake:
  """Workers that do what a script says, one line each: a number of trials, then how they end."""

  def __init__(self, plan, script):
    self.plan, self.script, self.started, self.stopped = plan, script, 0, []

  def start(self):
    self.started += 1
    return self.started

  def ended(self, workers):
    number, end = self.script(workers[0])
    if end is None:
      raise KeyboardInterrupt
    waiting = [one for one in self.plan.all if self.plan.folder.waits(one.id)]
    for one in waiting[:number]:
      with self.plan.folder.claim(one.id) as mine:
        assert mine
        loop.train_and_evaluate(one.config, self.plan.folder.trial(one.id))
    return {workers[0]: end}

  def stop(self, workers):
    self.stopped = list(workers)


class Told(list):
  follows = lambda self: None
  says = list.append


KILLED, STOPPED, DONE = (
  End("killed", True),
  End("SIGTERM: saved step 1 of 2", False),
  End("", False),
)


@pytest.fixture
def four(tmp_path, monkeypatch):
  """The plan of four trials that are over at once; the order in which they ran."""
  order = []

  def run(config, workdir):
    order.append(workdir.name)
    return sweep_test.pretend(config, workdir)

  monkeypatch.setattr(loop, "train_and_evaluate", run)
  made = plan.of(sweep_test.FOUR, Folder(tmp_path / "sweep"))
  made.folder.add(made.trials())
  return made, order


@pytest.mark.parametrize(
  ("count", "script", "started"),
  [
    (2, lambda worker: (4, DONE), 2),
    (1, lambda worker: (1, KILLED), 4),  # never twice in a row without a trial that ends
    (1, lambda worker: (0, KILLED) if worker in (1, 2) else (4, DONE), 3),
    (3, lambda worker: (0, KILLED) if worker < 5 else (4, DONE), 7),
    (1, lambda worker: (0, STOPPED) if worker < 9 else (4, DONE), 9),  # it has saved, every time
    (2, lambda worker: (3, STOPPED) if worker == 1 else (4, DONE), 3),
  ],
)
def test_who_ends_while_something_is_left_is_replaced(four, count, script, started):
  """Every trial ends, and runs once."""
  made, order = four
  fake, told = Fake(made, script), Told()
  executor.drive(fake, count, made, told)
  assert sorted(order) == sorted(sweep_test.ids()) and fake.started == started
  assert len([x for x in told if "takes its place" in x]) == started - count


def test_workers_that_die_without_end_are_given_up(four):
  """No more than one each and two; the last one's words are told."""
  made, order = four
  fake, told = Fake(made, lambda worker: (0, KILLED)), Told()
  with pytest.raises(ValueError, match="no trial ended meanwhile; the last: killed"):
    executor.drive(fake, 3, made, told)
  assert fake.started == 3 + 4 and not order
  assert told[-1] == "a worker has died: killed"


def test_a_signal_stops_workers_elsewhere(four):
  """Those that are left are asked to save."""
  made, order = four
  fake = Fake(made, lambda worker: (2, DONE) if worker == 1 else (0, None))
  with pytest.raises(KeyboardInterrupt):
    executor.drive(fake, 2, made, Told())
  assert fake.stopped == [2, 3] and len(order) == 2


def test_no_worker_is_left_alone(four):
  """Where the cluster takes fewer than asked for, those that it took are stopped."""
  made, _ = four
  fake = Fake(made, None)

  def start(take=fake.start):
    if fake.started == 2:
      raise ValueError("sbatch does not take a worker's job")
    return take()

  fake.start = start
  with pytest.raises(ValueError, match="sbatch does not take"):
    executor.drive(fake, 3, made, Told())
  assert fake.stopped == [1, 2]


def test_a_worker_elsewhere_is_one_that_was_started_here(four, monkeypatch, capsys):
  """It takes what is waiting; what stops it is its result."""
  made, order = four
  monkeypatch.chdir(made.folder.root)  # put back at the end
  monkeypatch.setattr("experiments.runtime.set_up", lambda cache: None)
  job = remote.Job(sweep_test.FOUR.to_dict(), str(made.folder.root), str(ROOT))
  with made.folder.claim(sweep_test.ids()[0]):
    assert remote.work(job) == ""
  assert order == sweep_test.ids()[1:] and pathlib.Path.cwd() == ROOT
  monkeypatch.setattr(loop, "train_and_evaluate", sweep_test.saves_and_stops)
  assert "saved step 1 of 2" in remote.work(job)
  capsys.readouterr()


@pytest.mark.parametrize(
  ("flags", "named"),
  [
    (dict(workers=2), ["--executor=ray or slurm", "another terminal"]),
    (dict(resources="cpu:1"), ["--executor=ray or slurm"]),
    (dict(resources="cpu=1"), ["--resources=cpu=1", "cpu:4,gpu:1"]),
    (dict(resources="cpu:1,cpu:2"), ["a number each"]),
    (dict(resources="cpu:0"), ["a number each"]),
    (dict(executor="ray"), ["pip install 'peftjax[ray]'"]),
    (dict(executor="slurm"), ["pip install 'peftjax[slurm]'"]),
  ],
)
def test_what_cannot_be_started_is_refused(fails, tmp_path, monkeypatch, flags, named):
  """In a sentence, before anything is written."""
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  given = dict(config=sweep_test.FOUR, dry_run=False, retry_failed=False, **flags)
  message = fails("sweep", workdir=str(tmp_path / "sweep"), **given)
  assert all(part in message for part in named), message
  assert len(message.splitlines()) == 1 and not (tmp_path / "sweep").exists()


# Four trials of 200 short steps, a row of metrics each.
SWEEP = """
from ml_collections import ConfigDict

def get_config(arg=""):
  return ConfigDict(dict(
    base="configs/classify.py:method=lora,data=files",
    grid=dict(
      seed=(0, 1),
      method=dict(rank=(2, 4)),
      model=dict(directory=({model!r},)),
      data=dict(train_file=({corpus!r},), max_length=(16,)),
      train=dict(steps=(200,), batch_size=(8,), eval_batch_size=(8,), log_every=(1,)),
      compilation_cache=("",),
    ),
  ))
"""


def shell(*command, env):
  return subprocess.run([*map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture
def sweep(tmp_path):
  """Starts a real sweep in a process of its own; its folder is `tmp_path / "sweep"`."""
  model, corpus = tiny.model_dir(tmp_path / "model"), tiny.corpus(tmp_path / "texts.csv", 80)
  (tmp_path / "sweep.py").write_text(SWEEP.format(model=str(model), corpus=str(corpus)))
  made = []

  def start(*flags, **env):
    command = (sys.executable, "-m", "experiments.sweep", f"--config={tmp_path / 'sweep.py'}")
    made.append(
      subprocess.Popen(
        [*command, f"--workdir={tmp_path / 'sweep'}", *flags],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
    )
    return made[-1]

  yield start
  for process in made:
    process.kill()
    process.wait()
    process.stdout.close()


def trains(folder, process, gone=None, seconds=300):
  """A process that is at the first steps of a trial of 200; not one that was killed."""
  until = time.monotonic() + seconds
  while time.monotonic() < until and process.poll() is None:
    for metrics in folder.glob("trials/*/metrics.jsonl"):
      holder = metrics.parent / "run.lock"
      if 1 < metrics.read_text().count("\n") < 50 and holder.exists():
        pid = json.loads(holder.read_text())["pid"]
        if pid != gone:
          return pid
    time.sleep(0.005)
  raise AssertionError(f"no trial trains: {process.communicate()[0] if process.poll() else folder}")


def assert_ended_once(folder, told):
  """Each trial is done and said to be so once; each of its steps is in its log once."""
  names = [path.name for path in folder.glob("trials/*") if path.is_dir()]
  rows = [json.loads(line) for line in (folder / "summary.jsonl").read_text().splitlines()]
  assert len(names) == 4 and sorted(row["id"] for row in rows) == sorted(names)
  for name in names:
    assert told.count(f"{name}: done") == 1, told
    steps = [row["step"] for row in runs.rows(folder / "trials" / name) if "loss" in row]
    assert steps == list(range(1, 201))


@pytest.fixture
def ray_alone():
  """The environment of a Ray of its own, which keeps nothing in the home folder."""
  if importlib.util.find_spec("ray") is None:
    pytest.skip("needs Ray: pip install 'peftjax[ray]'")
  return {"RAY_ADDRESS": "local", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.mark.slow(reason="a cluster; three processes that compile; two minutes")
def test_ray_replaces_a_worker_that_is_killed(sweep, ray_alone, tmp_path):
  """Its trial runs on elsewhere, and every trial ends once."""
  running = sweep("--executor=ray", "--workers=2", **ray_alone)
  os.kill(trains(tmp_path / "sweep", running), signal.SIGKILL)
  told = running.communicate()[0]
  assert running.returncode == 0, told
  assert told.count("a worker has died") == 1 and told.count("another one takes its place") == 1
  assert_ended_once(tmp_path / "sweep", told)


@pytest.mark.slow(reason="a cluster; processes that compile; a minute")
def test_a_sweep_on_ray_that_is_stopped_saves(sweep, ray_alone, tmp_path):
  """Ctrl-C here makes workers save; a worker that asks for what no node has is refused."""
  running = sweep("--executor=ray", "--workers=1", **ray_alone)
  trains(tmp_path / "sweep", running)
  running.send_signal(signal.SIGINT)
  told = running.communicate()[0]
  assert running.returncode == 0 and "run the same command to go on" in told, told
  assert list(tmp_path.glob("sweep/trials/*/checkpoints/latest/*/arrays"))
  refused = sweep("--executor=ray", "--resources=cpu:1,tpu:99", **ray_alone)
  told = refused.communicate()[0]
  assert refused.returncode == 1 and "no node of the Ray cluster has CPU 1, TPU 99" in told


@pytest.mark.slow(reason="a cluster; three processes that compile; two minutes")
def test_slurm_replaces_a_job_that_is_killed(sweep, tmp_path):
  """Its trial runs on in another job; one whose time is over saves, and another goes on."""
  if importlib.util.find_spec("submitit") is None:
    pytest.skip("needs submitit: pip install 'peftjax[slurm]'")
  if os.geteuid() or not shutil.which("slurmd") or not shutil.which("munged"):
    pytest.skip("needs root, slurm-wlm and munge")
  local, folder = ROOT / "launch" / "slurm_local.sh", tmp_path / "slurm"
  env = {"SLURM_CONF": str(folder / "slurm.conf")}
  made = shell(local, "start", folder, env={**os.environ})
  assert made.returncode == 0, made.stderr
  try:
    running = sweep("--executor=slurm", "--workers=2", **env)
    os.kill(killed := trains(tmp_path / "sweep", running), signal.SIGKILL)
    warned = trains(tmp_path / "sweep", running, gone=killed)
    os.kill(warned, signal.SIGUSR2)  # as SLURM warns of a time limit
    told = running.communicate()[0]
  finally:
    shell(local, "stop", folder, env={**os.environ})
  assert running.returncode == 0, told
  assert (
    told.count("a worker has died") == 1 and told.count("a worker has stopped: SIGTERM") == 1
  ), told
  assert "another one takes its place" in told
  assert_ended_once(tmp_path / "sweep", told)
