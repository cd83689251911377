"""IA3 in directories of Hugging Face's PEFT library (0.21)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from peftjax.core import patterns
from peftjax.core.layout import Axes
from peftjax.methods.codec import (
  Adapter,
  Codec,
  Flag,
  Module,
  Name,
  Names,
  Source,
  Targeted,
  Want,
  layers,
)
from peftjax.methods.ia3_weight import IA3

SCALES = "ia3_l"  # l, [1, in] or [out, 1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3Config(Targeted):
  """Fields of IA3: of `feedforward_modules` the inputs are scaled, of all others the outputs."""

  feedforward_modules: Names | Name | None = None
  init_ia3_weights: Flag = None


class IA3Codec(Codec):
  """IA3 of a kernel, and of the bias beside one; a layer without it has scales of 1."""

  kind = "IA3"
  leaf = IA3
  schema = IA3Config
  reads = frozenset({"kernel", "bias"})
  lacks = ("layers_to_transform", "layers_pattern")
  constants = {"init_ia3_weights": True}

  def check(self, config: Any, where: str) -> None:
    inner, outer = config.feedforward_modules, config.target_modules
    if isinstance(inner, str):
      patterns.check(inner, f"{where}: feedforward_modules")
    if inner is None:
      raise ValueError(
        f"{where} has feedforward_modules=None, so it does not say whose inputs are scaled.\n"
        "Name those of target_modules that are, [] for none (peft fills it in as it saves)."
      )
    both = isinstance(inner, list) and isinstance(outer, list)
    if both and (rest := sorted({*inner} - {*outer})):
      raise ValueError(
        f"{where}: feedforward_modules has {rest[0]!r}, which target_modules has not; it must name "
        "a part of them"
      )

  def wants(self, config: Any, module: Module, matcher: Any) -> dict[str, Want]:
    hint = ", as adapter_config.json says: feedforward_modules are [1, in], others [out, 1]"
    inputs = _scales_inputs(config, module.name, matcher)
    return {SCALES: Want((1, module.n_in) if inputs else (module.n_out, 1), hint)}

  def read(self, source: Source) -> Any:
    there = [module.name for module in source.modules if module is not None]
    sides = {_scales_inputs(source.config, name, source.matcher) for name in there}
    if len(sides) > 1:
      raise ValueError(
        f"{source.where}: feedforward_modules scales the inputs of some layers of {source.path} "
        "and the outputs of others: load the model unrolled (scan_layers=False)."
      )
    [inputs] = sides
    parent, _, kind = source.path.rpartition("/")
    if kind == "bias":
      lent = IA3(base=source.leaf, l=None, axes=Axes((), (-1,)), of=f"{parent}/kernel")
      return source.leaf if inputs else lent
    size = source.leaf.shape[-2 if inputs else -1]
    ones = np.ones((1, size) if inputs else (size, 1), np.float32)
    scales = source.rows(SCALES, ones).reshape(*source.stack, size)
    return IA3(base=source.leaf, l=scales, inputs=inputs)

  def write(self, path: str, leaf: Any, *, rslora: bool) -> dict[str, Adapter]:
    """Scales of each layer; a bias has its kernel's."""
    if leaf.of:
      return {}
    shape = (1, -1) if leaf.inputs else (-1, 1)
    found = layers(path, tuple(leaf.l.shape[:-1]), leaf.l)
    return {layer: Adapter({SCALES: row.reshape(shape)}, {}) for layer, row in found}

  def finish(
    self,
    config: dict[str, Any],
    adapters: Mapping[str, Adapter],
    names: Callable[[set[str]], list[str]],
  ) -> dict[str, Any]:
    ins = {module for module, x in adapters.items() if x.tensors[SCALES].shape[0] == 1}
    inputs = names(ins)
    targets = sorted({*names({*adapters} - ins), *inputs})
    return {**config, "target_modules": targets, "feedforward_modules": sorted(inputs)}


def _scales_inputs(config: Any, module: str, matcher: Any) -> bool:
  """Tells if a module's inputs are scaled, by PEFT's `_check_target_module_feedforward`."""
  if isinstance(config.feedforward_modules, str):
    return matcher.fullmatch(config.feedforward_modules, module)
  return module.endswith(tuple(config.feedforward_modules or ()))
