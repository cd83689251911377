"""`adapter_config.json` of an adapter, as the Hugging Face PEFT library has it."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from peftjax.io import safetensors_dir

NAME = "adapter_config.json"
# Config fields that make an adapter more than base + s·BA, unless they are empty or false.
_VARIANTS = (
  *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias"),
  *("monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora"),
  *("use_qalora", "velora_config"),
)
# Initialisations that leave the base as it was; all others of peft (PiSSA, OLoRA, ...) change it.
_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


# Values of peft_type that are read.
VIRTUAL = ("PREFIX_TUNING", "PROMPT_TUNING")
KINDS = ("LORA", "ADALORA", "IA3", "VERA", *VIRTUAL)


class Settings(NamedTuple):
  """What `adapter_config.json` says that a reader needs.

  Of AdaLoRA, `rank` is the initial one, which the scale is of, and `rank_pattern` says how many of
  its triplets each module's `lora_E` has left.
  """

  kind: str  # of KINDS
  dora: bool
  rank: int
  alpha: float
  rslora: bool
  dropout: float
  rank_pattern: Mapping[str, int]
  alpha_pattern: Mapping[str, float]
  modules_to_save: tuple[str, ...]
  virtual: int  # tokens of a prefix or a prompt, else 0


def read(directory: str | os.PathLike) -> Settings:
  """Reads and checks the config; peft's defaults for what is not in it."""
  config = safetensors_dir.read_config(directory, NAME)
  wrong = {field: config[field] for field in _VARIANTS if config.get(field)}
  for field, plain in (("peft_type", KINDS), ("bias", ("none",))):
    if config.get(field, "none") not in plain:
      wrong[field] = config.get(field)
  if wrong:
    field, value = next(iter(wrong.items()))
    raise ValueError(
      f"{directory}/{NAME} has {field}={value!r}; read are adapters with "
      f"peft_type {', '.join(map(repr, KINDS))}, bias 'none', no {', '.join(_VARIANTS)}.\n"
      "Merge the adapter with peft (model.merge_and_unload()) and load the model it gives."
    )
  if (init := config.get("init_lora_weights")) not in _INITS:
    raise ValueError(
      f"{directory}/{NAME} has init_lora_weights={init!r}: such an adapter belongs to a base "
      "that the initialisation changed, not to the pretrained one.\nConvert it with peft, which "
      "saves the initial adapter at the start and then writes plain LoRA:\n"
      "  model.save_pretrained(NEW, path_initial_model_for_weight_conversion=INITIAL)"
    )
  kind = config["peft_type"]
  if kind == "VERA" and not config.get("save_projection", True):
    raise ValueError(
      f"{directory}/{NAME} has save_projection=False: A and B are not in the directory, and only "
      "torch draws them from projection_prng_key.\nMerge the adapter with peft "
      "(model.merge_and_unload()) and load the model it gives."
    )
  adalora = kind == "ADALORA"
  patterns = config.get("rank_pattern") or {}
  if adalora:
    patterns = _left(patterns, f"{directory}/{NAME}")
  settings = Settings(
    kind,
    bool(config.get("use_dora")),
    config.get("init_r", 12) if adalora else config.get("r", 256 if kind == "VERA" else 8),
    config.get("lora_alpha", 8),
    bool(config.get("use_rslora")),
    config.get(_dropout(kind), 0.0),
    patterns,
    config.get("alpha_pattern") or {},
    tuple(config.get("modules_to_save") or ()),
    config.get("num_virtual_tokens", 0) if kind in VIRTUAL else 0,
  )
  _check(settings, f"{directory}/{NAME}")
  return settings


def _left(patterns: Any, where: str) -> dict[str, int]:
  """AdaLoRA's `{"module.lora_E": [true, false, ...]}` as patterns of what is left."""
  if not isinstance(patterns, dict) or not all(
    isinstance(flags, list) and all(type(flag) is bool for flag in flags)
    for flags in patterns.values()
  ):
    raise ValueError(f"{where}: rank_pattern must be {{tensor: [true, false, ...]}} of AdaLoRA")
  return {re.escape(key.removesuffix(".lora_E")): sum(x) for key, x in patterns.items()}


def _check(settings: Settings, where: str) -> None:
  for field in ("rank_pattern", "alpha_pattern"):
    patterns = getattr(settings, field)
    if not isinstance(patterns, dict):
      raise ValueError(f"{where}: {field} must be {{regex: number}}, and is {patterns!r}")
    for pattern in patterns:
      try:
        re.compile(pattern)
      except re.error as error:
        raise ValueError(f"{where}: {field} {pattern!r} is no regex: {error}") from None
  for field, ranks in (("r", [settings.rank]), ("rank_pattern", settings.rank_pattern.values())):
    for rank in ranks:
      if type(rank) is not int or rank < (0 if settings.kind == "ADALORA" and field != "r" else 1):
        raise ValueError(f"{where}: {field} has {rank!r}; a rank is a whole number from 1")
  for field, alphas in (
    ("lora_alpha", [settings.alpha]),
    ("alpha_pattern", settings.alpha_pattern.values()),
  ):
    for alpha in alphas:
      if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise ValueError(f"{where}: {field} has {alpha!r}; an alpha is a number")
  if type(settings.virtual) is not int or settings.virtual < (settings.kind in VIRTUAL):
    raise ValueError(
      f"{where}: num_virtual_tokens {settings.virtual!r} is not a whole number from 1"
    )
  if type(settings.dropout) not in (int, float) or not 0 <= settings.dropout < 1:
    field = _dropout(settings.kind)
    raise ValueError(f"{where}: {field} {settings.dropout!r} must be a number in [0, 1)")


