"""The GLUE tasks, from a local directory or through the `datasets` library.

Source: Wang et al., "GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language
Understanding", ICLR 2019, table 1.
"""

import dataclasses
import importlib.util
import pathlib

import numpy as np

from peftjax.data import tables
from peftjax.data.examples import REGRESSION_METRICS, Corpus, Examples
from peftjax.io import records


@dataclasses.dataclass(frozen=True)
class Task:
  """The places of a task's columns: in the official TSV files and in the `datasets` library.

  Attributes:
    folder: the official directory.
    columns: the official names of the text column or columns and, last, the label's.
    hub_columns: the library's names of the text column or columns (its label is "label").
    label_names: by class index; the TSV files write the name or the index; empty for regression.
    metrics: the task's official metrics.
    header: the column names of files that have no header line.
    validation: the stem of the validation file, and the library's name for that split.
  """

  folder: str
  columns: tuple[str, ...]
  hub_columns: tuple[str, ...]
  label_names: tuple[str, ...]
  metrics: tuple[str, ...] = ("accuracy",)
  header: tuple[str, ...] = ()
  validation: tuple[str, str] = ("dev", "validation")


_SENTENCES = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
TASKS = {
  "cola": Task(
    "CoLA",
    ("sentence", "label"),
    ("sentence",),
    ("unacceptable", "acceptable"),
    ("matthews",),
    header=("source", "label", "star", "sentence"),
  ),
  "sst2": Task("SST-2", ("sentence", "label"), ("sentence",), ("negative", "positive")),
  "mrpc": Task(
    "MRPC",
    ("#1 String", "#2 String", "Quality"),
    _SENTENCES,
    ("not_equivalent", "equivalent"),
    ("accuracy", "f1"),
  ),
  "stsb": Task("STS-B", (*_SENTENCES, "score"), _SENTENCES, (), REGRESSION_METRICS),
  "qqp": Task(
    "QQP",
    ("question1", "question2", "is_duplicate"),
    ("question1", "question2"),
    ("not_duplicate", "duplicate"),
    ("accuracy", "f1"),
  ),
  "mnli": Task(
    "MNLI",
    (*_SENTENCES, "gold_label"),
    ("premise", "hypothesis"),
    ("entailment", "neutral", "contradiction"),
    validation=("dev_matched", "validation_matched"),
  ),
  "qnli": Task("QNLI", ("question", "sentence", "label"), ("question", "sentence"), _ENTAILMENT),
  "rte": Task("RTE", (*_SENTENCES, "label"), _SENTENCES, _ENTAILMENT),
  "wnli": Task("WNLI", (*_SENTENCES, "label"), _SENTENCES, ("not_entailment", "entailment")),
}

# Parts that are scored besides, where their files are: of other genres, and GLUE's diagnostic set,
# AX, with its labels (those of all test sets are secret).
FURTHER = {
  "mnli": {
    "mismatched": dataclasses.replace(
      TASKS["mnli"], validation=("dev_mismatched", "validation_mismatched")
    ),
    "diagnostic": dataclasses.replace(
      TASKS["mnli"],
      folder="diagnostic",
      columns=("Premise", "Hypothesis", "Label"),
      metrics=("matthews",),
      validation=("diagnostic-full", ""),
    ),
  }
}


