"""The fields of `adapter_config.json`, kind by kind: what is read, and what changes nothing.

A schema holds what a reader needs, as PEFT's config classes have it (defaults too), and, with None
for a default, what says nothing of a trained adapter: how it began, was trained, or where it is
from. `PLAIN` are the fields that make an adapter more than its tensors say unless they have one of
the values given. A field that is in neither is refused: what a later PEFT adds may change what the
tensors mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

from peftjax.core.patterns import LENGTH
from peftjax.core.ranges import Count, Fraction, Size

PEFT = "0.21.2"  # whose fields these are

Name = Annotated[str, Meta(min_length=1, max_length=LENGTH)]
Names = list[Name]
Alpha = Annotated[float, Meta(gt=-1e30, lt=1e30)]
Flag = bool | None  # peft takes null for false
Number = int | float | None
Text = str | None
Nested = dict[str, Any] | None
TaskType = Literal[
  "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
  """What every kind has."""

  prefix: ClassVar[str] = "base_model.model."  # of the names of tensors

  peft_type: str
  task_type: TaskType | None = None
  modules_to_save: Names | None = None
  auto_mapping: Nested = None
  base_model_name_or_path: Text = None
  inference_mode: Flag = None
  peft_version: Text = None
  revision: Text = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Targeted(Common):
  """Adapters in modules, which `target_modules` and its exceptions name."""

  target_modules: Names | Name | None = None
  exclude_modules: Names | Name | None = None
  layers_to_transform: list[Count] | Count | None = None
  layers_pattern: Names | Name | None = None
  fan_in_fan_out: Flag = None  # peft looks at the module


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora(Targeted):
  """LoRA, DoRA."""

  r: Size = 8
  lora_alpha: Alpha = 8.0
  lora_dropout: Fraction = 0.0
  use_rslora: Flag = False
  use_dora: Flag = False
  rank_pattern: dict[str, Size] | None = None
  alpha_pattern: dict[str, Alpha] | None = None
  init_lora_weights: bool | str | None = True
  ensure_weight_tying: Flag = False
  # Of initialisations, ...
  corda_config: Nested = None
  eva_config: Nested = None
  loftq_config: Nested = None
  lora_ga_config: Nested = None
  # ... of what is not read, or at run time, and, to 0.2, whether evaluation merges.
  megatron_core: Text = None
  qalora_group_size: Number = None
  runtime_config: Nested = None
  merge_weights: Flag = None

  @property
  def dropout(self) -> float:
    return self.lora_dropout


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLora(Lora):
  """AdaLoRA: the scale is alpha over `init_r`; `rank_pattern` says which triplets are left."""

  init_r: Size = 12
  lora_alpha: Annotated[float, Meta(gt=0, lt=1e30)] = 8.0  # peft takes the rank for what is not
  rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]
  beta1: Number = None
  beta2: Number = None
  deltaT: Number = None
  orth_reg_weight: Number = None
  target_r: Number = None
  tfinal: Number = None
  tinit: Number = None
  total_step: Number = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ia3(Targeted):
  """IA3: the inputs of `feedforward_modules` are scaled, of all others the outputs."""

  feedforward_modules: Names | Name | None = None
  init_ia3_weights: Flag = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vera(Targeted):
  """VeRA."""

  r: Size = 256
  vera_dropout: Fraction = 0.0
  save_projection: Flag = True
  d_initial: Number = None
  init_weights: Flag = None
  projection_prng_key: Number = None

  @property
  def dropout(self) -> float:
    return self.vera_dropout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Virtual(Common):
  """Prefixes and prompts; sizes that are null are the model's."""

  prefix: ClassVar[str] = "base_model."

  num_virtual_tokens: Size
  token_dim: Size | None = None
  num_attention_heads: Size | None = None
  num_layers: Size | None = None
  num_transformer_submodules: Size | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefix(Virtual):
  """A prefix; its projection is only there in training: what is saved is what it gives."""

  encoder_hidden_size: Number = None
  init_weights: bool | str | None = None
  prefix_projection: Flag = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt(Virtual):
  """A prompt."""

  prompt_tuning_init: Text = None
  prompt_tuning_init_text: Text = None
  tokenizer_kwargs: Nested = None
  tokenizer_name_or_path: Text = None


SCHEMAS: Mapping[str, type[Common]] = {
  "LORA": Lora,
  "ADALORA": AdaLora,
  "IA3": Ia3,
  "VERA": Vera,
  "PREFIX_TUNING": Prefix,
  "PROMPT_TUNING": Prompt,
}

_LORA: Mapping[str, tuple[Any, ...]] = {
  "alora_invocation_tokens": (None,),
  "arrow_config": (None,),  # {} is one with its defaults
  "bias": ("none",),
  "enable_lora": (None,),  # to 0.2, a list for matrices of several projections
  "kasa_config": (None,),
  "layer_replication": (None, []),
  "lora_bias": (None, False),
  "megatron_config": (None,),
  "monteclora_config": (None,),
  "target_parameters": (None, []),
  "trainable_token_indices": (None,),
  "use_bdlora": (None,),
  "use_qalora": (None, False),
  "velora_config": (None,),
}
PLAIN: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
  "LORA": _LORA,
  "ADALORA": {field: values for field, values in _LORA.items() if field != "enable_lora"},
  "VERA": {"bias": ("none",)},
}
# What the shared schemas have, and these kinds have not.
_LACKS: Mapping[str, tuple[str, ...]] = {
  "ADALORA": ("merge_weights",),
  "IA3": ("layers_to_transform", "layers_pattern"),
  "VERA": ("exclude_modules",),
}


def known(kind: str) -> set[str]:
  """The fields that a config of this kind may have."""
  fields = {field.name for field in dataclasses.fields(SCHEMAS[kind])} - {*_LACKS.get(kind, ())}
  return fields | PLAIN.get(kind, {}).keys()


def changes(kind: str, config: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
  """The fields of `config` that make it more than its tensors say, and what they may be."""
  same = lambda x, y: type(x) is type(y) and x == y
  return {
    field: allowed
    for field, allowed in PLAIN.get(kind, {}).items()
    if field in config and not any(same(config[field], x) for x in allowed)
  }
