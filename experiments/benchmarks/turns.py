"""Two worker processes that take turns on one machine."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any


class Worker:
  """A process that has built its side and runs steps when asked to.

  Attributes:
    start_seconds: from spawning it to the end of its first step.
  """

  def __init__(self, module: str, *args: str, env: Mapping[str, str] | None = None):
    begun = time.perf_counter()
    self._process = subprocess.Popen(
      [sys.executable, "-m", module, *args],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env={**os.environ, **(env or {})},
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
    """Ends it; its peak resident memory in MiB."""
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


def serve(step: Callable[[], float]) -> None:
  """A worker's main loop: `step()` runs one step to its end and returns the loss."""
  print(json.dumps({"loss": step()}), flush=True)
  for line in sys.stdin:
    seconds = []
    for _ in range(int(line)):
      begun = time.perf_counter()
      step()
      seconds.append(time.perf_counter() - begun)
    print(json.dumps({"seconds": seconds}), flush=True)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  print(json.dumps({"peak_mb": peak}), flush=True)
