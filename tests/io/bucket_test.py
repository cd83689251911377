"""Addresses of folders in buckets."""

import pathlib

import pytest
from etils import epath

from peftjax.io import bucket


@pytest.mark.parametrize(
  "path",
  ["gs://b/x/run", "gs://b/x/run/", pathlib.Path("gs://b/x/run"), epath.Path("gs://b/x/run")],
)
def test_an_address_in_any_writing(path):
  assert bucket.url(path) == "gs://b/x/run"
  assert bucket.url("s3://b") == "s3://b"


@pytest.mark.parametrize("path", ["runs/one", "/runs", "~/runs", "", ".", "a:b", "C:/x", "gs:x"])
def test_a_local_path_is_none(path):
  assert bucket.url(path) is None
  assert bucket.url(pathlib.Path(path)) is None


@pytest.mark.parametrize(
  ("path", "told"),
  [
    ("http://b/run", r"http:// is not known here. Write gs://BUCKET/FOLDER or s3://"),
    ("az://b/run", "az:// is not known"),
    ("GS://b/run", "GS:// is not known"),
    ("file:///runs", "or a local folder"),
    ("gs://", "names no folder"),
    ("gs://b//run", "names no folder"),
    ("s3://b/../run", r"Write s3://BUCKET/FOLDER"),
  ],
)
def test_other_addresses_are_a_sentence(path, told):
  with pytest.raises(ValueError, match=told) as error:
    bucket.url(path)
  assert len(str(error.value).splitlines()) == 1
