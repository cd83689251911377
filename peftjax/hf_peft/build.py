"""Makes `adapter_config.json` as the Hugging Face PEFT library reads it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from peftjax.methods.codec import Adapter, Codec


def suffixes(targets: set[str], modules: set[str]) -> list[str]:
  """Names that peft's rule, the module or the end of it, turns into `targets` and nothing else."""

  def shortest(target: str) -> str:
    parts = target.split(".")
    for n in range(1, len(parts)):
      suffix = ".".join(parts[-n:])
      if {m for m in modules if f".{m}".endswith(f".{suffix}")} <= targets:
        return suffix
    return target

  return sorted({shortest(target) for target in targets})


def build(
  codec: Codec,
  adapters: Mapping[str, Adapter],
  modules: set[str],
  *,
  modules_to_save: Sequence[str],
  task_type: str | None,
  base_model: str,
  conv1d: bool = False,
  tied: bool = False,
) -> dict[str, Any]:
  """The config of adapters by module, all of one kind.

  The commonest value of a field is its default; where the kind has a field of exceptions, each is a
  pattern there that matches its module alone (peft matches a key, as a regex, against the end of a
  path).

  Args:
    modules: all modules of the model, those that hold others included.
    conv1d: True if the linear layers are GPT-2's.
    tied: True if head and table, both saved whole, are one.

  Raises:
    ValueError: if the adapters differ in a field that PEFT has only once, such as a dropout rate,
      or in any field of experts; if experts have another adapter than LoRA.
  """
  if not codec.of_experts and (found := [m for m in adapters if _routed(m)]):
    raise ValueError(
      f"{found[0]} adapts experts, to which peft gives LoRA and no {codec.leaf.__name__}. Save "
      "the whole model instead: pj.save_pretrained(...)."
    )
  adapters = codec.together(adapters)
  names = lambda targets: suffixes(targets, modules)
  config: dict[str, Any] = {
    "base_model_name_or_path": base_model or None,
    "inference_mode": True,
    "modules_to_save": list(modules_to_save) or None,
    "peft_type": codec.kind,
    "target_modules": names({*adapters}),
    "task_type": task_type,
    **codec.constants,
  }
  if "fan_in_fan_out" not in codec.lacks:
    config["fan_in_fan_out"] = conv1d
  for field in next(iter(adapters.values())).fields:
    values = {module: x.fields[field] for module, x in adapters.items()}
    usual = Counter(values.values()).most_common(1)[0][0]
    other = [module for module, value in values.items() if value != usual]
    if strange := [module for module in other if _routed(module)]:
      raise ValueError(
        f"{strange[0]} has {field} {values[strange[0]]}, most others {usual}, and peft gives "
        "experts and router the commonest one. Train them with one rank and alpha, or save the "
        "whole model: pj.save_pretrained(...)."
      )
    rest = {"^" + re.escape(module): values[module] for module in other}
    if field in codec.exceptions:
      config[codec.exceptions[field]] = rest
    elif rest:
      raise ValueError(
        f"the adapters have {field} {sorted(set(values.values()))}, and a PEFT directory has one "
        f"{field}.\nSet one on all leaves, such as leaf.replace(dropout=...)."
      )
    config[field] = usual
  if tied and hasattr(codec.schema, "ensure_weight_tying"):
    config["ensure_weight_tying"] = True
  return codec.finish(config, adapters, names)


def _routed(module: str) -> bool:
  """True for an expert or the router: parameters to peft, all of one rank and alpha."""
  parts = module.split(".")
  return "experts" in parts or parts[-1] == "gate"
