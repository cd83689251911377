"""Reads `adapter_config.json` as the Hugging Face PEFT library writes it."""

from __future__ import annotations

import difflib
import json
import os
from typing import Any

from peftjax.core import patterns
from peftjax.io import hf_peft_targets, records, safetensors_dir
from peftjax.io.hf_peft_fields import (
  PEFT,
  SCHEMAS,
  AdaLora,
  Common,
  Ia3,
  Lora,
  Targeted,
  Vera,
  changes,
  known,
)
from peftjax.io.records import clip

NAME = "adapter_config.json"
# Initialisations that leave the base as it was; all others of peft (PiSSA, OLoRA, ...) change it.
_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_MERGE = "Merge the adapter with peft (model.merge_and_unload()) and load the model it gives."


def read(directory: str | os.PathLike) -> Common:
  """The config, typed, by the schema of its kind; peft's defaults for what is not in it.

  Raises:
    ValueError: no such file, or not JSON; a kind that is not read; a field that this kind does not
      have, of another type, out of its range, or that makes of it what is not read; a pattern that
      is no regular expression; fields that contradict each other.
  """
  config = safetensors_dir.read_config(directory, NAME)
  where = f"{directory}/{NAME}"
  kind = config.get("peft_type")
  if not isinstance(kind, str) or kind not in SCHEMAS:
    raise ValueError(
      f"{where} has peft_type={clip(kind)}; read are {', '.join(map(repr, SCHEMAS))}.\n{_MERGE}"
    )
  _check_known(config, kind, where)
  if wrong := changes(kind, config):
    field, allowed = next(iter(wrong.items()))
    raise ValueError(
      f"{where} has {field}={clip(config[field])}, which makes more of the adapter than is read; "
      f"only {' or '.join(map(json.dumps, allowed))} is.\n{_MERGE}"
    )
  made = records.convert(config, SCHEMAS[kind], where)
  if isinstance(made, Lora):
    _check_lora(made, where)
  if isinstance(made, Vera) and not made.save_projection:
    raise ValueError(
      f"{where} has save_projection=False: A and B are not in the directory, and only torch draws "
      f"them from projection_prng_key.\n{_MERGE}"
    )
  if isinstance(made, Targeted):
    _check_targets(made, where)
  for name in made.modules_to_save or ():  # peft uses it as a pattern, too
    patterns.check(hf_peft_targets.UNDER.format(name), f"{where}: modules_to_save")
  return made


def _check_known(config: dict[str, Any], kind: str, where: str) -> None:
  fields = known(kind)
  if strange := [field for field in config if field not in fields]:
    near = difflib.get_close_matches(strange[0], fields, n=2)
    of = config.get("peft_version")
    raise ValueError(
      f"{where} has {'the field' if len(strange) == 1 else 'fields such as'} {clip(strange[0])} = "
      f"{clip(config[strange[0]])}, which {kind} of PEFT {PEFT} does not have"
      f"{' (near: ' + ', '.join(near) + ')' if near else ''}"
      f"{f'; the file is of PEFT {clip(of, quote=False)}' if of else ''}. It may change what the "
      "tensors mean.\nIf it does not, remove it from the file. Otherwise merge the adapter with "
      "that version of peft (model.merge_and_unload()) and load the model it gives."
    )


def _check_lora(config: Lora, where: str) -> None:
  init = config.init_lora_weights
  if (init.lower() if isinstance(init, str) else init) not in _INITS:
    raise ValueError(
      f"{where} has init_lora_weights={clip(init)}: such an adapter belongs to a base "
      "that the initialisation changed, not to the pretrained one.\nConvert it with peft, which "
      "saves the initial adapter at the start and then writes plain LoRA:\n"
      "  model.save_pretrained(NEW, path_initial_model_for_weight_conversion=INITIAL)"
    )
  if isinstance(config, AdaLora):
    if config.use_dora:
      raise ValueError(f"{where} has use_dora=True, which peft's AdaLoRA does not support")
    for key, flags in (config.rank_pattern or {}).items():
      if len(flags) != config.init_r or not key.endswith(".lora_E"):
        raise ValueError(
          f"{where}: rank_pattern of AdaLoRA must be {{'MODULE.lora_E': [true, false, ...]}} with "
          f"init_r = {config.init_r} flags, and has {len(flags)} at {clip(key)}"
        )
    return
  for field in ("rank_pattern", "alpha_pattern"):
    for pattern in getattr(config, field) or {}:
      patterns.check(hf_peft_targets.END.format(pattern), f"{where}: {field}")


def _check_targets(config: Targeted, where: str) -> None:
  if not config.target_modules:
    raise ValueError(
      f"{where} has target_modules={config.target_modules!r}, so it does not say which modules "
      'have an adapter.\nName them, such as ["q_proj", "v_proj"] (peft fills it in as it saves).'
    )
  for field in ("target_modules", "exclude_modules", "feedforward_modules"):
    if isinstance(value := getattr(config, field, None), str):
      patterns.check(value, f"{where}: {field}")
  for pattern in hf_peft_targets.listed(config.layers_pattern):
    patterns.check(hf_peft_targets.LAYER.format(pattern), f"{where}: layers_pattern")
  if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
    raise ValueError(
      f"{where}: layers_to_transform cannot be used where target_modules is one pattern; "
      "name the modules in a list, or the layers in the pattern"
    )
  if config.layers_pattern and config.layers_to_transform is None:
    raise ValueError(
      f"{where}: layers_pattern says where the layers_to_transform are, and those are null: "
      "give both or none"
    )
  if isinstance(config, Ia3):
    _check_feedforward(config, where)


def _check_feedforward(config: Ia3, where: str) -> None:
  inner, outer = config.feedforward_modules, config.target_modules
  if inner is None:
    raise ValueError(
      f"{where} has feedforward_modules=None, so it does not say whose inputs are scaled.\n"
      "Name those of target_modules that are, [] for none (peft fills it in as it saves)."
    )
  if isinstance(inner, list) and isinstance(outer, list) and (rest := sorted({*inner} - {*outer})):
    raise ValueError(
      f"{where}: feedforward_modules has {rest[0]!r}, which target_modules has not; it must name a "
      "part of them"
    )
