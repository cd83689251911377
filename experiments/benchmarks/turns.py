"""The worker processes of both sides, which take turns on one machine."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# A GPU is for both sides: JAX would take most of its memory at once.
SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


class Worker:
  """A process that has built its side and runs steps when asked to.

  Attributes:
    start_seconds: seconds from spawning it to the end of its first step.
  """

  def __init__(self, module: str, *args: str, env: Mapping[str, str] | None = None):
    begun = time.perf_counter()
    self._process = subprocess.Popen(
      [sys.executable, "-m", module, *args],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env={**SHARED, **os.environ, **(env or {})},
    )
    self.first = self._read()
    self.start_seconds = time.perf_counter() - begun

  def run(self, steps: int) -> list[float]:
    """Seconds of each of `steps` steps."""
    assert self._process.stdin is not None
    self._process.stdin.write(f"{steps}\n")
    self._process.stdin.flush()
    return self._read()["seconds"]

  def close(self) -> float:
    """Ends the process and returns its peak memory in MiB."""
    assert self._process.stdin is not None
    self._process.stdin.close()
    peak = self._read()["peak_mb"]
    self._process.wait()
    return peak

  def _read(self) -> dict[str, Any]:
    assert self._process.stdout is not None
    for line in self._process.stdout:
      if line.startswith("{"):
        return json.loads(line)
    raise RuntimeError(f"{self._process.args!r} ended early, exit code {self._process.wait()}")


def sides(benchmark: str, *args: str, alone: bool = False) -> list[Worker]:
  """Workers of a benchmark that compares with bitsandbytes: ours and, unless alone, the peer."""
  if not alone and importlib.util.find_spec("bitsandbytes") is None:
    raise SystemExit("bitsandbytes is missing: `make parity` adds it; --alone does without")
  names = ("ours",) if alone else ("ours", "peer")
  return [Worker(f"experiments.benchmarks.{benchmark}_{name}", *args) for name in names]


def medians(workers: Sequence[Worker], turns: int, steps: int, uncounted: int = 0) -> list[float]:
  """Seconds per step of each worker, which take turns; a turn's first steps may be uncounted."""
  seconds: list[list[float]] = [[] for _ in workers]
  for _ in range(turns):
    for worker, taken in zip(workers, seconds, strict=True):
      taken += worker.run(uncounted + steps)[uncounted:]
  return [statistics.median(taken) for taken in seconds]


def peak_resident() -> float:
  """The most memory that this process had in RAM, in MiB."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def serve(step: Callable[[], float], peak: Callable[[], float] = peak_resident) -> None:
  """A worker's main loop.

  Args:
    step: runs one step to its end and returns the loss.
    peak: returns in the end how much memory that took, in MiB.
  """
  print(json.dumps({"loss": step()}), flush=True)
  for line in sys.stdin:
    seconds = []
    for _ in range(int(line)):
      begun = time.perf_counter()
      step()
      seconds.append(time.perf_counter() - begun)
    print(json.dumps({"seconds": seconds}), flush=True)
  print(json.dumps({"peak_mb": peak()}), flush=True)
