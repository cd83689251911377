"""The configuration of a pretrained model, and the ids and checks that tasks take from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftjax.io import quantization
from peftjax.io.gguf import GGUFFile
from peftjax.io.records import clip
from peftjax.io.safetensors_dir import read_config
from peftjax.models import hf_config
from peftjax.models.config_fields import classifies
from peftjax.models.families import FAMILIES, READERS


def config_of(path: str | Path) -> dict[str, Any]:
  """The configuration alone, as the file has it, once `hf_config` has found nothing wrong with it.

  Raises:
    ValueError: on a field of the wrong type or out of range; on quantised weights of a kind that is
      not read.
  """
  if Path(path).suffix == ".gguf":
    return GGUFFile(path).config
  config = read_config(path)
  quantization.check(config, config_file(path))
  hf_config.read(config, config_file(path))
  return config


def check_decoder(directory: str | Path) -> None:
  """Raises ValueError unless the model is a language model, going by its configuration alone."""
  config, said = config_of(directory), config_file(directory)
  fields = hf_config.read(config, said)
  _check_texts(fields, said)
  kind = fields.model_type
  decoders = [
    name for name, x in FAMILIES.items() if hasattr(x.CONFIG, "remat") and name not in READERS
  ]
  if kind not in decoders:
    raise ValueError(
      f"{said} is of a {kind}, which is not a language model; task=causal_lm takes "
      f"{', '.join(decoders)}, configs/seq2seq.py {', '.join(READERS)}, and configs/classify.py "
      "the others"
    )
  if classifies(fields.architectures):
    raise ValueError(
      f"{said}: architectures is {' and '.join(fields.architectures)}, which is not a language "
      "model; configs/classify.py takes it"
    )


def check_encoder_decoder(directory: str | Path) -> None:
  """Raises ValueError unless the model has a decoder that reads the output of an encoder."""
  kind = config_of(directory)["model_type"]
  if kind not in READERS:
    raise ValueError(
      f"{config_file(directory)} is of a {kind}, and task=seq2seq takes {', '.join(READERS)}: "
      "name one of these, --config.model.directory=DIR, or take configs/causal_lm.py for a decoder"
    )


def reads_source(path: str | Path) -> bool:
  """Tells whether the model is an encoder-decoder, which answers a text and does not go on."""
  return config_of(path)["model_type"] in READERS


def start_id(path: str | Path) -> int:
  """The token id that a decoder which reads a source begins with."""
  return hf_config.read(config_of(path), config_file(path)).start_id


def end_ids(path: str | Path) -> tuple[int, ...]:
  """The token ids that end a text; if the file leaves them out, its model type's default.

  Raises:
    ValueError: if the configuration names none, or one beyond the vocabulary.
  """
  fields = _text_fields(path)
  if not fields.end_ids:
    raise ValueError(f"{config_file(path)} names no eos_token_id: add it")
  if strange := [i for i in fields.end_ids if not 0 <= i < fields.vocab_size]:
    raise ValueError(
      f"{config_file(path)}: eos_token_id names {clip(strange[0])}, and the model has the tokens "
      f"0 to {fields.vocab_size - 1}."
    )
  return fields.end_ids


def pad_id(path: str | Path) -> int:
  """The token id that pads a batch for this model."""
  return _text_fields(path).padding


def check_texts(path: str | Path) -> None:
  """Raises ValueError unless the model reads texts, going by its configuration alone."""
  _text_fields(path)


def _text_fields(path: str | Path) -> Any:
  """The typed configuration of a model that reads texts."""
  fields = hf_config.read(config_of(path), config_file(path))
  _check_texts(fields, config_file(path))
  return fields


def _check_texts(fields: Any, where: str) -> None:
  if "image" in fields.labels_of:
    raise ValueError(
      f"{where} is of a {fields.model_type}, which reads images: tasks and pj.texts take models of "
      "texts. Train it with pj.fit on arrays (images, labels), or in a loop of your own."
    )


def config_file(path: str | Path) -> str:
  """The configuration's file, for messages."""
  return str(path) if Path(path).suffix == ".gguf" else str(Path(path) / "config.json")
