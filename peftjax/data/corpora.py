"""Corpora by name."""

import dataclasses

import numpy as np

from peftjax.data import e2e, glue, local, samples, split
from peftjax.data.examples import Corpus, Examples

__all__ = ["Corpus", "Examples", "load"]

FROM_FILES = ("files", "e2e")
NAMES = ("bbc", "sentiment", *FROM_FILES, *(f"glue/{task}" for task in glue.TASKS))


def load(
  name: str,
  *,
  seed: int,
  train_file: str | None = None,
  validation_file: str | None = None,
  test_file: str | None = None,
  text_column: str = "text",
  pair_column: str | None = None,
  label_column: str | None = "label",
  regression: bool = False,
  glue_dir: str | None = None,
  between: str = "",
) -> Corpus:
  """The corpus `name`, in train, validation and test splits that depend on it and `seed` alone.

  In this order: examples with an empty text (or second text) are dropped; splits that the corpus
  does not have are carved out of train, stratified (`split.complete`); GLUE, whose test labels are
  secret, instead has its validation split halved into validation and test; texts that are also in
  a later one of train, validation, test are dropped (`split.drop_duplicates`). `Corpus.dropped`
  counts "empty", "train_duplicates", "validation_duplicates" and, for GLUE files, "malformed".

  Args:
    name: "bbc" and "sentiment" are read from their sample packages; "files" from `train_file` and,
      if given, `validation_file` and `test_file` (.csv, .tsv or .jsonl), as is "e2e", whose
      official CSV files become prompts and completions; "glue/<task>" from
      `glue_dir`/<TASK>/{train,dev}.tsv or, without `glue_dir`, through the `datasets` library.
    seed: seed of the splits that are made here.
    text_column, pair_column, label_column: columns of "files"; a `pair_column` makes pairs,
      without a `label_column` (None) texts have no labels.
    regression: for "files", that labels are numbers and not classes.
    between: for "files" with a `pair_column`, put behind each first text, as "\\nTL;DR:".

  Raises:
    ValueError: naming what is wrong with the name, a file (with its line), a class or a split.
  """
  paths = {"train": train_file, "validation": validation_file, "test": test_file}
  files = {part: path for part, path in paths.items() if path is not None}
  if name not in NAMES:
    raise ValueError(f"No corpus {name!r}. Allowed: {', '.join(NAMES)}.")
  if (name in FROM_FILES) != ("train" in files) or (name not in FROM_FILES and files):
    raise ValueError(
      f"The corpus {name!r} came with {files or 'no file'}. Allowed: 'files' and 'e2e' with"
      " train_file and, if you have them, validation_file and test_file; every other name without"
      " them. Write e.g. --config.data.train_file=train.csv."
    )
  columns = [x for x in (text_column, pair_column, label_column) if x is not None]
  if len(set(columns)) < len(columns):
    raise ValueError(
      f"text_column, pair_column and label_column are {', '.join(map(repr, columns))}: one column"
      " cannot be two of them. Name another."
    )
  if name == "files":
    corpus = local.read(files, text_column, pair_column, label_column, regression)
    for examples in corpus.splits.values() if between and pair_column else ():
      examples.texts[:] = [text + between if text else text for text in examples.texts]
  elif name == "e2e":
    if label_column is not None:
      raise ValueError("the corpus 'e2e' has no classes; train on it by configs/causal_lm.py")
    corpus = e2e.read(files)
  elif name.startswith("glue/"):
    corpus = glue.read(name.removeprefix("glue/"), glue_dir)
  else:
    corpus = {"bbc": samples.bbc, "sentiment": samples.sentiment}[name]()
  return _finish(corpus, seed)


def text_columns(name: str, text_column: str, pair_column: str | None) -> list[str]:
  """The columns of the text, or of both texts of a pair, as files of that corpus name them."""
  if name.startswith("glue/"):
    return list(glue.TASKS[name.removeprefix("glue/")].columns[:-1])
  return [text_column] if name != "files" or pair_column is None else [text_column, pair_column]


def _finish(corpus: Corpus, seed: int) -> Corpus:
  """The corpus without empty texts, with all three splits, and no text in two of them."""
  names = corpus.label_names
  splits = {part: _without_empty(examples) for part, examples in corpus.splits.items()}
  empty = sum(map(len, corpus.splits.values())) - sum(map(len, splits.values()))
  if corpus.name.startswith("glue/"):
    splits["validation"], splits["test"] = split.halve(splits["validation"], names, seed)
  further = {part: splits.pop(part) for part in corpus.further}
  splits, duplicates = split.drop_duplicates(split.complete(splits, names, seed))
  split.check(splits, names)
  splits |= further
  return dataclasses.replace(
    corpus, splits=splits, dropped={"empty": empty, **duplicates, **corpus.dropped}
  )


def _without_empty(examples: Examples) -> Examples:
  """The examples with a text and, for pairs, both texts."""
  return examples.take(np.flatnonzero([all(key) for key in examples.keys()]))
