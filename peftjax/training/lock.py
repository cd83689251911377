"""A lock on a workdir: one process at a time writes, by the system's lock on a file in it.

The lock ends with its process, however that ends, so none is ever stale. It is of the kind that
network file systems may not have; where locking is impossible, a run says so and goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from peftjax.io import disk, records

NAME = "run.lock"  # holds who has the lock; there only while someone has

_UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@dataclasses.dataclass(frozen=True)
class Holder:
  """A process that runs in a workdir."""

  pid: int
  host: str
  since: str
  command: str

  @classmethod
  def me(cls) -> Holder:
    """This process."""
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    return cls(os.getpid(), socket.gethostname(), since, " ".join(sys.argv)[:1000])

  def told(self) -> str:
    return f"process {self.pid} on {self.host} has run there since {self.since}"


class Held(ValueError):
  """Another process runs in the workdir."""


class Lock:
  """A workdir that belongs to this process; unless `kept` is set, no trace of the lock stays."""

  def __init__(self) -> None:
    self.kept = False


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[Lock]:
  """Makes `workdir` if need be and locks it until the block ends.

  A folder that was made for it goes again unless `kept` was set.

  Raises:
    Held: another process has it: which one, where, since when.
    disk.DiskError: it cannot be made or written to.
  """
  lock, made = Lock(), []
  try:
    made = [path for path in (workdir, *workdir.parents) if not path.exists()]
    descriptor = _acquire(workdir)
  except OSError as error:
    _remove(made)  # as far as nobody has written there
    raise disk.refusal(error, workdir, " Give another --workdir.") from None
  try:
    yield lock
  finally:
    with contextlib.suppress(OSError):
      (workdir / NAME).unlink()  # before it is let go: whoever waits for this file makes a new one
    os.close(descriptor)
    if not lock.kept:
      _remove(made)


def _acquire(workdir: Path) -> int:
  """The descriptor of the locked file, which names this process."""
  path = workdir / NAME
  while True:
    workdir.mkdir(parents=True, exist_ok=True)
    try:
      descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except FileNotFoundError:  # whoever had made the folder has just removed it
      continue
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      os.close(descriptor)
      who = _holder(path)
      raise Held(f"{workdir} is in use: {who}. Wait, or give another --workdir.") from None
    except OSError as error:
      if error.errno not in _UNKNOWN:
        os.close(descriptor)
        raise
      warnings.warn(f"{workdir} cannot be locked: start no second run in it", stacklevel=2)
    if _is(path, descriptor):
      break
    os.close(descriptor)  # it was removed by the one who had it
  try:
    _sign(path, descriptor)
  except BaseException:
    os.close(descriptor)
    raise
  return descriptor


def _sign(path: Path, descriptor: int) -> None:
  """Writes this process into the file, in which only another holder's name may be."""
  if os.fstat(descriptor).st_size:
    records.convert(records.read_object(path, "Move it away."), Holder, path)
  me = Holder.me()
  try:
    os.ftruncate(descriptor, 0)
    os.write(descriptor, (json.dumps(dataclasses.asdict(me)) + "\n").encode())
  except OSError:
    path.unlink()
    raise


def _is(path: Path, descriptor: int) -> bool:
  """Tells whether `path` is still the open file."""
  try:
    return os.path.samestat(os.stat(path), os.fstat(descriptor))
  except FileNotFoundError:
    return False


def _holder(path: Path) -> str:
  try:
    return records.convert(records.read_object(path), Holder, path).told()
  except ValueError:  # it has the lock and has not written its name yet
    return "another process has just begun a run there"


def _remove(made: list[Path]) -> None:
  for path in made:
    with contextlib.suppress(OSError):
      path.rmdir()
