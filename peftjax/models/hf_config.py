"""A model's `config.json`, typed: for each model type its fields, their ranges and its defaults.

A field that a file leaves out has the default of that model type's class in transformers, which
need not be another's. Only fields that change what is computed are listed; the rest is not read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from peftjax.core.ranges import Fraction, Size
from peftjax.io import records
from peftjax.io.records import clip
from peftjax.models.config_fields import (
  Common,
  Eps,
  Faults,
  Ids,
  Labelled,
  PadId,
  check_foreign,
  refused,
)
from peftjax.models.decoder_configs import GPT2, Gemma2, Gemma3, Llama, Mistral, Phi3, Qwen2, Qwen3
from peftjax.nn.ffn import ACTIVATIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bert(Labelled):
  """`BertConfig`."""

  vocab_size: Size = 30522
  hidden_size: Size = 768
  num_hidden_layers: Size = 12
  num_attention_heads: Size = 12
  intermediate_size: Size = 3072
  hidden_act: str = "gelu"
  hidden_dropout_prob: Fraction = 0.1
  attention_probs_dropout_prob: Fraction = 0.1
  max_position_embeddings: Size = 512
  type_vocab_size: Size = 2
  layer_norm_eps: Eps = 1e-12
  pad_token_id: PadId | None = 0
  classifier_dropout: Fraction | None = None
  is_decoder: bool = False
  add_cross_attention: bool = False
  position_embedding_type: str | None = "absolute"  # of files before transformers 5

  def faults(self) -> Faults:
    if self.hidden_size % self.num_attention_heads:
      yield "num_attention_heads", f"it must divide hidden_size {self.hidden_size}"
    if self.hidden_act not in ACTIVATIONS:
      yield "hidden_act", f"it must be one of {', '.join(ACTIVATIONS)}"
    if self.position_embedding_type not in (None, "absolute"):
      yield "position_embedding_type", "only absolute positions are supported"
    if self.is_decoder:
      yield "is_decoder", "only encoders are supported"
    if self.add_cross_attention:
      yield "add_cross_attention", "only encoders are supported"
    if (self.pad_token_id or 0) >= self.vocab_size:
      yield "pad_token_id", f"it must be below vocab_size {self.vocab_size}"
    yield from super().faults()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roberta(Bert):
  """`RobertaConfig`."""

  vocab_size: Size = 50265
  pad_token_id: PadId | None = 1
  eos_token_id: Ids = 2

  def faults(self) -> Faults:
    last = self.max_position_embeddings - 2
    if self.pad_token_id is None or not 0 <= self.pad_token_id <= last:
      yield "pad_token_id", f"positions start behind it, so it must be from 0 to {last}"
    yield from super().faults()


SCHEMAS: Mapping[str, type[Common]] = {
  "bert": Bert,
  "roberta": Roberta,
  "llama": Llama,
  "mistral": Mistral,
  "qwen2": Qwen2,
  "qwen3": Qwen3,
  "gemma2": Gemma2,
  "gemma3_text": Gemma3,
  "phi3": Phi3,
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
