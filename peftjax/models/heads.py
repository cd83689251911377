"""Heads in files: the task each is for, and whether a decoder's is its table."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from peftjax.core import ranges
from peftjax.io.safetensors_dir import file_of
from peftjax.models.encoder_configs import Encoder

# Endings of classes that have a head which is loaded here, and of those that have none.
_LABELS_OF: Mapping[str, str] = {
  "text": "ForSequenceClassification",
  "token": "ForTokenClassification",
  "span": "ForQuestionAnswering",
}
_MEANT = {
  "text": "whole texts",
  "token": "each token",
  "span": "the ends of an answer",
}
_NO_TASK = ("Model", "ForMaskedLM", "ForPreTraining", "LMHeadModel", "ForCausalLM")
_DECODERS = (("ForCausalLM", "ForSequenceClassification"), ("Model",))
_GPT2 = (("LMHeadModel",), ("Model",))
# Beginnings of the same classes.
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
  "qwen3_moe": "Qwen3Moe",
  "mixtral": "Mixtral",
  "gpt2": "GPT2",
}


def architecture(model_type: str, labels_of: str | None) -> str:
  """The transformers class that computes the same as the model that is loaded here.

  Args:
    model_type: model type of the files.
    labels_of: a key of `_LABELS_OF`, what the head gives labels to; None for a language model.
  """
  lm = (_GPT2 if model_type == "gpt2" else _DECODERS)[0][0]
  return _NAMES[model_type] + (_LABELS_OF[labels_of] if labels_of else lm)


class Head(NamedTuple):
  """The head that a model is to have.

  Attributes:
    labels_of: for an encoder, what it gives labels to: "text", "token", or "span", each token by
      two outputs, whether an answer starts there and whether it ends there; None for a decoder.
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
    raise ValueError(
      f"{where}: architectures is {named}, whose head is not for {_MEANT[asked or 'text']}. Write "
      "load_pretrained(..., num_labels=...) for a new head on this body."
    )
  return Head(asked or "text", foreign=True)


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
  own, neutral = _GPT2 if prefix == "GPT2" else _DECODERS
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
  warnings.warn(
    f"{where} says tie_word_embeddings, and {file_of(tensors, words.head)} has {words.head} other "
    f"than {words.table}: they are loaded apart. Write tie_word_embeddings: false there.",
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
