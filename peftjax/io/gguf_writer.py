"""Writes a GGUF file like another one: with its metadata and tokenizer, and new weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peftjax.io import gguf_header
from peftjax.io.gguf import GGUFFile, hf_name
from peftjax.io.shards import Tensor

# ggml's type for a dtype, and the `general.file_type` of a file whose matrices have it.
_KINDS = {"float32": ("F32", 0), "float16": ("F16", 1), "bfloat16": ("BF16", 32)}
_FREQUENCIES = "rope_freqs.weight"  # the only tensor that is not a weight
_HEAD = ("lm_head.weight", "output.weight")


def write(path: str | Path, source: str | Path, tensors: Sequence[Tensor]) -> None:
  """Writes the model of another GGUF file with other weights, one tensor in memory at a time.

  Matrices have the dtype of their `Tensor`, vectors float32, as llama.cpp asks for. For other types
  run llama.cpp's `llama-quantize` on the file. It appears whole or not at all.

  Args:
    path: ends in `.gguf`; nothing may be there.
    source: a file that `GGUFFile` reads, of the same model.
    tensors: every weight, under Hugging Face's names; a head may be there that `source` lacks.

  Raises:
    ValueError: a path that is not a new .gguf file; tensors that are not those of `source`.
  """
  import gguf

  path, model = Path(path), GGUFFile(source)
  if path.suffix != ".gguf" or os.path.lexists(path):
    raise ValueError(f"{path} is not a new file of that kind: name one that ends in .gguf")
  names = {hf_name(name): name for name in gguf_header.read(source).tensors}
  by_name = {tensor.name: tensor for tensor in tensors}
  wanted = {name for name, own in names.items() if own != _FREQUENCIES}
  if strange := sorted((wanted ^ by_name.keys()) - {_HEAD[0]}):
    raise ValueError(
      f"{strange[0]} is in one of {source} and the weights to write, and not in both"
    )
  names.setdefault(*_HEAD)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  kinds = {name: _kind(tensor) for name, tensor in by_name.items()}
  most = max(kinds.values(), key=[*kinds.values()].count)
  reader = gguf.GGUFReader(source)
  writer = gguf.GGUFWriter(temporary, model.config["model_type"])
  try:
    _add_metadata(reader, writer, dict(_KINDS.values())[most])
    raw = [x for x in reader.tensors if x.name == _FREQUENCIES]
    for x in raw:
      shape, kind = x.data.shape, x.tensor_type
      writer.add_tensor_info(x.name, shape, x.data.dtype, x.data.nbytes, kind)
    for name, tensor in by_name.items():
      kind = gguf.GGMLQuantizationType[kinds[name]]
      size = tensor.bytes // tensor.dtype.itemsize * (4 if kinds[name] == "F32" else 2)
      writer.add_tensor_info(names[name], tensor.shape, np.dtype(np.float32), size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for x in raw:
      writer.write_tensor_data(x.data)
    for name, tensor in by_name.items():
      array = np.ascontiguousarray(model.permuted(name, tensor.make()), np.float32)
      kind = gguf.GGMLQuantizationType[kinds[name]]
      writer.write_tensor_data(gguf.quants.quantize(array, kind))
    writer.close()
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def _kind(tensor: Tensor) -> str:
  return "F32" if len(tensor.shape) == 1 else _KINDS[tensor.dtype.name][0]


def _add_metadata(reader: Any, writer: Any, file_type: int) -> None:
  """Adds all fields of a file, except for the type of its matrices."""
  import gguf

  for field in reader.fields.values():
    if field.name == "general.architecture" or field.name.startswith("GGUF."):
      continue  # the writer adds its own
    kind, value = field.types[0], field.contents()
    inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
    if field.name == "general.file_type":
      value = file_type
    writer.add_key_value(field.name, value, kind, sub_type=inner)
