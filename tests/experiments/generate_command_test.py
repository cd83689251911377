"""The command that lets a fine-tuned language model write."""

import json
import shutil

import pytest

from peftjax.training.writer import Writer
from tests import tiny_lm

FLAGS = dict(
  prompt=["1 2 3 4 4", "9 8 7 7"],
  tokens=6,
  temperature=0.0,
  top_p=1.0,
  seed=0,
  chat=False,
  base=False,
  part=None,
  output=None,
  batch=32,
)


@pytest.fixture(scope="module")
def written(command, tmp_path_factory):
  """The workdir of a run that `experiments.train` made of a decoder."""
  folder = tmp_path_factory.mktemp("written")
  made = tiny_lm.model_dir(folder / "model"), tiny_lm.corpus(folder / "rows.jsonl")
  config = tiny_lm.config(*made, "quant=none", train__steps=8)
  command("train", config=config, workdir=str(folder / "run"), mesh="")
  return folder / "run"


@pytest.mark.slow(reason="trains a run of its own, 10 s")
def test_prompts_are_continued(written, command, capsys):
  """Each is printed with what follows it; --base shows before that what followed it untrained."""
  capsys.readouterr()
  command("generate", workdir=str(written), **FLAGS)
  printed = capsys.readouterr().out
  writer, base = Writer(written), Writer(written, adapted=False)
  new, old = (w.write(FLAGS["prompt"], max_new_tokens=6) for w in (writer, base))
  assert all(new) and new != old
  pairs = list(zip(FLAGS["prompt"], new, strict=True))
  assert printed == "".join(f"{prompt}{text}\n\n" for prompt, text in pairs)
  command("generate", workdir=str(written), **{**FLAGS, "base": True})
  shown = [f"[before training] {p}{t}\n\n" for p, t in zip(FLAGS["prompt"], old, strict=True)]
  shown += [f"[after training] {prompt}{text}\n\n" for prompt, text in pairs]
  assert capsys.readouterr().out == "".join(shown)


def test_drawn_tokens_depend_on_the_seed_alone(written, command, capsys):
  """--temperature and --seed arrive: the same seed draws the same text, another another."""

  def draw(seed):
    command("generate", workdir=str(written), **{**FLAGS, "temperature": 2.0, "seed": seed})
    return capsys.readouterr().out

  capsys.readouterr()
  assert draw(1) == draw(1) != draw(2)


def test_the_prompts_of_a_part_are_written_to_a_file(written, command, fails, tmp_path):
  """Each once and in their order, in batches that change nothing."""
  path = tmp_path / "written.jsonl"
  flags = {**FLAGS, "prompt": [], "part": "test", "output": str(path), "batch": 3}
  command("generate", workdir=str(written), **flags)
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  writer = Writer(written)
  prompts = writer.prompts("test")
  assert [row["prompt"] for row in rows] == prompts and len(set(prompts)) == len(prompts) > 3
  assert rows[0]["text"] == writer.write(prompts[:1], max_new_tokens=6)[0].strip()
  message = fails("generate", workdir=str(written), **{**flags, "part": None})
  assert "no prompt; write --prompt" in message


def test_a_chat_needs_a_template(written, fails):
  """A model that was not trained on conversations is named."""
  message = fails("generate", workdir=str(written), **{**FLAGS, "chat": True})
  assert "has no chat template" in message


def test_without_a_run(fails, tmp_path):
  """A folder that is not there is named, with the command that makes it; it is not created."""
  message = fails("generate", workdir=str(tmp_path / "none"), **FLAGS)
  assert f"{tmp_path / 'none'} holds no evaluated run of task=causal_lm" in message
  assert "experiments.train --config=configs/causal_lm.py" in message
  assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["latest", "best"])
def test_before_the_first_evaluation(name, written, fails, tmp_path):
  """A run without a best checkpoint is no run yet."""
  (tmp_path / "checkpoints" / name).mkdir(parents=True)
  shutil.copy(written / "config.json", tmp_path)
  message = fails("generate", workdir=str(tmp_path), **FLAGS)
  assert "no evaluated run of task=causal_lm" in message


def test_a_run_of_a_classifier(trained, fails):
  """It is finished, and no language model."""
  message = fails("generate", workdir=str(trained[0]), **FLAGS)
  assert f"{trained[0]} holds a run of task=classify, and not of task=causal_lm" in message
