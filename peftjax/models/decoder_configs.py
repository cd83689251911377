"""Fields of a decoder's `config.json`, with the defaults of its model type in transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from peftjax.core.ranges import Count, Fraction, Positive, Size
from peftjax.models import rope_config
from peftjax.models.config_fields import (
  MOST_OF_A_HEAD,
  Common,
  Eps,
  Faults,
  HeadSize,
  Ids,
  Labelled,
  Layers,
  PadId,
  Theta,
  refused,
)
from peftjax.nn.ffn import ACTIVATIONS

# Entries of `layer_types`.
_ALL, _WINDOW = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama(Labelled):
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

  # True if heads of any width are allowed, whatever `hidden_size` is.
  free_heads: ClassVar[bool] = False
  # True if a part of each head may be rotated, and the rest not.
  partial: ClassVar[bool] = False
  # The field of the gate's activation, and its allowed values.
  gates: ClassVar[tuple[str, tuple[str, ...]]] = "hidden_act", ("silu", "swish")

  def faults(self) -> Faults:
    field, known = self.gates
    if getattr(self, field) not in known:
      yield field, f"of this decoder's gate it must be {known[0]!r}"
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

  def rope(self, where: str = "config.json") -> tuple[float, dict[str, Any]]:
    """θ and the other rotary parameters: see `rope_config.read`."""
    return rope_config.read(self, where)

  def block(self, where: str) -> dict[str, Any]:
    """The fields of `llama.LlamaConfig` for this model type's block alone; raises as `rope`."""
    return dict(qkv_bias=self.attention_bias, out_bias=self.attention_bias, ffn_bias=self.mlp_bias)


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

  def block(self, where: str) -> dict[str, Any]:
    return dict(window=self.window)  # it has no biases, whatever a file says


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layered(Llama):
  """A decoder in which each layer sees all earlier tokens, or those in a window."""

  num_hidden_layers: Layers = 32
  sliding_window: Size | None = 4096
  layer_types: list[str] | None = None

  def slides(self, layer: int) -> bool:
    """Tells whether a layer has a window where `layer_types` does not say."""
    raise NotImplementedError

  @property
  def types(self) -> list[str]:
    default = lambda i: _WINDOW if self.slides(i) else _ALL
    return self.layer_types or [default(i) for i in range(self.num_hidden_layers)]

  @property
  def window(self) -> int | None:
    return self.sliding_window

  def faults(self) -> Faults:
    if self.layer_types is not None:
      if len(self.layer_types) != self.num_hidden_layers:
        yield "layer_types", f"it must have num_hidden_layers {self.num_hidden_layers} entries"
      if set(self.layer_types) - {_ALL, _WINDOW}:
        yield "layer_types", f"only {_ALL} and {_WINDOW} are supported"
    if self.window is None and _WINDOW in self.types:
      yield "sliding_window", f"layers of {_WINDOW} need one"
    yield from super().faults()

  def block(self, where: str) -> dict[str, Any]:
    full = tuple(i for i, kind in enumerate(self.types) if kind == _ALL)
    slide = len(full) < self.num_hidden_layers
    return dict(window=self.window, global_layers=full) if slide else {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2(Layered):
  """`Qwen2Config`."""

  vocab_size: Size = 151936
  intermediate_size: Size = 22016
  num_key_value_heads: Size | None = 32
  attention_dropout: Fraction = 0.0
  max_position_embeddings: Size = 32768
  eos_token_id: Ids = None
  use_sliding_window: bool = False
  max_window_layers: Count = 28

  free_heads: ClassVar[bool] = True

  @property
  def window(self) -> int | None:
    return self.sliding_window if self.use_sliding_window else None

  def slides(self, layer: int) -> bool:
    return self.window is not None and layer >= self.max_window_layers

  def faults(self) -> Faults:
    if not self.use_sliding_window and _WINDOW in self.types:
      yield "use_sliding_window", f"layers of {_WINDOW} need it to be true"
    yield from super().faults()

  def block(self, where: str) -> dict[str, Any]:
    return dict(super().block(where), qkv_bias=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3(Qwen2):
  """`Qwen3Config`."""

  head_dim: HeadSize = 128

  def block(self, where: str) -> dict[str, Any]:
    bias = dict(qkv_bias=self.attention_bias, out_bias=self.attention_bias)
    return dict(super().block(where), qk_norm=True, **bias)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma2(Layered):
  """`Gemma2Config`."""

  vocab_size: Size = 256000
  hidden_size: Size = 2304
  intermediate_size: Size = 9216
  num_hidden_layers: Layers = 26
  num_attention_heads: Size = 8
  num_key_value_heads: Size = 4
  head_dim: HeadSize = 256
  hidden_activation: str = "gelu_pytorch_tanh"
  max_position_embeddings: Size = 8192
  pad_token_id: PadId | None = 0
  eos_token_id: Ids = 1
  tie_word_embeddings: bool = True
  query_pre_attn_scalar: Size = 256
  final_logit_softcapping: Positive | None = 30.0
  attn_logit_softcapping: Positive | None = 50.0
  use_bidirectional_attention: bool | None = None

  gates: ClassVar[tuple[str, tuple[str, ...]]] = "hidden_activation", ("gelu_pytorch_tanh",)

  def slides(self, layer: int) -> bool:
    return layer % 2 == 0

  def faults(self) -> Faults:
    if self.use_bidirectional_attention:
      yield "use_bidirectional_attention", "only decoders, which look back, are supported"
    yield from super().faults()

  def block(self, where: str) -> dict[str, Any]:
    return dict(
      super().block(where),
      qkv_bias=self.attention_bias,
      out_bias=self.attention_bias,
      norm_offset=1.0,
      four_norms=True,
      gate="gelu_tanh",
      embedding_scale=self.hidden_size**0.5,
      query_size=self.query_pre_attn_scalar,
      score_cap=self.attn_logit_softcapping,
      logit_cap=self.final_logit_softcapping,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3(Gemma2):
  """`Gemma3TextConfig`."""

  vocab_size: Size = 262_208
  max_position_embeddings: Size = 131_072
  final_logit_softcapping: Positive | None = None
  attn_logit_softcapping: Positive | None = None
  use_bidirectional_attention: bool | None = False
  rope_theta: Theta = 1e6
  rope_local_base_freq: Theta = 1e4
  sliding_window_pattern: Size = 6

  def slides(self, layer: int) -> bool:
    return (layer + 1) % self.sliding_window_pattern != 0

  def faults(self) -> Faults:
    if self.attn_logit_softcapping is not None:
      yield "attn_logit_softcapping", "Gemma 3 caps no scores: leave it out, or null"
    yield from super().faults()

  def rope(self, where: str = "config.json") -> tuple[float, dict[str, Any]]:
    """θ and the other rotary parameters of layers without a window."""
    return rope_config.read_of_layers(self, _ALL, self.rope_theta, where)

  def window_rope(self, where: str = "config.json") -> tuple[float, dict[str, Any]]:
    """θ and the other rotary parameters of layers with a window."""
    return rope_config.read_of_layers(self, _WINDOW, self.rope_local_base_freq, where)

  def block(self, where: str) -> dict[str, Any]:
    made = dict(super().block(where), qk_norm=True)
    theta, stretch = self.window_rope(where)
    if stretch != {"rope_type": "default"}:
      kind = stretch["rope_type"]
      raise refused(where, f"rope_parameters.{_WINDOW}.rope_type", kind, "it must be default")
    return dict(made, window_theta=theta if "window" in made else None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phi3(Llama):
  """`Phi3Config`."""

  vocab_size: Size = 32064
  hidden_size: Size = 3072
  intermediate_size: Size = 8192
  attention_dropout: Fraction = 0.0
  resid_pdrop: Fraction = 0.0
  embd_pdrop: Fraction = 0.0  # which transformers does not apply
  max_position_embeddings: Size = 4096
  original_max_position_embeddings: Size = 4096
  rms_norm_eps: Eps = 1e-5
  eos_token_id: Ids = 32000
  pad_token_id: PadId | None = 32000
  sliding_window: Size | None = None

  free_heads: ClassVar[bool] = True
  partial: ClassVar[bool] = True

  @property
  def window(self) -> int | None:
    return self.sliding_window

  def rope(self, where: str = "config.json") -> tuple[float, dict[str, Any]]:
    theta, items = super().rope(where)
    if items["rope_type"] != "default":
      raise refused(where, "rope_type", items["rope_type"], "of Phi-3 only default is supported")
    rotated = self.head_size * items["partial_rotary_factor"]
    if not 2 <= rotated <= self.head_size or int(rotated) % 2:
      told = f"it must leave an even number of a head's {self.head_size} features, at least 2"
      raise refused(where, "partial_rotary_factor", items["partial_rotary_factor"], told)
    return theta, items

  def block(self, where: str) -> dict[str, Any]:
    return dict(window=self.window, fused=True)


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
