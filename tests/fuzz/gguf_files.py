"""GGUF files, against a parser of the format that reads just what is compared."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from peftjax.io.gguf import GGUFFile
from tests.fuzz import damage

WIDTH, HEADS, LAYERS, FFN, WORDS = 32, 4, 2, 48, 40
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_FORMATS[12] = "d"


class GGUF:
  name, share = "gguf", 12

  def prepare(self, folder: Path) -> None:
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_feed_forward_length(FFN)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"w{i}" for i in range(WORDS)])
    writer.add_token_types([1] * WORDS)
    writer.add_token_merges([])
    writer.add_eos_token_id(0)
    rng = np.random.default_rng(0)
    tensor = lambda name, *shape: writer.add_tensor(name, rng.normal(size=shape).astype("f"))
    tensor("token_embd.weight", WORDS, WIDTH)
    tensor("output_norm.weight", WIDTH)
    for i in range(LAYERS):
      tensor(f"blk.{i}.attn_norm.weight", WIDTH)
      tensor(f"blk.{i}.ffn_norm.weight", WIDTH)
      for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        tensor(f"blk.{i}.{name}.weight", WIDTH, WIDTH)
      tensor(f"blk.{i}.ffn_gate.weight", FFN, WIDTH)
      tensor(f"blk.{i}.ffn_up.weight", FFN, WIDTH)
      tensor(f"blk.{i}.ffn_down.weight", WIDTH, FFN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

  def damage(self, rng: random.Random, folder: Path) -> None:
    path = folder / "model.gguf"
    data = path.read_bytes()
    if rng.random() < 0.6:  # a number of the metadata or of a tensor's place
      at = rng.choice(_marks(data))
      value = rng.choice((0, 1, 2, 5, 255, 2**16, 2**31, 2**32 - 1))
      data = data[:at] + struct.pack("<I", value) + data[at + 4 :]
    else:
      data = damage.of_bytes(rng, data)
    path.write_bytes(data)

  def read(self, folder: Path) -> Any:
    file = GGUFFile(folder / "model.gguf")
    return file.config, {name: file.read(name) for name in file.names()}

  def check(self, folder: Path, got: Any) -> str:
    config, arrays = got
    try:
      metadata = _metadata((folder / "model.gguf").read_bytes())
    except (struct.error, ValueError, KeyError, OverflowError, MemoryError) as error:
      return f"accepted, but {error!r}"
    for field, key in (
      ("hidden_size", "embedding_length"),
      ("num_hidden_layers", "block_count"),
      ("num_attention_heads", "attention.head_count"),
      ("intermediate_size", "feed_forward_length"),
      ("max_position_embeddings", "context_length"),
    ):
      value = metadata.get(f"llama.{key}")
      if config[field] != value or not value or value >= 2**31:
        return f"{key}={value!r} was accepted as {config[field]!r}"
    if config["num_hidden_layers"] != LAYERS or config["hidden_size"] % HEADS:
      return f"{config} does not fit the tensors"
    if len(arrays) != 2 + 9 * LAYERS:
      return f"{len(arrays)} tensors"
    return ""


def _marks(data: bytes) -> list[int]:
  """Where the header's counts, the values of its metadata and the tensors' dimensions lie."""
  marks = [4, 8, 16]
  for word in (b".embedding_length", b".block_count", b".head_count", b".head_count_kv"):
    found = data.find(word)
    marks += [found + len(word), found + len(word) + 4]
  for word in (b".feed_forward_length", b".context_length", b"ggml.tokens", b"ggml.token_type"):
    found = data.find(word)
    marks += [found + len(word), found + len(word) + 4, found + len(word) + 8]
  for word in (b"token_embd.weight", b"blk.0.attn_q.weight", b"blk.1.ffn_down.weight"):
    found = data.find(word) + len(word)
    marks += [found, found + 4, found + 12, found + 20, found + 24]
  return marks


def _metadata(data: bytes) -> dict[str, Any]:
  """Scalars of the metadata."""
  magic, version, _, count = struct.unpack_from("<IIQQ", data)
  if magic != 0x46554747 or version not in (2, 3):
    raise ValueError("no GGUF")
  at, found = 24, {}

  def text() -> str:
    nonlocal at
    (size,) = struct.unpack_from("<Q", data, at)
    if at + 8 + size > len(data):
      raise ValueError("a text beyond the file")
    raw = data[at + 8 : at + 8 + size]
    at += 8 + size
    return raw.decode()

  def value(kind: int, depth: int = 0) -> Any:
    nonlocal at
    if kind == 8:
      return text()
    if kind == 9:
      if depth:
        raise ValueError("arrays in arrays")
      inner, size = struct.unpack_from("<IQ", data, at)
      at += 12
      if size > len(data):
        raise ValueError("an array beyond the file")
      return [value(inner, depth + 1) for _ in range(size)]
    (number,) = struct.unpack_from(f"<{_FORMATS[kind]}", data, at)
    at += struct.calcsize(f"<{_FORMATS[kind]}")
    return number

  for _ in range(min(count, 10_000)):
    key = text()
    (kind,) = struct.unpack_from("<I", data, at)
    at += 4
    if key in found:
      raise ValueError(f"{key} twice")
    found[key] = value(kind)
  return found
