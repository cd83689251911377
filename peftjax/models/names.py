"""Names of Hugging Face's tensors from paths of our parameters."""

import re
from typing import Any

_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


def torch_name(path: str, layer: str) -> str:
  """A path with dots, torch's name of the leaf, and `layer` in place of our `layers_`.

  >>> torch_name("transformer/layers_0/attn/c_attn/kernel", "h.")
  'transformer.h.0.attn.c_attn.weight'
  """
  *modules, leaf = path.split("/")
  name = re.sub(r"\blayers_(?=\d)", layer, ".".join([*modules, _LEAVES[leaf]]))
  return re.sub(r"\bexperts_(?=\d)", "experts.", name)


def turned(family: Any, path: str) -> bool:
  """Tells whether the family's files hold this parameter transposed, [out, in].

  The language-model head is an `nn.Linear` in GPT-2 too, whose other kernels are [in, out].
  """
  return path.endswith("kernel") and (family.OUT_FIRST or path.startswith("lm_head/"))
