"""A tiny model and corpus, one device unless a mesh is asked for."""

import shutil

import pytest

from peftjax.training import build, loop
from tests import tiny


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
  return tiny.model_dir(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
  return tiny.corpus(tmp_path_factory.mktemp("tiny") / "corpus.csv", 80)


@pytest.fixture(scope="session")
def run_once():
  """`train_and_evaluate` on one device, unless there is a mesh."""
  mesh_of = build.mesh_of

  def run(config, workdir, mesh="", **more):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(build, "mesh_of", lambda text: mesh_of(text) if text else None)
      return loop.train_and_evaluate(config, workdir, mesh=mesh, **more)

  return run


@pytest.fixture(scope="session")
def config(model_dir, corpus):
  """Makes the config of a short run: 4 steps an epoch, 2 epochs, one bucket; with changes."""

  def make(method="lora", **changes):
    base = dict(data__max_length=16, train__log_every=1, train__eval_batch_size=16)
    return tiny.config(model_dir, corpus, method, **{**base, **changes})

  return make


@pytest.fixture(scope="session")
def finished(run_once, config, tmp_path_factory):
  """The workdir and result of that short run; only to be read."""
  workdir = tmp_path_factory.mktemp("finished") / "run"
  return workdir, run_once(config(), workdir)


@pytest.fixture
def unfinished(finished, tmp_path):
  """A copy of that run as if it had been killed before the test split was scored."""
  workdir = tmp_path / "unfinished"
  shutil.copytree(finished[0], workdir)
  (workdir / "result.json").unlink()
  return workdir
