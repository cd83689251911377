"""A model's `config.json`, typed: for each model type its fields, their ranges and its defaults.

A field that a file leaves out has the default of that model type's class in transformers, which
need not be another's. Only fields that change what is computed are listed; the rest is not read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from peftjax.core.ranges import Count, Fraction, Positive, Size
from peftjax.io import records
from peftjax.io.records import clip
from peftjax.models.config_fields import (
  MOST_OF_A_HEAD,
  Common,
  Eps,
  Faults,
  HeadSize,
  Ids,
  Theta,
  refused,
)
from peftjax.models.encoder_configs import (
  Bert,
  Camembert,
  DebertaV2,
  DistilBert,
  Electra,
  Roberta,
  XLMRoberta,
)
from peftjax.nn.ffn import ACTIVATIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
  """`rope_parameters`, or `rope_scaling` of older files."""

  rope_type: str | None = None
  type: str | None = None  # what `rope_type` was
  rope_theta: Theta | None = None
  factor: Positive | None = None
  original_max_position_embeddings: Size | None = None
  low_freq_factor: Positive | None = None
  high_freq_factor: Positive | None = None
  beta_fast: Positive | None = None
  beta_slow: Positive | None = None
  attention_factor: Positive | None = None
  mscale: Annotated[float, Meta(ge=0, lt=1e30)] | None = None
  mscale_all_dim: Annotated[float, Meta(ge=0, lt=1e30)] | None = None
  truncate: bool | None = None
  partial_rotary_factor: Positive | None = None

  # What each kind has to have.
  kinds: ClassVar[Mapping[str, tuple[str, ...]]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
  }

  @property
  def kind(self) -> str:
    return self.rope_type or self.type or "default"

  def faults(self) -> Faults:
    """As `Common.faults`."""
    if self.kind not in self.kinds:
      yield "kind", f"it must be one of {', '.join(self.kinds)}"
    for field in self.kinds.get(self.kind, ()):
      if getattr(self, field) is None:
        yield field, f'rope_type "{self.kind}" needs a number there'
    low, high = self.low_freq_factor or 0.0, self.high_freq_factor or 0.0
    if self.kind == "llama3" and high <= low:
      yield "high_freq_factor", f"it must be above low_freq_factor {low}"

  def items(self) -> dict[str, Any]:
    """The fields that are given, for `nn.rope.frequencies`."""
    given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
    rest = {k: v for k, v in given.items() if k not in ("type", "rope_theta")}
    return {**rest, "rope_type": self.kind}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama(Common):
  """`LlamaConfig`."""

  vocab_size: Size = 32000
  hidden_size: Size = 4096
  intermediate_size: Size = 11008
  num_hidden_layers: Size = 32
  num_attention_heads: Size = 32
  num_key_value_heads: Size | None = None
  head_dim: HeadSize | None = None
  hidden_act: str = "silu"
  max_position_embeddings: Size = 2048
  original_max_position_embeddings: Size | None = None
  attention_dropout: Fraction | None = 0.0
  rms_norm_eps: Eps = 1e-6
  eos_token_id: Ids = 2
  tie_word_embeddings: bool = False
  rope_parameters: dict[str, Any] | None = None
  rope_scaling: dict[str, Any] | None = None
  rope_theta: Theta = 10_000.0
  partial_rotary_factor: Positive | None = None
  attention_bias: bool = False
  mlp_bias: bool = False

  # Whether heads of any width may be asked for, whatever `hidden_size` is.
  free_heads: ClassVar[bool] = False

  def faults(self) -> Faults:
    if self.hidden_act not in ("silu", "swish"):
      yield "hidden_act", "this decoder has SwiGLU, 'silu'"
    free = self.free_heads and self.head_dim
    if self.hidden_size % self.num_attention_heads and not free:
      yield "num_attention_heads", f"it must divide hidden_size {self.hidden_size}"
    if self.num_attention_heads % self.kv_heads:
      yield "num_key_value_heads", f"it must divide num_attention_heads {self.num_attention_heads}"
    if self.head_size % 2 or not 0 < self.head_size <= MOST_OF_A_HEAD:
      yield (
        "head_size",
        "(head_dim, or hidden_size / num_attention_heads) it must be even, since pairs are "
        f"rotated, and at most {MOST_OF_A_HEAD}",
      )
    yield from super().faults()

  @property
  def kv_heads(self) -> int:
    return self.num_key_value_heads or self.num_attention_heads

  @property
  def head_size(self) -> int:
    return self.head_dim or self.hidden_size // self.num_attention_heads

  @property
  def window(self) -> int | None:
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mistral(Llama):
  """`MistralConfig`."""

  intermediate_size: Size = 14336
  num_key_value_heads: Size = 8
  attention_dropout: Fraction = 0.0
  max_position_embeddings: Size = 4096 * 32
  sliding_window: Size | None = 4096

  free_heads: ClassVar[bool] = True

  @property
  def window(self) -> int | None:
    return self.sliding_window


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2(Llama):
  """`Qwen2Config`."""

  vocab_size: Size = 151936
  intermediate_size: Size = 22016
  num_key_value_heads: Size | None = 32
  attention_dropout: Fraction = 0.0
  max_position_embeddings: Size = 32768
  eos_token_id: Ids = None
  use_sliding_window: bool = False
  sliding_window: Size | None = 4096
  max_window_layers: Count = 28
  layer_types: list[str] | None = None

  free_heads: ClassVar[bool] = True

  def faults(self) -> Faults:
    mixed = self.max_window_layers < self.num_hidden_layers
    if self.layer_types is not None:
      mixed = "sliding_attention" in self.layer_types
      if len(self.layer_types) != self.num_hidden_layers:
        yield "layer_types", f"it must have num_hidden_layers {self.num_hidden_layers} entries"
      if set(self.layer_types) - {"full_attention", "sliding_attention"}:
        yield "layer_types", "only full_attention is supported"
    if self.use_sliding_window and self.sliding_window is not None and mixed:
      yield "use_sliding_window", "Qwen2 models that mix windows are not supported"
    yield from super().faults()


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2(Common):
  """`GPT2Config`."""

  vocab_size: Size = 50257
  n_positions: Size = 1024
  n_embd: Size = 768
  n_layer: Size = 12
  n_head: Size = 12
  n_inner: Size | None = None
  activation_function: str = "gelu_new"
  resid_pdrop: Fraction = 0.1
  embd_pdrop: Fraction = 0.1
  attn_pdrop: Fraction = 0.1
  layer_norm_epsilon: Eps = 1e-5
  scale_attn_weights: bool = True
  scale_attn_by_inverse_layer_idx: bool = False
  add_cross_attention: bool = False
  eos_token_id: Ids = 50256

  aliases: ClassVar[Mapping[str, str]] = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
  }

  def faults(self) -> Faults:
    if self.n_embd % self.n_head:
      yield "n_head", f"it must divide n_embd {self.n_embd}"
    if self.activation_function not in ACTIVATIONS:
      yield "activation_function", f"it must be one of {', '.join(ACTIVATIONS)}"
    if not self.scale_attn_weights:
      yield "scale_attn_weights", "only true is supported"
    for field in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
      if getattr(self, field):
        yield field, "only false is supported"
    yield from super().faults()


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
  fields = records.convert(_own_names(config, schema, where), schema, where)
  for field, allowed in fields.faults():
    raise refused(where, field, getattr(fields, field), allowed)
  both = "num_labels" in config and getattr(fields, "id2label", None) is not None
  if both and fields.num_labels != fields.labels:  # type: ignore[attr-defined]
    told = f"id2label names {fields.labels} outputs; leave one of them out"  # type: ignore[attr-defined]
    raise refused(where, "num_labels", config["num_labels"], told)
  return fields


def rope(fields: Llama, where: str = "config.json") -> tuple[float, dict[str, Any]]:
  """θ and the other rotary parameters; `rope_scaling` goes before `rope_parameters`, as there.

  Raises:
    ValueError: on a kind that is not known, or fields that it lacks or nobody has.
  """
  name = "rope_scaling" if fields.rope_scaling else "rope_parameters"
  given = getattr(fields, name) or {}
  if strange := records.unknown(given, Rope):
    raise refused(
      where, f"{name}.{next(iter(strange))}", given[next(iter(strange))], "it is unknown"
    )
  made = records.convert(given, Rope, f"{where}: {name}")
  for field, allowed in made.faults():
    named = "rope_type" if field == "kind" else field
    raise refused(where, f"{name}.{named}", getattr(made, field), allowed)
  part = made.partial_rotary_factor or fields.partial_rotary_factor or 1.0
  if part != 1.0:
    raise refused(where, "partial_rotary_factor", part, "only whole heads are rotated")
  theta = fields.rope_theta if made.rope_theta is None else made.rope_theta
  items, outside = made.items(), fields.original_max_position_embeddings
  if outside is not None and made.kind in ("llama3", "yarn"):  # goes before the one inside
    items["original_max_position_embeddings"] = outside
  return float(theta), items


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
