"""Refusals of the operating system about files, each in one sentence."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_WORDS = {
  errno.ENOSPC: "the disk is full",
  errno.EDQUOT: "the disk quota is used up",
  errno.EROFS: "the file system is read-only",
  errno.EACCES: "permission is denied",
  errno.EPERM: "permission is denied",
  errno.ENOTDIR: "a part of this path is a file, not a folder",
  errno.EEXIST: "there is a file where a folder belongs",
  errno.EISDIR: "there is a folder where a file belongs",
  errno.ENAMETOOLONG: "the path is too long",
  errno.EFBIG: "the file grows beyond the limit on file sizes",
  errno.EMFILE: "too many files are open",
  errno.EIO: "the device reports an error",
}
_FULL = (errno.ENOSPC, errno.EDQUOT)
# Texts that libraries quote in exceptions of their own.
_QUOTED = {os.strerror(code): code for code in _WORDS if code not in (errno.EEXIST, errno.EIO)}


class DiskError(OSError):
  """A file could not be written or read; the message is a sentence for the user.

  Attributes:
    code: the system's code, as in `errno`.
  """

  def __init__(self, message: str, code: int | None = None):
    super().__init__(message)
    self.code = code

  @property
  def everywhere(self) -> bool:
    """True if other files on that disk would be refused too."""
    return self.code in (*_FULL, errno.EROFS)


def refusal(refused: OSError, path: str | Path, more: str = "") -> DiskError:
  """`refused` in a sentence, with `more` after it."""
  code = refused.code if isinstance(refused, DiskError) else refused.errno
  return DiskError(sentence(refused, path).removesuffix(".") + "." + more, code)


def cause(error: BaseException | None) -> OSError | None:
  """The operating system's refusal that led to `error`, also where a library only quotes it."""
  seen: set[int] = set()
  while error is not None and id(error) not in seen:
    seen.add(id(error))
    if isinstance(error, OSError) and (error.errno in _WORDS or isinstance(error, DiskError)):
      return error
    text = str(error)[:10_000]
    for quoted, code in _QUOTED.items():
      if quoted in text:
        return OSError(code, quoted)
    error = error.__cause__ or error.__context__
  return None


def sentence(error: OSError, path: str | Path | None = None) -> str:
  """The refusal, its path and, on a full disk, the number of free bytes."""
  if isinstance(error, DiskError):
    return str(error)
  path = error.filename if error.filename is not None else path
  told = _WORDS.get(error.errno or 0) or error.strerror or str(error)
  free = ""
  if error.errno in _FULL and path is not None:
    free = f"; {_free(Path(os.fsdecode(path))):,} bytes are free there"
  where = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else "a file"
  return f"{where[:300]}{'...' if len(where) > 300 else ''}: {told}{free}"


@contextlib.contextmanager
def told(path: str | Path) -> Iterator[None]:
  """A context that makes a `DiskError` of any exception that the system's refusal caused."""
  try:
    yield
  except Exception as error:
    refused = cause(error)
    if refused is None:
      raise
    raise refusal(refused, path) from error


def _free(path: Path) -> int:
  """The number of free bytes where `path` is, or would be."""
  for folder in (path, *path.absolute().parents):
    try:
      return shutil.disk_usage(folder).free
    except OSError:
      continue
  return 0
