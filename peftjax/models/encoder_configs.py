"""The `config.json` of encoders: for each model type its fields, their ranges and its defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar

from msgspec import Meta

from peftjax.core.ranges import Count, Fraction, Size
from peftjax.models.config_fields import Eps, Faults, Ids, Labelled, PadId
from peftjax.nn.ffn import ACTIVATIONS

_DISTIL_EPS = 1e-12  # no field says it
# A number for relative positions, whose table has twice as many rows; -1 means none.
Span = Annotated[int, Meta(ge=-1, le=2**16)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder(Labelled):
  """The fields that the configurations of all encoders have."""

  def faults(self) -> Faults:
    if (self.pad_token_id or 0) >= self.vocab_size:
      yield "pad_token_id", f"it must be below vocab_size {self.vocab_size}"
    yield from super().faults()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bert(Encoder):
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
  position_embedding_type: str | None = "absolute"  # in files before transformers 5

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
    yield from super().faults()

  @property
  def embedding_width(self) -> int:
    return self.hidden_size

  def head_dropout(self, labels_of: str) -> float:
    """The rate before the head's projection, by what the head labels; see `heads.Head`."""
    if labels_of == "span":
      return 0.0
    head = self.classifier_dropout
    return self.hidden_dropout_prob if head is None else head


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roberta(Bert):
  """`RobertaConfig`."""

  vocab_size: Size = 50265
  pad_token_id: PadId | None = 1
  eos_token_id: Ids = 2

  def faults(self) -> Faults:
    last = self.max_position_embeddings - 2
    if self.pad_token_id is None or not 0 <= self.pad_token_id <= last:
      yield "pad_token_id", f"positions start after it, so it must be from 0 to {last}"
    yield from super().faults()


@dataclasses.dataclass(frozen=True, kw_only=True)
class XLMRoberta(Roberta):
  """`XLMRobertaConfig`."""

  vocab_size: Size = 30522


@dataclasses.dataclass(frozen=True, kw_only=True)
class Camembert(Roberta):
  """`CamembertConfig`."""

  vocab_size: Size = 30522


@dataclasses.dataclass(frozen=True, kw_only=True)
class Electra(Bert):
  """`ElectraConfig`."""

  embedding_size: Size = 128
  hidden_size: Size = 256
  num_attention_heads: Size = 4
  intermediate_size: Size = 1024

  @property
  def embedding_width(self) -> int:
    return self.embedding_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistilBert(Encoder):
  """`DistilBertConfig`; the properties have BERT's names for the same things."""

  vocab_size: Size = 30522
  max_position_embeddings: Size = 512
  n_layers: Size = 6
  n_heads: Size = 12
  dim: Size = 768
  hidden_dim: Size = 4 * 768
  dropout: Fraction = 0.1
  attention_dropout: Fraction = 0.1
  activation: str = "gelu"
  seq_classif_dropout: Fraction = 0.2
  qa_dropout: Fraction = 0.1
  pad_token_id: PadId | None = 0

  aliases: ClassVar[Mapping[str, str]] = {
    "hidden_size": "dim",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
  }

  def faults(self) -> Faults:
    if self.dim % self.n_heads:
      yield "n_heads", f"it must divide dim {self.dim}"
    if self.activation not in ACTIVATIONS:
      yield "activation", f"it must be one of {', '.join(ACTIVATIONS)}"
    yield from super().faults()

  hidden_size = embedding_width = property(lambda self: self.dim)
  num_hidden_layers = property(lambda self: self.n_layers)
  num_attention_heads = property(lambda self: self.n_heads)
  intermediate_size = property(lambda self: self.hidden_dim)
  hidden_act = property(lambda self: self.activation)
  hidden_dropout_prob = property(lambda self: self.dropout)
  attention_probs_dropout_prob = property(lambda self: self.attention_dropout)
  layer_norm_eps = property(lambda self: _DISTIL_EPS)
  type_vocab_size = property(lambda self: 0)

  def head_dropout(self, labels_of: str) -> float:
    """See `Bert.head_dropout`."""
    own = {"text": self.seq_classif_dropout, "span": self.qa_dropout}
    return own.get(labels_of, self.dropout)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DebertaV2(Bert):
  """`DebertaV2Config`, for versions 2 and 3."""

  vocab_size: Size = 128100
  hidden_size: Size = 1536
  num_hidden_layers: Size = 24
  num_attention_heads: Size = 24
  intermediate_size: Size = 6144
  type_vocab_size: Count = 0
  layer_norm_eps: Eps = 1e-7
  relative_attention: bool = False
  max_relative_positions: Span = -1
  position_buckets: Span = -1
  position_biased_input: bool = True
  pos_att_type: str | list[str] | None = None
  share_att_key: bool = False
  norm_rel_ebd: str = "none"
  conv_kernel_size: Count = 0
  embedding_size: Size | None = None
  attention_head_size: Size | None = None
  pooler_hidden_size: Size | None = None
  pooler_dropout: Fraction = 0.0
  pooler_hidden_act: str = "gelu"
  cls_dropout: Fraction | None = None

  def faults(self) -> Faults:
    if self.directions - {"c2p", "p2c"}:
      yield "pos_att_type", "only c2p and p2c are supported"
    if self.relative_attention != bool(self.directions):
      told = "c2p, p2c or both" if self.relative_attention else "nothing"
      yield "pos_att_type", f"with relative_attention {self.relative_attention} it must name {told}"
    if self.norms - {"none", "layer_norm"}:
      yield "norm_rel_ebd", "it must be none or layer_norm"
    if self.conv_kernel_size:
      yield "conv_kernel_size", "the convolution after the first layer is not supported"
    whole = self.hidden_size
    for field, size in (
      ("embedding_size", whole),
      ("pooler_hidden_size", whole),
      ("attention_head_size", whole // self.num_attention_heads),
    ):
      if getattr(self, field) not in (None, size):
        yield field, f"only {size}, as hidden_size means, is supported"
    if self.pooler_hidden_act not in ACTIVATIONS:
      yield "pooler_hidden_act", f"it must be one of {', '.join(ACTIVATIONS)}"
    if self.buckets and not 1 <= self.buckets // 2 < self.farthest - 1:
      yield "position_buckets", f"half of it must be from 1 to {self.farthest - 2}"
    yield from super().faults()

  @property
  def directions(self) -> frozenset[str]:
    """The directions of attention between contents and positions."""
    given = self.pos_att_type or []
    parts = given.lower().split("|") if isinstance(given, str) else given
    return frozenset(part.strip() for part in parts)

  @property
  def norms(self) -> frozenset[str]:
    return frozenset(part.strip() for part in self.norm_rel_ebd.lower().split("|"))

  @property
  def farthest(self) -> int:
    """The distance from which on all distances are one."""
    given = self.max_relative_positions
    return given if given >= 1 else self.max_position_embeddings

  @property
  def buckets(self) -> int:
    """The number of buckets for distances on either side; 0 if each distance has its own."""
    return max(self.position_buckets, 0)

  def head_dropout(self, labels_of: str) -> float:
    """See `Bert.head_dropout`."""
    if labels_of == "span":
      return 0.0
    own = self.cls_dropout if labels_of == "text" else None
    return self.hidden_dropout_prob if own is None else own
