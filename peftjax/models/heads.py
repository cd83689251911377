"""Heads in files: the task each is for, and whether a decoder's is its table."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from peftjax.core import ranges
from peftjax.io.safetensors_dir import file_of

# Endings of classes that have a head which is loaded here, and of those that have none.
LABELS_OF: Mapping[str, str] = {
  "text": "ForSequenceClassification",
  "token": "ForTokenClassification",
  "span": "ForQuestionAnswering",
  "image": "ForImageClassification",
}
_MEANT = {
  "text": "whole texts",
  "token": "each token",
  "span": "the ends of an answer",
  "image": "images",
}
_NO_TASK = (
  *("Model", "ForMaskedLM", "ForPreTraining", "LMHeadModel", "ForCausalLM"),
  "ForMaskedImageModeling",
)
_DECODERS = (("ForCausalLM", "ForSequenceClassification"), ("Model",))
_OTHERS: Mapping[str, Any] = {
  "gpt2": (("LMHeadModel",), ("Model",)),
  **dict.fromkeys(("t5", "mt5"), (("ForConditionalGeneration", "WithLMHeadModel"), ("Model",))),
}
# Beginnings of the same classes.
_NAMES: Mapping[str, str] = {
  "bert": "Bert",
  "roberta": "Roberta",
  "xlm-roberta": "XLMRoberta",
  "camembert": "Camembert",
  "electra": "Electra",
  "distilbert": "DistilBert",
  "deberta-v2": "DebertaV2",
  "vit": "ViT",
  "llama": "Llama",
  "mistral": "Mistral",
  "qwen2": "Qwen2",
  "qwen3": "Qwen3",
  "gemma2": "Gemma2",
  "gemma3_text": "Gemma3",
  "phi3": "Phi3",
  "qwen3_moe": "Qwen3Moe",
  "mixtral": "Mixtral",
  "gpt2": "GPT2",
  "t5": "T5",
  "mt5": "MT5",
}


def architecture(model_type: str, labels_of: str | None) -> str:
  """The transformers class that computes the same as the model that is loaded here.

  Args:
    model_type: model type of the files.
    labels_of: a key of `LABELS_OF`, what the head gives labels to; None for a language model.
  """
  lm = _OTHERS.get(model_type, _DECODERS)[0][0]
  return _NAMES[model_type] + (LABELS_OF[labels_of] if labels_of else lm)


class Head(NamedTuple):
  """The head that a model is to have.

  Attributes:
    labels_of: for an encoder, what it gives labels to: "text", "token", "image", or "span", each
      token by two outputs, whether an answer starts there and ends there; None for a decoder.
    foreign: the head in the files is another task's, so that one of its name must not be loaded.
  """

  labels_of: str | None
  foreign: bool = False


def of_files(fields: Any, where: str, *, asked: str | None, new: bool) -> Head:
  """The head, by the class that the file names; without one, an encoder's is for whole texts.

  Args:
    fields: the result of `hf_config.read`.
    where: the file they are from.
    asked: what the head of an encoder is asked to label; by default what the file's does.
    new: a new head was asked for.

  Raises:
    ValueError: if the file's head is for another task than asked, and no new one was asked for, or
      the class is not one of this model type.
  """
  allowed = fields.labels_of
  if asked is not None and allowed:
    ranges.one_of("labels_of", asked, allowed)
  ends = _ends(fields, where)
  named = " and ".join(fields.architectures or ())
  if not allowed:
    _check_decoder(fields.model_type, ends, named, where)
    return Head(None)
  found = next((of for of in allowed if LABELS_OF[of] in ends), None)
  if all(end in _NO_TASK for end in ends) or (found and found == (asked or found)):
    return Head(asked or found or allowed[0])
  if not new:
    raise ValueError(
      f"{where}: architectures is {named}, whose head is not for {_MEANT[asked or allowed[0]]}. "
      "Write load_pretrained(..., num_labels=...) for a new head on this body."
    )
  return Head(asked or allowed[0], foreign=True)


def _ends(fields: Any, where: str) -> list[str]:
  """The endings of a file's classes, after the name of the model type."""
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
  # Gemma 3's for texts alone have one word more.
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
  """Tells whether two matrices have the same values, compared some rows at a time."""
  if {one, other} & set(getattr(tensors, "states", ())):
    return False
  shape = tensors.info(one).shape
  if len(shape) != 2 or shape != tensors.info(other).shape:
    return False
  step = max(1, 2**20 // max(1, shape[1]))
  rows = lambda name, at: tensors.read_rows(name, at, min(at + step, shape[0]))
  return all(np.array_equal(rows(one, at), rows(other, at)) for at in range(0, shape[0], step))
