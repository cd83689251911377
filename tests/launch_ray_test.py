"""launch/ray_job.py on a real Ray: two nodes that share this machine."""

import importlib.util
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests import tiny

ROOT = pathlib.Path(__file__).parents[1]
# Ends when its input does.
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster()
for _ in range(2):
  cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
print("address", cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture
def address():
  if importlib.util.find_spec("ray") is None:
    pytest.skip("needs ray")
  devices = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
  cluster = subprocess.Popen(
    [sys.executable, "-c", CLUSTER],
    cwd=ROOT,
    env={**os.environ, "XLA_FLAGS": devices},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
  )
  with cluster:
    yield next(line.split()[1] for line in cluster.stdout if line.startswith("address "))
    cluster.stdin.close()


def processes(words):
  """Ids of the processes of a Python whose command has these words."""
  found = subprocess.run(["pgrep", "-af", words], capture_output=True, text=True).stdout
  lines = [line.split(" ", 2) for line in found.splitlines()]
  return [int(number) for number, program, _ in lines if "python" in program]


@pytest.mark.slow(reason="a cluster; four processes that compile; a minute")
def test_a_job_whose_process_is_killed_starts_again_and_ends(address, tmp_path):
  flags = tiny.flags(tiny.model_dir(tmp_path / "model"), tiny.corpus(tmp_path / "texts.csv", 80))
  workdir = tmp_path / "run"
  job = subprocess.Popen(
    [sys.executable, "launch/ray_job.py", "2", "CPU:1", *flags, f"--workdir={workdir}"],
    cwd=ROOT,
    env={**os.environ, "RAY_ADDRESS": address},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  metrics, until = workdir / "metrics.jsonl", time.monotonic() + 300
  while not (metrics.exists() and metrics.read_text().count("\n") > 2):
    assert time.monotonic() < until and job.poll() is None, job.communicate(timeout=60)[0]
    time.sleep(0.05)
  [killed] = processes(rf"experiments.train --distributed=\S+,2,1 .*--workdir={workdir}")
  os.kill(killed, signal.SIGKILL)
  output, _ = job.communicate(timeout=300)
  assert job.returncode == 0, output
  assert output.count("ray_job.py: starting again") == 1 and (workdir / "result.json").exists()
