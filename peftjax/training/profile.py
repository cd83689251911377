"""`Trace`: a profile of some steps of a run, for TensorBoard's profile plugin and Perfetto."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from peftjax.io import disk
from peftjax.training.run import Run

# Steps of a process that are not traced: the first is compiled, and the second is the first to
# find all that later ones find. (A batch of another length compiles its own program, whenever.)
WARM_UP = 2


def check(count: int, total: int) -> None:
  """Raises ValueError unless a run of `total` steps, if not interrupted, has as many to trace."""
  if not 0 <= count <= max(0, total - WARM_UP):
    raise ValueError(
      f"--profile={count}: the run has {total} steps, and the first {WARM_UP} of a process, which "
      f"compile, are not traced. Write a number from 0, for none, to {max(0, total - WARM_UP)}."
    )


class Trace:
  """A trace of `count` steps of this process, written when they are done or the block is left.

  The steps compute the same as without it. Before the first and after the last one the host waits
  for the devices, so that whole steps are traced; the run's work between them, as well.
  """

  def __init__(self, run: Run, count: int, folder: Path, say: Callable[[str], None]):
    """Makes the folder, and starts nothing yet.

    Args:
      run: the run whose steps are traced.
      count: 0 for none. If a run that goes on has fewer left, those; and `say` tells.
      folder: gets `plugins/profile/TIME/`; if there are several processes each has a folder in it.
      say: takes messages for a person.
    """
    left = max(0, run.total - run.steps_done - WARM_UP)
    if count > left:
      say(f"--profile={count}: {left} steps are left to trace")
    self._run, self._count, self._say = run, min(count, left), say
    self._folder = folder
    if jax.process_count() > 1:  # JAX names files by host, of which several may be one
      self._folder = folder / f"process_{jax.process_index()}"
    self._begun: int | None = None  # the first step traced, while it runs
    if self._count:
      self._folder.mkdir(parents=True, exist_ok=True)  # a failure to write is told at once

  def steps(self) -> Iterator[int]:
    """`run.steps()`, some of them traced."""
    steps, first = self._run.steps(), self._run.steps_done + WARM_UP + 1
    for number in range(self._run.steps_done + 1, self._run.total + 1):
      if self._count and number == first:
        self._start()
      with self._named(number):
        next(steps)
      if self._begun is not None and number == first + self._count - 1:
        self._stop()
      yield number

  def _named(self, number: int) -> contextlib.AbstractContextManager[object]:
    if self._begun is None:
      return contextlib.nullcontext()
    return jax.profiler.StepTraceAnnotation("train", step_num=number)

  def _start(self) -> None:
    jax.block_until_ready(self._run.state)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every call of Python would drown the steps
    jax.profiler.start_trace(self._folder, create_perfetto_trace=True, profiler_options=options)
    self._begun = self._run.steps_done + 1

  def _stop(self) -> None:
    begun, self._begun = self._begun, None
    try:
      jax.block_until_ready(self._run.state)
    finally:
      with disk.told(self._folder):
        jax.profiler.stop_trace()
    written = max(self._folder.glob("plugins/profile/*/perfetto_trace.json.gz"))
    self._say(
      f"traced steps {begun} to {self._run.steps_done}: {self._folder} for TensorBoard's profile "
      f"plugin (xprof), {written.relative_to(self._folder)} in it for Perfetto"
    )

  def __enter__(self) -> Trace:
    return self

  def __exit__(self, kind: object, error: object, trace: object) -> None:
    if self._begun is not None:
      # The error that ended the run is raised, whether or not its trace can be written.
      with contextlib.suppress(*((Exception,) if error else ())):
        self._stop()
