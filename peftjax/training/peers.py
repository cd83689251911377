"""The processes that share a run: who writes and decides, and how the others hear of it."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from peftjax.io import disk
from peftjax.training import lock, process

# Errors that a user can mend. Any other that ends the main process ends the others as it is.
_TOLD: Mapping[str, Callable[[str], Exception]] = {
  "ValueError": ValueError,
  "Held": lock.Held,
  "DiskError": disk.DiskError,
  "FloatingPointError": FloatingPointError,
}


# Seconds between signs of life, and without one until a process counts as gone.
_SIGN, _GONE = 5.0, 60.0


def watch(gone: Callable[[], None]) -> None:
  """Calls `gone`, in a thread, when one of the processes gives no sign of life for a minute.

  A collective may wait for it for ever. Each process counts up a number that all can read.
  """
  client, me = _client(), jax.process_index()
  others = [i for i in range(jax.process_count()) if i != me]

  def look() -> None:
    seen = dict.fromkeys(others, ("", time.monotonic()))
    for beat in itertools.count():
      try:
        client.key_value_set(f"peftjax/alive/{me}", str(beat), allow_overwrite=True)
        found = dict(client.key_value_dir_get("peftjax/alive/"))
      except Exception:  # process 0, which keeps the numbers, is gone, or this run has ended
        found = {}
      now = time.monotonic()
      for i in others:
        said = found.get(f"peftjax/alive/{i}", "")
        if said and said != seen[i][0]:
          seen[i] = said, now
        if now - seen[i][1] > _GONE:
          return gone()
      time.sleep(_SIGN)

  threading.Thread(target=look, name="peers", daemon=True).start()


def leave(code: int) -> None:
  """Ends all processes but process 0, which JAX in the others asks to the last, and goes on alone.

  One that fails while the others do not waits for them a few seconds.
  """
  with contextlib.suppress(Exception):
    _client().wait_at_barrier("peftjax/end", int(1000 * (_SIGN if code else _GONE)))
  if jax.process_index():
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _client() -> Any:
  return distributed.global_state.client


class Peers:
  """All processes of `jax.distributed`, or this one alone.

  Each calls the same methods in the same order, and waits in them for the others.

  Attributes:
    count: how many there are.
    main: True if this one speaks for all: it alone reads and writes the workdir, and prints.
  """

  def __init__(self) -> None:
    self.count = jax.process_count()
    self.main = jax.process_index() == 0

  def told(self, make: Callable[[], Any]) -> Any:
    """The result of `make()`, called by the main process alone: something that JSON can say.

    Raises:
      Exception: any exception of `make`, in all processes.
    """
    if self.count == 1:
      return make()
    raised: Exception | None = None
    said: dict[str, Any] = {}
    if self.main:
      try:
        said = {"value": make()}
      except Exception as error:
        raised, said = error, {"error": type(error).__name__, "message": str(error)}
    heard = json.loads(self._broadcast(json.dumps(said).encode()))
    if raised is not None:
      raise raised
    if "error" in heard:
      raise _TOLD.get(heard["error"], RuntimeError)(heard["message"])
    return heard["value"]

  def agree(self, **given: Any) -> None:
    """Raises ValueError, in all processes, if one was started with other values than the others.

    Args:
      **given: values for JSON, by a name for the message. The code's commit is compared as well.
    """
    if self.count == 1:
      return
    given["commit"] = process.commit()
    texts = [json.dumps(value, sort_keys=True) for value in given.values()]
    hashes = [hashlib.sha256(text.encode()).digest() for text in texts]
    digests = np.frombuffer(b"".join(hashes), np.uint8).reshape(len(texts), -1)
    found = np.asarray(multihost_utils.process_allgather(digests))  # [processes, given, 32]
    for i, name in enumerate(given):
      if others := np.flatnonzero((found[:, i] != found[0, i]).any(-1)).tolist():
        raise ValueError(
          f"process {others[0]} of {self.count} has another {name} than process 0. Start all of "
          "them with the same command and the same code."
        )

  @contextlib.contextmanager
  def hold(self, workdir: Any) -> Iterator[lock.Lock]:
    """Holds the lock `lock.hold`, by the main process for all."""
    with contextlib.ExitStack() as stack:
      held = [lock.Lock()]

      def enter() -> None:
        held[0] = stack.enter_context(lock.hold(workdir))

      self.told(enter)
      yield held[0]

  def asked(self, asked: str, step: int) -> str:
    """The signal that asks all processes to save and stop after `step`, "" if none does.

    With several processes JAX notices SIGTERM, and names a step that none of them has passed.
    """
    if self.count == 1:
      return asked
    return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else ""

  def _broadcast(self, text: bytes) -> bytes:
    """The main process's text."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    buffer = np.zeros(size, np.uint8)
    if self.main:
      buffer[:] = np.frombuffer(text, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(buffer)).astype(np.uint8).tobytes()
