"""Texts to token ids: for a classifier's inputs, and for a language model's documents."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import Encoding

from peftjax.data.examples import Examples
from peftjax.data.text_tokenizer import TextTokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
  """The token ids of N texts of different lengths, one after the other.

  Attributes:
    ids: int32 [offsets[N]].
    types: uint8 [offsets[N]]: 1 in the second text of a pair (if the tokenizer tells them apart).
    offsets: int64 [N+1]; text i is ids[offsets[i]:offsets[i+1]].
  """

  ids: np.ndarray
  types: np.ndarray
  offsets: np.ndarray

  def __len__(self) -> int:
    return len(self.offsets) - 1

  @property
  def lengths(self) -> np.ndarray:
    """int64 [N]: the number of tokens of each text."""
    return np.diff(self.offsets)


def encode(tokenizer: TextTokenizer, examples: Examples, max_length: int) -> Tokens:
  """Token ids with the special tokens, at most `max_length` per text (for pairs, per pair).

  Longer texts lose their last tokens (or first, if the model's files say so) but not the special
  ones; in a pair the longer text loses first.

  Raises:
    ValueError: if `max_length` leaves no room beside the special tokens.
  """
  pairs = examples.pairs
  inputs = examples.texts if pairs is None else list(zip(examples.texts, pairs, strict=True))
  with truncated(tokenizer, max_length, pairs=pairs is not None, side=tokenizer.truncation_side):
    return joined(tokenizer, tokenizer.encodings(inputs))


@contextlib.contextmanager
def truncated(
  tokenizer: TextTokenizer, max_length: int, *, pairs: bool, side: str = "right", **how: Any
) -> Iterator[None]:
  """Encodings have at most `max_length` tokens.

  Args:
    pairs: of texts; the longer loses first, unless `how` says otherwise.
    side: where texts are cut.
    **how: of `tokenizers.Tokenizer.enable_truncation`.

  Raises:
    ValueError: if `max_length` leaves no room beside the special tokens.
  """
  special = tokenizer.backend.num_special_tokens_to_add(pairs)
  # Below this the library would, without a word, not truncate at all.
  if max_length < (least := special + pairs + 1):
    raise ValueError(
      f"max_length {max_length} is too short: the tokenizer adds {special} special tokens. Allowed:"
      f" {least} or more."
    )
  tokenizer.backend.enable_truncation(max_length, direction=side, **how)
  try:
    yield
  finally:
    tokenizer.backend.no_truncation()


def joined(tokenizer: TextTokenizer, encodings: Iterable[Encoding]) -> Tokens:
  """The tokens of encodings."""
  ids, types = [np.zeros(0, np.int32)], [np.zeros(0, np.uint8)]
  for encoding in encodings:
    ids.append(np.asarray(encoding.ids, np.int32))
    types.append(np.asarray(encoding.type_ids, np.uint8) * np.uint8(tokenizer.typed))
  offsets = np.cumsum([len(one) for one in ids], dtype=np.int64)
  return Tokens(np.concatenate(ids), np.concatenate(types), offsets)


def documents(
  tokenizer: TextTokenizer, examples: Examples, end_ids: Sequence[int], *, completions: bool
) -> tuple[list[np.ndarray], list[int]]:
  """Each text, or prompt and completion one after the other, as ids that end in an end-of-text id.

  A document is tokenised as one text, special tokens included; a pair is `prompt + completion`
  with nothing between. The first of `end_ids` comes after it, unless the last id is one already.

  Returns:
    int32 arrays, and how many ids of each are prompt: with `completions` the first text of a pair,
    or the first line of a text, which is the title in BBC's articles; else none. A token that has
    any character of the completion is completion, and so are all after it.
  """
  texts, pairs = examples.texts, examples.pairs
  if pairs is None:
    borders = [text.find("\n") + 1 or len(text) for text in texts]
  else:
    borders = [len(text) for text in texts]
    texts = [one + two for one, two in zip(texts, pairs, strict=True)]
  ids, prompts = [], []
  encodings = tokenizer.encodings(texts, offsets=completions)
  for border, encoding in zip(borders, encodings, strict=True):
    found = encoding.ids
    if not found or found[-1] not in end_ids:
      found = [*found, end_ids[0]]
    ids.append(np.asarray(found, np.int32))
    prompts.append(_prompt(encoding, border, len(found)) if completions else 0)
  return ids, prompts


def _prompt(encoding: Encoding, border: int, length: int) -> int:
  """The number of prompt ids: those of `length` without a character from `border` on."""
  ends = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)[:, 1]  # 0 of added special tokens
  later = np.flatnonzero(ends > border)
  return int(later[0]) if len(later) else length - 1
