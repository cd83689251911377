"""Reads and writes adapters (`has_adapter`) as Hugging Face's PEFT library has them (0.21).

A directory holds `adapter_config.json` and `adapter_model.safetensors`. A linear module has
`lora_A.weight` [r, in] and `lora_B.weight` [out, r], an embedding `lora_embedding_A` [r, V] and
`lora_embedding_B` [D, r], which is how our factors lie too; DoRA has a `lora_magnitude_vector`
[out] more; a module in `modules_to_save` is a whole copy, its tensors as in the model's own files.
Beside an adapter of a table or of the language-model head peft writes `base_layer.weight`, which
replaces the base's. AdaLoRA's `lora_A` [r', in], `lora_E` [r', 1] and `lora_B` [out, r'] are of the
triplets that are left, and its `rank_pattern` says which those are. VeRA's modules have
`vera_lambda_d` [r] and `vera_lambda_b` [out], and the model one `vera_A` [r, in] and `vera_B`
[out, r] of the largest sizes among them. Prefixes and prompts: see `hf_peft_virtual`.

Invariants:
- The config says which modules have an adapter or are saved whole, by peft's own rules, and at
  which scale; the tensors must be those, no fewer and no more (peft ignores what is too much).
- A layer of a scanned stack is a module of its own, with its own true rank.
- What one side has and the other cannot say is a `ValueError`, never left out.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from peftjax.core import paths, shared, tree
from peftjax.core.attachment import attachments
from peftjax.core.weight import Weight
from peftjax.io import (
  hf_peft_build,
  hf_peft_config,
  hf_peft_virtual,
  hf_peft_whole,
  safetensors_dir,
)
from peftjax.io.hf_peft_fields import Common, Virtual
from peftjax.io.hf_peft_plan import (
  EMBEDDINGS,
  FACTORS,
  MAGNITUDE,
  PROJECTIONS,
  SCALES,
  STEM,
  TRIPLETS,
  VECTORS,
)
from peftjax.io.hf_peft_reader import Reader
from peftjax.methods.adalora_weight import SVDLoRA
from peftjax.methods.dora_weight import DoRA
from peftjax.methods.ia3_weight import IA3
from peftjax.methods.lora_weight import LoRA
from peftjax.methods.vera import PAIR
from peftjax.methods.vera_weight import VeRA
from peftjax.models.pretrained import FAMILIES, stack_of

# Weights that have a place in such a directory.
KINDS = (LoRA, SVDLoRA, DoRA, IA3, VeRA)


def has_adapter(params: Any) -> bool:
  """Whether there is something that `save` could write: `KINDS`, a prefix or a prompt."""
  weights = paths.leaves(params).values()
  return hf_peft_virtual.found(params) or any(isinstance(leaf, KINDS) for leaf in weights)


def save(
  directory: str | os.PathLike,
  params: Any,
  model: Any,
  *,
  base_model: str = "",
  trained: Any | None = None,
  task_type: str | None = "SEQ_CLS",
  rslora: bool = False,
) -> None:
  """Writes the adapters of `params`, all of one kind, and the trained head.

  Every module gets its own rank and alpha back, alpha = s·r (s·√r if `rslora`); those that differ
  from the commonest go into `rank_pattern` and `alpha_pattern` by their exact path.

  Args:
    directory: made if missing; the two files in it are replaced whole.
    params: an attached tree, layers unrolled or scanned.
    model: the module it belongs to; `model.config.family` names the torch modules.
    base_model: what `base_model_name_or_path` shall be.
    trained: mask over `params`, as `method.trainable(params)` gives it: a module with a trained
      array is saved whole. Without it the head counts as trained and all other plain arrays as the
      base's.
    task_type: with "SEQ_CLS" peft's reader asks for the head, so the head is always written; of a
      decoder it is "CAUSAL_LM".
    rslora: write `use_rslora`.

  Raises:
    ValueError: no adapter, or one that the format cannot say; a PiSSA leaf; AdaLoRA of several
      scales; a prefix before a sliding window; adapters of several kinds; a trained
      array under an adapter or beside one in its module, but for tables and heads; an adapter in a
      module that is saved whole; dropout rates that differ.
  """
  family = FAMILIES[model.config.family]
  pairs, params = shared.nodes(params), shared.without(params)
  adapters: dict[str, _Adapter] = {}
  for path, leaf in paths.leaves(params).items():
    if isinstance(leaf, LoRA):
      adapters.update(_adapters(path, leaf, family, rslora))
    elif isinstance(leaf, IA3):
      adapters.update(_scales(path, leaf, family))
    elif isinstance(leaf, VeRA):
      adapters.update(_vectors(path, leaf, family))
    elif isinstance(leaf, Weight) and any(jax.tree.leaves(tree.made_mask(leaf))):
      raise ValueError(
        f"{path} is a {type(leaf).__name__}, which is not written; allowed: "
        f"{', '.join(kind.__name__ for kind in KINDS)}"
      )
  kinds = {type(leaf) for leaf in paths.leaves(params).values() if isinstance(leaf, KINDS)}
  kinds.update(map(type, attachments(params)))
  if not has_adapter(params):
    raise ValueError("params has no adapter that PEFT knows: attach pj.lora(...) first")
  if len(kinds) > 1:
    raise ValueError(
      f"a PEFT directory holds one kind of adapter, and these are {_named(kinds)}: save each in a "
      "directory of its own, or pj.to_lora(params), which makes LoRA of AdaLoRA"
    )
  bare, flags = hf_peft_virtual.without(params), hf_peft_virtual.without(trained)
  if task_type == "SEQ_CLS" and "head" not in params:
    task_type = "CAUSAL_LM"
  whole = hf_peft_whole.collect(bare, flags, family, task_type, adapters)
  tensors = whole.tensors
  if hf_peft_virtual.found(params):
    config, rows = hf_peft_virtual.build(
      params,
      model,
      modules_to_save=sorted(whole.modules),
      task_type=task_type,
      base_model=base_model,
    )
    tensors = {Virtual.prefix + name: array for name, array in tensors.items()}
    return _write(Path(directory), config, {**tensors, EMBEDDINGS: rows})
  for module, adapter in adapters.items():
    tensors.update({f"{module}.{name}": array for name, array in adapter.tensors.items()})
  if kinds == {SVDLoRA}:
    adapters = _of_one_rank(adapters)
  every = _modules(params, family)
  config = hf_peft_build.build(
    [(m, x.rank, x.alpha, x.dropout) for m, x in adapters.items()],
    hf_peft_build.suffixes(set(adapters), every),
    rslora=rslora,
    modules_to_save=sorted(whole.modules),
    task_type=task_type,
    base_model=base_model,
    dora=kinds == {DoRA},
    conv1d=not family.OUT_FIRST,
    tied=whole.tied,
  )
  kept = {module: x.kept for module, x in adapters.items() if x.kept is not None}
  config = hf_peft_build.build_adalora(config, kept) if kept else config
  if kinds == {IA3}:
    ins = {module for module, x in adapters.items() if x.tensors[SCALES].shape[0] == 1}
    sides = (hf_peft_build.suffixes(side, every) for side in (set(adapters) - ins, ins))
    config = hf_peft_build.build_ia3(config, *sides)
  tensors = {Common.prefix + name: array for name, array in tensors.items()}
  if kinds == {VeRA}:
    config = hf_peft_build.build_vera(config)
    tensors.update(_pair(params, pairs))
  _write(Path(directory), config, tensors)


def load(directory: str | os.PathLike, params: Any, model: Any) -> tuple[Any, Any]:
  """`params` with a PEFT directory's adapters attached and its saved modules put in.

  A scanned stack is padded to its largest rank; a layer without an adapter has rank 0, scale 0.
  Of a tied model, a table or head that alone is saved or adapted is untied, as in peft; with
  `ensure_weight_tying` both are saved as one and stay so.
  Factors are read as float32, saved modules in the dtype of what they replace.

  Args:
    directory: as peft's `save_pretrained` or `save` wrote it.
    params: the base model's tree, without adapters; not changed.
    model: the module it belongs to.

  Returns:
    `(params, mask)`; the mask is true on all that came from the directory: A, B, saved modules, and
    a table or head beside its adapter that is another than the model had.

  Raises:
    ValueError: adapters in params; a missing or damaged file; a config field that is not known, of
      another type, out of its range or of what is not read; a tensor missing, of another shape than
      model and config mean, or without a place in them; NaN or infinite entries, which peft loads.
  """
  if nodes := attachments(params):
    raise ValueError(
      f"params has a {type(nodes[0]).__name__} already: load into the base model's params"
    )
  for path, leaf in paths.leaves(params).items():
    if isinstance(leaf, KINDS):
      raise ValueError(f"{path} has an adapter already: load into the base model's params")
  shape = lambda config, where: hf_peft_virtual.shape_of(config, model.config, where)
  reader = Reader(directory, params, FAMILIES[model.config.family], shape)
  loaded = paths.map_leaves(reader.leaf, reader.base(params))
  if reader.config.peft_type == "VERA":
    loaded = shared.add(loaded, {PAIR: reader.pair()})
  made: set[str] = set()
  if isinstance(reader.config, Virtual):
    loaded, made = hf_peft_virtual.load(reader, loaded)

  def flags(path: str, leaf: Any) -> Any:
    if path in reader.rebased and path not in reader.attached:
      made.add(path)
    mask = jax.tree.map(lambda _: path in reader.replaced | made, leaf)
    names = ["l"] if isinstance(leaf, IA3) else ["d" if isinstance(leaf, VeRA) else "a", "b"]
    names += [name for kind, name in ((SVDLoRA, "e"), (DoRA, "m")) if isinstance(leaf, kind)]
    names += ["base"] * (path in reader.rebased)
    return mask.replace(**dict.fromkeys(names, True)) if path in reader.attached else mask

  return loaded, paths.map_leaves(flags, loaded)


class _Adapter(NamedTuple):
  """The adapter of one torch module."""

  tensors: dict[str, np.ndarray]
  rank: int
  alpha: float
  dropout: float
  kept: list[bool] | None  # of AdaLoRA, which triplets are left


def _adapters(path: str, leaf: LoRA, family: Any, rslora: bool) -> dict[str, _Adapter]:
  """One adapter a layer, padding stripped; a layer of rank 0 has none."""
  if leaf.residual:
    raise ValueError(
      f"{path} is a PiSSA adapter: its base is no longer the pretrained one, which readers of this "
      "format add B A to.\nSave the whole model instead, from pj.merge(params), or train with "
      'pj.lora(..., init="kaiming").'
    )
  if isinstance(leaf, SVDLoRA) and (leaf.e is None or path.endswith("embedding")):
    raise ValueError(f"{path}: peft has no such AdaLoRA adapter; save pj.to_lora(params)")
  names = FACTORS[path.rpartition("/")[2]]
  ranks, scales = (np.asarray(x).ravel() for x in (leaf.rank, leaf.scale))
  a, b = (np.asarray(x).reshape(ranks.size, *x.shape[-2:]) for x in (leaf.a, leaf.b))
  found = {}
  for i, layer in enumerate(paths.layer_paths(path, leaf.stack)):
    if rank := int(ranks[i]):
      # peft's AdaLoRA divides by the rank whatever use_rslora says.
      root = rslora and not isinstance(leaf, SVDLoRA)
      alpha = _alpha(scales[i], math.sqrt(rank) if root else rank)
      low = a[i, :rank], b[i, :, :rank]
      tensors, kept = dict(zip(names, low, strict=True)), None
      if isinstance(leaf, SVDLoRA):
        tensors, kept = _triplets(*low, np.asarray(leaf.e).reshape(len(ranks), -1)[i, :rank])
      if isinstance(leaf, DoRA):
        tensors[MAGNITUDE] = np.asarray(leaf.m).reshape(len(ranks), -1)[i]
      found[_module(family, layer)] = _Adapter(tensors, rank, alpha, leaf.dropout, kept)
  return found


def _scales(path: str, leaf: IA3, family: Any) -> dict[str, _Adapter]:
  """IA3's l of each layer, [1, in] or [out, 1]; a bias has its kernel's."""
  if leaf.of:
    return {}
  layers = paths.layer_paths(path, tuple(leaf.l.shape[:-1]))
  rows = np.asarray(leaf.l).reshape(len(layers), -1)
  shape = (1, -1) if leaf.inputs else (-1, 1)
  return {
    _module(family, layer): _Adapter({SCALES: row.reshape(shape)}, 1, 1, 0.0, None)
    for layer, row in zip(layers, rows, strict=True)
  }


def _vectors(path: str, leaf: VeRA, family: Any) -> dict[str, _Adapter]:
  """VeRA's d and b of each layer; a layer where both are zero has none."""
  d, b = (np.asarray(x).reshape(-1, x.shape[-1]) for x in (leaf.d, leaf.b))
  return {
    _module(family, layer): _Adapter(
      dict(zip(VECTORS, rows, strict=True)), d.shape[-1], 1, leaf.dropout, None
    )
    for layer, *rows in zip(paths.layer_paths(path, leaf.stack), d, b, strict=True)
    if any(map(np.any, rows))
  }


