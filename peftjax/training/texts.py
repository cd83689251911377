"""`texts`: lists of texts as the data of `fit`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peftjax import data
from peftjax.core import ranges
from peftjax.core.ranges import Length
from peftjax.data.examples import CLASSIFICATION_METRICS, REGRESSION_METRICS, Corpus, Examples
from peftjax.data.pack import pack
from peftjax.io import hub
from peftjax.io.records import clip
from peftjax.models import configuration
from peftjax.training.causal_lm import LanguageModelling, trainable_rows
from peftjax.training.classification import Classification


@dataclasses.dataclass(frozen=True, eq=False)
class Labelled:
  """N texts, or pairs of texts, with classes or numbers.

  Attributes:
    examples: the texts and their labels.
    tokens: their ids.
    label_names: the classes by index; empty for numbers.
    max_length: the limit on the length of texts.
    pad_id: padding id of the model.
    source: the directory of the tokenizer.
  """

  examples: Examples
  tokens: data.Tokens
  label_names: tuple[str, ...]
  max_length: int
  pad_id: int
  source: str

  name = "classify"

  def __len__(self) -> int:
    return len(self.tokens)

  def __repr__(self) -> str:
    what = f"{len(self.label_names)} classes" if self.label_names else "numbers"
    return f"<{len(self)} texts with {what}, up to {self.tokens.lengths.max()} tokens>"

  def task(self, held_out: Labelled | None, seed: int) -> Classification:
    """The data as a run trains on it; `held_out` is its validation part."""
    parts = {"train": self} if held_out is None else {"train": self, "validation": held_out}
    metrics = CLASSIFICATION_METRICS if self.label_names else REGRESSION_METRICS
    splits = {part: one.examples for part, one in parts.items()}
    tokens = {part: one.tokens for part, one in parts.items()}
    lengths = np.concatenate([t.lengths for t in tokens.values()])
    longest = max(one.max_length for one in parts.values())
    buckets = data.buckets(lengths, max_length=longest)
    corpus = Corpus("texts", self.label_names, metrics, splits, {})
    return Classification(corpus, tokens, buckets, self.pad_id)


@dataclasses.dataclass(frozen=True, eq=False)
class Plain:
  """N texts, or prompts with completions, for a language model.

  Attributes:
    documents: ids of each text, including those that end the text.
    prompts: how many first ids of each are not to be predicted.
    max_length: length of the rows that they are packed into.
    source: the directory of the tokenizer.
  """

  documents: list[np.ndarray]
  prompts: list[int]
  max_length: int
  source: str

  name = "causal_lm"
  label_names = ()

  def __len__(self) -> int:
    return len(self.documents)

  def __repr__(self) -> str:
    tokens = sum(map(len, self.documents))
    return f"<{len(self)} texts of {tokens:,} tokens, for rows of {self.max_length}>"

  def task(self, held_out: Plain | None, seed: int) -> LanguageModelling:
    """The data as a run trains on it; `held_out` is its validation part."""
    parts = {"train": self} if held_out is None else {"train": self, "validation": held_out}
    rows = {
      part: pack(one.documents, self.max_length, one.prompts, seed) for part, one in parts.items()
    }
    rows["train"], idle = trainable_rows(rows["train"])
    return LanguageModelling("texts", rows, idle)


@ranges.checked
def texts(
  texts: Any,
  labels: Any = None,
  *,
  tokenizer: str | Path | data.TextTokenizer,
  max_length: Length | None = None,
  label_names: Sequence[str] | None = None,
) -> Labelled | Plain:
  """Texts as token ids, for `pj.fit`: to be classified or rated, or to be continued.

  With labels an encoder learns to give them. Without, a decoder learns to write the texts or, for
  pairs `(prompt, completion)`, the completions alone.

  Args:
    texts: N texts, or N pairs of texts.
    labels: N of one kind: texts or whole numbers are classes, other numbers are regressed on.
    tokenizer: the model's: its directory or hub name, or `peftjax.data.load_tokenizer`'s result.
    max_length: tokens per text, which is cut there (default 128), or, without labels, per row
      that texts are packed into (default 256).
    label_names: the classes, in the order of the outputs. By default those in `labels`, sorted; for
      held-out texts give those of the training texts: `label_names=train.label_names`.

  Raises:
    ValueError: no texts, or one that is no text; labels of several kinds, of one class alone or of
      another number; a tokenizer that is not there.
  """
  left, right = _columns(texts)
  if not isinstance(tokenizer, data.TextTokenizer):
    tokenizer = data.load_tokenizer(hub.local(tokenizer))
  if labels is None:
    if label_names is not None:
      raise ValueError("label_names without labels: give the label of every text, labels=[...]")
    examples = Examples(left, right, np.zeros(len(left), np.float32))
    ends = configuration.end_ids(tokenizer.source)
    found = data.documents(tokenizer, examples, ends, completions=right is not None)
    length = 256 if max_length is None else max_length
    ranges.check_one("max_length", length, ranges.RowLength)
    return Plain(*found, length, tokenizer.source)
  names, values = _labels(labels, len(left), label_names)
  examples = Examples(left, right, values)
  length = 128 if max_length is None else max_length
  tokens = data.encode(tokenizer, examples, length)
  pad_id = configuration.pad_id(tokenizer.source)
  return Labelled(examples, tokens, names, length, pad_id, tokenizer.source)


def _columns(texts: Any) -> tuple[list[str], list[str] | None]:
  """The texts or, for pairs, the first and the second ones."""
  if isinstance(texts, str | bytes) or not hasattr(texts, "__iter__"):
    raise ValueError(f"texts is {clip(texts)}; give a list: texts=[...]")
  rows = list(texts)
  if not rows:
    raise ValueError("texts is empty; give at least one text")
  paired = not isinstance(rows[0], str)
  for i, row in enumerate(rows):
    pair = isinstance(row, tuple | list) and len(row) == 2 and all(isinstance(x, str) for x in row)
    if not (pair if paired else isinstance(row, str)):
      raise ValueError(
        f"texts[{i}] is {clip(row)}; write a text for each, or for each a pair of two texts, as "
        "(prompt, completion)"
      )
  if paired:
    return [str(row[0]) for row in rows], [str(row[1]) for row in rows]
  return [str(row) for row in rows], None


def _labels(
  labels: Any, count: int, given: Sequence[str] | None
) -> tuple[tuple[str, ...], np.ndarray]:
  """The classes, none for a regression, and int32 classes or float32 numbers."""
  values = [x.item() if isinstance(x, np.generic) else x for x in labels]
  if len(values) != count:
    raise ValueError(f"{len(values)} labels for {count} texts: give one for each")
  kinds = {type(x) for x in values}
  if float in kinds and kinds <= {int, float} and given is None:
    if odd := [x for x in values if not math.isfinite(x)]:
      raise ValueError(f"the label {odd[0]} is not a finite number; leave its text out")
    return (), np.asarray(values, np.float32)
  if len(kinds) > 1 or not kinds <= {str, int}:
    shown = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise ValueError(f"labels are of the kind {shown}; write all as texts, or all as numbers")
  names = tuple(map(str, sorted(set(values)))) if given is None else tuple(map(str, given))
  if len(names) < 2 or len(set(names)) < len(names):
    raise ValueError(f"the classes are {clip(list(names))}; there must be two, each named once")
  index = {name: i for i, name in enumerate(names)}
  if strange := [x for x in values if str(x) not in index]:
    raise ValueError(f"the label {clip(strange[0])} is none of the classes {clip(list(names))}")
  return names, np.asarray([index[str(x)] for x in values], np.int32)
