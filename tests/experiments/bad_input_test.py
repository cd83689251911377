"""Bad input ends in a message that fits a screen, and no workdir is made."""

import json
import pathlib
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from peftjax.training import defaults

ROOT = pathlib.Path(__file__).parents[2]
TWENTY = b"text,label\n" + b"".join(b"a%d,x\n" % i for i in range(20))
QUERY = "bert.encoder.layer.1.attention.self.query.weight"


@pytest.fixture
def workdir(tmp_path):
  yield tmp_path / "run"
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("change", "named"),
  [
    ({"method__targets": ("qeury",)}, ["'qeury'", "query"]),
    ({"method__targets": ("query", r".*/nowhere/kernel")}, [".*/nowhere/kernel"]),
    ({"method__rank": 17}, ["layers_0/attention/self/query/kernel", "17", "16 x 16"]),
    ({"method__targets": ("query", "head/.*")}, ["head/classifier", "two methods"]),
    ({"method__rank_pattern": ("quary=4",)}, ["'quary'", "rank_pattern"]),
    ({"model__directory": "not/there"}, ["not/there"]),
  ],
  ids=["no match", "one of two no match", "rank", "two methods", "pattern", "directory"],
)
def test_settings_that_do_not_fit_the_model(fails, config, workdir, change, named):
  """Targets, ranks, claims and lengths are checked against the model, by path and number."""
  message = fails("train", config=config(**change), workdir=str(workdir), mesh="")
  assert all(part in message for part in named), message


def test_unknown_key_in_a_config_file(fails, config, workdir):
  """A key that a config file made up is named, with the near one."""
  made = config()
  with made.unlocked():
    made.optimizer.learning_rte = 1e-3
  message = fails("train", config=made, workdir=str(workdir), mesh="")
  assert "'learning_rte'" in message and "'learning_rate'" in message


def test_mesh_that_does_not_fit_the_devices(fails, config, workdir):
  """A mesh of another size than the devices is refused with both numbers."""
  message = fails("train", config=config(), workdir=str(workdir), mesh="data:3")
  assert "3 places for 8 devices" in message


