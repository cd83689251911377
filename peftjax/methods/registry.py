"""The methods by the names that configs and flags give them."""

from __future__ import annotations

from collections.abc import Mapping

from peftjax.methods.adalora import AdaLoRAMethod
from peftjax.methods.adapters import AdaptersMethod
from peftjax.methods.base import Method
from peftjax.methods.dora import DoRAMethod
from peftjax.methods.ia3 import IA3Method
from peftjax.methods.loha import LoHaMethod
from peftjax.methods.lokr import LoKrMethod
from peftjax.methods.lora import LoRAMethod
from peftjax.methods.oft import OFTMethod
from peftjax.methods.prefix import PrefixMethod
from peftjax.methods.prompt import PromptMethod
from peftjax.methods.unfreeze import UnfreezeMethod
from peftjax.methods.vera import VeRAMethod

# A new method is its file and a line here.
METHODS: Mapping[str, type[Method]] = {
  "lora": LoRAMethod,
  "dora": DoRAMethod,
  "loha": LoHaMethod,
  "lokr": LoKrMethod,
  "oft": OFTMethod,
  "adalora": AdaLoRAMethod,
  "ia3": IA3Method,
  "adapters": AdaptersMethod,
  "prefix": PrefixMethod,
  "prompt": PromptMethod,
  "vera": VeRAMethod,
  "unfreeze": UnfreezeMethod,
}