def read(name: str, glue_dir: str | None) -> Corpus:
  """The task `name`'s "train" and "validation" splits (for mnli, validation_matched).

  Reads `glue_dir`/<TASK>/train.tsv and dev.tsv if a directory is given, else asks `datasets`; and
  of mnli "mismatched" (dev_mismatched.tsv) and "diagnostic" (diagnostic/diagnostic-full.tsv), where
  they are there. A
  line with more or fewer fields than columns (qqp's official files have some that are cut short) is
  left out and counted as "malformed".

  Raises:
    ValueError: for an unknown task, a missing file, column or library, or an unknown label.
  """
  if name not in TASKS:
    raise ValueError(f"No GLUE task {name!r}. Allowed: {', '.join(TASKS)}; write glue/<task>.")
  task = TASKS[name]
  if glue_dir is None:
    splits, dropped = _from_library(name, task), {}
  else:
    folder = pathlib.Path(glue_dir) / task.folder
    train, broken_train = _from_tsv(str(folder / "train.tsv"), task)
    validation, broken = _from_tsv(str(folder / f"{task.validation[0]}.tsv"), task)
    splits = {"train": train, "validation": validation}
    dropped = {"malformed": broken_train + broken}
    for part, other in FURTHER.get(name, {}).items():
      path = pathlib.Path(glue_dir) / other.folder / f"{other.validation[0]}.tsv"
      if path.exists():
        splits[part], broken = _from_tsv(str(path), other)
        dropped["malformed"] += broken
  further = {part: other.metrics for part, other in FURTHER.get(name, {}).items() if part in splits}
  return Corpus(f"glue/{name}", task.label_names, task.metrics, splits, dropped, further)


def _from_tsv(path: str, task: Task) -> tuple[Examples, int]:
  """The examples of a TSV file, which knows no quoting, and its count of malformed lines."""
  lines = [
    (number, line.rstrip("\r").split("\t"))
    for number, line in enumerate(tables.decode(path).split("\n"), 1)
    if line.strip()
  ]
  header = list(task.header or (lines.pop(0)[1] if lines else ()))
  missing = [column for column in task.columns if column not in header]
  if missing:
    raise ValueError(
      f"{path}: no column {missing[0]!r}. The file has: {', '.join(map(repr, header)) or 'none'}."
      " Use the official GLUE file of this task."
    )
  tables.check_columns(path, header)
  places = [header.index(column) for column in task.columns]
  whole = [(number, fields) for number, fields in lines if len(fields) == len(header)]
  *texts, _ = ([fields[place] for _, fields in whole] for place in places)
  labels = [_label(f"{path} line {number}", task, fields[places[-1]]) for number, fields in whole]
  return _examples(task, texts, labels), len(lines) - len(whole)


def _label(where: str, task: Task, label: str) -> float:
  """A label of a TSV file as a number."""
  allowed = [*task.label_names, *map(str, range(len(task.label_names)))]
  if not task.label_names:
    value = tables.number(label)
    if value is not None:
      return value
    allowed = ["a finite number"]
  if label not in allowed:
    raise ValueError(
      f"{where}: unknown label {records.clip(label)}. Allowed: {', '.join(allowed)}."
    )
  return allowed.index(label) % len(task.label_names)


def _from_library(name: str, task: Task) -> dict[str, Examples]:
  """Both splits through the `datasets` library, which keeps or downloads them."""
  if importlib.util.find_spec("datasets") is None:
    raise ValueError(
      f"glue/{name} needs its files. Either set glue_dir to the directory that holds"
      f" {task.folder}/train.tsv and {task.folder}/{task.validation[0]}.tsv, or let a library fetch"
      " them:\n  pip install datasets"
    )
  import datasets  # optional, so not at the top

  splits = {}
  others = {part: other.validation[1] for part, other in FURTHER.get(name, {}).items()}
  stored_as = {"train": "train", "validation": task.validation[1], **others}
  for split, stored in stored_as.items():
    if not stored:
      continue
    table = datasets.load_dataset("nyu-mll/glue", name, split=stored)
    texts = [list(table[column]) for column in task.hub_columns]
    splits[split] = _examples(task, texts, list(table["label"]))
  return splits


def _examples(task: Task, texts: list[list[str]], labels: list[float]) -> Examples:
  """Texts (one list, or two for pairs) and labels, as integers if the task has classes."""
  kind = np.int32 if task.label_names else np.float32
  return Examples(texts[0], texts[1] if len(texts) > 1 else None, np.asarray(labels, kind))
