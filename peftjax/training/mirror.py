"""Workdirs of runs: a local folder or, for a workdir in a bucket, a copy of it on this machine.

A bucket can neither be appended to nor locked, and on most of them Orbax's renaming of a folder
is many copies that a kill can part. So no part of a run knows of buckets: it works in a temporary
folder, to which all that holds of a workdir applies, and `Mirror` brings the bucket's files there
before and puts new ones back whenever a checkpoint is whole, and at the end.

`contents.json` in the bucket makes many objects one state. It names the `files` that a run goes on
from and, as `loose`, all others that may be there, which it names before they are written: so a
kill at any moment leaves the state before or the one after, and no object that nobody knows of.
Files of checkpoints are put under names that the state does not have yet, and removed once it does
not have them any more. Other files are overwritten: rows of metrics after those of the checkpoint
are cut when a run goes on, as on this machine.

Its `writer` stands for the lock: a process that starts puts its own name there, and one that finds
another's there when it saves ends. So the one that was started last goes on, where on this machine
it is the first; nobody has to clean up after a preempted one. Between that look and the writing
after it no bucket lets anybody wait: two that save in the same second may leave a damaged
checkpoint, which its digests tell.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

from peftjax.io import bucket, disk, records
from peftjax.io.bucket import Bucket
from peftjax.training import build, lock
from peftjax.training import workdir as workdirs
from peftjax.training.checkpoint import Checkpoints
from peftjax.training.peers import Peers
from peftjax.training.relay import Relayed

RECORD = "contents.json"
_LAST = "result.json"  # tells launchers that all else is there
_CHECKPOINTS = "checkpoints/"
_ELSEWHERE = "Put it back from a copy, or give another --workdir."


@dataclasses.dataclass(frozen=True)
class Contents:
  """The contents of `contents.json`."""

  writer: lock.Holder
  token: str  # a token of that writer: process numbers come again
  files: list[str]
  loose: list[str]

  def __post_init__(self) -> None:
    for name in (*self.files, *self.loose):
      parts = name.split("/")
      if name.startswith("/") or {"", ".", "..", RECORD} & {*parts}:
        raise ValueError(f"{records.clip(name)} is not a name of a file of a run")


class Here:
  """A workdir on this machine, which is written where it is.

  Attributes:
    folder: where the run works.
  """

  def __init__(self, folder: Path):
    self.folder = folder

  def claim(self) -> None:
    """Claims the workdir before anything is written: `lock` has seen to it."""

  def keep(self, wait: Callable[[], None]) -> None:
    """Keeps a checkpoint that has begun to be saved: it may go on being."""

  def checkpoints(self, *, read_only: bool = False) -> Checkpoints:
    """The checkpoints of the run, for their writers and readers."""
    return Checkpoints(self.folder / "checkpoints", read_only=read_only)

  def named(self, text: str) -> str:
    """`text` about the folder, as text about the workdir that the user gave."""
    return text

  def newest(self) -> int | None:
    """The step of the checkpoint that a run would go on from."""
    return workdirs.newest(self.folder / "checkpoints")


class Mirror(Here):
  """A workdir in a bucket, with a copy of it in `folder`, which is empty at first.

  If there are several processes all make one, and the main one alone has the copy and asks the
  bucket: their machines may have no file system in common.

  Raises:
    ValueError: the bucket's contents are damaged, or of something else.
    disk.DiskError: in all methods: the bucket cannot be read or written.
  """

  def __init__(self, address: str, folder: Path, peers: Peers):
    super().__init__(folder)
    self._peers, self._bucket = peers, Bucket(address)
    self._there: Contents | None = None
    self._claimed: Contents | None = None
    self._kept: dict[str, tuple[int, ...]] = {}
    peers.told(self._bring)

  def _bring(self) -> None:
    self._there = self._read()
    for name in self._there.files if self._there else ():
      if not self._bucket.download(name, self.folder / name) and name.startswith(_CHECKPOINTS):
        raise ValueError(
          f"{self._bucket.address}/{name} is gone, which {RECORD} names. {_ELSEWHERE}"
        )
    self._kept = self._stamps()

  def checkpoints(self, *, read_only: bool = False) -> Checkpoints:
    if self._peers.count == 1:
      return super().checkpoints(read_only=read_only)
    return Relayed(self.folder / "checkpoints", self._peers, read_only=read_only)

  def named(self, text: str) -> str:
    return text.replace(str(self.folder), self._bucket.address)

  def claim(self) -> None:
    """Makes this process the one that writes; for the main process.

    Raises:
      lock.Held: another one has begun to since the bucket was read.
    """
    there = self._read()
    if there != self._there:
      who = "" if there is None else f": {there.writer.told()}"
      raise lock.Held(
        f"{self._bucket.address} has changed since this run began to read it{who}. Start it again "
        "to go on from there, or give another --workdir."
      )
    files, loose = (there.files, there.loose) if there else ([], [])
    self._claimed = Contents(lock.Holder.me(), uuid.uuid4().hex, files, loose)
    self._write(self._claimed)

  def keep(self, wait: Callable[[], None]) -> None:
    """Puts new files into the bucket, once the checkpoint is whole.

    Raises:
      lock.Held: another process has claimed the workdir.
    """
    wait()
    self._peers.told(self.put)

  def put(self) -> None:
    """Puts files into the bucket as `keep`, if they are whole; none if nothing was claimed."""
    if self._claimed is None:
      return
    now = self._stamps()
    changed = {name for name, stamp in now.items() if self._kept.get(name) != stamp}
    old, loose = {*self._claimed.files}, {*self._claimed.loose}
    if not changed and old == now.keys():
      return
    self._say(old, loose | (changed - old))
    for name in sorted(changed - {_LAST}):
      self._bucket.upload(self.folder / name, name)
    loose = (loose | old) - now.keys()
    self._say(now, loose)
    for name in sorted(loose):
      self._bucket.remove(name)
    if _LAST in changed:
      self._bucket.upload(self.folder / _LAST, _LAST)
    self._kept = now

  def newest(self) -> int | None:
    """The step of the newest checkpoint in the bucket."""
    contents = self._claimed or self._there
    names = [PurePosixPath(name).parts for name in contents.files] if contents else []
    steps = [int(x[2]) for x in names if x[:2] == ("checkpoints", "latest") and x[2].isdecimal()]
    return max(steps, default=None)

  def _stamps(self) -> dict[str, tuple[int, ...]]:
    """Every file by name, with values that change when it is written."""
    found: dict[str, tuple[int, ...]] = {}
    for path in self.folder.rglob("*"):
      name = path.relative_to(self.folder).as_posix()
      if path.is_file() and not workdirs.passing(name):
        stat = path.stat()
        found[name] = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
    return found

  def _say(self, files: Iterable[str], loose: Iterable[str]) -> None:
    """Writes the contents, if they are still this process's to write."""
    there = self._read()
    mine = self._claimed
    if mine is None or there is None or there.token != mine.token:
      who = "its contents.json is gone" if there is None else there.writer.told()
      raise lock.Held(
        f"{self._bucket.address} is no longer this process's: {who}. This one ends; what it saved "
        "before is kept."
      )
    self._claimed = dataclasses.replace(mine, files=sorted(files), loose=sorted(loose))
    self._write(self._claimed)

  def _write(self, contents: Contents) -> None:
    text = json.dumps(dataclasses.asdict(contents), indent=1) + "\n"
    self._bucket.write(RECORD, text.encode())

  def _read(self) -> Contents | None:
    """The contents; None if there is no workdir.

    Raises:
      ValueError: the record is damaged, or there is a workdir without one.
    """
    where = f"{self._bucket.address}/{RECORD}"
    data = self._bucket.read(RECORD)
    if data is not None:
      return records.convert(records.parse_object(data, where, _ELSEWHERE), Contents, where)
    if self._bucket.read("config.json") is not None:
      raise ValueError(
        f"{where} is not there, which names the files of a run, though there is a config.json. "
        f"{_ELSEWHERE} A workdir that was copied to a bucket is used where it was copied from."
      )
    return None


