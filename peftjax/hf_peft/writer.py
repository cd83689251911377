"""Writes adapters (`has_adapter`) or trained norms as Hugging Face's PEFT library (0.21) has them.

A directory holds `adapter_config.json` and `adapter_model.safetensors`. The tensors of a module's
adapter are named after it, as the codec of its method says; a module in `modules_to_save` is a
whole copy, its tensors as in the model's own files. Beside an adapter of a table or of the
language-model head peft writes `base_layer.weight`, which replaces the base's. Prefixes and
prompts: see `virtual`; norms that are trained without an adapter: see `norms`.

Invariants, for reading too:
- The config says which modules have an adapter or are saved whole, by peft's own rules, and at
  which scale; the tensors must be exactly those (peft ignores superfluous ones).
- A layer of a scanned stack is a module of its own, with its own true rank.
- Whatever one side has and the other cannot say is a `ValueError`, never left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from peftjax.core import paths, shared, tree
from peftjax.core.attachment import attachments
from peftjax.core.params import Params
from peftjax.core.weight import Weight
from peftjax.hf_peft import build, norms, virtual, whole
from peftjax.hf_peft.codecs import codec_of, codecs
from peftjax.hf_peft.config import NAME
from peftjax.hf_peft.fields import Virtual
from peftjax.hf_peft.plan import EMBEDDINGS, STEM, check_copied
from peftjax.io import safetensors_dir
from peftjax.methods.codec import Adapter, Codec, Common
from peftjax.models.families import family_of
from peftjax.models.match import stack_of
from peftjax.models.names import module_name


def has_adapter(params: Params) -> bool:
  """Tells whether there is an adapter that `save` could write."""
  return virtual.found(params) or any(map(codec_of, paths.leaves(params).values()))


def save(
  directory: str | os.PathLike,
  params: Params,
  model: Any,
  *,
  base_model: str = "",
  trained: Any | None = None,
  task_type: str | None = "SEQ_CLS",
  rslora: bool = False,
) -> None:
  """Writes the adapters of `params`, all of one kind, and the trained head; or its trained norms.

  Every module gets its own rank and alpha back, alpha = s·r (s·√r if `rslora`); those that differ
  from the commonest go into `rank_pattern` and `alpha_pattern` by their exact path.

  Args:
    directory: made if missing; the two files in it are replaced whole.
    params: an attached tree, layers unrolled or scanned.
    model: the module it belongs to; `model.config.family` names the torch modules.
    base_model: value of `base_model_name_or_path`.
    trained: mask over `params`, as `method.trainable(params)` gives it: a module with a trained
      array is saved whole. Without it the head counts as trained and all other plain arrays as the
      base's.
    task_type: with "SEQ_CLS" peft's reader asks for the head, so the head is always written; for a
      head that labels tokens it is "TOKEN_CLS", for answers "QUESTION_ANS", for a decoder
      "CAUSAL_LM", for an encoder-decoder "SEQ_2_SEQ_LM", and for images there is none.
    rslora: write `use_rslora`.

  Raises:
    ValueError: no adapter and no trained norm; an adapter that the format cannot say, or of a
      convolution; a prefix of a model of images or before a sliding window; a PiSSA leaf; AdaLoRA
      of several scales; adapters of several kinds; a trained array under an adapter or beside one
      in its module, but for tables and heads; an adapter in a module that is saved whole; dropout
      rates that differ.
  """
  family = family_of(model)
  lenders, params = shared.nodes(params), shared.without(params)
  adapters: dict[str, Adapter] = {}
  adapted = []
  for path, leaf in paths.leaves(params).items():
    if codec := codec_of(leaf):
      if path.endswith("/filters"):
        raise ValueError(
          f"{path} is a convolution with a {type(leaf).__name__}, and only adapters of linear "
          "layers and tables are written: leave it out of the targets, or save the whole model, "
          "pj.save_pretrained(...)"
        )
      adapted.append(leaf)
      made = codec.write(path, leaf, rslora=rslora)
      adapters.update({_module(family, layer): adapter for layer, adapter in made.items()})
    elif isinstance(leaf, Weight) and any(jax.tree.leaves(tree.made_mask(leaf))):
      raise ValueError(
        f"{path} is a {type(leaf).__name__}, which is not written; allowed: "
        f"{', '.join(codec.leaf.__name__ for codec in codecs())}"
      )
  is_plain = not adapted and not attachments(params) and trained is not None
  codec = None if is_plain else _one_kind(params, adapted)
  bare, flags = virtual.without(params), virtual.without(trained)
  if task_type == "SEQ_CLS" and "head" not in params:
    task_type = "SEQ_2_SEQ_LM" if hasattr(model.config, "decoder") else "CAUSAL_LM"
  elif task_type == "SEQ_CLS":
    task_type = whole.task_of(model.config)
  saved = whole.collect(bare, flags, family, task_type, adapters)
  check_copied({*adapters, *saved.modules}, family, "params")
  common: Any = dict(
    modules_to_save=sorted(saved.modules), task_type=task_type, base_model=base_model
  )
  tensors = saved.tensors
  if is_plain:
    known = norms.modules_of(bare, family)
    return _write(Path(directory), *norms.build(saved, known, _modules(bare, family), **common))
  if codec is None:
    config, rows = virtual.build(params, model, **common)
    tensors = {Virtual.prefix + name: array for name, array in tensors.items()}
    return _write(Path(directory), config, {**tensors, EMBEDDINGS: rows})
  if not adapters:
    raise ValueError("every adapter in params has rank 0: there is nothing to write")
  for module, adapter in adapters.items():
    tensors.update({f"{module}.{name}": array for name, array in adapter.tensors.items()})
  conv1d = not family.OUT_FIRST
  config = build.build(
    codec, adapters, _modules(params, family), conv1d=conv1d, tied=saved.tied, **common
  )
  tensors = {Common.prefix + name: array for name, array in tensors.items()}
  _write(Path(directory), config, {**tensors, **codec.write_shared(adapted, lenders)})


def _one_kind(params: Any, adapted: list[Any]) -> Codec | None:
  """The codec of all adapters; None for a prefix or a prompt."""
  kinds = {type(leaf) for leaf in [*adapted, *attachments(params)]}
  if not has_adapter(params):
    raise ValueError(norms.NOTHING)
  if len(kinds) > 1:
    named = " and ".join(sorted(kind.__name__ for kind in kinds))
    raise ValueError(
      f"a PEFT directory holds one kind of adapter, and these are {named}: save each in a "
      "directory of its own, or pj.tree.to_lora(params), which makes LoRA of AdaLoRA"
    )
  return codec_of(adapted[0]) if adapted else None


def _module(family: Any, path: str) -> str:
  return module_name(family, path).rpartition(".")[0]


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
  temporary = folder / f".{NAME}.{os.getpid()}.tmp"
  try:
    # Written first, so that the two files change one right after the other.
    temporary.write_text(json.dumps(config, indent=2, sort_keys=True))
    safetensors_dir.write(folder / f"{STEM}.safetensors", tensors)
    os.replace(temporary, folder / NAME)
  finally:
    temporary.unlink(missing_ok=True)
