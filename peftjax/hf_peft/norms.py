"""Trained norms as Hugging Face's PEFT library has them: `LNTuningConfig` (0.21).

A norm's tensors are whole copies, named `MODULE.ln_tuning_layers.weight` (and `.bias`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from peftjax.core import paths
from peftjax.core.params import Params
from peftjax.hf_peft.build import suffixes
from peftjax.hf_peft.fields import NORMS, Norms
from peftjax.hf_peft.whole import Whole
from peftjax.models.match import stack_of
from peftjax.models.names import module_name

NOTHING = (
  "params has no adapter that PEFT knows, nor a trained norm: attach pj.lora(...) first, or save "
  "the whole model, pj.save_pretrained(...)"
)


def modules_of(params: Params, family: Any) -> set[str]:
  """The torch modules of all norms."""
  return {
    module_name(family, layer).rpartition(".")[0]
    for path, leaf in paths.leaves(params).items()
    if path.endswith("/scale")
    for layer in paths.layer_paths(path, stack_of(path, leaf))
  }


def build(
  saved: Whole,
  norms: set[str],
  modules: set[str],
  *,
  modules_to_save: Sequence[str],
  task_type: str | None,
  base_model: str,
) -> tuple[dict[str, Any], Mapping[str, np.ndarray]]:
  """`adapter_config.json` and the tensors; other trained modules are in `modules_to_save`.

  Args:
    saved: the modules that were trained, norms among them.
    norms: all norms of the model.
    modules: all modules of the model, those that hold others included.

  Raises:
    ValueError: no norm was trained; or a table and the head that is tied to it were trained, too.
  """
  chosen = saved.modules.keys() & norms
  if not chosen:
    raise ValueError(NOTHING)
  if saved.tied:
    raise ValueError(
      "the table and the head that is tied to it are trained beside norms, and peft's "
      "LNTuningConfig has no ensure_weight_tying. Save the whole model: pj.save_pretrained(...)."
    )
  tensors: dict[str, np.ndarray] = {}
  for module, arrays in saved.modules.items():
    inside = f"{module}.{Norms.inside}" if module in chosen else module
    tensors.update({inside + name.removeprefix(module): x for name, x in arrays.items()})
  config = {
    "base_model_name_or_path": base_model or None,
    "inference_mode": True,
    "modules_to_save": [name for name in modules_to_save if name not in chosen] or None,
    "peft_type": NORMS,
    "target_modules": suffixes({*chosen}, modules),
    "task_type": task_type,
  }
  return config, {Norms.prefix + name: x for name, x in tensors.items()}
