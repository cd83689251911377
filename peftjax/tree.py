"""`pj.tree`: operations on adapted parameter trees besides training them.

The frequent ones, `partition`, `combine`, `merge` and `count`, are names of `peftjax` itself.
"""

from peftjax.core.tree import adapter_mask, untie
from peftjax.methods.adalora_ranks import ranks, to_lora
from peftjax.methods.stack import unstack_adapters
from peftjax.methods.swap import align_ranks, unmerge
from peftjax.methods.truncate import convert_to_lora

__all__ = [
  "adapter_mask",
  "align_ranks",
  "convert_to_lora",
  "ranks",
  "to_lora",
  "unmerge",
  "unstack_adapters",
  "untie",
]
