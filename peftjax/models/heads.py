"""Heads in files: which task they are of, and whether a decoder's is its table."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from peftjax.core import ranges
from peftjax.io.safetensors_dir import file_of
from peftjax.models.encoder_configs import Encoder

# How classes end that have a head which is loaded here, and that have none of a task.
_LABELS_OF: Mapping[str, str] = {
  "text": "ForSequenceClassification",
  "token": "ForTokenClassification",
}
_NO_TASK = ("Model", "ForMaskedLM", "ForPreTraining", "LMHeadModel", "ForCausalLM")
_DECODERS = (("ForCausalLM", "ForSequenceClassification"), ("Model",))
_OTHERS: Mapping[str, Any] = {
  "gpt2": (("LMHeadModel",), ("Model",)),
  **dict.fromkeys(("t5", "mt5"), (("ForConditionalGeneration", "WithLMHeadModel"), ("Model",))),
}
# How they begin.
_NAMES: Mapping[str, str] = {
  "bert": "Bert",
  "roberta": "Roberta",
  "xlm-roberta": "XLMRoberta",
  "camembert": "Camembert",
  "electra": "Electra",
  "distilbert": "DistilBert",
  "deberta-v2": "DebertaV2",
  "llama": "Llama",
  "mistral": "Mistral",
  "qwen2": "Qwen2",
  "qwen3": "Qwen3",
  "gemma2": "Gemma2",
  "gemma3_text": "Gemma3",
  "phi3": "Phi3",
  "gpt2": "GPT2",
  "t5": "T5",
  "mt5": "MT5",
}


def architecture(model_type: str, labels_of: str | None) -> str:
  """The class in transformers that computes what the model that is loaded here does.

  Args:
    model_type: of the files.
    labels_of: "text" or "token", what the head gives labels to; None of a language model.
  """
  lm = _OTHERS.get(model_type, _DECODERS)[0][0]
  return _NAMES[model_type] + (_LABELS_OF[labels_of] if labels_of else lm)


class Head(NamedTuple):
  """What a model's head is to be.

  Attributes:
    labels_of: of an encoder, "text" or "token": what it gives labels to; None of a decoder.
    foreign: the head in the files is another task's, so that one of its name must not be loaded.
  """

  labels_of: str | None
  foreign: bool = False


def of_files(fields: Any, where: str, *, asked: str | None, new: bool) -> Head:
  """The head, by the class that the file names; without one, an encoder's is of whole texts.

  Args:
    fields: of `hf_config.read`.
    where: the file they are from.
    asked: what the head of an encoder shall label; by default what the file's does.
    new: a new head was asked for.

  Raises:
    ValueError: if the file's head is of another task than asked, and no new one was asked for, or
      the class is none of this model type.
  """
  if asked is not None:
    ranges.one_of("labels_of", asked, _LABELS_OF)
  ends = _ends(fields, where)
  named = " and ".join(fields.architectures or ())
  if not isinstance(fields, Encoder):
    _check_decoder(fields.model_type, ends, named, where)
    return Head(None)
  found = next((of for of, end in _LABELS_OF.items() if end in ends), None)
  if all(end in _NO_TASK for end in ends) or (found and found == (asked or found)):
    return Head(asked or found or "text")
  if not new:
    wanted = "each token" if asked == "token" else "whole texts"
    raise ValueError(
      f"{where}: architectures is {named}, whose head is none for {wanted}. Write "
      "load_pretrained(..., num_labels=...) for a new head on this body."
    )
  return Head(asked or "text", foreign=True)


def _ends(fields: Any, where: str) -> list[str]:
  """How the classes of a file end, behind the name of the model type."""
  if not fields.architectures:
    return []
  prefix = _NAMES[fields.model_type]
  kinds = [name for name in fields.architectures if name.lower().startswith(prefix.lower())]
  if not kinds:
    raise ValueError(
      f"{where}: architectures is {' and '.join(fields.architectures)}, and model_type "
      f"{fields.model_type!r} means {prefix}...: other models differ from it, if only in a factor. "
      "It is not supported."
    )
  # Gemma 3's for texts alone have a word more.
  return [name[len(prefix) :].removeprefix("Text") for name in kinds]


def _check_decoder(model_type: str, ends: list[str], named: str, where: str) -> None:
  prefix = _NAMES[model_type]
  own, neutral = _OTHERS.get(model_type, _DECODERS)
  if any(end in own for end in ends) or all(end in neutral for end in ends):
    return
  raise ValueError(
    f"{where}: architectures is {named}, whose head is not read; only "
    f"{' and '.join(prefix + end for end in own)} are. Take a checkpoint of such a class."
  )


class Words(NamedTuple):
  """The table of words and the head of a decoder's file: their tensors, if they are there."""

  table: str | None
  head: str | None


def words(tensors: Any, tables: list[str | None], heads: list[str | None]) -> Words:
  """The first table that is there, and the head.

  Raises:
    ValueError: if tables under several names differ, which in the model are one.
  """
  there = [name for name in tables if name]
  for other in there[1:]:
    if not _equal(tensors, there[0], other):
      raise ValueError(
        f"{file_of(tensors, other)}: {other} is another than {there[0]}, and in this model they "
        "are one table. Take a checkpoint that shares it."
      )
  return Words(there[0] if there else None, heads[0])


def settle(tensors: Any, words: Words, config: Any, where: str) -> tuple[Any, dict[str, str]]:
  """The config, and the tensors of parameters that have another's, by path; as transformers 5 does.

  A file that says it is tied and has two tables that differ is not tied, with a warning. One with
  only the head is tied to that.

  Args:
    tensors: opened files.
    words: their names there.
    config: a decoder's; `config.tied` is what the file says.
    where: the file that says it.
  """
  if not config.tied or words.head is None:
    return config, {}
  if words.table is None:
    return config, {config.table: words.head}
  if _equal(tensors, words.table, words.head):
    return config, {}
  if not getattr(config, "free_head", False):
    file = file_of(tensors, words.head)
    warnings.warn(
      f"{where} says tie_word_embeddings, and {file} has {words.head} other than {words.table}: "
      "they are loaded apart. Write tie_word_embeddings: false there.",
      stacklevel=4,
    )
  return dataclasses.replace(config, tied=False), {}


def _equal(tensors: Any, one: str, other: str) -> bool:
  """Whether two matrices have the same values, compared some rows at a time."""
  if {one, other} & set(getattr(tensors, "states", ())):
    return False
  shape = tensors.info(one).shape
  if len(shape) != 2 or shape != tensors.info(other).shape:
    return False
  step = max(1, 2**20 // max(1, shape[1]))
  rows = lambda name, at: tensors.read_rows(name, at, min(at + step, shape[0]))
  return all(np.array_equal(rows(one, at), rows(other, at)) for at in range(0, shape[0], step))