def damage(directory, kind):
  """Breaks model.safetensors in one way; returns what the message must name."""
  path = directory / "model.safetensors"
  tensors = load_file(path)
  if kind == "missing":
    del tensors[QUERY]
  elif kind == "extra":
    tensors["bert.encoder.layer.1.extra.weight"] = np.zeros(3, np.float32)
  elif kind == "misshaped":
    tensors[QUERY] = np.zeros((16, 8), np.float32)
  if kind in ("missing", "extra", "misshaped"):
    save_file(tensors, path)
    return {"extra": "layer.1.extra.weight"}.get(kind, QUERY)
  data = path.read_bytes()
  if kind == "truncated":
    path.write_bytes(data[: len(data) // 2])
  elif kind == "long header":
    path.write_bytes(struct.pack("<Q", 2**62) + data[8:])
  elif kind == "overlap":
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header[QUERY]["data_offsets"] = [0, header[QUERY]["data_offsets"][1]]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
  elif kind == "pickle":
    path.rename(directory / "pytorch_model.bin")
    return "pytorch_model.bin"
  return "model.safetensors"


@pytest.mark.parametrize(
  "kind",
  ["missing", "extra", "misshaped", "truncated", "long header", "overlap", "pickle"],
)
def test_damaged_model(fails, config, workdir, model_dir, tmp_path, kind):
  """A file that is not the model config.json describes is refused by file or tensor."""
  shutil.copytree(model_dir, tmp_path / "model")
  named = damage(tmp_path / "model", kind)
  changed = config(model__directory=str(tmp_path / "model"))
  message = fails("train", config=changed, workdir=str(workdir), mesh="")
  assert named in message, message


@pytest.mark.parametrize(
  ("content", "named"),
  [
    (b"txt,label\na,b\n", ["'text'", "'txt'", "'label'"]),
    (b"text,lbl\na,b\n", ["'label'", "'lbl'"]),
    (b"text,label\nna\xefve,x\n", ["line 2", "0xef", "UTF-8", "iconv"]),
    (b"text,label\n" + b"".join(b"a%d,x\n" % i for i in range(20)), ["only class", "'x'"]),
    (
      b"text,label\n" + b"".join(b"a%d,x\n" % i for i in range(20)) + b"b,y\n",
      ["'y'", "1 training"],
    ),
    (b"text,label\na,\n", ["line 2", "'label' is empty"]),
    (b"text,label\n", ["no examples"]),
  ],
  ids=[
    "no text column",
    "no label column",
    "encoding",
    "one class",
    "small class",
    "no label",
    "no row",
  ],
)
def test_broken_table(fails, config, workdir, tmp_path, content, named):
  """A CSV file is refused by file and column, line or class."""
  path = tmp_path / "train.csv"
  path.write_bytes(content)
  changed = config(data__train_file=str(path))
  message = fails("train", config=changed, workdir=str(workdir), mesh="")
  assert all(part in message for part in named), message


def test_texts_longer_than_the_model(fails, config, workdir, tmp_path):
  """A max_length above the model's positions is refused where texts are that long."""
  rows = "".join(f"{'word ' * 90}{i},{'xy'[i % 2]}\n" for i in range(40))
  (tmp_path / "long.csv").write_text("text,label\n" + rows)
  changed = config(data__train_file=str(tmp_path / "long.csv"), data__max_length=100)
  message = fails("train", config=changed, workdir=str(workdir), mesh="")
  assert "max_length" in message and "64" in message


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_texts_longer_than_a_model_with_virtual_tokens(fails, config, workdir, tmp_path, method):
  """They take positions too."""
  rows = "".join(f"{'word ' * 90}{i},{'xy'[i % 2]}\n" for i in range(40))
  (tmp_path / "long.csv").write_text("text,label\n" + rows)
  changed = config(method, data__train_file=str(tmp_path / "long.csv"), data__max_length=60)
  message = fails("train", config=changed, workdir=str(workdir), mesh="")
  assert "max_length=60, but this model has 64 positions, 20 of them for virtual" in message


def test_class_that_only_another_file_has(fails, config, workdir, tmp_path):
  """A label of the test file that the train file lacks is named with its line."""
  (tmp_path / "test.csv").write_text("text,label\nhello,weather\n")
  changed = config(data__test_file=str(tmp_path / "test.csv"))
  message = fails("train", config=changed, workdir=str(workdir), mesh="")
  assert "line 2" in message and "'weather'" in message


@pytest.mark.fast_for("unknown field|unknown flag")
@pytest.mark.parametrize(
  ("arguments", "named"),
  [
    (["--config.method.rnak=4"], ["'rnak'", "'rank'"]),
    (["--config.method.rank=four"], ["rank", "four"]),
    (["rank=4"], ["rank=4", "--config.FIELD=VALUE"]),
    (["--wrokdir=x"], ["wrokdir", "workdir"]),
  ],
  ids=["unknown field", "not a number", "no dashes", "unknown flag"],
)
def test_flags_of_the_command_itself(workdir, arguments, named):
  """What the command line gets wrong ends in a message too, and in an exit code that is not 0."""
  config = f"--config={ROOT / 'configs' / 'classify.py'}:method=lora,data=bbc"
  ended = train(config, f"--workdir={workdir}", *arguments)
  assert ended.returncode
  assert all(part in ended.stderr + ended.stdout for part in named), ended
  assert "Traceback" not in ended.stderr and len(ended.stderr.splitlines()) <= 24


@pytest.mark.fast_for("classify-methd.*")
@pytest.mark.parametrize(
  ("name", "argument", "message"),
  [
    (
      "classify",
      "method=lor",
      "method='lor' is not one of " + ", ".join((*defaults.names(), "head", "full", "bitfit")),
    ),
    (
      "causal_lm",
      "quant=nf4,method=",
      "method='' is not one of " + ", ".join((*defaults.names(), "full")),
    ),
    ("classify", "methd=lora", "classify.py takes method=..., data=..., not 'methd=lora'"),
  ],
)
def test_argument_of_a_config_file(workdir, name, argument, message):
  """What `get_config` refuses is one line, also with fields after it."""
  config = f"--config={ROOT / 'configs' / name}.py:{argument}"
  ended = train(config, "--config.seed=1", f"--workdir={workdir}")
  assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", f"error: {message}\n")


@pytest.mark.parametrize(
  ("arguments", "named"),
  [
    (["--workdir={workdir}"], "--config"),
    (["--config={root}/configs/classify.py"], "--workdir"),
    (["--config={root}/configs/clasify.py", "--workdir={workdir}"], "clasify.py"),
  ],
  ids=["no config", "no workdir", "no such config"],
)
def test_flags_that_must_be_given(workdir, arguments, named):
  """A missing flag or config file is named; nothing is trained."""
  ended = train(*(part.format(root=ROOT, workdir=workdir) for part in arguments))
  assert ended.returncode
  assert named in ended.stderr + ended.stdout, ended
  assert "Traceback" not in ended.stderr and len(ended.stderr.splitlines()) <= 24


def train(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "experiments.train", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )


def test_trace_on_demand(command, config, workdir, monkeypatch):
  """For those who mend the framework, PEFTJAX_TRACEBACK=1 lets the exception through."""
  monkeypatch.setenv("PEFTJAX_TRACEBACK", "1")
  with pytest.raises(ValueError, match="rank 17"):
    command("train", config=config(method__rank=17), workdir=str(workdir), mesh="")


def test_more_steps_to_trace_than_the_run_has(fails, config, workdir):
  message = fails("train", config=config(), workdir=str(workdir), mesh="", profile=1)
  assert "--profile=1: the run has 2 steps" in message and not workdir.exists()