def where(workdir: str | Path) -> Path | str:
  """A workdir as an absolute path or, in a bucket, its address; ValueError if it is neither."""
  return bucket.url(workdir) or build.resolve(workdir)


@contextlib.contextmanager
def opened(place: Path | str, peers: Peers) -> Iterator[Here]:
  """A context with the workdir from `where`, to train in.

  If the block fails by other than the bucket's fault, its files are put there still: its rows
  of metrics tell why.

  Raises:
    ValueError, disk.DiskError: see `Mirror`.
  """
  if isinstance(place, Path):
    yield Here(place)
    return
  with _copied(place, peers) as mirror:
    try:
      yield mirror
    except (lock.Held, disk.DiskError):
      raise
    except Exception:
      with contextlib.suppress(ValueError, OSError):
        mirror.put()
      raise


@contextlib.contextmanager
def read(workdir: str | Path) -> Iterator[Path]:
  """A context with the folder to read a run from.

  Raises:
    ValueError, disk.DiskError: see `Mirror`.
  """
  place = where(workdir)
  if isinstance(place, Path):
    yield place
    return
  with _copied(place, Peers()) as mirror:
    yield mirror.folder


@contextlib.contextmanager
def _copied(address: str, peers: Peers) -> Iterator[Mirror]:
  """A mirror that leaves no folder here; errors about its files name the bucket."""
  with tempfile.TemporaryDirectory(prefix="peftjax-", ignore_cleanup_errors=True) as folder:
    try:
      yield Mirror(address, Path(folder), peers)
    except (ValueError, FloatingPointError) as error:
      if folder not in str(error):
        raise
      raise type(error)(str(error).replace(folder, address)) from error
