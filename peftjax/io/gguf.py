"""Reads GGUF files (llama.cpp) of the Llama family: weights, configuration and tokenizer.

The weights appear under Hugging Face's names and in its layout, so a file stands for a directory:
llama.cpp's converter reorders the rows of query and key for its own rotary layout, undone here.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from peftjax.io.safetensors_dir import TensorInfo
from peftjax.quant import stream

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")

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
    config: what `config.json` would say.

  Raises:
    ValueError: a file that is none or is damaged; another architecture; a tensor of a type other
      than F32, F16, BF16, Q8_0, Q4_0 and Q4_1.
  """

  def __init__(self, path: str | Path):
    self.path = Path(path)
    tensors = _open(self.path).tensors
    self._tensors = {hf_name(t.name): t for t in tensors if t.name != "rope_freqs.weight"}
    for tensor in tensors:
      if tensor.tensor_type.name not in TYPES:
        raise ValueError(
          f"{self.path}: tensor {tensor.name} has type {tensor.tensor_type.name}; only "
          f"{', '.join(TYPES)} are read. Convert the model to one of them with llama-quantize."
        )
    if any(t.name == "rope_freqs.weight" for t in tensors):
      raise ValueError(
        f"{self.path} stretches its rotary frequencies by a tensor, rope_freqs.weight, which is "
        "not supported; load the model's Hugging Face directory instead."
      )
    self.config = _config(self.path, self._tensors)

  def names(self) -> tuple[str, ...]:
    """The names of all tensors, sorted."""
    return tuple(sorted(self._tensors))

  def info(self, name: str) -> TensorInfo:
    """Shape and dtype of what `read` returns."""
    tensor = self._tensors[name]
    return TensorInfo(tuple(int(n) for n in tensor.shape[::-1]), np.dtype(np.float32))

  def read(self, name: str) -> np.ndarray:
    """One tensor, dequantised to float32 by the gguf package, some rows at a time."""
    shape = self.info(name).shape
    array = stream.aligned(shape, np.float32)
    size = max(1, stream.PIECE // math.prod(shape[1:]))
    for start in range(0, shape[0], size):
      array[start : start + size] = self.read_rows(name, start, start + size)
    return array

  def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
    """`read(name)[start:stop]`, of which no more is dequantised."""
    from gguf.quants import dequantize

    tensor, rows = self._tensors[name], np.arange(self.info(name).shape[0])
    for module, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
      if self.config["model_type"] == "llama" and f".{module}." in name:
        rows = _unpermute(rows, self.config[heads])
    rows = rows[start:stop]
    if tensor.data.ndim == 1:  # blocks would go across rows
      return np.array(dequantize(tensor.data, tensor.tensor_type)[rows], np.float32)
    return np.array(dequantize(tensor.data[rows], tensor.tensor_type), np.float32)


def hf_name(name: str) -> str:
  """Hugging Face's name of a GGUF tensor.

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


class _Opened(NamedTuple):
  """A file's tensors as the gguf package gives them, mapped and not yet read, and its metadata."""

  tensors: list[Any]
  metadata: dict[str, Any]


@functools.lru_cache(maxsize=1)
def _open(path: Path) -> _Opened:
  try:
    import gguf
  except ImportError:
    raise ValueError(f"{path} needs the gguf package: pip install gguf") from None
  if not path.is_file():
    raise ValueError(f"no file {path}")
  try:
    reader = gguf.GGUFReader(path)
    # Its own fields have several arrays for every token: 160 MB for a vocabulary of 49,152.
    return _Opened(reader.tensors, {k: field.contents() for k, field in reader.fields.items()})
  except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
    raise ValueError(f"{path} is not a sound GGUF file: {error}. Download it again.") from error


def metadata(path: str | Path, key: str, default: Any = None) -> Any:
  """One value of the file's metadata."""
  return _open(Path(path)).metadata.get(key, default)


def _config(path: Path, names: Iterable[str]) -> dict[str, Any]:
  kind = metadata(path, "general.architecture")
  if kind not in ("llama", "qwen2"):
    raise ValueError(f"{path} has the architecture {kind!r}; 'llama' and 'qwen2' are supported")
  scaling = metadata(path, f"{kind}.rope.scaling.type", "none")
  if scaling not in ("none", "linear"):
    raise ValueError(f"{path} has rope scaling {scaling!r}; only 'linear' is read from GGUF files")

  def need(key: str) -> Any:
    value = metadata(path, f"{kind}.{key}")
    if value is None:
      raise ValueError(f"{path} lacks {kind}.{key}")
    return value

  heads = need("attention.head_count")
  config = {
    "model_type": kind,
    "vocab_size": len(metadata(path, "tokenizer.ggml.tokens", ())),
    "hidden_size": need("embedding_length"),
    "num_hidden_layers": need("block_count"),
    "num_attention_heads": heads,
    "num_key_value_heads": metadata(path, f"{kind}.attention.head_count_kv", heads),
    "head_dim": metadata(path, f"{kind}.attention.key_length"),
    "intermediate_size": need("feed_forward_length"),
    "max_position_embeddings": need("context_length"),
    "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
    "rope_theta": metadata(path, f"{kind}.rope.freq_base", 10_000.0),
    "tie_word_embeddings": "lm_head.weight" not in set(names),
    "bos_token_id": metadata(path, "tokenizer.ggml.bos_token_id"),
    "eos_token_id": metadata(path, "tokenizer.ggml.eos_token_id"),
    "pad_token_id": metadata(path, "tokenizer.ggml.padding_token_id"),
  }
  if scaling == "linear":
    factor = metadata(path, f"{kind}.rope.scaling.factor", 1.0)
    config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
  return config


def tokenizer(path: str | Path) -> Any:
  """The `tokenizers.Tokenizer` of a file with a byte-level BPE vocabulary.

  Raises:
    ValueError: on another kind of vocabulary.
  """
  from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

  kind = metadata(path, "tokenizer.ggml.model")
  split = metadata(path, "tokenizer.ggml.pre", "default")
  # What comes before the split into words by GPT-2's pattern, or instead of it.
  splits: dict[str, list[Any]] = {
    "gpt-2": [],
    "smollm": [pre_tokenizers.Digits(individual_digits=True)],
    "llama-bpe": [pre_tokenizers.Split(Regex(_LLAMA3_WORDS), "isolated")],
    "qwen2": [pre_tokenizers.Split(Regex(_QWEN2_WORDS), "isolated")],
  }
  if kind != "gpt2" or split not in splits:
    raise ValueError(
      f"{path} has a vocabulary of kind {kind!r} split as {split!r}; read are 'gpt2' vocabularies "
      f"split as {', '.join(splits)}. Put a tokenizer.json beside the file."
    )
  tokens = metadata(path, "tokenizer.ggml.tokens")
  merges = [tuple(merge.split(" ")) for merge in metadata(path, "tokenizer.ggml.merges")]
  made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
  own_pattern = split in ("gpt-2", "smollm")
  last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own_pattern)
  made.pre_tokenizer = pre_tokenizers.Sequence([*splits[split], last])
  made.decoder = decoders.ByteLevel()
  control = 3  # llama.cpp's type of tokens such as <|im_start|>
  types = metadata(path, "tokenizer.ggml.token_type")
  special = [t for t, of in zip(tokens, types, strict=True) if of == control]
  made.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
  return made


_LLAMA3_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
