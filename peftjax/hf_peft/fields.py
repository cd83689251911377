"""The fields of `adapter_config.json` by kind: those that are read, and those that change nothing.

A field that its kind's schema does not have is refused, unless it is null, false or []: a field
that a later PEFT adds may change the meaning of the tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from peftjax.core.ranges import Size
from peftjax.methods.codec import Common, Flag, Nested, Number, Targeted, Text

PEFT = "0.21.2"  # the version whose fields these are


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
  """A prefix; its projection exists only in training: the file holds the projected prefix."""

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Norms(Targeted):
  """Norms that are trained and saved whole (`LNTuningConfig`)."""

  lacks: ClassVar[tuple[str, ...]] = ("layers_to_transform", "layers_pattern", "fan_in_fan_out")
  inside: ClassVar[str] = "ln_tuning_layers"  # between a module's name and its tensors'


NORMS = "LN_TUNING"
VIRTUAL: Mapping[str, type[Virtual]] = {"PREFIX_TUNING": Prefix, "PROMPT_TUNING": Prompt}
