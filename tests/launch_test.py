"""Scripts that start runs elsewhere: what they would run, and a real SLURM of one node."""

import os
import pathlib
import shutil
import subprocess
import time

import pytest

from tests import tiny
from tests.training import runs

ROOT = pathlib.Path(__file__).parents[1]
SLURM = ROOT / "launch" / "slurm.sh"


def shell(*command, env=None):
  return subprocess.run(
    [*map(str, command)],
    cwd=ROOT,
    env={**os.environ, **(env or {})},
    capture_output=True,
    text=True,
  )


def test_what_slurm_would_run():
  """The flags go to experiments.train as they are."""
  told = shell(SLURM, "--dry_run", "--config=a.py", "--workdir=/b", "--config.data.name=c d")
  assert told.returncode == 0 and told.stdout == (
    "srun .venv/bin/python -m experiments.train --distributed=auto --config=a.py --workdir=/b "
    "--config.data.name=c\\ d \n"
  )
  told = shell(SLURM, "--dry_run", "--config=a.py", env={"PYTHON": "python3"})
  assert told.returncode == 2 and "write --workdir=DIR" in told.stderr


@pytest.fixture
def slurm(tmp_path):
  """The environment of commands that speak to a cluster of this machine."""
  if os.geteuid() or not shutil.which("slurmd") or not shutil.which("munged"):
    pytest.skip("needs root, slurm-wlm and munge")
  folder = tmp_path / "slurm"
  made = shell(ROOT / "launch" / "slurm_local.sh", "start", folder)
  assert made.returncode == 0, made.stderr
  flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
  yield {"SLURM_CONF": str(folder / "slurm.conf"), "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  shell(ROOT / "launch" / "slurm_local.sh", "stop", folder)


def state_of_the_cluster(slurm, folder):
  shown = [shell("scontrol", "show", what, env=slurm).stdout for what in ("job", "node")]
  logs = [*folder.glob("*.log"), *folder.glob("slurm/slurm*.log")]
  return "\n".join([*shown, *(path.read_text()[-3000:] for path in logs)])


@pytest.mark.slow(reason="a cluster; four processes that compile; a minute")
def test_a_job_of_two_tasks_saves_when_asked_and_goes_on_by_itself(slurm, tmp_path):
  """scancel --signal=TERM; the job queues itself again, and ends as one that was let alone."""
  model, corpus = tiny.model_dir(tmp_path / "model"), tiny.corpus(tmp_path / "texts.csv", 80)

  def submit(workdir):
    job = shell(
      *("sbatch", "--parsable", "--ntasks=2", f"--output={workdir}.log", SLURM),
      f"--workdir={workdir}",
      *tiny.flags(model, corpus),
      "--mesh=fsdp:-1",
      env=slurm,
    )
    assert job.returncode == 0, job.stderr
    return job.stdout.strip()

  def wait_for(condition, what, seconds=600):
    until = time.monotonic() + seconds
    while not condition():
      assert time.monotonic() < until, f"no {what}: {state_of_the_cluster(slurm, tmp_path)}"
      time.sleep(0.05)

  job, asked, alone = submit(tmp_path / "asked"), tmp_path / "asked", tmp_path / "alone"
  metrics = asked / "metrics.jsonl"
  wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 2, "rows of metrics")
  assert shell("scancel", "--signal=TERM", job, env=slurm).returncode == 0
  wait_for(lambda: (asked / "result.json").exists(), "result of the job that was asked to stop")
  log = (tmp_path / "asked.log").read_text()
  assert log.count("SIGTERM: saved step") == 1 and "going on after step" in log
  submit(alone)
  wait_for(lambda: (alone / "result.json").exists(), "result of the job that was let alone")
  runs.assert_same(asked, alone)
