"""Parameter-efficient fine-tuning in JAX: a method is a pure transform of a parameter tree."""

from peftjax import linen, losses, optim, sharding
from peftjax.core.einsum import attend, einsum, take
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
from peftjax.io.hf_peft import load as load_peft
from peftjax.io.hf_peft import save as save_peft
from peftjax.linen import apply
from peftjax.methods.adalora import adalora
from peftjax.methods.adalora_ranks import ranks, to_lora
from peftjax.methods.adalora_weight import SVDLoRA
from peftjax.methods.adapters import adapters
from peftjax.methods.base import Method, chain
from peftjax.methods.dora import dora
from peftjax.methods.ia3 import ia3
from peftjax.methods.ia3_weight import IA3
from peftjax.methods.lora import lora
from peftjax.methods.lora_weight import LoRA
from peftjax.methods.prefix import prefix
from peftjax.methods.prompt import prompt
from peftjax.methods.swap import align_ranks, unmerge
from peftjax.methods.unfreeze import unfreeze
from peftjax.methods.vera import vera
from peftjax.models.generate import generate
from peftjax.models.pretrained import load_pretrained
from peftjax.optim import freeze
from peftjax.quant.formats import fp4, int4, int8, nf4
from peftjax.quant.transform import quantize, requantize
from peftjax.quant.weight import Quantized
from peftjax.sharding import make_mesh, shardings

__all__ = [
  "IA3",
  "LoRA",
  "Method",
  "Quantized",
  "SVDLoRA",
  "Weight",
  "adalora",
  "adapter_mask",
  "adapters",
  "align_ranks",
  "apply",
  "attend",
  "chain",
  "combine",
  "count",
  "describe",
  "dora",
  "einsum",
  "fp4",
  "freeze",
  "generate",
  "int4",
  "int8",
  "ia3",
  "linen",
  "load_peft",
  "load_pretrained",
  "lora",
  "losses",
  "make_mesh",
  "merge",
  "nf4",
  "optim",
  "partition",
  "prefix",
  "prompt",
  "quantize",
  "ranks",
  "requantize",
  "save_peft",
  "select",
  "sharding",
  "shardings",
  "take",
  "to_lora",
  "unfreeze",
  "unmerge",
  "untie",
  "value_and_grad",
  "vera",
]
