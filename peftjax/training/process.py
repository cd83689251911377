"""This process: its clock, the signals it gets, its memory and code version."""

from __future__ import annotations

import functools
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax


class Clock:
  """Seconds since the process started, and the rate of its steps."""

  def __init__(self, started: float | None):
    self._started = self._last = time.perf_counter() if started is None else started
    self._done: Mapping[str, float] = {}
    self.first_step: float | None = None  # seconds until the first step of this process was done

  def seconds(self) -> float:
    return time.perf_counter() - self._started

  def rates(self, done: Mapping[str, float], peak: float | None = None) -> dict[str, float]:
    """`NAME_per_second` since the last call, from this process's totals by name.

    The first rates are since it started, compilation included.

    Args:
      done: numbers that grow, such as "tokens".
      peak: FLOP/s of all devices; "share_of_peak" is `done["flops"]` per second over it.
    """
    now = time.perf_counter()
    seconds = max(now - self._last, 1e-9)
    rates = {f"{x}_per_second": (done[x] - self._done.get(x, 0)) / seconds for x in done}
    if peak:
      rates["share_of_peak"] = rates["flops_per_second"] / peak
    self.first_step = self.first_step or now - self._started
    self._last, self._done = now, dict(done)
    return rates

  def rest(self) -> None:
    """Leaves out of the next rates the time since the last: scores, checkpoints."""
    self._last = time.perf_counter()


class Stop:
  asked = ""


class Again(KeyboardInterrupt):
  """A Ctrl-C after a signal that had asked to save and stop."""


def _hang_up() -> list[signal.Signals]:
  """The signal of a closed terminal, unless it is ignored, as under nohup."""
  ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
  return [] if ignored else [signal.SIGHUP]


@contextmanager
def stop_signals(*, alone: bool = True) -> Iterator[Stop]:
  """A context in which SIGTERM, SIGHUP and the first Ctrl-C only ask; a second raises `Again`.

  Where several processes share a run, SIGTERM is JAX's, which tells the others; SIGHUP and the
  first Ctrl-C become one.
  """
  stop = Stop()

  def again(number: int, frame: Any) -> None:
    raise Again("stopped at once, without saving")

  def ask(number: int, frame: Any) -> None:
    stop.asked = signal.Signals(number).name
    signal.signal(signal.SIGINT, again)
    if not alone:
      os.kill(os.getpid(), signal.SIGTERM)

  asking = (*([signal.SIGTERM] if alone else []), signal.SIGINT, *_hang_up())
  previous = {n: signal.signal(n, ask) for n in asking}
  try:
    yield stop
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
  """A context for several runs in turn: SIGTERM and SIGHUP interrupt as Ctrl-C; tells if one came.

  A run has handlers of its own while it trains, and one that is at its last step just finishes.
  The file descriptor gets the number of every signal, whoever handles it.
  """
  reader, writer = socket.socketpair()
  reader.setblocking(False)
  writer.setblocking(False)
  descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
  ours = (signal.SIGTERM, *_hang_up())
  previous = {n: signal.signal(n, signal.default_int_handler) for n in ours}

  def asked() -> bool:
    try:
      return bool({signal.SIGINT, *ours} & set(reader.recv(4096)))
    except BlockingIOError:
      return False

  try:
    yield asked
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(descriptor)
    reader.close()
    writer.close()


def commit() -> str | None:
  """The commit of this code; "-dirty" if a file other than results has changed since."""
  git = functools.partial(
    subprocess.run, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
  )
  try:
    found = git(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
    code = ["--", ":/", ":(top,exclude)experiments/results"]
    changed = git(["git", "diff", "--name-only", "HEAD", *code]).stdout
  except (OSError, subprocess.CalledProcessError):
    return None
  return f"{found}-dirty" if changed else found


def memory_in_use() -> dict[str, int]:
  """Bytes of the first device here, now and at most so far; empty where it does not count them."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return {name: stats[name] for name in ("bytes_in_use", "peak_bytes_in_use") if name in stats}


def peak_memory_mb() -> float:
  """Peak memory of the device where it counts it, else of this process."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if "peak_bytes_in_use" in stats:
    return stats["peak_bytes_in_use"] / 2**20
  scale = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**20
