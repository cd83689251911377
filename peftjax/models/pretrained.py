"""`load_pretrained`: a Hugging Face directory to a linen module and its parameters."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from peftjax.core import paths
from peftjax.io.gguf import GGUFFile
from peftjax.io.safetensors_dir import TensorDir, read_config
from peftjax.models import bert, gpt2, llama
from peftjax.quant.formats import Format
from peftjax.quant.transform import quantize_leaf

# Hugging Face model_type to the file of its family: `CONFIG`, `MODEL`, `hf_name`, and what the
# checkpoint may lack or have too much of.
FAMILIES: Mapping[str, Any] = {
  "bert": bert,
  "roberta": bert,
  "llama": llama,
  "mistral": llama,
  "qwen2": llama,
  "gpt2": gpt2,
}


class Pretrained(NamedTuple):
  """A module and its parameters; `new` lists what the checkpoint did not have."""

  model: nn.Module
  params: Any
  new: tuple[str, ...] = ()


def load_pretrained(
  directory: str | Path,
  *,
  num_labels: int | None = None,
  scan_layers: bool = False,
  remat: bool = False,
  dtype: Any = jnp.float32,
  quant: Format | None = None,
  where: str | Sequence[str] = "all-linear",
  key: jax.Array | None = None,
) -> tuple[nn.Module, Any]:
  """A pretrained encoder with a head to classify or regress, or a pretrained decoder.

  Args:
    directory: with `config.json` and `model.safetensors`, or shards and their index; or, of a
      Llama model, a `.gguf` file.
    num_labels: of an encoder: outputs of the head, 1 for a regression. By default the checkpoint's.
      A head of this size in the checkpoint is loaded, otherwise a new one is drawn.
    scan_layers: one scanned stack (compiles once whatever the depth) or unrolled layers.
    remat: of a decoder: keep only each layer's input for the backward pass and compute the rest
      again ("gradient checkpointing").
    dtype: of activations; parameters keep the checkpoint's.
    quant: quantise the matrices that `where` selects as they are read, so that the dense model is
      never in memory; see `peftjax.quantize`.
    key: of the new head's weights; by default `jax.random.key(0)`.

  Returns:
    `(model, params)`; `model.apply({"params": params}, tokens, mask, ...)` gives logits.

  Raises:
    ValueError: an unknown model_type; a tensor missing, left over or of another shape; a damaged
      file.
  """
  options: dict[str, Any] = dict(scan_layers=scan_layers, dtype=dtype)
  if remat:
    options["remat"] = remat
  pretrained = load(directory, num_labels, key=key, quant=quant, where=where, **options)
  return pretrained.model, pretrained.params


def load(
  directory: str | Path,
  num_labels: int | None = None,
  *,
  key: jax.Array | None = None,
  quant: Format | None = None,
  where: str | Sequence[str] = "all-linear",
  **options: Any,
) -> Pretrained:
  """`load_pretrained` that also says which parameters are new; `options` go to the family."""
  tensors, config = open_model(directory)
  family = FAMILIES.get(config.get("model_type", ""))
  if family is None:
    raise ValueError(
      f"{directory}/config.json has model_type {config.get('model_type')!r}; "
      f"supported are {', '.join(FAMILIES)}"
    )
  if num_labels is not None:
    options["labels"] = num_labels
  allowed = {field.name for field in dataclasses.fields(family.CONFIG)}
  if strange := set(options) - allowed:
    raise ValueError(f"a model of type {config['model_type']} has no {', '.join(sorted(strange))}")
  try:
    model = family.MODEL(family.CONFIG.from_hf(config, **options))
  except KeyError as missing:
    raise ValueError(f"{directory}/config.json lacks {missing}") from None
  key = jax.random.key(0) if key is None else key
  init = lambda key: model.init(key, jnp.zeros((1, 4), jnp.int32))["params"]
  abstract = jax.eval_shape(init, key)
  chosen = set(paths.select(abstract, where)) if quant else set()
  finish = lambda path, array: _finish(path, array, quant if path in chosen else None)
  params, new = _read(tensors, family, abstract, num_labels, finish)
  if new:
    fresh = jax.jit(lambda key: {p: paths.leaves(init(key))[p] for p in new})(key)
    params = paths.map_leaves(lambda p, leaf: fresh[p] if p in new else leaf, params)
  return Pretrained(model, params, tuple(new))


def _finish(path: str, array: np.ndarray, quant: Format | None) -> Any:
  """One tensor on the device, quantised if it is to be."""
  return quantize_leaf(path, jnp.asarray(array), quant) if quant else jnp.asarray(array)


def _read(
  tensors: TensorDir | GGUFFile,
  family: Any,
  abstract: Any,
  num_labels: int | None,
  finish: Callable[[str, np.ndarray], Any],
) -> tuple[Any, list[str]]:
  """The parameters that the files have, and the paths of those they may lack and do."""
  available = set(tensors.names())
  used: set[str] = set()
  missing: list[str] = []
  new: list[str] = []

  def read(path: str, leaf: Any) -> Any:
    stack = stack_of(path, leaf)
    names = [_find(family.hf_name(p), available) for p in paths.layer_paths(path, stack)]
    found = [name for name in names if name]
    used.update(found)
    may_be_new = re.fullmatch(family.NEW, path) is not None
    if len(found) < len(names):
      (new if may_be_new else missing).append(path)
      return leaf
    want = leaf.shape[len(stack) :]
    turned = path.endswith("kernel") and family.OUT_FIRST
    want = want[::-1] if turned else want
    for name in found:
      got = tensors.info(name).shape
      if got != want and may_be_new and num_labels is not None:
        new.append(path)
        return leaf
      if got != want:
        raise ValueError(f"tensor {name} has shape {got}; config.json means {want}")
    read_one = lambda name: tensors.read(name).T if turned else tensors.read(name)
    layers = [finish(path, read_one(name)) for name in found]
    return jax.tree.map(lambda *xs: jnp.stack(xs), *layers) if stack else layers[0]

  params = paths.map_leaves(read, abstract)
  if missing:
    shown = "\n  ".join(family.hf_name(p) for p in missing[:10])
    raise ValueError(f"{len(missing)} tensors are missing from the checkpoint:\n  {shown}")
  extra = sorted(n for n in available - used if not re.fullmatch(family.UNUSED, n))
  if extra:
    shown = "\n  ".join(extra[:10])
    raise ValueError(
      f"{len(extra)} tensors of the checkpoint have no place in this model:\n  {shown}\n"
      "Is config.json the one the weights were saved with?"
    )
  return params, new


def stack_of(path: str, leaf: Any) -> tuple[int, ...]:
  """The layers axis of a scanned parameter (under `layers`), if it is one."""
  return leaf.shape[:1] if "layers" in path.split("/") else ()


def _find(name: str, available: set[str]) -> str | None:
  """The tensor by its name in a full model, in a bare encoder, or by LayerNorm's old names."""
  old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
    "LayerNorm.bias", "LayerNorm.beta"
  )
  for candidate in (name, old):
    for spelled in (candidate, candidate.partition(".")[2]):
      if spelled in available:
        return spelled
  return None


def open_model(path: str | Path) -> tuple[TensorDir | GGUFFile, dict[str, Any]]:
  """The tensors and the configuration of a Hugging Face directory or a GGUF file."""
  if Path(path).suffix == ".gguf":
    file = GGUFFile(path)
    return file, file.config
  return TensorDir(path), read_config(path)


def config_of(path: str | Path) -> dict[str, Any]:
  """The configuration alone."""
  return GGUFFile(path).config if Path(path).suffix == ".gguf" else read_config(path)


def pad_id(path: str | Path) -> int:
  """The token id that pads a batch for this model."""
  return config_of(path).get("pad_token_id") or 0
