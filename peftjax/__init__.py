"""Parameter-efficient fine-tuning in JAX: a method is a pure transform of a parameter tree."""

import importlib
from typing import TYPE_CHECKING, Any

from peftjax import linen, losses, nnx, optim, quant, sharding, tree
from peftjax.core.einsum import einsum
from peftjax.core.factored import factored
from peftjax.core.tree import (
  combine,
  count,
  merge,
  partition,
  value_and_grad,
)
from peftjax.core.weight import Weight
from peftjax.describe import describe
from peftjax.hf_peft import load as load_peft
from peftjax.hf_peft import save as save_peft
from peftjax.linen import apply
from peftjax.methods.adalora import adalora
from peftjax.methods.adapters import adapters
from peftjax.methods.base import chain
from peftjax.methods.combine import combine_adapters
from peftjax.methods.dora import dora
from peftjax.methods.ia3 import ia3
from peftjax.methods.loha import loha
from peftjax.methods.lokr import lokr
from peftjax.methods.lora import lora
from peftjax.methods.oft import oft
from peftjax.methods.prefix import prefix
from peftjax.methods.prompt import prompt
from peftjax.methods.stack import stack_adapters
from peftjax.methods.unfreeze import unfreeze
from peftjax.methods.vera import vera
from peftjax.models.generate import generate
from peftjax.models.pretrained import load_pretrained
from peftjax.models.saved import save_pretrained
from peftjax.quant.transform import quantize

if TYPE_CHECKING:
  from peftjax.training.fit import fit
  from peftjax.training.texts import texts

__all__ = [
  "Weight",
  "adalora",
  "adapters",
  "apply",
  "chain",
  "combine",
  "combine_adapters",
  "count",
  "describe",
  "dora",
  "einsum",
  "factored",
  "fit",
  "generate",
  "ia3",
  "linen",
  "load_peft",
  "load_pretrained",
  "loha",
  "lokr",
  "lora",
  "losses",
  "merge",
  "nnx",
  "oft",
  "optim",
  "partition",
  "prefix",
  "prompt",
  "quant",
  "quantize",
  "save_peft",
  "save_pretrained",
  "sharding",
  "stack_adapters",
  "texts",
  "tree",
  "unfreeze",
  "value_and_grad",
  "vera",
]

# Imported when asked for: scikit-learn, SciPy and grain take longer than all the rest.
_LATER = {"fit": "peftjax.training.fit", "texts": "peftjax.training.texts"}


def __getattr__(name: str) -> Any:
  if name not in _LATER:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(_LATER[name]), name)
