"""Sections of tasks that are read from files in their official formats."""

from __future__ import annotations

import dataclasses
from typing import Any

from peftjax.core.ranges import Length, Size
from peftjax.training.sections import Section


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files(Section):
  """Names the files; the best parameters are scored once more on a test file."""

  section = "data"

  train_file: str | None = None
  validation_file: str | None = None
  test_file: str | None = None
  train_examples: Size | None = None  # a random subset of at most this many
  eval_examples: Size | None = None  # likewise of validation and of test

  def paths(self) -> dict[str, str]:
    """The files by part.

    Raises:
      ValueError: there is none to train or to choose the best parameters by.
    """
    for name in ("train_file", "validation_file"):
      if not getattr(self, name):
        raise ValueError(f"no --config.data.{name}; name the official file, or one in its format")
    files: dict[str, Any] = {
      "train": self.train_file,
      "validation": self.validation_file,
      "test": self.test_file,
    }
    return {part: path for part, path in files.items() if path}

  def size(self, part: str) -> int | None:
    """At most as many examples of a part."""
    return self.train_examples if part == "train" else self.eval_examples


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tags(Files):
  """Sentences of tagged words; see `data.conll`."""

  max_length: Length = 128  # tokens, special ones included


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers(Files):
  """Questions about passages; see `data.squad`."""

  max_length: Length = 384  # tokens of a window: the question, a part of the passage, special ones
  stride: Size = 128  # tokens that a window shares with the next
  max_answer: Size = 30  # tokens of an answer
  # The answer is none where its score, less the best span's, is above this.
  no_answer_threshold: float = 0.0
