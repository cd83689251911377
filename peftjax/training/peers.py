"""The processes that share a run: who writes and decides, and how the others hear of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from peftjax.io import disk
from peftjax.training import lock, process

# What a user can mend. Anything else that ends the main process ends the others as what it is.
_TOLD: Mapping[str, Callable[[str], Exception]] = {
  "ValueError": ValueError,
  "Held": lock.Held,
  "DiskError": disk.DiskError,
  "FloatingPointError": FloatingPointError,
}


class Peers:
  """All processes of `jax.distributed`, or this one alone.

  Each calls the same methods in the same order, and waits in them for the others.

  Attributes:
    count: how many there are.
    main: whether this one speaks for all: it alone reads and writes the workdir, and prints.
  """

  def __init__(self) -> None:
    self.count = jax.process_count()
    self.main = jax.process_index() == 0

  def told(self, make: Callable[[], Any]) -> Any:
    """What `make()`, called by the main process alone, returns: something that JSON can say.

    Raises:
      Exception: what `make` raises, in all processes.
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
    """ValueError, in all processes, if one was started with something else than the others.

    Args:
      **given: by a name for the message: for JSON. The code's commit is compared as well.
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
    """`lock.hold`, by the main process for all."""
    with contextlib.ExitStack() as stack:
      held = [lock.Lock()]

      def enter() -> None:
        held[0] = stack.enter_context(lock.hold(workdir))

      self.told(enter)
      yield held[0]

  def asked(self, asked: str, step: int) -> str:
    """The signal that asks all of them to save and stop after `step`, "" if none does.

    Of several processes JAX notices SIGTERM, and names a step that none of them has passed.
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
