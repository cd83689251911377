"""Makes `adapter_config.json` as the Hugging Face PEFT library reads it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


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
  conv1d: bool = False,
  tied: bool = False,
) -> dict[str, Any]:
  """The config of adapters, each (module, rank, alpha, dropout).

  The commonest rank and alpha are the default; an exception is a pattern that matches its module
  alone (peft matches a key, as a regex, against the end of a path).

  Args:
    target_modules: names, as of `suffixes`.
    conv1d: the linear layers are GPT-2's.
    tied: head and table, both saved whole, are one.

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
    "fan_in_fan_out": conv1d,
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
    **({"ensure_weight_tying": True} if tied else {}),
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
