"""The `config.json` of encoder-decoders: for each model type its fields, ranges and defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar

from msgspec import Meta

from peftjax.core.ranges import Count, Fraction, Size
from peftjax.models.config_fields import Eps, Faults, HeadSize, Ids, PadId, Texts

# Names in `nn.ffn.CURVES` by those of Hugging Face.
_CURVES: Mapping[str, str] = {
  "relu": "relu",
  "gelu": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "silu": "swish",
  "swish": "swish",
}
Buckets = Annotated[int, Meta(ge=4, le=2**16)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5(Texts):
  """`T5Config`, of the first version and of 1.1."""

  vocab_size: Size = 32128
  d_model: Size = 512
  d_kv: HeadSize = 64
  d_ff: Size = 2048
  num_layers: Size = 6
  num_decoder_layers: Size | None = None
  num_heads: Size = 8
  relative_attention_num_buckets: Buckets = 32
  relative_attention_max_distance: Size = 128
  dropout_rate: Fraction = 0.1
  layer_norm_epsilon: Eps = 1e-6
  feed_forward_proj: str = "relu"
  dense_act_fn: str | None = None  # these two are derived from it, unless a file has others
  is_gated_act: bool | None = None
  pad_token_id: PadId | None = 0
  eos_token_id: Ids = 1
  decoder_start_token_id: Count | None = None
  tie_word_embeddings: bool | None = True  # type: ignore[assignment]
  scale_decoder_outputs: bool | None = None  # of files since transformers 5
  is_encoder_decoder: bool = True
  is_decoder: bool = False

  aliases: ClassVar[Mapping[str, str]] = {
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "head_dim": "d_kv",
  }

  def faults(self) -> Faults:
    parts = self.feed_forward_proj.split("-")
    if len(parts) > 2 or (len(parts) == 2 and parts[0] != "gated"):
      yield "feed_forward_proj", "it must be an activation, or gated-ACTIVATION"
    for field, name in (("feed_forward_proj", self._derived), ("dense_act_fn", self.activation)):
      if name not in _CURVES:
        yield field, f"the activation must be one of {', '.join(_CURVES)}"
    if self.relative_attention_num_buckets % 2:
      yield "relative_attention_num_buckets", "it must be even: one half is of later tokens"
    if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 2:
      least = self.relative_attention_num_buckets // 2 + 1
      yield "relative_attention_max_distance", f"of so many buckets it must be {least} or more"
    if self.is_decoder:
      yield "is_decoder", "only an encoder with a decoder is supported"
    if not self.is_encoder_decoder:
      yield "is_encoder_decoder", "only an encoder with a decoder is supported"
    for field in ("decoder_start_token_id", "pad_token_id"):
      if (getattr(self, field) or 0) >= self.vocab_size:
        yield field, f"it must be below vocab_size {self.vocab_size}"
    yield from super().faults()

  @property
  def _derived(self) -> str:
    said = self.feed_forward_proj
    return "gelu_new" if said == "gated-gelu" else said.rpartition("-")[2]

  @property
  def activation(self) -> str:
    """Hugging Face's name of the activation."""
    return self._derived if self.dense_act_fn is None else self.dense_act_fn

  @property
  def curve(self) -> str:
    """The activation, one of `nn.ffn.CURVES`."""
    return _CURVES[self.activation]

  @property
  def gated(self) -> bool:
    derived = self.feed_forward_proj.startswith("gated-")
    return derived if self.is_gated_act is None else self.is_gated_act

  @property
  def start_id(self) -> int:
    """The id that a target begins with: padding, where a file says nothing."""
    return self.padding if self.decoder_start_token_id is None else self.decoder_start_token_id

  @property
  def scales(self) -> bool:
    """True if the head reads the last hidden state over √D: 1.1 says so by an untied head."""
    tied = self.tie_word_embeddings is not False
    return tied if self.scale_decoder_outputs is None else self.scale_decoder_outputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class MT5(T5):
  """`MT5Config`."""

  vocab_size: Size = 250112
  d_ff: Size = 1024
  num_layers: Size = 8
  num_heads: Size = 6
  feed_forward_proj: str = "gated-gelu"
  decoder_start_token_id: Count | None = 0
  tie_word_embeddings: bool = True

  @property
  def scales(self) -> bool:
    return False
