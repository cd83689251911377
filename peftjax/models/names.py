"""Paths of our parameters to the names of Hugging Face's tensors."""

import re
from typing import Any

# Others have the same name in both.
_LEAVES = dict.fromkeys(("kernel", "filters", "embedding", "scale"), "weight")


def torch_name(path: str, layer: str) -> str:
  """A path with dots, the leaf as torch calls it, and `layer` for what we call `layers_`.

  >>> torch_name("transformer/layers_0/attn/c_attn/kernel", "h.")
  'transformer.h.0.attn.c_attn.weight'
  """
  *modules, leaf = path.split("/")
  return re.sub(r"\blayers_(?=\d)", layer, ".".join([*modules, _LEAVES.get(leaf, leaf)]))


def turned(family: Any, path: str) -> bool:
  """Whether the family's files hold this parameter with its axes turned round: kernels [out, in].

  The language-model head is an `nn.Linear` in GPT-2 too, whose other kernels are [in, out].
  """
  if path.endswith("filters"):
    return True
  return path.endswith("kernel") and (family.OUT_FIRST or path.startswith("lm_head/"))


def module_name(family: Any, path: str) -> str:
  """The tensor of a parameter by the modules of transformers, which PEFT's names are of.

  They are those of the family's files but where it says otherwise.
  """
  return getattr(family, "module_name", family.hf_name)(path)
