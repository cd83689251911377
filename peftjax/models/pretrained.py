"""`load_pretrained`: a Hugging Face directory to a linen module and its parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from peftjax.core import paths
from peftjax.io.safetensors_dir import TensorDir, read_config
from peftjax.models import bert

# Hugging Face model_type to the file of its family.
FAMILIES: Mapping[str, Any] = {"bert": bert, "roberta": bert}


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
  dtype: Any = jnp.float32,
  key: jax.Array | None = None,
) -> tuple[nn.Module, Any]:
  """A classifier or regressor on a pretrained encoder.

  Args:
    directory: with `config.json` and `model.safetensors`, or shards and their index.
    num_labels: outputs of the head, 1 for a regression. By default the checkpoint's. A head of
      this size in the checkpoint is loaded, otherwise a new one is drawn.
    scan_layers: one scanned stack (compiles once whatever the depth) or unrolled layers.
    dtype: of activations; parameters keep the checkpoint's.
    key: of the new head's weights; by default `jax.random.key(0)`.

  Returns:
    `(model, params)`; `model.apply({"params": params}, tokens, mask, types)` gives logits.

  Raises:
    ValueError: an unknown model_type; a tensor missing, left over or of another shape; a damaged
      file.
  """
  pretrained = load(directory, num_labels, scan_layers, dtype, key)
  return pretrained.model, pretrained.params


def load(
  directory: str | Path,
  num_labels: int | None = None,
  scan_layers: bool = False,
  dtype: Any = jnp.float32,
  key: jax.Array | None = None,
) -> Pretrained:
  """`load_pretrained` that also says which parameters are new."""
  config = read_config(directory)
  family = FAMILIES.get(config.get("model_type", ""))
  if family is None:
    raise ValueError(
      f"{directory}/config.json has model_type {config.get('model_type')!r}; "
      f"supported are {', '.join(FAMILIES)}"
    )
  overrides = {} if num_labels is None else {"labels": num_labels}
  try:
    model_config = family.BertConfig.from_hf(
      config, scan_layers=scan_layers, dtype=dtype, **overrides
    )
  except KeyError as missing:
    raise ValueError(f"{directory}/config.json lacks {missing}") from None
  model = family.BertClassifier(model_config)
  key = jax.random.key(0) if key is None else key
  init = lambda key: model.init(key, jnp.zeros((1, 4), jnp.int32))["params"]
  params, new = _read(TensorDir(directory), family, jax.eval_shape(init, key), num_labels)
  if new:
    fresh = jax.jit(lambda key: {p: paths.leaves(init(key))[p] for p in new})(key)
    params = paths.map_leaves(lambda p, leaf: fresh[p] if p in new else leaf, params)
  return Pretrained(model, params, tuple(new))


def _read(
  tensors: TensorDir, family: Any, abstract: Any, num_labels: int | None
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
    want = want[::-1] if path.endswith("kernel") else want  # torch keeps [out, in]
    for name in found:
      got = tensors.info(name).shape
      if got != want and may_be_new and num_labels is not None:
        new.append(path)
        return leaf
      if got != want:
        raise ValueError(f"tensor {name} has shape {got}; config.json means {want}")
    arrays = [tensors.read(name) for name in found]
    if path.endswith("kernel"):
      arrays = [a.T for a in arrays]
    return jnp.asarray(np.stack(arrays).reshape(leaf.shape) if stack else arrays[0])

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


def pad_id(directory: str | Path) -> int:
  """The token id that pads a batch for this model."""
  return read_config(directory).get("pad_token_id") or 0
