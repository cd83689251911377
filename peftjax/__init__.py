"""Parameter-efficient fine-tuning in JAX: a method is a pure transform of a parameter tree."""

from peftjax import linen, losses, nnx, optim, quant, sharding
from peftjax.core.einsum import einsum
from peftjax.core.factored import factored
from peftjax.core.paths import select
from peftjax.core.tree import (
  adapter_mask,
  combine,
  count,
  merge,
  partition,
  untie,
  value_and_grad,
)
from peftjax.core.weight import Weight
from peftjax.describe import describe
from peftjax.hf_peft import load as load_peft
from peftjax.hf_peft import save as save_peft
from peftjax.linen import apply
from peftjax.methods.adalora import adalora
from peftjax.methods.adalora_ranks import ranks, to_lora
from peftjax.methods.adapters import adapters
from peftjax.methods.base import Method, chain
from peftjax.methods.dora import dora
from peftjax.methods.ia3 import ia3
from peftjax.methods.loha import loha
from peftjax.methods.lokr import lokr
from peftjax.methods.lora import lora
from peftjax.methods.prefix import prefix
from peftjax.methods.prompt import prompt
from peftjax.methods.swap import align_ranks, unmerge
from peftjax.methods.unfreeze import unfreeze
from peftjax.methods.vera import vera
from peftjax.models.generate import generate
from peftjax.models.pretrained import load_pretrained
from peftjax.quant.transform import quantize

__all__ = [
  "Method",
  "Weight",
  "adalora",
  "adapter_mask",
  "adapters",
  "align_ranks",
  "apply",
  "chain",
  "combine",
  "count",
  "describe",
  "dora",
  "einsum",
  "factored",
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
  "optim",
  "partition",
  "prefix",
  "prompt",
  "quant",
  "quantize",
  "ranks",
  "save_peft",
  "select",
  "sharding",
  "to_lora",
  "unfreeze",
  "unmerge",
  "untie",
  "value_and_grad",
  "vera",
]
