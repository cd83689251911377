"""The torch side of the comparisons."""

from pathlib import Path

import numpy as np
import torch
from transformers import (
  AutoModelForCausalLM,
  AutoModelForSequenceClassification,
  PreTrainedModel,
)

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-4  # of logits


def classifier(directory: str | Path, **config) -> PreTrainedModel:
  """transformers' classifier from `directory`, with its attention written out."""
  torch.manual_seed(0)  # of a head that the directory lacks
  return AutoModelForSequenceClassification.from_pretrained(
    directory, attn_implementation="eager", **config
  )


def decoder(directory: str | Path) -> PreTrainedModel:
  """transformers' language model from `directory`, with its attention written out."""
  return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")


def inputs(vocab: int, pad: int = 0, types: int = 2, seed: int = 0, length: int = 16) -> list:
  """`[tokens, mask, types]`, int32 [6, length], rows padded on the right."""
  rng = np.random.default_rng(seed)
  lengths = np.array([length, 1, 2, *rng.integers(3, length, 3)])
  mask = (np.arange(length) < lengths[:, None]).astype(np.int32)
  tokens = np.where(mask, rng.integers(5, vocab, mask.shape), pad).astype(np.int32)
  return [tokens, mask, (rng.integers(0, types, mask.shape) * mask).astype(np.int32)]


def compute(model: torch.nn.Module, batch: list):
  """What `model` returns in evaluation mode, of tokens and, if given, mask and types."""
  names = ("input_ids", "attention_mask", "token_type_ids")
  with torch.no_grad():
    return model.eval()(**dict(zip(names, map(torch.from_numpy, batch), strict=False)))


def logits(model: torch.nn.Module, batch: list) -> np.ndarray:
  return compute(model, batch).logits.numpy()


def assert_near(ours, theirs: np.ndarray) -> None:
  np.testing.assert_allclose(np.asarray(ours), theirs, atol=TOLERANCE, rtol=0)
