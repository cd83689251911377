"""Reads GGUF files (llama.cpp) of the Llama family: weights, configuration and tokenizer.

The weights appear under Hugging Face's names and in its layout, so a file stands for a directory:
llama.cpp's converter reorders the rows of query and key for its own rotary layout, undone here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from peftjax.io.safetensors_dir import TensorInfo

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
    reader = _reader(self.path)
    self._tensors = {hf_name(t.name): t for t in reader.tensors if t.name != "rope_freqs.weight"}
    for tensor in reader.tensors:
      if tensor.tensor_type.name not in TYPES:
        raise ValueError(
          f"{self.path}: tensor {tensor.name} has type {tensor.tensor_type.name}; only "
          f"{', '.join(TYPES)} are read. Convert the model to one of them with llama-quantize."
        )
    if any(t.name == "rope_freqs.weight" for t in reader.tensors):
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
    """One tensor, dequantised to float32 by the gguf package."""
    from gguf.quants import dequantize

    tensor = self._tensors[name]
    array = np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)
    array = array.reshape(self.info(name).shape)
    for module, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
      if self.config["model_type"] == "llama" and f".{module}." in name:
        array = _unpermute(array, self.config[heads])
    return array


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


def _unpermute(w: np.ndarray, heads: int) -> np.ndarray:
  """Rows from llama.cpp's order, pairs (i, i + 1), to Hugging Face's, pairs (i, i + H/2)."""
  split = w.reshape(heads, w.shape[0] // heads // 2, 2, *w.shape[1:])
  return np.ascontiguousarray(split.swapaxes(1, 2).reshape(w.shape))


@functools.lru_cache(maxsize=1)
def _reader(path: Path) -> Any:
  try:
    import gguf
  except ImportError:
    raise ValueError(f"{path} needs the gguf package: pip install gguf") from None
  if not path.is_file():
    raise ValueError(f"no file {path}")
  try:
    return gguf.GGUFReader(path)
  except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
    raise ValueError(f"{path} is not a sound GGUF file: {error}. Download it again.") from error


def metadata(path: str | Path, key: str, default: Any = None) -> Any:
  """One value of the file's metadata."""
  field = _reader(Path(path)).get_field(key)
  return default if field is None else field.contents()


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
