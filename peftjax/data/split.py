"""Train, validation and test splits: made by seed; no text is in two, and no class is empty."""

import math
from collections.abc import Sequence

import numpy as np
from sklearn.model_selection import train_test_split

from peftjax.data.examples import Examples

_CARVED = 0.1  # the share of the given training examples that a missing split gets


def complete(
  splits: dict[str, Examples], label_names: Sequence[str], seed: int
) -> dict[str, Examples]:
  """Adds whichever of validation and test is missing, each a tenth of the given training examples.

  With neither given that is 80/10/10. A split that is given stays as it is. Splits are stratified
  by class, with at least as many examples as there are classes; without `label_names` (regression)
  they are plain random ones. The result depends on the examples and the seed alone.

  Raises:
    ValueError: naming a class with fewer examples than there are splits to make.
  """
  missing = [split for split in ("test", "validation") if split not in splits]
  train = splits["train"]
  size = max(math.ceil(_CARVED * len(train)), len(label_names), 1)
  _check_enough("training", train, label_names, 1 + len(missing))
  carved = {}
  for split in missing:
    train, carved[split] = _cut(train, size, label_names, seed)
  given = {"train": train, **{split: splits[split] for split in splits if split != "train"}}
  return {split: (given | carved)[split] for split in ("train", "validation", "test")}


def halve(examples: Examples, label_names: Sequence[str], seed: int) -> tuple[Examples, Examples]:
  """Two halves, stratified by class, for instance a validation split as validation and test."""
  _check_enough("validation", examples, label_names, 2)
  return _cut(examples, len(examples) // 2, label_names, seed)


def drop_duplicates(splits: dict[str, Examples]) -> tuple[dict[str, Examples], dict[str, int]]:
  """Removes texts that are also in a later one of train, validation, test; counts them by split.

  Two texts are the same if they are equal once each run of whitespace is one space (for pairs, both
  texts). So nothing is tested on that was trained or selected on, and the test split stays what it
  was. The label plays no part. Duplicates inside one split stay.
  """
  kept, dropped, later = {"test": splits["test"]}, {}, set(splits["test"].keys())
  for split in ("validation", "train"):
    keys = splits[split].keys()
    rows = np.flatnonzero([key not in later for key in keys])
    kept[split] = splits[split].take(rows)
    dropped[f"{split}_duplicates"] = len(keys) - len(rows)
    later.update(keys)
  return {split: kept[split] for split in ("train", "validation", "test")}, dropped


def check(splits: dict[str, Examples], label_names: Sequence[str]) -> None:
  """Raises ValueError on a split without examples, or a class without training examples."""
  for split, examples in splits.items():
    if not len(examples):
      raise ValueError(
        f"The {split} split has no examples left: all were empty or, by their text, also in a later"
        " one of train, validation and test. Give it other examples, or leave its file out, for a"
        " tenth of the training examples."
      )
  _check_enough("training", splits["train"], label_names, 1)


def _check_enough(kind: str, examples: Examples, label_names: Sequence[str], least: int) -> None:
  """Raises ValueError naming the first class with fewer than `least` examples."""
  for label, name in enumerate(label_names):
    count = np.count_nonzero(examples.labels == label)
    if count < least:
      raise ValueError(
        f"The class {name!r} has {count} {kind} examples (empty texts and duplicates do not count)."
        f" At least {least} are needed, one for each split made from them. Add examples, remove the"
        " class or, if the labels are numbers on a scale, set regression=True."
      )


def _cut(
  examples: Examples, size: int, label_names: Sequence[str], seed: int
) -> tuple[Examples, Examples]:
  """All but `size` examples, and those `size`; both in their old order."""
  if not size < len(examples):
    raise ValueError(
      f"{len(examples)} examples are too few to make another split of {size}. Add some."
    )
  rest, cut = train_test_split(
    np.arange(len(examples)),
    test_size=size,
    random_state=seed,
    stratify=examples.labels if label_names else None,
  )
  return examples.take(np.sort(rest)), examples.take(np.sort(cut))
