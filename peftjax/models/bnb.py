"""Writes 4-bit weights as transformers and bitsandbytes keep them; `bnb_reader` reads them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from peftjax.core import paths
from peftjax.core.weight import Weight
from peftjax.io import new_directory, safetensors_dir
from peftjax.io.bnb_reader import STATE, TYPES
from peftjax.models.families import FAMILIES
from peftjax.models.match import layers_of
from peftjax.models.names import turned
from peftjax.quant import codebooks
from peftjax.quant.double import GROUP
from peftjax.quant.formats import Format
from peftjax.quant.weight import Quantized


def save(directory: str | os.PathLike, params: Any, model: Any, config: Mapping[str, Any]) -> None:
  """Writes a model that `AutoModelForCausalLM.from_pretrained` loads with 4-bit linear layers.

  Codes and scales are written as they are: the loaded weights dequantise to the same numbers.

  Args:
    directory: new or empty; it appears whole or not at all.
    params: parameters of a model whose kernels are quantised by one `pj.quant.nf4(...)` or
      `pj.quant.fp4(...)`; dense leaves are written in their own dtype. Layers unrolled or scanned.
    model: the module it belongs to; `model.config.family` names the torch modules.
    config: the base's `config.json`, for example `safetensors_dir.read_config(base)`.

  Raises:
    ValueError: a directory that holds something; no quantised kernel; a quantised leaf that
      bitsandbytes has no place for, by its path; kernels of several formats; an adapter.
  """
  directory = Path(directory)
  new_directory.check(directory)
  family = FAMILIES[model.config.family]
  leaves = paths.leaves(params)
  formats = {path: _format(path, leaf) for path, leaf in leaves.items() if isinstance(leaf, Weight)}
  if not formats:
    raise ValueError(
      "params has no quantised kernel: quantise it with pj.quant.nf4() or pj.quant.fp4() first"
    )
  first, fmt = next(iter(formats.items()))
  for path, other in formats.items():
    if other != fmt:
      raise ValueError(f"{first} is in {fmt}, {path} in {other}; one file has one format")
  tensors, dense = _tensors(leaves, set(formats), family)
  dtype = np.dtype(model.config.dtype).name
  config = {**config, "quantization_config": _quantization(fmt, dtype, dense)}
  if hasattr(model.config, "tied"):  # what the tree says, whatever the base's file did
    config["tie_word_embeddings"] = "lm_head/kernel" not in leaves
  _write(directory, config, tensors)


def _tensors(
  leaves: Mapping[str, Any], packed: set[str], family: Any
) -> tuple[dict[str, np.ndarray], list[str]]:
  """Every tensor of the file, and the linear modules that are not in four bits."""
  tensors: dict[str, np.ndarray] = {}
  # A tied head is a module without a kernel of its own.
  dense = set() if "lm_head/kernel" in packed else {"lm_head"}
  for path, leaf in leaves.items():
    for layer, at in layers_of(path, leaf):
      part = jax.tree.map(lambda x, at=at: np.asarray(x)[at], leaf)
      name = family.hf_name(layer)
      if path in packed:
        tensors.update(_weight(name, part))
      elif path.endswith("kernel"):
        dense.add(name.removesuffix(".weight"))
        tensors[name] = part.T if turned(family, path) else part
      else:
        tensors[name] = part
  return tensors, sorted(dense)


def _format(path: str, leaf: Weight) -> Format:
  """The format of a leaf, if it can be written."""
  if not isinstance(leaf, Quantized):
    raise ValueError(
      f"{path} is a {type(leaf).__name__}, and this writes no adapters: save them with "
      "pj.save_peft, and here the tree as it was before the adapters were attached."
    )
  if leaf.fmt.name not in TYPES or leaf.axis != -2:
    what = f"a table in {leaf.fmt.name}" if leaf.axis != -2 else f"in {leaf.fmt.name}"
    raise ValueError(
      f"{path} is {what}; bitsandbytes has kernels in {' and '.join(TYPES)} only. Quantise with "
      "pj.quant.nf4() or pj.quant.fp4(), and leave tables out of `where`."
    )
  if "experts" in path.split("/"):
    raise ValueError(
      f"{path} is of experts, which transformers does not keep in four bits. Leave them out of "
      "`where`, or write the model dense: pj.save_pretrained(..., pj.merge(params, dense=True))."
    )
  if leaf.shape[-2] % leaf.fmt.block_size:
    raise ValueError(
      f"{path} {leaf.shape} has {leaf.shape[-2]} inputs, not a multiple of the block size "
      f"{leaf.fmt.block_size}, and bitsandbytes' blocks would run across its columns. Quantise it "
      "with a block size that divides them, or leave it out of `where`."
    )
  return leaf.fmt


def _weight(name: str, leaf: Quantized) -> dict[str, np.ndarray]:
  """The tensors of one quantised kernel [in, out]."""
  fields: dict[str, Any] = {
    "quant_type": leaf.fmt.name,
    "blocksize": leaf.fmt.block_size,
    "dtype": leaf.dense_dtype,
    "shape": leaf.shape[::-1],
  }
  flat = lambda x: np.ascontiguousarray(x.T).reshape(-1)
  tensors = {
    name: flat(leaf.codes)[:, None],
    f"{name}.quant_map": codebooks.four_bits(leaf.fmt.name),
  }
  if leaf.fmt.double_quant:
    fields["nested_blocksize"] = GROUP
    fields["nested_dtype"] = "float32"
    fields["nested_offset"] = float(leaf.scales.offset)
    tensors[f"{name}.absmax"] = flat(leaf.scales.codes)
    tensors[f"{name}.nested_absmax"] = leaf.scales.group
    tensors[f"{name}.nested_quant_map"] = codebooks.dynamic_map()
  else:
    tensors[f"{name}.absmax"] = flat(leaf.scales)
  text = json.dumps(fields).encode()
  tensors[f"{name}{STATE}{leaf.fmt.name}"] = np.frombuffer(text, np.uint8)
  return tensors


def _quantization(fmt: Format, compute_dtype: str, dense: list[str]) -> dict[str, Any]:
  """`quantization_config`, as transformers writes it; the modules `dense` stay as they are."""
  return {
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "bnb_4bit_compute_dtype": compute_dtype,
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": fmt.name,
    "bnb_4bit_use_double_quant": fmt.double_quant,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": dense,
    "llm_int8_threshold": 6.0,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "quant_method": "bitsandbytes",
  }


def _write(directory: Path, config: Mapping[str, Any], tensors: dict[str, np.ndarray]) -> None:
  with new_directory.writing(directory) as folder:
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    safetensors_dir.write(folder / "model.safetensors", tensors)