def _pair(params: Any, pairs: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """VeRA's projections, as far as a weight uses them: peft asks for just those sizes."""
  weights = [leaf for leaf in paths.leaves(params).values() if isinstance(leaf, VeRA)]
  n_in, n_out = (max(leaf.shape[axis] for leaf in weights) for axis in (-2, -1))
  pair = pairs[weights[0].of]
  return dict(
    zip(PROJECTIONS, (np.asarray(pair.a)[:, :n_in], np.asarray(pair.b)[:n_out]), strict=True)
  )


def _triplets(
  a: np.ndarray, b: np.ndarray, e: np.ndarray
) -> tuple[dict[str, np.ndarray], list[bool]]:
  """The tensors of what is left of one module, and which that is."""
  on = e != 0
  return dict(zip(TRIPLETS, (a[on], b[:, on], e[on, None]), strict=True)), on.tolist()


def _of_one_rank(adapters: Mapping[str, _Adapter]) -> dict[str, _Adapter]:
  """AdaLoRA's at the same scales, all of the largest rank: what one lacks of it counts as pruned.

  So what was loaded pruned can be saved again.
  """
  rank = max((x.rank for x in adapters.values()), default=0)
  return {
    module: x._replace(
      rank=rank,
      alpha=_alpha(np.float32(x.alpha / x.rank), rank),
      kept=[*(x.kept or []), *(rank - x.rank) * [False]],
    )
    for module, x in adapters.items()
  }


def _named(kinds: set[type]) -> str:
  return " and ".join(sorted(kind.__name__ for kind in kinds))


def _alpha(scale: np.float32, divisor: float) -> float:
  """The shortest decimal alpha with float32(alpha / divisor) = scale."""
  exact = float(scale) * divisor
  tries = (float(f"{exact:.{digits}g}") for digits in range(1, 18))
  alpha = next((x for x in tries if np.float32(x / divisor) == scale), exact)
  return int(alpha) if alpha == round(alpha) else alpha


def _module(family: Any, path: str) -> str:
  return family.hf_name(path).rpartition(".")[0]


def _modules(params: Any, family: Any) -> set[str]:
  """Every module of the torch model, those that hold others included."""
  found: set[str] = set()
  for path, leaf in paths.leaves(params).items():
    for layer in paths.layer_paths(path, stack_of(path, leaf)):
      parts = _module(family, layer).split(".")
      found.update(".".join(parts[: n + 1]) for n in range(len(parts)))
  return found


def _write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  temporary = folder / f".{hf_peft_config.NAME}.{os.getpid()}.tmp"
  try:
    # Written first, so that the two files change one right after the other.
    temporary.write_text(json.dumps(config, indent=2, sort_keys=True))
    safetensors_dir.write(folder / f"{STEM}.safetensors", tensors)
    os.replace(temporary, folder / hf_peft_config.NAME)
  finally:
    temporary.unlink(missing_ok=True)
