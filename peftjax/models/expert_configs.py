"""Fields of `config.json` of decoders with experts; see `decoder_configs`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from peftjax.core.ranges import Count, Fraction, Size
from peftjax.models.config_fields import Eps, Faults, Ids, Layers, Theta
from peftjax.models.decoder_configs import Llama, Mistral


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routed(Llama):
  """A decoder with experts in every layer; its subclasses say in which field their number is."""

  num_experts_per_tok: Size = 2
  output_router_logits: bool = False

  aliases: ClassVar[Mapping[str, str]] = {"num_experts": "num_local_experts"}

  @property
  def experts(self) -> int:
    return self.num_local_experts  # type: ignore[attr-defined]

  def faults(self) -> Faults:
    if self.num_experts_per_tok > self.experts:
      yield "num_experts_per_tok", f"it must be at most the number of experts, {self.experts}"
    if self.output_router_logits:
      yield (
        "output_router_logits",
        "no loss that balances the load of experts is computed here: set it to false",
      )
    yield from super().faults()

  def block(self, where: str) -> dict[str, Any]:
    return dict(super().block(where), experts=self.experts, routed=self.num_experts_per_tok)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixtral(Routed, Mistral):
  """`MixtralConfig`."""

  num_local_experts: Size = 8
  sliding_window: Size | None = None
  rms_norm_eps: Eps = 1e-5
  rope_theta: Theta = 1e6
  router_jitter_noise: float = 0.0

  def faults(self) -> Faults:
    if self.router_jitter_noise:
      yield "router_jitter_noise", "training adds no noise to what the router reads: set it to 0"
    yield from super().faults()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3Moe(Routed):
  """`Qwen3MoeConfig`."""

  vocab_size: Size = 151936
  hidden_size: Size = 2048
  intermediate_size: Size = 6144  # of layers without experts, of which none is read
  num_hidden_layers: Layers = 24
  num_key_value_heads: Size = 4
  attention_dropout: Fraction = 0.0
  max_position_embeddings: Size = 32768
  eos_token_id: Ids = None
  use_sliding_window: bool = False
  sliding_window: Size | None = 4096
  num_local_experts: Size = 128
  num_experts_per_tok: Size = 8
  moe_intermediate_size: Size = 768
  norm_topk_prob: bool = False
  decoder_sparse_step: Size = 1
  mlp_only_layers: list[Count] | None = dataclasses.field(default_factory=list)

  free_heads: ClassVar[bool] = True

  @property
  def window(self) -> int | None:
    return self.sliding_window if self.use_sliding_window else None

  def faults(self) -> Faults:
    for field, alike in (("mlp_only_layers", []), ("decoder_sparse_step", 1)):
      if (getattr(self, field) or alike) != alike:
        yield (
          field,
          f"layers with experts and layers without make no stack; only {alike} is supported",
        )
    yield from super().faults()

  def block(self, where: str) -> dict[str, Any]:
    bias = self.attention_bias
    return dict(
      super().block(where),
      window=self.window,
      qkv_bias=bias,
      out_bias=bias,
      ffn_bias=False,
      qk_norm=True,
      ffn=self.moe_intermediate_size,
      routed_sum=self.norm_topk_prob,
    )
