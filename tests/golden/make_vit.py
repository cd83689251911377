"""Writes a tiny random ViT, and what transformers computes from it.

Run:   python -m tests.golden.make_vit
With:  torch 2.13.0 (CPU), transformers 5.23.0, safetensors 0.8.0, numpy 2.4.6

`image_vit` is as `save_pretrained` writes it, and holds `expected.safetensors` besides: `pixels`
float32 [4, 8, 12, 2], channels last; `logits` [4, 3]; `hidden` [4, 5, 16], the last hidden state,
in evaluation mode with eager attention.

Every weight is drawn, as by `make_encoders`. Height, width and the sides of a patch all differ, so
that two of them exchanged show.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import ViTConfig, ViTForImageClassification

from tests.golden.make_encoders import draw

DIRECTORY = Path(__file__).parent / "image_vit"
FIELDS = {
  "hidden_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "intermediate_size": 24,
  "image_size": [8, 12],
  "patch_size": [4, 6],
  "num_channels": 2,
  "layer_norm_eps": 1e-2,  # large enough to show when it is not read
  "num_labels": 3,
}


def make(fields: dict, seed: int) -> ViTForImageClassification:
  """A model with every weight drawn."""
  model = ViTForImageClassification(ViTConfig(**fields, attn_implementation="eager"))
  draw(model, seed)
  return model


def images(config: ViTConfig, rows: int, seed: int) -> np.ndarray:
  """Standard normal pixels, float32 [rows, height, width, channels]."""
  size = config.image_size
  height, width = (size, size) if isinstance(size, int) else size
  shape = (rows, height, width, config.num_channels)
  return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def run(model: torch.nn.Module, pixels: np.ndarray) -> dict[str, np.ndarray]:
  """`pixels` with `logits` and `hidden`."""
  given = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
  with torch.no_grad():
    out = model.eval()(pixel_values=given)
    hidden = model.vit(pixel_values=given).last_hidden_state
  return {"pixels": pixels, "logits": out.logits.numpy(), "hidden": hidden.numpy()}


def main() -> None:
  shutil.rmtree(DIRECTORY, ignore_errors=True)
  make(FIELDS, 0).save_pretrained(DIRECTORY)
  # From a fresh load, so that the values are what the files give.
  loaded = ViTForImageClassification.from_pretrained(DIRECTORY, attn_implementation="eager")
  save_file(run(loaded, images(loaded.config, 4, 0)), DIRECTORY / "expected.safetensors")


if __name__ == "__main__":
  main()
