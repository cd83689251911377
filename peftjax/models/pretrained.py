"""`load_pretrained`: a Hugging Face directory to a linen module and its parameters."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from peftjax import sharding
from peftjax.core import paths
from peftjax.core.params import Params
from peftjax.io import bnb_reader, hub
from peftjax.io.gguf import GGUFFile
from peftjax.io.safetensors_dir import TensorDir, file_of
from peftjax.models import heads, hf_config
from peftjax.models.configuration import config_file, config_of
from peftjax.models.families import FAMILIES
from peftjax.models.match import Tensors, body_of, check_sizes, find, match, packed, stack_of
from peftjax.models.names import turned
from peftjax.quant import stream, transform
from peftjax.quant.formats import Format
from peftjax.quant.weight import Quantized

_log = logging.getLogger(__name__)

HEAD = "lm_head.weight"  # of a decoder


class Pretrained(NamedTuple):
  """A module and its parameters; `new` lists those that the checkpoint lacked."""

  model: nn.Module
  params: Any
  new: tuple[str, ...] = ()


def load_pretrained(
  directory: str | Path,
  *,
  num_labels: int | None = None,
  labels_of: str | None = None,
  scan_layers: bool = False,
  remat: bool | str = False,
  dtype: Any = jnp.float32,
  quant: Format | None = None,
  where: str | Sequence[str] = "all-linear",
  mesh: Mesh | None = None,
  rules: sharding.Rules = sharding.RULES,
  key: jax.Array | None = None,
) -> tuple[nn.Module, Params]:
  """A pretrained encoder (of texts or images) or decoder with a head, or a language model.

  Args:
    directory: a path, or a name on the Hugging Face hub, `org/name` or `org/name@revision`, which
      is looked up in the Hugging Face cache first. With `config.json` and `model.safetensors`, or
      shards and their index; or, for a Llama model, a `.gguf` file. Linear layers that bitsandbytes
      quantised to 4 bits stay so.
    num_labels: outputs of the head, 1 for a regression; a decoder then scores texts by their last
      token. By default the checkpoint's: for a decoder, none unless its class has such a head. A
      head of this size in the checkpoint is loaded, otherwise a new one is drawn.
    labels_of: for an encoder of texts: "text", "token" for labels of each token, or "span" for the
      ends of an answer (`num_labels=2`). By default what the head in the files labels, and "text"
      where there is none.
    scan_layers: one scanned stack (compiles once whatever the depth) or unrolled layers.
    remat: for a decoder: keep only each layer's input for the backward pass and compute the rest
      again ("gradient checkpointing"); True or "layer". "products" also keeps the results of
      products with weights: more memory, less time. "offload" keeps the input in host memory.
    dtype: dtype of activations; parameters keep the checkpoint's.
    quant: quantise the matrices that `where` selects as they are read: besides the parameters, at
      most two of the checkpoint's tensors are in memory. See `peftjax.quantize`.
    mesh, rules: where to put each parameter as soon as it is read: see `peftjax.shardings`.
    key: random key of the new head's weights; by default `jax.random.key(0)`.

  Returns:
    The model and its parameters; `peftjax.apply(model, params, tokens, mask)` gives logits, or of
    images `peftjax.apply(model, params, pixel_values)`.

  Raises:
    ValueError: before any weight is read, an unknown model_type, a damaged file, a tensor missing,
      left over or of another shape, or one that cannot be quantised; a NaN in one that is.
  """
  directory = hub.local(directory)
  options: dict[str, Any] = dict(scan_layers=scan_layers, dtype=dtype)
  if remat:
    options["remat"] = remat
  if labels_of is not None:
    options["labels_of"] = labels_of
  pretrained = load(
    directory, num_labels, key=key, quant=quant, where=where, mesh=mesh, rules=rules, **options
  )
  if pretrained.new:
    _log.warning(
      "%s has no tensors of this size for %s: they are new, drawn at random, to be trained",
      directory,
      ", ".join(pretrained.new),
    )
  return pretrained.model, pretrained.params


def load(
  directory: str | Path,
  num_labels: int | None = None,
  *,
  key: jax.Array | None = None,
  quant: Format | None = None,
  where: str | Sequence[str] = "all-linear",
  mesh: Mesh | None = None,
  rules: sharding.Rules = sharding.RULES,
  **options: Any,
) -> Pretrained:
  """`load_pretrained` that also says which parameters are new; `options` go to the family."""
  said = config_file(directory)
  tensors, config = open_model(directory)
  fields = hf_config.read(config, said)
  family = FAMILIES[fields.model_type]
  if num_labels is not None:
    options["labels"] = num_labels
  allowed = {field.name for field in dataclasses.fields(family.CONFIG)}
  if options.get("labels_of") == "text" and "labels_of" not in allowed:
    del options["labels_of"]  # a decoder's head has no choice
  if strange := set(options) - allowed:
    raise ValueError(f"a model of type {fields.model_type} has no {', '.join(sorted(strange))}")
  asked = options.get("labels_of")
  head = heads.of_files(fields, said, asked=asked, new=num_labels is not None)
  if head.labels_of is not None:
    options["labels_of"] = head.labels_of
  settings = family.CONFIG.from_hf(config, said, **options)
  body, available = body_of(family, settings), set(tensors.names())
  tables = (family.hf_name(settings.table), *getattr(family, "TABLES", ()))
  words = heads.words(tensors, *([find(n, available, body) for n in ns] for ns in (tables, [HEAD])))
  others = {settings.table: words.table} if words.table else {}
  check_sizes(tensors, family, settings, said, words.table)
  if hasattr(settings, "tied"):
    settings, tied_to = heads.settle(tensors, words, settings, said)
    others |= tied_to
  model = family.MODEL(settings)
  key = jax.random.key(0) if key is None else key
  abstract = abstract_params(model)
  chosen = set(paths.select(abstract, where, arrays=True)) if quant else set()
  names, new = match(
    tensors,
    family,
    settings,
    abstract,
    said,
    resize=num_labels is not None,
    skip_head=head.foreign,
    others=others,
  )
  formats = dict.fromkeys(chosen - set(new), quant) if quant else {}
  for path, fmt in formats.items():
    _check(path, paths.leaves(abstract)[path], names[path], tensors, fmt)

  fresh = _draw(model, tuple(new), key) if new else {}

  def make(path: str, leaf: Any) -> Any:
    turn = turned(family, path)
    if mesh is not None and path not in (*fresh, *formats) and type(tensors) is TensorDir:
      place = sharding.shardings({path: leaf}, mesh, rules)[path]
      read = functools.partial(_read_part, tensors, names[path], stack_of(path, leaf), turn)
      return sharding.put_parts(leaf.shape, place, read)
    if path in fresh:
      made = fresh[path]
    else:
      made = _read(tensors, path, names[path], stack_of(path, leaf), turn, formats.get(path))
    if mesh is None:
      return jax.device_put(made)
    return sharding.put(made, sharding.shardings({path: made}, mesh, rules)[path])

  return Pretrained(model, paths.map_leaves(make, abstract), tuple(new))


def _init(model: nn.Module, key: jax.Array) -> Any:
  image = getattr(model.config, "image", None)
  example = jnp.zeros((1, *image)) if image else jnp.zeros((1, 1), jnp.int32)
  return model.init(key, example)["params"]


@functools.lru_cache(maxsize=16)  # a sweep loads one model many times
def abstract_params(model: nn.Module) -> Params:
  """Shapes and dtypes of a module's parameters; only to be read."""
  return jax.eval_shape(functools.partial(_init, model), jax.random.key(0))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draw(model: nn.Module, new: tuple[str, ...], key: jax.Array) -> dict[str, Any]:
  """Initial values of the parameters `new`."""
  leaves = paths.leaves(_init(model, key))
  return {path: leaves[path] for path in new}


