"""Questions about passages, in the files of SQuAD v1.1 and v2.0, and their windows of tokens.

Sources: Rajpurkar et al. 2016 (arXiv 1606.05250) and 2018 (arXiv 1806.03822); the scores are those
of the official evaluate-v2.0.py.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding

from peftjax.data.text_tokenizer import TextTokenizer
from peftjax.data.tokenise import Tokens, joined, truncated
from peftjax.io import records

START, END = 1, 2  # bits of a token's label
_ADVICE = 'Use the official file: {"data": [{"paragraphs": [{"context": ..., "qas": [...]}]}]}.'


@dataclasses.dataclass(frozen=True)
class Answer:
  """A span of the passage: `context[answer_start:][:len(text)]` is `text`."""

  text: str
  answer_start: int


@dataclasses.dataclass(frozen=True)
class Qa:
  """A question as the files have it; with `is_impossible` its answers are no answers."""

  id: str
  question: str
  answers: list[Answer]
  is_impossible: bool = False


@dataclasses.dataclass(frozen=True)
class Paragraph:
  context: str
  qas: list[Qa]


@dataclasses.dataclass(frozen=True)
class Article:
  paragraphs: list[Paragraph]


@dataclasses.dataclass(frozen=True)
class File:
  data: list[Article]


@dataclasses.dataclass(frozen=True)
class Question:
  """A question, its passage and the answers that people gave; none if it has no answer there."""

  id: str
  text: str
  context: str
  answers: tuple[Answer, ...]


def read(path: str | Path) -> list[Question]:
  """The questions of a file of either version, in its order.

  Raises:
    ValueError: it is no such JSON, an answer is not where it says, an id comes twice, or there is
      no question.
  """
  file = records.convert(records.read_object(path, _ADVICE), File, path)
  questions: dict[str, Question] = {}
  for article in file.data:
    for paragraph in article.paragraphs:
      context = paragraph.context
      for qa in paragraph.qas:
        for answer in qa.answers:
          start = answer.answer_start
          if start < 0 or context[start : start + len(answer.text)] != answer.text:
            raise ValueError(
              f"{path}: question {records.clip(qa.id)}: the answer {records.clip(answer.text)} is "
              f"not at character {start} of its passage. {_ADVICE}"
            )
        if qa.id in questions:
          raise ValueError(f"{path}: the id {records.clip(qa.id)} comes twice. {_ADVICE}")
        answers = () if qa.is_impossible else tuple(qa.answers)
        questions[qa.id] = Question(qa.id, qa.question.strip(), context, answers)
  if not questions:
    raise ValueError(f"{path} has no question. {_ADVICE}")
  return list(questions.values())


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
  """The W windows of N questions: the question and a part of its passage each.

  Attributes:
    tokens: of each window; the first is the one that stands for no answer.
    question: int64 [W], ascending: whose window it is.
    spans: of each window int32 [T, 2]: the characters of the passage that a token stands for, and
      -1 where it is none of the passage.
  """

  tokens: Tokens
  question: np.ndarray
  spans: list[np.ndarray]


def windows(
  tokenizer: TextTokenizer, questions: Sequence[Question], max_length: int, stride: int
) -> Windows:
  """Windows of at most `max_length` tokens, each with the last `stride` ones of that before it.

  Raises:
    ValueError: a question leaves no room for more than `stride` tokens of its passage.
  """
  texts = [(question.text, question.context) for question in questions]
  how: Any = dict(strategy="only_second", stride=stride)
  owners: list[int] = []
  spans: list[np.ndarray] = []

  def each() -> Iterator[Encoding]:  # of which not all are kept: they take much memory
    for i, first in enumerate(tokenizer.encodings(texts, offsets=True)):
      for one in (first, *first.overflowing):
        passage = np.array([part == 1 for part in one.sequence_ids])
        owners.append(i)
        spans.append(np.where(passage[:, None], np.asarray(one.offsets, np.int32), np.int32(-1)))
        yield one

  with truncated(tokenizer, max_length, pairs=True, **how):
    return Windows(joined(tokenizer, each()), np.asarray(owners, np.int64), spans)


def labels_of(made: Windows, questions: Sequence[Question], max_length: int) -> np.ndarray:
  """uint8 [W, max_length]: `START` at the first token of the answer, `END` at the last.

  The first answer counts. Where it is not whole in the window, or there is none, both are at the
  window's first token.
  """
  out = np.zeros((len(made.tokens), max_length), np.uint8)
  for row, owner, span in zip(out, made.question, made.spans, strict=True):
    start, end = _place(span, questions[owner].answers)
    row[start] |= START
    row[end] |= END
  return out


def _place(span: np.ndarray, answers: Sequence[Answer]) -> tuple[int, int]:
  """The first and the last token of the first answer, (0, 0) if it is not in this window."""
  if not answers or not answers[0].text:
    return 0, 0
  begin = answers[0].answer_start
  stop = begin + len(answers[0].text)
  own = span[:, 0] >= 0
  if not own.any() or span[own, 0].min() > begin or span[own, 1].max() < stop:
    return 0, 0
  covers = np.flatnonzero(own & (span[:, 0] < stop) & (span[:, 1] > begin))
  return (int(covers[0]), int(covers[-1])) if len(covers) else (0, 0)


def answers_of(
  made: Windows,
  logits: Sequence[np.ndarray],
  questions: Sequence[Question],
  *,
  max_answer: int,
  no_answer_threshold: float | None,
) -> list[str]:
  """The text of the best span of each question over all of its windows.

  A span's score is the sum of its start's and its end's logit, over spans of at most `max_answer`
  tokens of the passage. That of no answer is the least of the first token's over the windows. With
  a threshold the answer is "" where no answer's score less the best span's is above it.

  Args:
    logits: of each window float32 [T, 2], possibly padded.
    no_answer_threshold: None if every question has an answer.
  """
  best: list[tuple[float, str]] = [(-np.inf, "")] * len(questions)
  none = np.full(len(questions), np.inf)
  for owner, span, two in zip(made.question, made.spans, logits, strict=True):
    none[owner] = min(none[owner], two[0].sum())
    own = np.flatnonzero(span[:, 1] > span[:, 0])
    if not len(own):
      continue
    starts, ends = two[own, 0], two[own, 1]
    apart = own[None, :] - own[:, None]
    scores = np.where((apart >= 0) & (apart < max_answer), starts[:, None] + ends, -np.inf)
    i, j = np.unravel_index(scores.argmax(), scores.shape)
    if scores[i, j] > best[owner][0]:
      text = questions[owner].context[span[own[i], 0] : span[own[j], 1]]
      best[owner] = float(scores[i, j]), text
  limit = np.inf if no_answer_threshold is None else no_answer_threshold
  return ["" if none[i] - score > limit else text for i, (score, text) in enumerate(best)]


def scores(questions: Sequence[Question], found: Sequence[str]) -> dict[str, float]:
  """Means of exact match and F1, each with the answer it fits best, as the official script.

  With questions that have no answer, also the means of those that have one and of those that have
  none.
  """
  pairs = [(_golds(q), x) for q, x in zip(questions, found, strict=True)]
  exact = np.array([max(exact_match(gold, x) for gold in golds) for golds, x in pairs])
  f1 = np.array([max(f1_score(gold, x) for gold in golds) for golds, x in pairs])
  made = {"f1": float(f1.mean()), "exact_match": float(exact.mean())}
  has = np.array([bool(q.answers) for q in questions])
  if has.all() or not has.any():
    return made
  kinds: Mapping[str, Any] = {"answerable": has, "unanswerable": ~has}
  return {**made, **{f"{name}_f1": float(f1[rows].mean()) for name, rows in kinds.items()}}


def _golds(question: Question) -> list[str]:
  return [a.text for a in question.answers if normalised(a.text)] or [""]


def exact_match(gold: str, found: str) -> float:
  """1 if both are the same text, normalised."""
  return float(normalised(gold) == normalised(found))


def f1_score(gold: str, found: str) -> float:
  """Harmonic mean of precision and recall of words; without any, 1 if both have none."""
  one, two = normalised(gold).split(), normalised(found).split()
  if not one or not two:
    return float(one == two)
  same = sum((collections.Counter(one) & collections.Counter(two)).values())
  return 2 * same / (len(one) + len(two))


_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
  """Lower case, without punctuation, articles and more than one space."""
  return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())
