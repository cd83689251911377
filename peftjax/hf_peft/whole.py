"""The tensors a PEFT directory holds whole: `modules_to_save`, and bases under adapters."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import numpy as np

from peftjax.core import paths
from peftjax.core.params import Params
from peftjax.core.weight import Weight
from peftjax.hf_peft.plan import BASES, HEAD
from peftjax.models.match import layers_of
from peftjax.models.names import module_name, turned

# Maps each of peft's tasks to what its head labels, as in a model's `labels_of`.
LABELS_OF = {"SEQ_CLS": "text", "TOKEN_CLS": "token", "QUESTION_ANS": "span"}


def task_of(config: Any) -> str | None:
  """PEFT's name for what the head of a model is trained for; it has none for images."""
  of = getattr(config, "labels_of", "text")
  return next((task for task, labelled in LABELS_OF.items() if labelled == of), None)


class Whole(NamedTuple):
  """Arrays to save as they are.

  Attributes:
    modules: tensors by module.
    bases: tables and heads that were trained under their adapter, by name.
    tied: a table and the head that is tied to it are both among the modules.
  """

  modules: dict[str, dict[str, np.ndarray]]
  bases: dict[str, np.ndarray]
  tied: bool

  @property
  def tensors(self) -> dict[str, np.ndarray]:
    flat = {name: array for arrays in self.modules.values() for name, array in arrays.items()}
    return {**flat, **self.bases}


def collect(
  params: Params, trained: Any | None, family: Any, task_type: str | None, adapted: Collection[str]
) -> Whole:
  """All arrays of each module that has a trained one, and the head of a classifier.

  Args:
    params: parameters without prefixes and prompts.
    trained: a mask over them; without it the head counts as trained, all else as the base's.
    adapted: the modules with an adapter.

  Raises:
    ValueError: a trained array under an adapter or beside one; a weight in a module that is saved.
  """
  flat = paths.leaves(params)
  always = trained is None or task_type in LABELS_OF
  flags = {} if trained is None else paths.leaves(trained)
  chosen: dict[str, dict[str, np.ndarray]] = {}  # filled below
  bases: dict[str, np.ndarray] = {}
  layers = {path: layers_of(path, leaf) for path, leaf in flat.items()}
  for path, leaf in flat.items():
    flag = flags.get(path)
    on = any(jax.tree.leaves(getattr(flag, "base", flag)))
    units = dict.fromkeys(_unit(family, layer) for layer, _ in layers[path])
    if on and isinstance(leaf, Weight) and _is_table_or_head(path):
      array = np.asarray(leaf.base)  # type: ignore[attr-defined]
      bases[f"{_module(family, path)}.{BASES[0]}"] = array.T if turned(family, path) else array
    elif on and (isinstance(leaf, Weight) or units.keys() & {*adapted}):
      raise ValueError(
        f"{path} is trained, and a PEFT directory has no place for it: only for adapters and for "
        "modules that have none.\nSave the whole model instead, from pj.merge(params), or train "
        'with pj.chain(pj.lora(...), pj.unfreeze("head/.*")).'
      )
    elif on or (always and path.startswith("head/")):
      chosen.update({unit: {} for unit in units})
  for path, leaf in flat.items():
    for layer, at in layers[path]:
      if (unit := _unit(family, layer)) in chosen:
        if isinstance(leaf, Weight):
          raise ValueError(
            f"{path} is a {type(leaf).__name__} in {unit}, which is saved whole; peft does not "
            "take both.\nMerge it (pj.merge), or leave it out of the targets or of the "
            "trained arrays."
          )
        array = np.asarray(leaf)[at]
        chosen[unit][module_name(family, layer)] = array.T if turned(family, path) else array
  return Whole(*_with_heads(params, family, chosen, bases))


def _with_heads(params: Any, family: Any, chosen: Any, bases: Any) -> tuple[Any, Any, bool]:
  """Adds the head that is tied to a saved table: peft would leave it as it was."""
  tied = False
  for path, head in paths.tied(params).items():
    if (table := _module(family, head.of)) in chosen:
      name = _module(family, path)
      chosen[name] = {f"{name}.weight": chosen[table][f"{table}.weight"]}
      tied = True
  return chosen, bases, tied


def _is_table_or_head(path: str) -> bool:
  return path.endswith("/embedding") or path == f"{HEAD}/kernel"


def _unit(family: Any, path: str) -> str:
  """The module that peft wraps: the whole head (`classifier`), or one module of the body."""
  module = _module(family, path)
  return module.partition(".")[0] if path.startswith("head/") else module


def _module(family: Any, path: str) -> str:
  return module_name(family, path).rpartition(".")[0]
