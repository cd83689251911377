"""Runs of a tiny T5 on a corpus of sources and targets."""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import peftjax as pj
from peftjax import losses
from peftjax.training import build, finished, flops
from peftjax.training.run import Run
from peftjax.training.seq2seq import KIND
from peftjax.training.settings import from_config
from peftjax.training.together import Together
from peftjax.training.writer import Writer
from tests import tiny_t5
from tests.training import runs

SLOW = pytest.mark.slow(reason="runs of its own, 20 s")


class Interrupted(Exception):
  """Stands for anything that ends a process in the middle."""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tiny_t5")
  made = tiny_t5.model_dir(folder / "model"), tiny_t5.corpus(folder / "rows.jsonl")
  return functools.partial(tiny_t5.config, *made)


@pytest.fixture(scope="module")
def trained(run_once, config, tmp_path_factory):
  """The workdir and result of a run in which the base is in four bits."""
  workdir = tmp_path_factory.mktemp("seq2seq") / "run"
  targets = (*"qkvo", "wi_0", "wi_1", "wo")
  how = dict(quant__block_size=32, method__targets=targets, method__rank=8, train__steps=120)
  how |= dict(optimizer__learning_rate=2e-2, train__save_every=60)
  return workdir, run_once(config("quant=nf4", **how), workdir)


def test_both_columns_are_tokens_with_an_end(config):
  """In buckets of both lengths; the loss is the mean over the targets' tokens."""
  settings = from_config(config())
  task = build.task(settings)
  assert task.lengths == (16, 32) and task.widths["targets"] == (16, 16)
  train = task.pairs["train"]
  first = train.targets.ids[:3].tolist()
  assert first[0] == first[1] and first[2] == 1 and (train.pad_id, train.start_id) == (0, 0)
  assert train.sources.ids[train.sources.offsets[1:] - 1].tolist() == [1] * len(train)
  batch = next(iter(task.stream(8, 0).iterate(0, 1)))
  shape = (*batch["targets"].shape, 14)
  logits = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
  total, count = KIND.loss(logits, batch)
  wanted = _by_hand(logits.astype(np.float64), batch["targets"])
  assert count == len(wanted) == batch["weights"].sum()
  np.testing.assert_allclose(losses.mean(total, count), np.mean(wanted), rtol=1e-5)


def _by_hand(logits, targets):
  """−log p of every token behind the start, padding left out."""
  found = []
  for row, one in zip(logits, targets, strict=True):
    for t, token in enumerate(one[1:].tolist()):
      if token:
        found.append(np.log(np.exp(row[t]).sum()) - row[t][token])
  return found


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(data__source_column="text"), "no column 'text'"),
    (dict(data__train_file=None), "'files' came with no file"),
    (dict(data__target_length=1), "max_length 1 is too short"),
    (dict(model__directory=str(tiny_t5.GOLDEN / "bert_tiny")), "is of a bert, and task=seq2seq"),
    (dict(method__targets=("query",)), "matches no parameter"),
  ],
)
def test_bad_settings_are_refused_before_anything_is_written(
  changes, message, run_once, config, tmp_path
):
  with pytest.raises(ValueError, match=message):
    run_once(config(**changes), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_ends_nothing_is_refused(config, tmp_path):
  model = tiny_t5.model_dir(tmp_path / "model", ends=False)
  with pytest.raises(ValueError, match=r"puts none of the ids \[1\], which end a text, behind one"):
    build.task(from_config(config(model__directory=str(model))))


def test_products_of_a_step(config):
  """The source's in the encoder and in keys and values that the decoder reads, all trained."""
  settings = from_config(config("method=full"))
  made = build.attached(settings, None)
  train, frozen = pj.partition(made.params, made.mask)
  got = flops.step_work(made.module.config, train, frozen, 2, 32, 16).model
  width, inner, ffn = 24, 30, 40
  layer = 4 * width * inner + 3 * width * ffn
  of_source = 3 * layer + 2 * 2 * width * inner
  of_target = 2 * (layer + 2 * width * inner) + 96 * width
  seen = 32 * 32 * 3 + 16 * (16 - 8 + 32) * 2
  assert got == 6 * 2 * (32 * of_source + 16 * of_target) + 12 * 2 * seen * inner


@SLOW
def test_perplexity_falls_and_the_adapter_is_written(trained):
  workdir, result = trained
  before, after = (result[key]["test"] for key in ("before", "metrics"))
  assert after["perplexity"] < 0.2 * before["perplexity"]
  assert after["perplexity"] == pytest.approx(np.exp(after["loss"]))
  said = json.loads((workdir / "peft" / "adapter_config.json").read_text())
  assert said["task_type"] == "SEQ_2_SEQ_LM" and "modules_to_save" in said
  assert len(load_file(workdir / "peft" / "adapter_model.safetensors")) == 2 * (3 * 7 + 2 * 11)


@SLOW
def test_the_writer_answers_with_the_adapter(trained):
  """After training with digits; padding and batches change nothing."""
  writer, base = Writer(trained[0]), Writer(trained[0], adapted=False)
  asked = ["1 2 3 4", "9 8 7 7" + " after" * 15]
  got = writer.write(asked, max_new_tokens=6)
  assert writer.answers and got == [writer.write([one], max_new_tokens=6)[0] for one in asked]
  assert all(text.replace(" ", "").isdigit() for text in got)
  assert base.write(asked, max_new_tokens=6) != got
  assert writer.write(asked, max_new_tokens=6, temperature=5.0) != got
  assert finished.load(trained[0]).model == writer.model


@SLOW
def test_a_stopped_run_goes_on_to_the_same_bits(run_once, config, tmp_path, monkeypatch):
  """Through batches of both buckets."""
  run_once(config(), tmp_path / "whole")
  place, count = Run.place, [0]

  def stop(self, batch):
    count[0] += 1
    if count[0] == 20:
      raise Interrupted
    return place(self, batch)

  monkeypatch.setattr(Run, "place", stop)
  with pytest.raises(Interrupted):
    run_once(config(), tmp_path / "stopped")
  monkeypatch.undo()
  run_once(config(), tmp_path / "stopped")
  runs.assert_same(tmp_path / "stopped", tmp_path / "whole")


@SLOW
def test_on_a_mesh_it_is_the_same_run(run_once, config, tmp_path):
  """Rows over two devices, matrices over two others."""
  short = config(train__steps=6)
  alone = run_once(short, tmp_path / "alone")
  shared = run_once(short, tmp_path / "mesh", mesh="data:2,fsdp:2,tensor:2")
  for part in ("validation", "test"):
    one, two = (made["metrics"][part]["loss"] for made in (alone, shared))
    assert two == pytest.approx(one, rel=1e-3)


@SLOW
def test_runs_trained_together_are_those_of_single_runs(config):
  """At the columns that each one's batch has, of sources and of targets."""
  configs = [
    config(optimizer__learning_rate=rate, optimizer__eps=1e-5, train__steps=5)
    for rate in (1e-2, 1e-3)
  ]
  group = Together(configs, 1)
  for _ in group.steps():
    pass
  for i, one in enumerate(configs):
    run = Run(from_config(one), None)
    for _ in run.steps():
      pass
    group.take(i)
    got, want = (jax.tree.leaves(r.state.train) for r in (group.runs[i], run))
    for x, y in zip(got, want, strict=True):
      np.testing.assert_allclose(x, y, atol=2e-4)
