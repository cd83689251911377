"""Paths of our parameters to the names of Hugging Face's tensors."""

import re

_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


def torch_name(path: str, layer: str) -> str:
  """A path with dots, the leaf as torch calls it, and `layer` for what we call `layers_`.

  >>> torch_name("transformer/layers_0/attn/c_attn/kernel", "h.")
  'transformer.h.0.attn.c_attn.weight'
  """
  *modules, leaf = path.split("/")
  return re.sub(r"\blayers_(?=\d)", layer, ".".join([*modules, _LEAVES[leaf]]))
