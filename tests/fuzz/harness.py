"""Cases in worker processes with limits of time and memory, and what became of each."""

from __future__ import annotations

import collections
import multiprocessing
import multiprocessing.connection
import os
import resource
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tests.fuzz.kind import Kind, names_file

SECONDS, GIGABYTES, LONGEST = 20.0, 4, 3000


def kinds() -> dict[str, Kind]:
  from tests.fuzz import adapters, checkpoints, gguf_files, models, settings, tables, tensors
  from tests.fuzz import tokenizers as tokenizer_files

  every: list[Any] = [tensors.Tensors(), tensors.Index(), adapters.Adapter(), gguf_files.GGUF()]
  every += [models.Model("bert", 6), models.Model("llama", 6), models.Model("gpt2", 4)]
  every += [models.Model("gemma3", 4), models.Model("phi3", 2)]
  every += [tables.Table("csv"), tables.Table("tsv"), tables.Table("jsonl")]
  every += [tokenizer_files.TokenizerFiles(), settings.Flags(), settings.Sweeps()]
  every += [checkpoints.Workdir()]
  return {kind.name: kind for kind in every}


class Verdict(NamedTuple):
  """What became of a case: `refused`, `accepted`, or one of the faults."""

  outcome: str
  told: str = ""


FAULTS = ("silent", "unclear", "hang", "crash")


def judge(kind: Kind, seed: int, number: int, sound: Path, folder: Path) -> Verdict:
  """Damages a copy of the sound input in `folder`, reads it, and checks what came of it."""
  shutil.rmtree(folder, ignore_errors=True)
  shutil.copytree(sound, folder)
  kind.damage(Random(f"{seed} {kind.name} {number}"), folder)
  try:
    got = kind.read(folder)
  except ValueError as error:
    message = str(error)
    if type(error) is not ValueError or not 0 < len(message) <= LONGEST:
      return Verdict("unclear", _shown(error))
    if kind.name not in ("flags", "sweeps") and not names_file(message, folder):
      return Verdict("unclear", f"names no file: {message[:300]}")
    return Verdict("refused", message)
  except BaseException as error:  # a panic of Rust is no Exception
    if isinstance(error, KeyboardInterrupt):
      raise
    return Verdict("unclear", _shown(error))
  try:
    fault = kind.check(folder, got)
  except Exception as error:
    fault = f"the check itself: {_shown(error)}"
  return Verdict("silent", fault) if fault else Verdict("accepted")


def _shown(error: BaseException) -> str:
  frames = traceback.extract_tb(error.__traceback__)
  own = [f for f in frames if "site-packages" not in f.filename] or frames
  at = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
  return f"{type(error).__name__} at {at}: {str(error)[:300]}"


def work(pipe: Any, seed: int) -> None:
  """A worker: takes (kind, number), gives a verdict."""
  limit = GIGABYTES * 2**30
  resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
  silence = os.open(os.devnull, os.O_WRONLY)
  for descriptor in (1, 2):  # what the product prints; libraries write to the descriptors
    os.dup2(silence, descriptor)
  known = kinds()
  with tempfile.TemporaryDirectory(prefix="fuzz") as root:
    while (job := pipe.recv()) is not None:
      name, number = job
      sound = Path(root) / f"{name}-sound"
      if not sound.exists():
        sound.mkdir()
        known[name].prepare(sound)
        pipe.send(None)  # now the time counts
      else:
        pipe.send(None)
      pipe.send(judge(known[name], seed, number, sound, Path(root) / name))


class Worker:
  """A process with a limit of time for each case; replaced when it breaks."""

  def __init__(self, seed: int):
    context = multiprocessing.get_context("spawn")
    self.pipe, other = context.Pipe()
    self._process = context.Process(target=work, args=(other, seed), daemon=True)
    self._process.start()
    other.close()
    self.job: tuple[str, int] | None = None
    self._since: float | None = None
    self._before = 0.0

  def give(self, job: tuple[str, int]) -> None:
    self.job, self._since = job, None
    self.pipe.send(job)

  def answer(self) -> Verdict | None:
    """The verdict, if there is one by now."""
    try:
      while self.pipe.poll(0):
        got = self.pipe.recv()
        if got is not None:
          return got
        self._since, self._before = time.monotonic(), _computed(self._process.pid)
    except (EOFError, ConnectionError):
      return Verdict("crash", f"the process ended with {self._process.exitcode}")
    if self._since is not None:
      # Its own seconds, as others may use the machine; one that waits for something uses none.
      computed = _computed(self._process.pid) - self._before
      if computed > SECONDS or time.monotonic() - self._since > 6 * SECONDS:
        return Verdict("hang", f"more than {SECONDS:.0f} s")
    return None

  def end(self) -> None:
    self._process.kill()
    self._process.join()


def _computed(pid: int | None) -> float:
  """Seconds of computing that a process has had."""
  try:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
  except OSError:  # it has ended
    return 0.0
  return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run(jobs: list[tuple[str, int]], seed: int, workers: int) -> Iterator[tuple[Any, Verdict]]:
  waiting = collections.deque(jobs)
  busy: list[Worker] = [Worker(seed) for _ in range(min(workers, len(jobs)))]
  try:
    for worker in busy:
      worker.give(waiting.popleft())
    while busy:
      multiprocessing.connection.wait([worker.pipe for worker in busy], timeout=1.0)
      for i, worker in enumerate(list(busy)):
        verdict = worker.answer()
        if verdict is None:
          continue
        yield worker.job, verdict
        if verdict.outcome in ("hang", "crash"):
          worker.end()
          busy[i] = worker = Worker(seed)
        if waiting:
          worker.give(waiting.popleft())
        else:
          worker.job = None
      for worker in [worker for worker in busy if worker.job is None]:
        worker.end()
        busy.remove(worker)
  finally:
    for worker in busy:
      worker.end()


def plan(inputs: int, chosen: list[str]) -> list[tuple[str, int]]:
  """The cases: each kind's share of `inputs`, numbered from 0."""
  shares = {name: kind.share for name, kind in kinds().items() if name in chosen}
  total = sum(shares.values())
  return [
    (name, number)
    for name, share in shares.items()
    for number in range(max(1, inputs * share // total))
  ]