def _dropout(kind: str) -> str:
  return "vera_dropout" if kind == "VERA" else "lora_dropout"


def match(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
  """The value of the first key that matches the end of a module's path: peft's own rule."""
  matching = (x for key, x in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
  return next(matching, default)


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
  adapters: Sequence[tuple[str, int, float, float]],
  target_modules: Sequence[str],
  *,
  rslora: bool,
  modules_to_save: Sequence[str],
  task_type: str | None,
  base_model: str,
  dora: bool = False,
) -> dict[str, Any]:
  """The config of adapters, each (module, rank, alpha, dropout).

  The commonest rank and alpha are the default; an exception is a pattern that matches its module
  alone (peft matches a key, as a regex, against the end of a path).

  Raises:
    ValueError: if the dropout rates differ.
  """
  modules, ranks, alphas, rates = zip(*adapters, strict=True)
  if len(set(rates)) > 1:
    raise ValueError(
      f"the adapters have dropout rates {sorted(set(rates))}, and a PEFT directory has one "
      "lora_dropout.\nSet one on all LoRA leaves: leaf.replace(dropout=...)."
    )

  def usual_and_rest(values: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
    usual = Counter(values).most_common(1)[0][0]
    pairs = zip(modules, values, strict=True)
    return usual, {"^" + re.escape(m): value for m, value in pairs if value != usual}

  rank, rank_pattern = usual_and_rest(ranks)
  alpha, alpha_pattern = usual_and_rest(alphas)
  return {
    "alpha_pattern": alpha_pattern,
    "base_model_name_or_path": base_model or None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_alpha": alpha,
    "lora_dropout": rates[0],
    "modules_to_save": list(modules_to_save) or None,
    "peft_type": "LORA",
    "r": rank,
    "rank_pattern": rank_pattern,
    "target_modules": list(target_modules),
    "task_type": task_type,
    "use_dora": dora,
    "use_rslora": rslora,
  }


def build_adalora(plain: dict[str, Any], kept: Mapping[str, Sequence[bool]]) -> dict[str, Any]:
  """The config of AdaLoRA adapters, from that of the same as LoRA of their initial rank.

  Args:
    plain: by `build`.
    kept: of each module, which triplets are left.

  Raises:
    ValueError: if the scales differ: this format has one, alpha over the initial rank.
  """
  if plain["rank_pattern"] or plain["alpha_pattern"]:
    raise ValueError(
      "a PEFT AdaLoRA directory has one scale, alpha over the initial rank, and these weights have "
      "several; save pj.to_lora(params), which is the same adapter as plain LoRA"
    )
  left = sum(map(sum, kept.values()))
  fields = {
    "peft_type": "ADALORA",
    "init_r": plain["r"],
    "r": 8,  # unused; peft warns at any other number
    "target_r": round(left / len(kept)),
    "rank_pattern": {f"{module}.lora_E": list(flags) for module, flags in kept.items()},
    "use_rslora": False,
    # Training is over; peft asks for a schedule that fits.
    "tinit": 0,
    "tfinal": 0,
    "deltaT": 1,
    "total_step": 1,
  }
  return {**plain, **fields}


def build_ia3(
  plain: dict[str, Any], outputs: Sequence[str], inputs: Sequence[str]
) -> dict[str, Any]:
  """The config of IA3 adapters, from LoRA's of the same model.

  Args:
    plain: by `build`.
    outputs, inputs: names, as of `suffixes`, of the modules that are scaled on either side.
  """
  common = (
    *("base_model_name_or_path", "fan_in_fan_out", "inference_mode", "modules_to_save"),
    "task_type",
  )
  return {
    **{field: plain[field] for field in common},
    "peft_type": "IA3",
    "target_modules": sorted({*outputs, *inputs}),
    "feedforward_modules": sorted(inputs),
    "init_ia3_weights": True,
  }


def build_vera(plain: dict[str, Any]) -> dict[str, Any]:
  """The config of VeRA adapters whose projections are saved, from LoRA's of the same model."""
  common = (
    *("base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "modules_to_save"),
    *("r", "target_modules", "task_type"),
  )
  return {
    **{field: plain[field] for field in common},
    "peft_type": "VERA",
    "vera_dropout": plain["lora_dropout"],
    "save_projection": True,
    # Of what peft draws for a new adapter, and then replaces by what is saved.
    "d_initial": 0.1,
    "init_weights": True,
    "projection_prng_key": 0,
  }


def build_virtual(
  kind: str,
  tokens: int,
  *,
  width: int,
  heads: int,
  layers: int,
  modules_to_save: Sequence[str],
  task_type: str | None,
  base_model: str,
) -> dict[str, Any]:
  """The config of a prefix or a prompt.

  Args:
    kind: of `VIRTUAL`.
    tokens: P.
    width: of a token in the tensor: D of a prompt, K·H of a prefix.
    heads: of keys and values, K.
  """
  own: dict[str, Any] = {"prompt_tuning_init": "RANDOM"}
  if kind == "PREFIX_TUNING":
    own = {"prefix_projection": False, "encoder_hidden_size": width}
  return {
    **own,
    "base_model_name_or_path": base_model or None,
    "inference_mode": True,
    "modules_to_save": list(modules_to_save) or None,
    "num_attention_heads": heads,
    "num_layers": layers,
    "num_transformer_submodules": 1,
    "num_virtual_tokens": tokens,
    "peft_type": kind,
    "task_type": task_type,
    "token_dim": width,
  }
