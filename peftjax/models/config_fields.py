"""The fields that every model type's `config.json` has, and the ranges of common ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from peftjax.core.ranges import Count, Size
from peftjax.io.records import clip

Eps = Annotated[float, Meta(gt=0, lt=1)]
Theta = Annotated[float, Meta(gt=1, lt=1e15)]
MOST_OF_A_HEAD = 2**16  # features: their frequencies are computed before any tensor is looked at
HeadSize = Annotated[int, Meta(ge=1, le=MOST_OF_A_HEAD)]
Layers = Annotated[int, Meta(ge=1, le=2**16)]  # listed before any tensor is looked at
Labels = Annotated[int, Meta(ge=1, le=2**20)]
# A padding id of -1 means none. Whether an id has a row in the table is seen where the table is.
PadId = Annotated[int, Meta(ge=-1, lt=2**31)]
Ids = Count | list[Count] | None
# Pairs of a field and its allowed values.
Faults = Iterator[tuple[str, str]]

# Computations of relatives of these families, by the field that asks for them. A file of a
# known model type that has one was made for other code.
FOREIGN = (
  *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "logit_scale"),
  *("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"),
  *("no_rope_layers", "no_rope_layer_interval", "use_qk_norm", "qk_layernorm", "clip_qkv"),
  *("num_experts", "num_local_experts", "n_routed_experts", "attention_chunk_size"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
  """The fields that every model type has."""

  model_type: str = ""
  architectures: tuple[str, ...] | None = None
  vocab_size: Size
  pad_token_id: PadId | None = None
  eos_token_id: Ids = None
  tie_word_embeddings: bool = True  # of decoders

  # Other names of the same fields, which some files use.
  aliases: ClassVar[Mapping[str, str]] = {}

  def faults(self) -> Faults:
    """Fields whose values do not go together with others, and what is allowed."""
    if self.eos_token_id == []:
      yield "eos_token_id", "it must name a token, or be left out"

  @property
  def end_ids(self) -> tuple[int, ...]:
    ids = self.eos_token_id
    return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)

  @property
  def padding(self) -> int:
    """The id that pads a batch: any will do where files name none, as padding is masked."""
    known = self.pad_token_id is not None and 0 <= self.pad_token_id < self.vocab_size
    return self.pad_token_id if known else 0  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labelled(Common):
  """The further fields of model types with a head for whole texts."""

  id2label: dict[str, Any] | None = None
  num_labels: Labels = 2

  def faults(self) -> Faults:
    if self.id2label is not None and not (self.id2label and all(map(_is_index, self.id2label))):
      yield "id2label", "it must give each output, 0, 1, ..., its name"
    yield from super().faults()

  @property
  def labels(self) -> int:
    return self.num_labels if self.id2label is None else len({int(key) for key in self.id2label})


def classifies(architectures: Sequence[str] | None) -> bool:
  """Tells whether one of the classes has a head for whole texts."""
  return any(name.endswith("ForSequenceClassification") for name in architectures or ())


def check_foreign(config: Mapping[str, Any], schema: type[Common], where: str) -> None:
  """Raises ValueError if one of `FOREIGN` that a schema lacks has a value, not 0 or false."""
  for field in FOREIGN:
    if config.get(field) and field not in {*schema.__dataclass_fields__, *schema.aliases}:
      kind = config.get("model_type")
      told = f"models of type {kind} are computed without it: leave it out if it was not used"
      raise refused(where, field, config[field], told)


def refused(where: str, field: str, value: Any, why: str) -> ValueError:
  """The error of a field: the file, what it holds, and what is allowed."""
  return ValueError(f"{where}: {field} is {clip(value)}; {why}.")


def _is_index(key: str) -> bool:
  return key.isascii() and key.isdigit() and len(key) < 10
