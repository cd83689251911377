"""The configuration in a GGUF file of a Llama or Qwen2: typed, ranged, checked against tensors."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta

from peftjax.core.ranges import Count, Positive, Size
from peftjax.io import records
from peftjax.io.gguf_header import Header
from peftjax.io.records import clip

Share = Annotated[float, Meta(gt=0, lt=1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _General:
  architecture: str
  type: str = "model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Parts:
  count: Count = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Attention:
  head_count: Size
  layer_norm_rms_epsilon: Share
  head_count_kv: Size | None = None  # by default as many as heads
  key_length: Size | None = None  # of a head; by default the width over the heads
  value_length: Size | None = None
  causal: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Scaling:
  type: Literal["none", "linear"] = "linear"  # llama.cpp's default; without a factor none is meant
  factor: Annotated[float, Meta(ge=0, lt=1e30)] = 0.0  # 0: none is meant


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rope:
  freq_base: Positive = 10_000.0
  dimension_count: Size | None = None
  scale_linear: Annotated[float, Meta(ge=0, lt=1e30)] = 0.0  # the factor in old files
  scaling: _Scaling = dataclasses.field(default_factory=_Scaling)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Model:
  """The metadata that begins with the architecture's name."""

  attention: _Attention
  embedding_length: Size
  block_count: Size
  feed_forward_length: Size
  context_length: Size
  rope: _Rope = dataclasses.field(default_factory=_Rope)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Ids:
  """Ids of tokens, which begin with `tokenizer.ggml`."""

  bos_token_id: Count | None = None
  eos_token_id: Count | None = None
  eot_token_id: Count | None = None  # the end of a turn, and of a message: llama.cpp ends there
  eom_token_id: Count | None = None
  padding_token_id: Count | None = None
  unknown_token_id: Count | None = None


def config(path: Path, header: Header) -> dict[str, Any]:
  """The contents that `config.json` would have.

  Raises:
    ValueError: naming the file and the value: a value missing, of another type or out of
      range; sizes that do not fit each other; another architecture, a stretch of the rotary
      frequencies that is not read, or tensors other than the architecture's, layer by layer.
  """
  kind = _kind(path, header)
  said = records.convert(nested(header.metadata, kind), _Model, f"{path}: {kind}")
  heads, size = _heads(path, kind, said)
  tokens = header.metadata.get("tokenizer.ggml.tokens")
  if not isinstance(tokens, list) or not tokens:
    raise ValueError(f"{path} has no vocabulary: tokenizer.ggml.tokens is {clip(tokens)}.")
  found = {
    "model_type": kind,
    "vocab_size": len(tokens),
    "hidden_size": said.embedding_length,
    "num_hidden_layers": said.block_count,
    "num_attention_heads": heads,
    "num_key_value_heads": said.attention.head_count_kv or heads,
    "head_dim": size,
    "intermediate_size": said.feed_forward_length,
    "max_position_embeddings": said.context_length,
    "rms_norm_eps": said.attention.layer_norm_rms_epsilon,
    "rope_theta": said.rope.freq_base,
    "attention_bias": "blk.0.attn_q.bias" in header.tensors,
    "mlp_bias": "blk.0.ffn_gate.bias" in header.tensors,
    "tie_word_embeddings": "output.weight" not in header.tensors,
  }
  ids = token_ids(path, header.metadata)
  ends = [ids[name] for name in ("eos", "eot", "eom") if ids[name] is not None]
  found["eos_token_id"] = ends if len(ends) > 1 else ids["eos"]
  for name in ("bos", "pad"):
    found[f"{name}_token_id"] = ids[name]
  _match(path, header, found)
  if scaling := _scaling(path, header, said.rope, found):
    found["rope_scaling"] = scaling
  return found


def _kind(path: Path, header: Header) -> str:
  """The architecture of a whole model."""
  general = records.convert(nested(header.metadata, "general"), _General, f"{path}: general")
  kind = general.architecture
  if kind not in ("llama", "qwen2"):
    raise ValueError(
      f"{path} has the architecture {clip(kind)}; 'llama' and 'qwen2' are supported. Load the "
      "model's Hugging Face directory instead."
    )
  if general.type != "model":
    raise ValueError(f"{path} does not hold a model: its general.type is {clip(general.type)}.")
  parts = records.convert(nested(header.metadata, "split"), _Parts, f"{path}: split").count
  if parts > 1:
    raise ValueError(
      f"{path} is one of {parts} parts of a model. Join them with llama-gguf-split --merge."
    )
  return kind


