"""A folder in a bucket (gs://, s3://), by `etils.epath`, as Orbax has it; refusals in a sentence.

A bucket has objects and no folders: one is written whole or not at all, none is appended to or
renamed, and nobody can lock it. This file has the operations that take one call each, and no more.
epath uses gcsfs and s3fs, or TensorFlow where that is installed; they find the credentials.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from peftjax.io import disk

# Schemes before "://": the extra that brings support, and the command that logs in.
SCHEMES: Mapping[str, tuple[str, str]] = {
  "gs": ("gcs", "gcloud auth application-default login"),
  "s3": ("s3", "aws configure"),
}
# A `pathlib.Path` makes two slashes one.
_URL = re.compile(r"(?:([A-Za-z][A-Za-z0-9+.-]*)://|(gs|s3):/)(.*)", re.DOTALL)
_PIECE = 2**24  # bytes per copied piece


def url(path: str | os.PathLike[str]) -> str | None:
  """The address of a folder in a bucket; None for a path on this machine.

  Raises:
    ValueError: it is an address of another kind, or names no bucket.
  """
  text = os.fspath(path)
  match = _URL.match(text)
  if match is None:
    return None
  scheme, rest = match[1] or match[2], match[3].strip("/")
  if scheme not in SCHEMES:
    allowed = " or ".join(f"{name}://BUCKET/FOLDER" for name in SCHEMES)
    raise ValueError(f"{text}: {scheme}:// is not known here. Write {allowed}, or a local folder.")
  if not rest or {"", ".", ".."} & {*rest.split("/")}:
    raise ValueError(f"{text} names no folder in a bucket. Write {scheme}://BUCKET/FOLDER.")
  return f"{scheme}://{rest}"


class Bucket:
  """The objects below an address, by names like those of files.

  Raises:
    ValueError: if the packages that read such addresses are not installed.
    disk.DiskError: from all methods: the bucket refuses, or cannot be reached.
  """

  def __init__(self, address: str):
    from etils import epath  # only here: a local run needs none

    self.address = address
    self._root = epath.Path(address)

  def read(self, name: str) -> bytes | None:
    """All bytes of a small object; None if there is none."""
    with self._told("read", name):
      try:
        with (self._root / name).open("rb") as file:
          return bytes(file.read())
      except FileNotFoundError:
        return None

  def write(self, name: str, data: bytes) -> None:
    """Puts a small object, in place of one of that name."""
    with self._told("written", name), (self._root / name).open("wb") as file:
      file.write(data)

  def download(self, name: str, path: Path) -> bool:
    """Downloads an object to `path`, and tells whether there was one."""
    with self._told("read", name):
      try:
        with (self._root / name).open("rb") as source:
          path.parent.mkdir(parents=True, exist_ok=True)
          with path.open("wb") as file:
            shutil.copyfileobj(source, file, _PIECE)
      except FileNotFoundError:
        return False
    return True

  def upload(self, path: Path, name: str) -> None:
    """Puts a file, in place of an object of that name."""
    with path.open("rb") as file, self._told("written", name):
      with (self._root / name).open("wb") as target:
        shutil.copyfileobj(file, target, _PIECE)

  def remove(self, name: str) -> None:
    """Removes an object, if there is one of that name."""
    with self._told("removed", name):
      (self._root / name).unlink(missing_ok=True)

  @contextlib.contextmanager
  def _told(self, done: str, name: str) -> Iterator[None]:
    """A context in which whatever the libraries raise becomes a sentence of ours."""
    try:
      yield
    except ImportError as error:
      scheme = self.address.partition(":")[0]
      raise ValueError(
        f"{self.address}: {scheme}:// needs a package that is not installed "
        f"({' '.join(str(error).split())[:200]}). Run pip install 'peftjax[{SCHEMES[scheme][0]}]'."
      ) from None
    except Exception as error:
      told = " ".join(f"{type(error).__name__}: {error}".split())
      login = SCHEMES[self.address.partition(":")[0]][1]
      raise disk.DiskError(
        f"{self.address}/{name} cannot be {done} ({told[:300]}). See that the bucket is there and "
        f"that this machine may read and write in it ({login}), or give another --workdir."
      ) from error
