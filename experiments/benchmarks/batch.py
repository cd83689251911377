"""The batch that both sides of a benchmark train on."""

import numpy as np


def example(batch_size: int, length: int) -> dict[str, np.ndarray]:
  """Random tokens and labels, without padding."""
  random = np.random.default_rng(0)
  shape = (batch_size, length)
  return {
    "tokens": random.integers(1000, 30000, shape, np.int32),
    "mask": np.ones(shape, bool),
    "types": np.zeros(shape, np.int32),
    "labels": random.integers(0, 2, batch_size, np.int32),
    "weights": np.ones(batch_size, np.float32),
  }


def packed(batch_size: int, length: int, vocab: int) -> dict[str, np.ndarray]:
  """Random tokens of a language model, one document per row."""
  shape = (batch_size, length)
  tokens = np.random.default_rng(0).integers(1000, min(vocab, 40_000), shape, np.int32)
  return {
    "tokens": tokens,
    "segments": np.ones_like(tokens),
    "positions": np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape),
    "weights": np.ones(tokens.shape, np.float32),
  }


def pairs(batch_size: int, length: int, vocab: int) -> tuple[np.ndarray, np.ndarray]:
  """Random tokens of sources, and of targets half as long."""
  random = np.random.default_rng(0)
  shapes = (batch_size, length), (batch_size, length // 2)
  source, target = (random.integers(1000, vocab, shape, np.int32) for shape in shapes)
  return source, target


def images(batch_size: int, size: int) -> tuple[np.ndarray, np.ndarray]:
  """Random pixels `[B, size, size, 3]`, and labels."""
  random = np.random.default_rng(0)
  pixels = random.standard_normal((batch_size, size, size, 3), np.float32)
  return pixels, random.integers(0, 10, batch_size, np.int32)
