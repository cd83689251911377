"""Reads `adapter_config.json` as the Hugging Face PEFT library writes it."""

from __future__ import annotations

import difflib
import json
import os
from typing import Any

from peftjax.core import patterns
from peftjax.hf_peft import codecs, targets
from peftjax.hf_peft.fields import PEFT
from peftjax.io import records, safetensors_dir
from peftjax.io.records import clip
from peftjax.methods.codec import END, MERGE, Common, Targeted

NAME = "adapter_config.json"


def read(directory: str | os.PathLike) -> Common:
  """The config, typed, by the schema of its kind; peft's defaults for fields it lacks.

  Raises:
    ValueError: no such file, or not JSON; a kind that is not read; a field that this kind does not
      have, of another type, out of its range, or with a value that is not read; a pattern that is
      not a regular expression; fields that contradict each other.
  """
  config = safetensors_dir.read_config(directory, NAME)
  where = f"{directory}/{NAME}"
  kind = config.get("peft_type")
  schema = codecs.schema_of(kind) if isinstance(kind, str) else None
  if schema is None or not isinstance(kind, str):
    read = ", ".join(map(repr, codecs.kinds()))
    raise ValueError(f"{where} has peft_type={clip(kind)}; those read are {read}.\n{MERGE}")
  _check_known(config, kind, where)
  if wrong := codecs.changes(kind, config):
    field, allowed = next(iter(wrong.items()))
    raise ValueError(
      f"{where} has {field}={clip(config[field])}, which makes more of the adapter than is read; "
      f"only {' or '.join(map(json.dumps, allowed))} is.\n{MERGE}"
    )
  made = records.convert(config, schema, where)
  if codec := codecs.reader_of(made):
    codec.check(made, where)
    for field in codec.exceptions.values():
      for pattern in getattr(made, field) or {}:
        patterns.check(END.format(pattern), f"{where}: {field}")
  if isinstance(made, Targeted):
    _check_targets(made, where)
  for name in made.modules_to_save or ():  # peft uses it as a pattern, too
    patterns.check(targets.UNDER.format(name), f"{where}: modules_to_save")
  return made


def _check_known(config: dict[str, Any], kind: str, where: str) -> None:
  fields = codecs.known(kind)
  # A field of another PEFT that this directory has not switched on changes nothing. {} may be a
  # dictionary of defaults that does.
  unset = lambda value: value is None or value is False or value == []
  if strange := [x for x, value in config.items() if x not in fields and not unset(value)]:
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


def _check_targets(config: Targeted, where: str) -> None:
  if not config.target_modules:
    raise ValueError(
      f"{where} has target_modules={config.target_modules!r}, so it does not say which modules "
      'have an adapter.\nName them, such as ["q_proj", "v_proj"] (peft fills it in as it saves).'
    )
  for field in ("target_modules", "exclude_modules"):
    if isinstance(value := getattr(config, field), str):
      patterns.check(value, f"{where}: {field}")
  for pattern in targets.listed(config.layers_pattern):
    patterns.check(targets.LAYER.format(pattern), f"{where}: layers_pattern")
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
