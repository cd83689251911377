"""A bucket in memory where gs:// leads, by the same way that a real one is reached: epath, fsspec.

It counts what it is asked, and can end the process at any of these, or refuse.

  python -m tests.buckets FOLDER INDEX FLAGS

trains with the flags of `experiments.train`, and a bucket that lies in a folder.
"""

import contextlib
import runpy
import sys

import pytest
from etils.epath import backend, gpath
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem


class Killed(BaseException):
  """Stands for `kill -9`: nothing that handles errors handles it."""


class Fake(MemoryFileSystem):
  """Objects by name in `store`, each written whole when its file is closed.

  Attributes:
    asked: what was done so far: "read", "write" or "remove", and the name.
    kill_at: the number of the one, from 0, that is not done any more, nor any after it.
    refused: those of these kinds raise PermissionError.
  """

  protocol = ("gs", "gcs")
  cachable = False

  def __init__(self):
    super().__init__()
    self.store, self.pseudo_dirs = {}, [""]
    self.asked, self.kill_at, self.refused = [], None, ()

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol("memory://" + path.removeprefix("gs://"))

  def _open(self, path, mode="rb", **kwargs):
    self._ask("read" if mode == "rb" else "write", path)
    return super()._open(path, mode, **kwargs)

  def rm(self, path, recursive=False, maxdepth=None):
    self._ask("remove", self._strip_protocol(path))
    return super().rm(path, recursive, maxdepth)

  def _ask(self, kind, name):
    if self.kill_at is not None and len(self.asked) >= self.kill_at:
      raise Killed
    self.asked.append((kind, name))
    if kind in self.refused:
      raise PermissionError(f"{kind} is forbidden: 403")

  def objects(self, address):
    """Their bytes below an address, by name."""
    root = self._strip_protocol(address) + "/"
    return {
      name.removeprefix(root): file.getvalue()
      for name, file in sorted(self.store.items())
      if name.startswith(root)
    }

  def copy_to(self, address, folder):
    """Makes files of the objects below an address."""
    for name, data in self.objects(address).items():
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      (folder / name).write_bytes(data)
    return folder


@contextlib.contextmanager
def made():
  """The bucket that every gs:// leads to."""
  fake = Fake()
  with leads_to(lambda: fake):
    yield fake


@contextlib.contextmanager
def leads_to(find):
  """gs:// leads to the file system that `find()` returns."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(gpath, "_is_tf_installed", lambda: False)
    patch.setattr(backend._FileSystemSpecBackend, "fs", lambda self, path: find())
    yield


def on_disk(folder):
  """A bucket whose objects are files below `folder`, which outlives its process."""

  class Disk(LocalFileSystem):
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
      return super()._strip_protocol(path.replace("gs:/", str(folder)))

  return Disk(auto_mkdir=True)


def main(folder, index, *flags):
  """`experiments.train` where gs:// is below `folder`, and only process 0 has it."""

  def refuse():
    raise AssertionError("this process has no way to the bucket")

  disk = on_disk(folder)
  sys.argv = ["train", *flags]
  with leads_to(refuse if int(index) else lambda: disk):
    runpy.run_module("experiments.train", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
