"""Reads GGUF files (llama.cpp) of the Llama family: weights, configuration and tokenizer.

The weights appear under Hugging Face's names and in its layout, so a file stands for a directory:
llama.cpp's converter reorders the rows of query and key for its own rotary layout, undone here.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np

from peftjax.io import gguf_config, gguf_header
from peftjax.io.gguf_tokenizer import chat_templates, special_tokens, tokenizer
from peftjax.io.safetensors_dir import TensorInfo
from peftjax.quant import stream

__all__ = ["GGUFFile", "chat_templates", "hf_name", "metadata", "special_tokens", "tokenizer"]

_MODULES = {
  "token_embd": "model.embed_tokens",
  "output_norm": "model.norm",
  "output": "lm_head",
  "attn_norm": "input_layernorm",
  "ffn_norm": "post_attention_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}


class GGUFFile:
  """The tensors of one file, under Hugging Face's names; as `TensorDir` it reads one at a time.

  Attributes:
    config: the contents that `config.json` would have.

  Raises:
    ValueError: a file of another kind or damaged; another architecture; a tensor too many, missing
      or of another shape than the metadata mean; one of a type that the gguf package cannot
      dequantise; metadata of another type or out of range.
  """

  def __init__(self, path: str | Path):
    self.path = Path(path)
    header = gguf_header.read(self.path)
    for tensor in header.tensors.values():
      if tensor.kind not in types():
        raise ValueError(
          f"{self.path}: tensor {tensor.name} has type {tensor.kind}; only "
          f"{', '.join(types())} are read. Convert the model to one of them with llama-quantize."
        )
    self.config = gguf_config.config(self.path, header)
    self._data = header.data
    self._tensors = {
      hf_name(name): tensor
      for name, tensor in header.tensors.items()
      if name != "rope_freqs.weight"  # it is in the configuration
    }

  def names(self) -> tuple[str, ...]:
    """The names of all tensors, sorted."""
    return tuple(sorted(self._tensors))

  def info(self, name: str) -> TensorInfo:
    """Shape and dtype of the array that `read` returns."""
    return TensorInfo(self._tensors[name].shape, np.dtype(np.float32))

  def read(self, name: str) -> np.ndarray:
    """One tensor, dequantised to float32 by the gguf package, some rows at a time."""
    shape = self.info(name).shape
    if len(shape) == 1:
      return self.read_rows(name, 0, shape[0])
    array = stream.aligned(shape, np.float32)
    size = max(1, stream.PIECE // shape[1])
    for start in range(0, shape[0], size):
      array[start : start + size] = self.read_rows(name, start, start + size)
    return array

  def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
    """`read(name)[start:stop]`; of a matrix, only those rows are dequantised."""
    tensor = self._tensors[name]
    rows = self._rows(name, tensor.shape[0])[start:stop]
    data = self._data[tensor.start : tensor.start + tensor.size]
    if len(tensor.shape) == 1:  # its blocks go across what are rows in the others
      return _dequantize(data, tensor.kind)[rows]
    if not len(rows):
      return np.empty((0, *tensor.shape[1:]), np.float32)
    return _dequantize(data.reshape(tensor.shape[0], -1)[rows], tensor.kind)

  def permuted(self, name: str, array: np.ndarray) -> np.ndarray:
    """A tensor with its rows in the file's order: the inverse of the reordering in `read`."""
    return array[np.argsort(self._rows(name, len(array)))]

  def _rows(self, name: str, count: int) -> np.ndarray:
    """The place of each of a tensor's rows in the file."""
    rows = np.arange(count)
    for module, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
      if self.config["model_type"] == "llama" and f".{module}." in name:
        rows = _unpermute(rows, self.config[heads])
    return rows


@functools.cache
def types() -> tuple[str, ...]:
  """ggml's types that the gguf package dequantises."""
  import gguf

  found = []
  for kind, (_, size) in gguf.constants.GGML_QUANT_SIZES.items():
    try:
      gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
      continue
    found.append(kind.name)
  return tuple(found)


def _dequantize(data: np.ndarray, kind: str) -> np.ndarray:
  """The tensor as a new float32 array; a NaN scale makes its block NaN, without a warning."""
  import gguf

  with np.errstate(all="ignore"):
    made = gguf.quants.dequantize(np.ascontiguousarray(data), gguf.GGMLQuantizationType[kind])
  return np.array(made, np.float32)


def hf_name(name: str) -> str:
  """Hugging Face's name for a GGUF tensor.

  >>> hf_name("blk.3.attn_q.weight")
  'model.layers.3.self_attn.q_proj.weight'
  """
  layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
  if layer:
    return f"model.layers.{layer[1]}.{_MODULES.get(layer[2], layer[2])}.{layer[3]}"
  module, _, kind = name.rpartition(".")
  return f"{_MODULES.get(module, module)}.{kind}"


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
  """Rows from llama.cpp's order, pairs (i, i + 1), to Hugging Face's, pairs (i, i + H/2)."""
  return rows.reshape(heads, len(rows) // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def metadata(path: str | Path, key: str, default: Any = None) -> Any:
  """One value of the file's metadata: a number, a text, true or false, or a list of them."""
  return gguf_header.read(path).metadata.get(key, default)
