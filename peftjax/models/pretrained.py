"""`load_pretrained`: a Hugging Face directory to a linen module and its parameters."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from peftjax import sharding
from peftjax.core import paths
from peftjax.io import bnb_reader
from peftjax.io.bnb_reader import BnbDir
from peftjax.io.gguf import GGUFFile
from peftjax.io.safetensors_dir import TensorDir, read_config
from peftjax.models import bert, gpt2, llama
from peftjax.models.names import turned
from peftjax.quant import stream, transform
from peftjax.quant.formats import Format
from peftjax.quant.weight import Quantized

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


Tensors = TensorDir | BnbDir | GGUFFile


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
  mesh: Mesh | None = None,
  key: jax.Array | None = None,
) -> tuple[nn.Module, Any]:
  """A pretrained encoder with a head to classify or regress, or a pretrained decoder.

  Args:
    directory: with `config.json` and `model.safetensors`, or shards and their index; or, of a
      Llama model, a `.gguf` file. Linear layers that bitsandbytes quantised to 4 bits stay so.
    num_labels: of an encoder: outputs of the head, 1 for a regression. By default the checkpoint's.
      A head of this size in the checkpoint is loaded, otherwise a new one is drawn.
    scan_layers: one scanned stack (compiles once whatever the depth) or unrolled layers.
    remat: of a decoder: keep only each layer's input for the backward pass and compute the rest
      again ("gradient checkpointing").
    dtype: of activations; parameters keep the checkpoint's.
    quant: quantise the matrices that `where` selects as they are read: besides what is loaded, no
      more than two of the checkpoint's tensors are in memory. See `peftjax.quantize`.
    mesh: where to put each parameter as soon as it is read, as `peftjax.shardings` says.
    key: of the new head's weights; by default `jax.random.key(0)`.

  Returns:
    `(model, params)`; `model.apply({"params": params}, tokens, mask, ...)` gives logits.

  Raises:
    ValueError: before any weight is read, an unknown model_type, a damaged file, a tensor missing,
      left over or of another shape, or one that cannot be quantised; a NaN in one that is.
  """
  options: dict[str, Any] = dict(scan_layers=scan_layers, dtype=dtype)
  if remat:
    options["remat"] = remat
  pretrained = load(directory, num_labels, key=key, quant=quant, where=where, mesh=mesh, **options)
  return pretrained.model, pretrained.params


def load(
  directory: str | Path,
  num_labels: int | None = None,
  *,
  key: jax.Array | None = None,
  quant: Format | None = None,
  where: str | Sequence[str] = "all-linear",
  mesh: Mesh | None = None,
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
  names, new = _match(tensors, family, abstract, num_labels)
  formats = dict.fromkeys(chosen - set(new), quant) if quant else {}
  for path, fmt in formats.items():
    _check(path, paths.leaves(abstract)[path], names[path], tensors, fmt)
  fresh = jax.jit(lambda key: {p: paths.leaves(init(key))[p] for p in new})(key) if new else {}

  def make(path: str, leaf: Any) -> Any:
    turn = turned(family, path)
    if path in fresh:
      made = fresh[path]
    else:
      made = _read(tensors, path, names[path], bool(stack_of(path, leaf)), turn, formats.get(path))
    return jax.device_put(made, mesh and sharding.shardings({path: made}, mesh)[path])

  return Pretrained(model, paths.map_leaves(make, abstract), tuple(new))


def _match(
  tensors: Tensors, family: Any, abstract: Any, num_labels: int | None
) -> tuple[dict[str, list[str]], list[str]]:
  """The tensors of every parameter's layers, and the paths of what may be lacking and is."""
  available = set(tensors.names())
  used: set[str] = set()
  missing: list[str] = []
  new: list[str] = []
  matched: dict[str, list[str]] = {}
  for path, leaf in paths.leaves(abstract).items():
    stack = stack_of(path, leaf)
    names = [_find(family.hf_name(p), available) for p in paths.layer_paths(path, stack)]
    found = [name for name in names if name]
    used.update(found)
    may_be_new = re.fullmatch(family.NEW, path) is not None
    if len(found) < len(names):
      (new if may_be_new else missing).append(path)
      continue
    for name in found:
      packed = name in _packed(tensors)
      if packed and not path.endswith("kernel"):
        raise ValueError(f"{name} has 4 bits; only the weights of linear layers are read so")
      got, want = tensors.info(name).shape, leaf.shape[len(stack) :]
      want = want[::-1] if turned(family, path) or packed else want
      if got != want and may_be_new and num_labels is not None:
        new.append(path)
        break
      if got != want:
        raise ValueError(f"tensor {name} has shape {got}; config.json means {want}")
    matched[path] = found
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
  return matched, new


def _packed(tensors: Tensors) -> Mapping[str, Any]:
  """The tensors that have 4 bits in the files."""
  return tensors.states if isinstance(tensors, BnbDir) else {}


def _check(path: str, leaf: Any, names: list[str], tensors: Tensors, fmt: Format) -> None:
  """Raises `ValueError` if a parameter cannot be quantised."""
  for name in names:
    if name in _packed(tensors):
      raise ValueError(f"{name} has 4 bits already: load this directory without `quant`")
  layer = jax.ShapeDtypeStruct(leaf.shape[len(stack_of(path, leaf)) :], leaf.dtype)
  transform.check(path, layer, fmt)


def _read(
  tensors: Tensors, path: str, names: list[str], stacked: bool, turned: bool, fmt: Format | None
) -> Any:
  """One parameter, tensor by tensor, quantised if it is to be: a tree of NumPy arrays."""

  def one(layer_path: str, name: str) -> Any:
    if fmt and turned and isinstance(tensors, TensorDir | GGUFFile):
      info, rows = tensors.info(name), lambda at: tensors.read_rows(name, at.start, at.stop).T
      return stream.quantize_pieces(layer_path, info.shape[::-1], info.dtype, rows, fmt)
    array = tensors.read(name)
    if isinstance(array, Quantized):
      return array
    array = array.T if turned else array
    return stream.quantize_array(layer_path, array, fmt) if fmt else array

  layers = paths.layer_paths(path, (len(names),) if stacked else ())
  made = (one(layer, name) for layer, name in zip(layers, names, strict=True))
  return stream.stack(path, made, len(names)) if stacked else next(made)


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


def open_model(path: str | Path) -> tuple[Tensors, dict[str, Any]]:
  """The tensors and the configuration of a Hugging Face directory or a GGUF file."""
  if Path(path).suffix == ".gguf":
    file = GGUFFile(path)
    return file, file.config
  return bnb_reader.open_dir(TensorDir(path)), read_config(path)


def config_of(path: str | Path) -> dict[str, Any]:
  """The configuration alone."""
  return GGUFFile(path).config if Path(path).suffix == ".gguf" else read_config(path)


def end_ids(path: str | Path) -> tuple[int, ...]:
  """The token ids that end a text.

  Raises:
    ValueError: if the configuration names none.
  """
  ids = config_of(path).get("eos_token_id")
  if ids is None:
    raise ValueError(f"the configuration of {path} names no eos_token_id: add it to config.json")
  return tuple(ids) if isinstance(ids, list) else (ids,)


def pad_id(path: str | Path) -> int:
  """The token id that pads a batch for this model."""
  return config_of(path).get("pad_token_id") or 0
