"""Runs on files in official formats: tags of words, and answers in passages."""

import importlib.util
import json
import pathlib
import re

import jax
import numpy as np
import pytest

import peftjax as pj
from configs import answer, tag
from peftjax.data import squad
from peftjax.training import answering, build, finished, predict, tagging
from peftjax.training.settings import from_config
from tests import tiny

NO_SEQEVAL = importlib.util.find_spec("seqeval") is None
needs_seqeval = pytest.mark.skipif(NO_SEQEVAL, reason="seqeval is not installed")
KINDS = {word: name.upper() for name, words in tiny.WORDS.items() for word in words}


@pytest.fixture(scope="module")
def conll_files(tmp_path_factory):
  """Words that tell a class are names of its kind; the last file is the second again."""
  folder, made = tmp_path_factory.mktemp("conll"), {}
  for part, seed, count in (("train", 0, 64), ("validation", 1, 16), ("test", 1, 16)):
    blocks = []
    for text, _, _ in tiny.texts(count, seed):
      kinds = [KINDS.get(word) for word in text.split()]
      tags = [f"B-{kind}" if kind else "O" for kind in kinds]
      blocks.append("".join(f"{w} NN O {t}\n" for w, t in zip(text.split(), tags, strict=True)))
    made[f"data__{part}_file"] = str(folder / part)
    (folder / part).write_text("-DOCSTART- -X- -X- O\n\n" + "\n".join(blocks))
  return made


@pytest.fixture(scope="module")
def squad_files(tmp_path_factory):
  """Which of a passage's words is of a kind; one in four asks for a kind that is not there."""
  folder, made = tmp_path_factory.mktemp("squad"), {}
  for part, seed, count in (("train", 0, 64), ("validation", 1, 16)):
    paragraphs = []
    for i, (text, name, _) in enumerate(tiny.texts(count, seed)):
      word = next(word for word in text.split() if word in tiny.WORDS[name])
      at = re.search(rf"\b{word}\b", text).start()
      answers = [] if i % 4 == 0 else [{"text": word, "answer_start": at}]
      asked = "what" if i % 4 == 0 else name
      qa = {"id": f"{i}", "question": asked, "answers": answers, "is_impossible": not answers}
      paragraphs.append({"context": text, "qas": [qa]})
    made[f"data__{part}_file"] = str(folder / f"{part}.json")
    (folder / f"{part}.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
  return made


@pytest.fixture
def made(model_dir):
  """The config of a short run of a task; with changes."""

  def make(module, files, **changes):
    config = module.get_config("method=full")
    config.model.directory = str(model_dir)
    config.compilation_cache = ""
    config.train.update(batch_size=4, epochs=5.0, eval_batch_size=16)
    config.optimizer.learning_rate = 1e-2
    for key, value in {**files, **changes}.items():
      config.update_from_flattened_dict({key.replace("__", "."): value})
    return config

  return make


@needs_seqeval
@pytest.mark.slow(reason="a run of its own, several seconds")
def test_a_run_of_tags_learns_and_predicts(conll_files, made, run_once, tmp_path):
  """Its test file is that of validation, so the predictor's tags score what the run says."""
  config = made(tag, conll_files, data__max_length=32)
  result = run_once(config, tmp_path / "run")
  metrics = result["metrics"]
  assert metrics["test"] == metrics["validation"] and metrics["test"]["f1"] > 0.4
  assert result["labels"] == ["O", "B-BUSINESS", "B-SPORT", "B-TECH"]
  task = build.task(from_config(config))
  sentences = task.sentences["test"]
  predictor = predict.Predictor(tmp_path / "run")
  found = predictor.tags([" ".join(sentence.words) for sentence in sentences])
  gold = [list(sentence.tags) for sentence in sentences]
  assert tagging.scores(gold, found) == pytest.approx(metrics["test"])
  with pytest.raises(ValueError, match="a run of task=tag"):
    predictor.logits(["one"])
  merged = finished.load(tmp_path / "run")
  pj.save_pretrained(
    tmp_path / "whole", pj.merge(merged.params), of=merged.base, labels=merged.labels
  )
  saved = json.loads((tmp_path / "whole" / "config.json").read_text())
  assert saved["architectures"] == ["BertForTokenClassification"]
  assert saved["id2label"]["3"] == "B-TECH"


@needs_seqeval
def test_scores_are_of_whole_entities():
  """IOB1 and IOB2 give the same entities; a word beyond the end counts as missed."""
  gold = [["B-PER", "I-PER", "O", "B-LOC"]]
  assert tagging.scores(gold, [["I-PER", "I-PER", "O", "I-LOC"]])["f1"] == 1
  half = tagging.scores(gold, [["B-PER", "O", "O", "B-LOC"]])
  assert (half["f1"], half["accuracy"]) == (0.5, 0.75)
  assert tagging.scores([["O"]], [["O"]]) == dict(f1=0.0, precision=0.0, recall=0.0, accuracy=1.0)
  logits = [np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])]
  assert tagging.tags_of(logits, [np.array([1, 2, -1])], ("O", "B-X")) == [["B-X", "O", "O"]]


