"""Directories of every kind of tokenizer: ids as transformers', and what is damaged, refused."""

import zlib

import numpy as np
import pytest
from safetensors.numpy import load_file

from peftjax import data
from tests.golden import tokenizer_dirs
from tests.golden.tokenizer_texts import texts


@pytest.fixture(scope="module")
def golden():
  return load_file(tokenizer_dirs.ROOT / "ids.safetensors")


@pytest.fixture(scope="module")
def load(tmp_path_factory):
  """Loads a directory of `tokenizer_dirs` by name."""
  root = tmp_path_factory.mktemp("tokenizers")
  return lambda name: data.load_tokenizer(
    root / name if (root / name).exists() else tokenizer_dirs.write(name, root / name)
  )


@pytest.mark.parametrize("name", tokenizer_dirs.DIRECTORIES)
def test_ids_are_those_of_transformers(name, load, golden):
  """500 texts with every kind of white space, script, special token and length."""
  given = texts()
  rows = [np.asarray(e.ids, np.int32) for e in load(name).encodings(given)]
  found = [zlib.crc32(row.tobytes()) for row in rows]
  wrong = np.flatnonzero(golden[name] != np.asarray(found, np.uint32))
  assert [given[i] for i in wrong] == []
  shown = [row for text, row in zip(given, rows, strict=True) if len(text) > 20][:20]
  ends = np.cumsum(golden[f"{name}/lengths"])
  want = np.split(golden[f"{name}/ids"], ends[:-1])
  assert [row.tolist() for row in shown] == [row.tolist() for row in want]


def test_the_directories_differ(golden):
  """Each setting changes some ids, or the comparison would not see it."""
  digests = {name: golden[name].tobytes() for name in tokenizer_dirs.DIRECTORIES}
  same = {
    name
    for name in digests
    for other in digests
    if name < other and digests[name] == digests[other]
  }
  print(sorted(same))
  assert len(set(digests.values())) > 25