def token_ids(path: Path, metadata: Mapping[str, Any]) -> dict[str, int | None]:
  """The ids called `bos`, `eos`, `eot`, `eom`, `pad` and `unk`, as the file or llama.cpp has them.

  llama.cpp's defaults for a SentencePiece vocabulary are 1, 2, none and 0. Those for byte-level
  ones, 11, are Falcon's alone, and not taken.

  Raises:
    ValueError: if one is beyond the vocabulary.
  """
  said = records.convert(nested(metadata, "tokenizer.ggml"), _Ids, f"{path}: tokenizer.ggml")
  tokens = metadata.get("tokenizer.ggml.tokens")
  number = len(tokens) if isinstance(tokens, list) else 0
  ids = {
    "bos": said.bos_token_id,
    "eos": said.eos_token_id,
    "eot": said.eot_token_id,
    "eom": said.eom_token_id,
    "pad": said.padding_token_id,
    "unk": said.unknown_token_id,
  }
  for name, value in ids.items():
    if value is not None and value >= number:
      raise ValueError(f"{path} names token {value} as {name}, and its vocabulary has {number}.")
  if metadata.get("tokenizer.ggml.model") == "llama":
    for name, value in (("bos", 1), ("eos", 2), ("unk", 0)):
      if ids[name] is None and value < number:
        ids[name] = value
  return ids


def nested(metadata: Mapping[str, Any], prefix: str) -> dict[str, Any]:
  """`{"a.b": 1, "a.c": 2}` as `{"a": {"b": 1, "c": 2}}`: a schema for each part."""
  nested: dict[str, Any] = {}
  for key, value in metadata.items():
    if not key.startswith(prefix + "."):
      continue
    *outer, last = key.removeprefix(prefix + ".").split(".")
    if len(outer) > 4:
      continue  # a key that is not read
    place = nested
    for name in outer:
      inner = place.setdefault(name, {})
      place = inner if isinstance(inner, dict) else {}
    place[last] = value
  return nested


def _heads(path: Path, kind: str, said: _Model) -> tuple[int, int]:
  """The number of heads and the size of each."""
  attention, width = said.attention, said.embedding_length
  if not attention.causal:
    raise ValueError(f"{path} is not causal ({kind}.attention.causal), and only decoders are read.")
  heads, kv_heads = attention.head_count, attention.head_count_kv or attention.head_count
  if heads % kv_heads:
    raise ValueError(
      f"{path}: {heads} heads (attention.head_count) do not divide into {kv_heads} groups "
      "(attention.head_count_kv)."
    )
  if attention.key_length is None and width % heads:
    raise ValueError(
      f"{path}: {kind}.embedding_length {width} does not divide into {heads} heads "
      "(attention.head_count), and there is no attention.key_length."
    )
  size = attention.key_length or width // heads
  if size % 2:
    raise ValueError(f"{path}: a head has size {size}; rotary embeddings need an even one.")
  for name, value in (
    ("attention.value_length", attention.value_length),
    ("rope.dimension_count", said.rope.dimension_count),
  ):
    if value not in (None, size):
      raise ValueError(f"{path}: {kind}.{name} is {value} though a head has size {size}.")
  return heads, size


