"""The fields of `adapter_config.json`, kind by kind: what is read, and what changes nothing.

A schema holds what a reader needs, as PEFT's config classes have it (defaults too). `KNOWN` adds
the fields that say nothing of a trained adapter; those of `PLAIN` do if they are set, and `OLD` are
of versions before 1.0 that no longer have them. A field that is in none of them is refused: what a
later PEFT adds may change what the tensors mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from peftjax.core.patterns import LENGTH
from peftjax.io.records import Count, Rate, Size

PEFT = "0.21.2"  # whose fields these are

Name = Annotated[str, Meta(min_length=1, max_length=LENGTH)]
Names = list[Name]
Alpha = Annotated[float, Meta(gt=-1e30, lt=1e30)]
Flag = bool | None  # peft takes null for false


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
  """What every kind has."""

  prefix: ClassVar[str] = "base_model.model."  # of the names of tensors

  peft_type: str
  task_type: str | None = None
  modules_to_save: Names | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Targeted(Common):
  """Adapters in modules, which `target_modules` and its exceptions name."""

  target_modules: Names | Name | None = None
  exclude_modules: Names | Name | None = None
  layers_to_transform: list[Count] | Count | None = None
  layers_pattern: Names | Name | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora(Targeted):
  """LoRA, DoRA."""

  r: Size = 8
  lora_alpha: Alpha = 8.0
  lora_dropout: Rate = 0.0
  use_rslora: Flag = False
  use_dora: Flag = False
  rank_pattern: dict[str, Size] | None = None
  alpha_pattern: dict[str, Alpha] | None = None
  init_lora_weights: bool | str | None = True
  ensure_weight_tying: Flag = False

  @property
  def dropout(self) -> float:
    return self.lora_dropout


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLora(Lora):
  """AdaLoRA: the scale is alpha over `init_r`; `rank_pattern` says which triplets are left."""

  init_r: Size = 12
  lora_alpha: Annotated[float, Meta(gt=0, lt=1e30)] = 8.0  # peft takes the rank for what is not
  rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ia3(Targeted):
  """IA3: the inputs of `feedforward_modules` are scaled, of all others the outputs."""

  feedforward_modules: Names | Name | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vera(Targeted):
  """VeRA."""

  r: Size = 256
  vera_dropout: Rate = 0.0
  save_projection: Flag = True

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


SCHEMAS: Mapping[str, type[Common]] = {
  "LORA": Lora,
  "ADALORA": AdaLora,
  "IA3": Ia3,
  "VERA": Vera,
  "PREFIX_TUNING": Virtual,
  "PROMPT_TUNING": Virtual,
}

# Fields that make an adapter more than its tensors say, unless they are null, false or empty.
_VARIANTS = (
  *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias"),
  *("megatron_config", "monteclora_config", "target_parameters", "trainable_token_indices"),
  *("use_bdlora", "use_qalora", "velora_config"),
)
PLAIN: Mapping[str, tuple[str, ...]] = {
  "LORA": _VARIANTS,
  "ADALORA": _VARIANTS,
  "IA3": (),
  "VERA": (),
  "PREFIX_TUNING": (),
  "PROMPT_TUNING": (),
}
# `enable_lora` (to 0.2) was a list for matrices of several projections; null otherwise.
OLD_PLAIN: Mapping[str, tuple[str, ...]] = {"LORA": ("enable_lora",)}

# Fields that say how an adapter began, was trained or run, or where it is from.
_ANY = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision")
_LORA = (
  *("corda_config", "eva_config", "fan_in_fan_out", "loftq_config", "lora_ga_config"),
  *("megatron_core", "qalora_group_size", "runtime_config"),
)
_ADALORA = ("beta1", "beta2", "deltaT", "orth_reg_weight", "target_r", "tfinal", "tinit")
_HARMLESS: Mapping[str, tuple[str, ...]] = {
  "LORA": _LORA,
  "ADALORA": (*_LORA, *_ADALORA, "total_step"),
  "IA3": ("fan_in_fan_out", "init_ia3_weights"),
  "VERA": ("d_initial", "fan_in_fan_out", "init_weights", "projection_prng_key"),
  # A projection of a prefix is only there in training: what is saved is what it gives.
  "PREFIX_TUNING": ("encoder_hidden_size", "init_weights", "prefix_projection"),
  "PROMPT_TUNING": (
    *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs"),
    "tokenizer_name_or_path",
  ),
}
# `merge_weights` (to 0.2) said whether evaluation merges.
OLD: Mapping[str, tuple[str, ...]] = {"LORA": ("merge_weights",)}
# What the shared schema of `Targeted` has, and these kinds have not.
_LACKS: Mapping[str, tuple[str, ...]] = {
  "IA3": ("layers_to_transform", "layers_pattern"),
  "VERA": ("exclude_modules",),
}


def known(kind: str) -> set[str]:
  """The fields that a config of this kind may have."""
  fields = {field.name for field in dataclasses.fields(SCHEMAS[kind])} - {*_LACKS.get(kind, ())}
  bias = {"bias"} if kind in ("LORA", "ADALORA", "VERA") else set()
  more = (PLAIN[kind], OLD_PLAIN.get(kind, ()), _ANY, _HARMLESS[kind], OLD.get(kind, ()))
  return fields.union(bias, *more)


def changes(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of `config` that make it more than its tensors say."""
  empty = lambda x: x is None or x is False or x in ([], {}, "")
  fields = (*PLAIN[kind], *OLD_PLAIN.get(kind, ()))
  found = {field: config[field] for field in fields if not empty(config.get(field))}
  if "bias" in known(kind) and config.get("bias", "none") != "none":
    found["bias"] = config["bias"]
  return found
