import importlib.util
import sys
import types

import numpy as np
import pytest

from peftjax import data
from peftjax.data import glue


@pytest.fixture
def write(tmp_path):
  """Writes a task's train and validation files in the official layout."""

  def write_files(folder, train, validation, stem="dev"):
    (tmp_path / folder).mkdir()
    for name, lines in (("train", train), (stem, validation)):
      (tmp_path / folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return str(tmp_path)

  return write_files


def test_cola_has_no_header_and_its_validation_is_halved(write):
  train = [f"g\t{i % 2}\t\ttrain\u2028{i}" for i in range(20)]
  validation = [f"g\t{i % 2}\t*\tdev {i}" for i in range(8)]
  corpus = data.load("glue/cola", seed=0, glue_dir=write("CoLA", train, validation))
  assert corpus.label_names == ("unacceptable", "acceptable")
  assert corpus.metrics == ("matthews",)
  assert {part: len(examples) for part, examples in corpus.splits.items()} == {
    "train": 20,
    "validation": 4,
    "test": 4,
  }
  assert corpus.splits["train"].texts[3] == "train\u20283" and corpus.splits["train"].labels[3] == 1
  assert sorted(corpus.splits["test"].labels) == [0, 0, 1, 1]
  for part in ("validation", "test"):
    assert all(text.startswith("dev") for text in corpus.splits[part].texts)


def test_mnli_reads_the_matched_validation_and_labels_by_name(write):
  header = "index\tsentence1\tsentence2\tgold_label"
  names = ("entailment", "neutral", "contradiction")
  rows = [f'{i}\t"p {i}\th {i}\t{names[i % 3]}' for i in range(12)]
  other = [row.replace("p ", "q ") for row in rows]
  glue_dir = write("MNLI", [header, *rows], [header, *other], "dev_matched")
  corpus = data.load("glue/mnli", seed=0, glue_dir=glue_dir)
  train = corpus.splits["train"]
  assert (train.texts[1], train.pairs[1], train.labels[1]) == ('"p 1', "h 1", 1)


def test_mnli_s_other_genres_and_the_diagnostic_set_are_scored_besides(write, tmp_path):
  """Whole, and by Matthews' correlation; they leave the other splits as they were."""
  header, names = "index\tsentence1\tsentence2\tgold_label", glue.TASKS["mnli"].label_names
  rows = [f"{i}\tp {i}\th {i}\t{names[i % 3]}" for i in range(12)]
  glue_dir = write(
    "MNLI", [header, *rows], [header, *(r.replace("p", "q") for r in rows)], "dev_matched"
  )
  before = data.load("glue/mnli", seed=0, glue_dir=glue_dir)
  (tmp_path / "MNLI" / "dev_mismatched.tsv").write_text("\n".join([header, *rows[:4]]))
  (tmp_path / "diagnostic").mkdir()
  full = ["Logic\tDomain\tPremise\tHypothesis\tLabel", "Negation\tNews\tp\th\tneutral"]
  (tmp_path / "diagnostic" / "diagnostic-full.tsv").write_text("\n".join(full))
  corpus = data.load("glue/mnli", seed=0, glue_dir=glue_dir)
  assert corpus.further == {"mismatched": ("accuracy",), "diagnostic": ("matthews",)}
  assert [len(x) for x in corpus.splits.values()] == [12, 6, 6, 4, 1]
  for part, examples in before.splits.items():
    assert corpus.splits[part].texts == examples.texts
  assert corpus.splits["diagnostic"].labels.tolist() == [1]


@pytest.mark.parametrize("name", glue.TASKS)
def test_every_task_reads_its_official_columns(name, write):
  """With a column more before each, as the files have, and both ways of writing a class."""
  task = glue.TASKS[name]
  header = list(task.header) or ["index", *task.columns]
  place = {column: header.index(column) for column in task.columns}

  def row(part, i):
    count = max(len(task.label_names), 1)
    label = task.label_names[i % count] if name in ("mnli", "qnli", "rte") else str(i % count)
    cells = [f"x{i}"] * len(header)
    for column in task.columns[:-1]:
      cells[place[column]] = f"{part} {column} {i}"
    cells[place[task.columns[-1]]] = label
    return "\t".join(cells)

  files = [[row(part, i) for i in range(12)] for part in ("train", "dev")]
  head = [] if task.header else ["\t".join(header)]
  glue_dir = write(task.folder, *([*head, *rows] for rows in files), task.validation[0])
  corpus = data.load(f"glue/{name}", seed=0, glue_dir=glue_dir)
  train = corpus.splits["train"]
  assert len(train) == 12 and train.texts[3] == f"train {task.columns[0]} 3"
  assert (train.pairs is None) == (len(task.columns) == 2)
  assert train.labels.tolist() == [i % max(len(task.label_names), 1) for i in range(12)]


OFFICIAL = {
  **dict.fromkeys(("sst2", "mnli", "qnli", "rte", "wnli"), ("accuracy",)),
  **dict.fromkeys(("mrpc", "qqp"), ("accuracy", "f1")),
  "cola": ("matthews",),
  "stsb": ("pearson", "spearman"),
}


def test_metrics_are_the_official_ones():
  assert {name: task.metrics for name, task in glue.TASKS.items()} == OFFICIAL


def test_stsb_is_regression(write):
  header = "index\tsentence1\tsentence2\tscore"
  rows = [f"{i}\ta {i}\tb {i}\t{i / 2}" for i in range(10)]
  other = [row.replace("a ", "c ") for row in rows]
  corpus = data.load(
    "glue/stsb", seed=0, glue_dir=write("STS-B", [header, *rows], [header, *other])
  )
  assert corpus.label_names == () and corpus.metrics == ("pearson", "spearman")
  assert corpus.splits["train"].labels.dtype == np.float32
  assert corpus.splits["train"].labels.tolist() == [i / 2 for i in range(10)]


def test_truncated_lines_are_counted(write):
  header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
  rows = [f"{i}\t1\t2\tq {i}\tr {i}\t{i % 2}" for i in range(8)]
  other = [row.replace("q ", "s ") for row in rows]
  glue_dir = write("QQP", [header, *rows, "9\t1\t2\thalf a"], [header, *other])
  corpus = data.load("glue/qqp", seed=0, glue_dir=glue_dir)
  assert corpus.dropped["malformed"] == 1 and len(corpus.splits["train"]) == 8
  assert corpus.metrics == ("accuracy", "f1")


def test_lines_that_are_too_long_are_counted(write):
  """A tab inside a text moves what is right of it to other columns."""
  header = "index\tsentence1\tsentence2\tlabel"
  rows = [f"{i}\ta {i}\tb {i}\t{('not_entailment', 'entailment')[i % 2]}" for i in range(8)]
  other = [row.replace("a ", "c ") for row in rows]
  shifted = "9\tone\ttwo\tentailment\tnot_entailment"
  corpus = data.load(
    "glue/rte", seed=0, glue_dir=write("RTE", [header, *rows, shifted], [header, *other])
  )
  assert corpus.dropped["malformed"] == 1 and len(corpus.splits["train"]) == 8


@pytest.mark.parametrize("score", ["nan", "inf", "1e39"])
def test_a_score_that_is_no_number_is_named(write, score):
  lines = ["index\tsentence1\tsentence2\tscore", f"0\ta\tb\t{score}"]
  with pytest.raises(ValueError, match="train.tsv line 2: .*a finite number"):
    data.load("glue/stsb", seed=0, glue_dir=write("STS-B", lines, lines))


@pytest.mark.parametrize(
  "train, named",
  [
    (["sentence\tlabel\tlabel", "x\t1\t0"], "train.tsv: the first line names .*'label' 2 times"),
    (["sentence\tclass", "x\t1"], "train.tsv: no column 'label'.*'sentence', 'class'"),
    (["sentence\tlabel", "x\t2"], "train.tsv line 2: unknown label '2'.*negative, positive, 0, 1"),
    ([], "train.tsv: no column 'sentence'.*none"),
  ],
)
def test_wrong_files_are_named(write, train, named):
  with pytest.raises(ValueError, match=named):
    data.load("glue/sst2", seed=0, glue_dir=write("SST-2", train, []))


def test_a_missing_directory_is_named(tmp_path):
  with pytest.raises(ValueError, match="RTE/train.tsv cannot be read"):
    data.load("glue/rte", seed=0, glue_dir=str(tmp_path))


def test_without_files_or_library_the_error_says_what_to_do(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"MNLI/dev_matched.tsv(.|\n)*pip install datasets"):
    data.load("glue/mnli", seed=0)


def test_the_datasets_library_is_asked_for_the_same_splits(monkeypatch):
  asked = []

  def load_dataset(path, name, split):
    asked.append((path, name, split))
    rows = range(12)
    return {
      "premise": [f"{split} {i}" for i in rows],
      "hypothesis": [f"h {i}" for i in rows],
      "label": [i % 3 for i in rows],
    }

  library = types.SimpleNamespace(load_dataset=load_dataset)
  monkeypatch.setitem(sys.modules, "datasets", library)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: library)
  corpus = data.load("glue/mnli", seed=0)
  stored = ["train", "validation_matched", "validation_mismatched"]
  assert [split for _, _, split in asked] == stored
  assert len(corpus.splits["train"]) == 12 and corpus.splits["train"].pairs[5] == "h 5"
  assert len(corpus.splits["validation"]) == len(corpus.splits["test"]) == 6


def test_every_task_has_text_and_label_columns():
  for task in glue.TASKS.values():
    assert len(task.columns) == len(task.hub_columns) + 1