def _shapes(said: Mapping[str, Any]) -> tuple[dict[str, tuple[int, ...]], set[str]]:
  """Every tensor of the model with its shape, and the names of those that may be missing."""
  width, inner = said["hidden_size"], said["intermediate_size"]
  queries = said["num_attention_heads"] * said["head_dim"]
  keys = said["num_key_value_heads"] * said["head_dim"]
  shapes: dict[str, tuple[int, ...]] = {
    "token_embd.weight": (said["vocab_size"], width),
    "output_norm.weight": (width,),
    "output.weight": (said["vocab_size"], width),
  }
  matrices = {
    "attn_q": (queries, width),
    "attn_k": (keys, width),
    "attn_v": (keys, width),
    "attn_output": (width, queries),
    "ffn_gate": (inner, width),
    "ffn_up": (inner, width),
    "ffn_down": (width, inner),
  }
  biased = [name for name in matrices if said["mlp_bias" if "ffn" in name else "attention_bias"]]
  if said["model_type"] == "qwen2":
    biased = ["attn_q", "attn_k", "attn_v"]
  for layer in range(said["num_hidden_layers"]):
    for name in ("attn_norm", "ffn_norm"):
      shapes[f"blk.{layer}.{name}.weight"] = (width,)
    for name, shape in matrices.items():
      shapes[f"blk.{layer}.{name}.weight"] = shape
    for name in biased:
      shapes[f"blk.{layer}.{name}.bias"] = matrices[name][:1]
  return shapes, {"output.weight"}


def _match(path: Path, header: Header, said: Mapping[str, Any]) -> None:
  """Checks the sizes against the tensors: first the layers, of which there may be any number."""
  layers = {found[1] for name in header.tensors if (found := re.match(r"blk\.(\d+)\.", name))}
  if len(layers) != said["num_hidden_layers"]:
    raise ValueError(
      f"{path}: {said['model_type']}.block_count is {said['num_hidden_layers']}, and there are "
      f"tensors of {len(layers)} layers. Download it again, or convert the model again."
    )
  shapes, optional = _shapes(said)
  problems = {
    "are missing from the checkpoint": set(shapes) - optional - set(header.tensors),
    "of the checkpoint have no place in this model": set(header.tensors)
    - set(shapes)
    - {"rope_freqs.weight"},
  }
  for what, names in problems.items():
    if names:
      shown = "\n  ".join(clip(name, quote=False) for name in sorted(names)[:10])
      raise ValueError(f"{path}: {len(names)} tensors {what}:\n  {shown}")
  for name, shape in shapes.items():
    if name in header.tensors and header.tensors[name].shape != shape:
      raise ValueError(
        f"{path}: tensor {name} has shape {header.tensors[name].shape}; the metadata mean {shape}."
      )


def _scaling(
  path: Path, header: Header, rope: _Rope, said: Mapping[str, Any]
) -> dict[str, Any] | None:
  """The field `rope_scaling` of `config.json`."""
  factor = rope.scaling.factor or rope.scale_linear or 1.0
  linear = rope.scaling.type == "linear" and factor != 1.0
  if "rope_freqs.weight" not in header.tensors:
    return {"rope_type": "linear", "factor": factor} if linear else None
  tensor = header.tensors["rope_freqs.weight"]
  if linear or tensor.kind != "F32" or tensor.shape != (said["head_dim"] // 2,):
    raise ValueError(
      f"{path} has rope_freqs.weight, {tensor.kind} of shape {tensor.shape}; only F32 of shape "
      f"({said['head_dim'] // 2},) without another stretch of the frequencies is read."
    )
  data = header.data[tensor.start : tensor.start + tensor.size]
  found = _llama3(data.view("<f4").astype(np.float64), said["rope_theta"], said["head_dim"])
  if found is None:
    raise ValueError(
      f"{path} stretches its rotary frequencies by a tensor, rope_freqs.weight, other than Llama "
      "3's, which is not supported; load the model's Hugging Face directory instead."
    )
  return found


def _llama3(divisors: np.ndarray, theta: float, size: int) -> dict[str, Any] | None:
  """Llama 3's stretch of the frequencies, if the divisors are of that kind.

  llama.cpp's converter writes ω / ω', as in `nn.rope`'s "llama3". All of Meta's have the bounds 1
  and 4; the factor is the largest divisor; of the trained lengths, powers of two, all those that
  give the divisors give the same frequencies.
  """
  if not np.isfinite(divisors).all() or not 1 <= divisors.min() <= divisors.max() < 2**20:
    return None
  omega = theta ** -(np.arange(0, size, 2) / size)
  factor = float(divisors.max())
  for length in (2**n for n in range(24)):
    keep = np.clip((length * omega / (2 * math.pi) - 1.0) / 3.0, 0.0, 1.0)
    if np.allclose(1 / (keep + (1 - keep) / factor), divisors, rtol=1e-5, atol=0):
      return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": length,
      }
  return None
