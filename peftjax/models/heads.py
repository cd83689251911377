"""Heads in files: which task they are of, and whether a decoder's is its table."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from peftjax.io.safetensors_dir import file_of
from peftjax.models import hf_config

# How classes are named that have the head which is loaded here, and that have none of a task.
_ENCODERS = (
  ("ForSequenceClassification",),
  ("Model", "ForMaskedLM", "ForPreTraining", "LMHeadModel", "ForCausalLM"),
)
_DECODERS = (("ForCausalLM", "LMHeadModel"), ("Model",))
# How they begin.
_NAMES: Mapping[str, str] = {
  "bert": "Bert",
  "roberta": "Roberta",
  "llama": "Llama",
  "mistral": "Mistral",
  "qwen2": "Qwen2",
  "gpt2": "GPT2",
}


def architecture(model_type: str) -> str:
  """The class in transformers that computes what the model that is loaded here does."""
  if model_type in ("bert", "roberta"):
    return _NAMES[model_type] + _ENCODERS[0][0]
  return _NAMES[model_type] + _DECODERS[0][model_type == "gpt2"]


def of_another_task(fields: Any, where: str, *, new: bool) -> bool:
  """Whether the file's head is another task's, so that one of the same name must not be loaded.

  Args:
    fields: of `hf_config.read`.
    where: the file they are from.
    new: a new head was asked for.

  Raises:
    ValueError: if there is such a head and no new one was asked for, or the class is none of this
      model type.
  """
  if not fields.architectures:
    return False
  named = " and ".join(fields.architectures)
  decoder = not isinstance(fields, hf_config.Bert)
  own, neutral = _DECODERS if decoder else _ENCODERS
  prefix = _NAMES[fields.model_type]
  kinds = [name for name in fields.architectures if name.lower().startswith(prefix.lower())]
  if not kinds:
    raise ValueError(
      f"{where}: architectures is {named}, and model_type {fields.model_type!r} means {prefix}...: "
      "other models differ from it, if only in a factor. It is not supported."
    )
  ends = [name[len(prefix) :] for name in kinds]
  if any(end in own for end in ends) or all(end in neutral for end in ends):
    return False
  if decoder:
    raise ValueError(
      f"{where}: architectures is {named}, whose head is not a language model's; only "
      f"{prefix}{own[prefix == 'GPT2']} is loaded. Take a checkpoint of that class."
    )
  if not new:
    raise ValueError(
      f"{where}: architectures is {named}, whose head is none for whole texts. Write "
      "load_pretrained(..., num_labels=...) for a new head on this body."
    )
  return True


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
  """Whether two matrices have the same values, compared some rows at a time."""
  if {one, other} & set(getattr(tensors, "states", ())):
    return False
  shape = tensors.info(one).shape
  if len(shape) != 2 or shape != tensors.info(other).shape:
    return False
  step = max(1, 2**20 // max(1, shape[1]))
  rows = lambda name, at: tensors.read_rows(name, at, min(at + step, shape[0]))
  return all(np.array_equal(rows(one, at), rows(other, at)) for at in range(0, shape[0], step))
