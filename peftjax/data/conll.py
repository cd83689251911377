"""Tagged sentences in columns, as of the shared task of CoNLL-2003.

Source: Tjong Kim Sang and De Meulder, "Introduction to the CoNLL-2003 Shared Task", 2003.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from peftjax.data import tables
from peftjax.data.text_tokenizer import TextTokenizer
from peftjax.data.tokenise import Tokens, joined, truncated
from peftjax.io.records import clip

_TAG = 'Tags are "O", or "B-" or "I-" and a name, such as B-PER.'
NO_LABEL = -1  # of a token that is not the first of a word


@dataclasses.dataclass(frozen=True)
class Sentence:
  """Words and, of each, its tag."""

  words: tuple[str, ...]
  tags: tuple[str, ...]


def read(path: str | Path) -> list[Sentence]:
  """The sentences of a file: a word a line, its tag in the last column, empty lines between.

  Columns are separated by spaces or tabs; those between word and tag, parts of speech in the
  official files, are not used. Lines of -DOCSTART- are left out. Tags are as they are, in any of
  the schemes IOB1, IOB2.

  Raises:
    ValueError: naming the file and the line: one column alone, or a tag of another form; no word.
  """
  sentences, rows = [], []
  for number, line in enumerate([*tables.decode(str(path)).split("\n"), ""], 1):
    columns = line.split()
    if columns and columns[0] != "-DOCSTART-":
      tag = columns[-1]
      if len(columns) < 2 or not (tag == "O" or tag[:2] in ("B-", "I-") and tag[2:]):
        raise ValueError(f"{path} line {number}: {clip(line)} does not end in a tag. {_TAG}")
      rows.append((columns[0], tag))
    elif rows:
      sentences.append(Sentence(*map(tuple, zip(*rows, strict=True))))
      rows = []
  if not sentences:
    raise ValueError(f"{path}: the file holds no words. Write a word and its tag on each line.")
  return sentences


def names(sentences: Sequence[Sentence]) -> tuple[str, ...]:
  """The tags that there are, "O" first."""
  found = {tag for sentence in sentences for tag in sentence.tags}
  return ("O", *sorted(found - {"O"}))


def encode(
  tokenizer: TextTokenizer, sentences: Sequence[Sequence[str]], max_length: int
) -> tuple[Tokens, list[np.ndarray]]:
  """Token ids of each sentence, its words with a space between, and where its words begin.

  Returns:
    The tokens, cut to `max_length`, and for every sentence an int64 array as long as it has words:
    the place of the first token that ends within the word, or -1 if that is cut off.
  """
  texts = [" ".join(words) for words in sentences]
  with truncated(tokenizer, max_length, pairs=False):
    encodings = list(tokenizer.encodings(texts, offsets=True))
  firsts = []
  for words, encoding in zip(sentences, encodings, strict=True):
    ends = np.cumsum([len(word) + 1 for word in words])  # behind the space that follows
    spans = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
    own = (spans[:, 1] > spans[:, 0]) & ~np.asarray(encoding.special_tokens_mask, bool)
    word_of = np.searchsorted(ends, spans[:, 1], side="left")
    first = np.full(len(words), -1)
    for place in np.flatnonzero(own)[::-1]:
      first[word_of[place]] = place
    firsts.append(first)
  return joined(tokenizer, encodings), firsts


def labels_of(
  firsts: Sequence[np.ndarray], tags: Sequence[np.ndarray], max_length: int
) -> np.ndarray:
  """The tag of each word at its first token, `NO_LABEL` at all others: int32 [N, max_length]."""
  made = np.full((len(tags), max_length), NO_LABEL, np.int32)
  for row, first, own in zip(made, firsts, tags, strict=True):
    row[first[first >= 0]] = own[first >= 0]
  return made