def test_only_first_tokens_count():
  """The loss is that of the labelled tokens, whatever the logits of the others are."""
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(2, 4, 3)).astype(np.float32)
  labels = np.array([[-1, 2, -1, 0], [1, -1, -1, -1]])
  batch = {"labels": labels, "weights": np.array([1.0, 0.0], np.float32)}
  total, count = tagging.KIND.loss(logits, batch)
  log_p = jax.nn.log_softmax(logits)
  assert count == 2
  np.testing.assert_allclose(total, -(log_p[0, 1, 2] + log_p[0, 3, 0]), rtol=1e-6)


def test_the_loss_of_an_answer_is_over_the_window_s_tokens():
  logits = np.random.default_rng(0).normal(size=(2, 4, 2)).astype(np.float32)
  labels = np.array([[0, squad.START, squad.END, 0], [squad.START | squad.END, 0, 0, 0]], np.uint8)
  mask = np.array([[True] * 4, [True, True, False, False]])
  batch = {"labels": labels, "mask": mask, "weights": np.ones(2, np.float32)}
  total, count = answering.KIND.loss(logits, batch)
  first, second = jax.nn.log_softmax(logits[0], 0), jax.nn.log_softmax(logits[1, :2], 0)
  want = -(first[1, 0] + first[2, 1]) / 2 - second[0].sum() / 2
  np.testing.assert_allclose(total, want, rtol=1e-6)
  assert count == 2


@pytest.mark.slow(reason="a run of its own, several seconds")
def test_a_run_of_answers_learns(squad_files, made, run_once, tmp_path):
  config = made(answer, squad_files, data__max_length=32, data__stride=8)
  result = run_once(config, tmp_path / "run")
  assert result["metrics"]["validation"]["f1"] > 0.3
  assert result["questions"] == {"train": 64, "validation": 16}
  with pytest.raises(ValueError, match="a run of task=answer"):
    predict.Predictor(tmp_path / "run").logits(["one"])


def test_without_questions_that_have_no_answer_each_gets_one(squad_files, made):
  """As in v1.1, however the threshold is set."""
  settings = from_config(made(answer, squad_files, data__max_length=32, data__stride=8))
  assert build.task(settings).no_answer_threshold == 0.0
  path = pathlib.Path(squad_files["data__train_file"])
  text = json.loads(path.read_text())
  text["data"][0]["paragraphs"] = text["data"][0]["paragraphs"][1:2]
  (path.parent / "one.json").write_text(json.dumps(text))
  files = {**squad_files, "data__train_file": str(path.parent / "one.json")}
  changed = made(answer, files, data__max_length=32, data__stride=8)
  assert build.task(from_config(changed)).no_answer_threshold is None


@pytest.mark.parametrize("module", [tag, answer])
def test_a_missing_file_is_asked_for(module, made, monkeypatch):
  monkeypatch.setattr(tagging, "seqeval", lambda: None)
  with pytest.raises(ValueError, match="no --config.data.train_file"):
    build.task(from_config(made(module, {})))
  with pytest.raises(ValueError, match="no --config.data.validation_file"):
    build.task(from_config(made(module, {"data__train_file": "x"})))


def test_without_seqeval_it_says_what_to_install(conll_files, made, monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "seqeval.metrics", None)
  with pytest.raises(ValueError, match=r"pip install 'peftjax\[scores\]'"):
    build.task(from_config(made(tag, conll_files)))
