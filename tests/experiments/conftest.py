"""Commands called in this process, each module with its flags to itself."""

import contextlib
import importlib
import io
import types

import pytest
from absl import flags

from peftjax.training import build
from tests import tiny


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
  return tiny.model_dir(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
  return tiny.corpus(tmp_path_factory.mktemp("tiny") / "corpus.csv", 80)


@pytest.fixture(scope="session")
def config(model_dir, corpus):
  """Makes the config of the shortest run: two steps, one bucket; with changes."""

  def make(method="lora", **changes):
    base = dict(data__max_length=16, train__steps=2)
    return tiny.config(model_dir, corpus, method, **{**base, **changes})

  return make


@pytest.fixture(scope="session")
def command():
  """Calls `main` of a module of `experiments` with its flags set, on one device.

  A process normally imports one command. Here flags of one that was imported before make way.
  """
  mesh_of, runtime = build.mesh_of, importlib.import_module("experiments.runtime")

  def call(module, **values):
    main = load(module)
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(build, "mesh_of", lambda text: mesh_of(text) if text else None)
      patch.setattr(runtime, "set_up", lambda cache: None)
      if hasattr(main, "DISTRIBUTED"):
        values.setdefault("distributed", "off")
      if hasattr(main, "FACTORY"):
        values.setdefault("factory", None)
      if hasattr(main, "PROFILE"):
        values.setdefault("profile", 0)
      if hasattr(main, "EXECUTOR"):
        values = {"executor": "local", "workers": 1, "resources": "", **values}
      for name, value in values.items():
        patch.setattr(main, name.upper(), types.SimpleNamespace(value=value))
      return main.main([module])

  return call


@pytest.fixture(scope="session")
def trained(command, config, tmp_path_factory):
  """The workdir of a run that `experiments.train` made, and what it printed."""
  workdir, printed = tmp_path_factory.mktemp("trained") / "run", io.StringIO()
  with contextlib.redirect_stdout(printed):
    command("train", config=config(), workdir=str(workdir), mesh="")
  return workdir, printed.getvalue()


def load(name):
  """Imports `experiments.<name>`."""
  for module, registered in list(flags.FLAGS.flags_by_module_dict().items()):
    if module.startswith("experiments."):
      for flag in list(registered):
        delattr(flags.FLAGS, flag.name)
  return importlib.import_module(f"experiments.{name}")


@pytest.fixture
def fails(command, capsys):
  """Runs a command that must fail; its message, which fits a screen and is no trace."""

  def call(module, **values):
    with pytest.raises(SystemExit) as ended:
      command(module, **values)
    message = capsys.readouterr().err
    assert ended.value.code == 1
    assert message.startswith("error: ")
    assert "Traceback" not in message and len(message.splitlines()) <= 24
    return message

  return call
