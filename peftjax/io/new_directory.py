"""A directory that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def check(directory: str | os.PathLike) -> None:
  """Raises ValueError if there is something at that path, an empty directory excepted."""
  directory = Path(directory)
  if os.path.lexists(directory) and (not directory.is_dir() or any(directory.iterdir())):
    raise ValueError(f"{directory} is not an empty directory: give a new one")


@contextlib.contextmanager
def writing(directory: str | os.PathLike) -> Iterator[Path]:
  """A folder beside `directory`, which takes its name when the block ends without an error.

  Raises:
    ValueError: see `check`.
  """
  check(directory)
  directory = Path(directory).resolve()
  directory.parent.mkdir(parents=True, exist_ok=True)
  temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
  try:
    yield temporary
    temporary.chmod(directory.parent.stat().st_mode & 0o777)
    os.replace(temporary, directory)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