def _check(path: str, leaf: Any, names: list[str], tensors: Tensors, fmt: Format) -> None:
  """Raises ValueError if a parameter cannot be quantised."""
  for name in names:
    if name in packed(tensors):
      raise ValueError(
        f"{file_of(tensors, name)}: {name} has 4 bits already: load this directory without `quant`"
      )
  layer = jax.ShapeDtypeStruct(leaf.shape[len(stack_of(path, leaf)) :], leaf.dtype)
  transform.check(path, layer, fmt)


def _read(
  tensors: Tensors,
  path: str,
  names: list[str],
  stack: tuple[int, ...],
  turned: bool,
  fmt: Format | None,
) -> Any:
  """One parameter, tensor by tensor, quantised if it is to be: a tree of NumPy arrays."""

  def one(layer_path: str, name: str) -> Any:
    if fmt and turned and isinstance(tensors, TensorDir | GGUFFile):
      info, rows = tensors.info(name), lambda at: tensors.read_rows(name, at.start, at.stop).T
      try:
        return stream.quantize_pieces(layer_path, info.shape[::-1], info.dtype, rows, fmt)
      except ValueError as error:
        raise ValueError(f"{file_of(tensors, name)}: tensor {name}: {error}") from None
    array = tensors.read(name)
    if isinstance(array, Quantized):
      return array
    _check_finite(tensors, name, array)
    array = array.T if turned else array
    return stream.quantize_array(layer_path, array, fmt) if fmt else array

  layers = paths.layer_paths(path, stack)
  made = (one(layer, name) for layer, name in zip(layers, names, strict=True))
  return stream.stack(path, made, stack) if stack else next(made)


def _read_part(
  tensors: TensorDir,
  names: list[str],
  stack: tuple[int, ...],
  turned: bool,
  part: tuple[slice, ...],
) -> np.ndarray:
  """Part of one parameter; only the rows that the part needs are read from each tensor."""

  def one(name: str, axes: tuple[slice, ...]) -> np.ndarray:
    first, *others = axes[::-1] if turned else axes
    array = tensors.read_rows(name, first.start, first.stop)[(slice(None), *others)]
    _check_finite(tensors, name, array)
    return array.T if turned else array

  if not stack:
    return one(names[0], part)
  own, axes = part[: len(stack)], part[len(stack) :]
  found = np.reshape(np.asarray(names, object), stack)[own]
  rows = np.stack([one(name, axes) for name in found.flat])
  return rows.reshape(*found.shape, *rows.shape[1:])


def _check_finite(tensors: Tensors, name: str, array: np.ndarray) -> None:
  """Raises ValueError on a NaN or an infinity: it would be in every output, and in every loss."""
  flat = array.reshape(-1)
  for start in range(0, flat.size, 2**20):  # a copy of some of it
    if not np.isfinite(flat[start : start + 2**20].astype(np.float32, copy=False)).all():
      raise ValueError(
        f"{file_of(tensors, name)}: tensor {name} has NaN or infinite entries, so all outputs "
        "would be NaN. Download or mend the checkpoint."
      )


def open_model(path: str | Path) -> tuple[Tensors, dict[str, Any]]:
  """The tensors and the configuration of a Hugging Face directory or a GGUF file."""
  if Path(path).suffix == ".gguf":
    file = GGUFFile(path)
    return file, file.config
  config = config_of(path)
  return bnb_reader.open_dir(TensorDir(path)), config
