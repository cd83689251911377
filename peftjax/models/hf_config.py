"""A model's `config.json`, typed: for each model type its fields, their ranges and its defaults.

A field that a file leaves out has the default of that model type's class in transformers, which
need not be another's. Only fields that change what is computed are listed; the rest is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftjax.io import records
from peftjax.io.records import clip
from peftjax.models.config_fields import Common, check_foreign, refused
from peftjax.models.decoder_configs import GPT2, Gemma2, Gemma3, Llama, Mistral, Phi3, Qwen2, Qwen3
from peftjax.models.encoder_configs import (
  Bert,
  Camembert,
  DebertaV2,
  DistilBert,
  Electra,
  Roberta,
  XLMRoberta,
)
from peftjax.models.expert_configs import Mixtral, Qwen3Moe

SCHEMAS: Mapping[str, type[Common]] = {
  "bert": Bert,
  "roberta": Roberta,
  "xlm-roberta": XLMRoberta,
  "camembert": Camembert,
  "electra": Electra,
  "distilbert": DistilBert,
  "deberta-v2": DebertaV2,
  "llama": Llama,
  "mistral": Mistral,
  "qwen2": Qwen2,
  "qwen3": Qwen3,
  "gemma2": Gemma2,
  "gemma3_text": Gemma3,
  "phi3": Phi3,
  "qwen3_moe": Qwen3Moe,
  "mixtral": Mixtral,
  "gpt2": GPT2,
}


def read(config: Mapping[str, Any], where: str = "config.json") -> Any:
  """The typed fields of a configuration, with its model type's defaults.

  Raises:
    ValueError: naming `where`, the field, what it holds and what is allowed.
  """
  kind = config.get("model_type")
  if not isinstance(kind, str) or kind not in SCHEMAS:
    raise ValueError(f"{where} has model_type {clip(kind)}; supported are {', '.join(SCHEMAS)}.")
  schema = SCHEMAS[kind]
  check_foreign(config, schema, where)
  fields = records.convert(_own_names(config, schema, where), schema, where)
  for field, allowed in fields.faults():
    raise refused(where, field, getattr(fields, field), allowed)
  both = "num_labels" in config and getattr(fields, "id2label", None) is not None
  if both and fields.num_labels != fields.labels:  # type: ignore[attr-defined]
    told = f"id2label names {fields.labels} outputs; leave one of them out"  # type: ignore[attr-defined]
    raise refused(where, "num_labels", config["num_labels"], told)
  return fields


def _own_names(config: Mapping[str, Any], schema: type[Common], where: str) -> dict[str, Any]:
  """The fields under the names that the schema has for them."""
  made = dict(config)
  for other, own in schema.aliases.items():
    if other in made:
      value = made.pop(other)
      if own in made and made[own] != value:
        raise refused(where, other, value, f"{own}, the same thing, is {clip(made[own])}")
      made[own] = value
  return made
