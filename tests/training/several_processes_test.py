"""Several processes that share a run compute what one does."""

import itertools

import numpy as np
import pytest

from tests import tiny, tiny_lm
from tests.training import several_processes

MESHES = ("data:4", "fsdp:4", "tensor:4", "fsdp:2,tensor:2")


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
  """A classifier and a language model, dense and in four bits, of three steps each."""
  folder = tmp_path_factory.mktemp("several")
  texts = tiny.model_dir(folder / "bert"), tiny.corpus(folder / "texts.csv", 80)
  rows = tiny_lm.model_dir(folder / "llama"), tiny_lm.corpus(folder / "rows.jsonl")
  common = dict(train__steps=3, train__batch_size=8, train__eval_batch_size=8)
  made = {}
  for quant in ("none", "nf4"):
    made["classify", quant] = tiny.config(*texts, quant__name=quant, **common)
    made["causal_lm", quant] = tiny_lm.config(*rows, f"quant={quant}", **common)
  return made


def check(configs, cases):
  found = several_processes.together([(configs[kind], mesh) for kind, mesh in cases])
  alone = {kind: several_processes.numbers(configs[kind], None) for kind, _ in cases}
  for (kind, mesh), (rows, scores) in zip(cases, found, strict=True):
    want, want_scores = alone[kind]
    for got, row in zip(rows, want, strict=True):
      assert got.keys() == row.keys()
      for name in row:
        np.testing.assert_allclose(got[name], row[name], rtol=1e-5, err_msg=f"{kind} {mesh} {name}")
    for name, value in want_scores.items():
      np.testing.assert_allclose(scores[name], value, rtol=1e-5, err_msg=f"{kind} {mesh} {name}")


def test_two_processes_train_as_one(configs):
  """This mesh does not split a batch: each process needs all of its rows."""
  check(configs, [(("causal_lm", "nf4"), "tensor:4")])


@pytest.mark.slow(reason="every mesh with every kind of run and base")
def test_two_processes_train_as_one_on_every_mesh(configs):
  check(configs, list(itertools.product(configs, MESHES)))
