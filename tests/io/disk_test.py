"""What the system refuses is told in one sentence, whichever library says it."""

import errno
import os

import pytest

from peftjax.io import disk


def refused(code, path="/a/b"):
  return OSError(code, os.strerror(code), path)


@pytest.mark.parametrize(
  ("code", "told"),
  [
    (errno.ENOSPC, "disk is full"),
    (errno.EDQUOT, "quota"),
    (errno.EROFS, "read-only"),
    (errno.EACCES, "permission"),
    (errno.ENAMETOOLONG, "too long"),
    (errno.EFBIG, "limit on file sizes"),
  ],
)
def test_a_refusal_names_path_and_reason(tmp_path, code, told):
  text = disk.sentence(refused(code, str(tmp_path / "no" / "file")))
  assert str(tmp_path / "no" / "file") in text and told in text
  assert ("bytes are free" in text) == (code in (errno.ENOSPC, errno.EDQUOT))
  full = code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
  assert disk.refusal(refused(code), "x").everywhere == full


def test_it_is_found_where_a_library_wraps_or_only_quotes_it(tmp_path):
  """Background threads of Orbax raise exceptions of their own."""
  quoting = RuntimeError("RESOURCE_EXHAUSTED: [OS error 28: ENOSPC No space left on device]")
  for error in (refused(errno.ENOSPC), quoting):
    with pytest.raises(disk.DiskError, match="the disk is full; [0-9,]+ bytes are free") as told:
      with disk.told(tmp_path):
        try:
          raise error
        except Exception as inner:
          raise ValueError("the save failed") from inner
    assert told.value.everywhere and "\n" not in str(told.value)


def test_anything_else_goes_through(tmp_path):
  with pytest.raises(KeyError), disk.told(tmp_path):
    raise KeyError("x")
