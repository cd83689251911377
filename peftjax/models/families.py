"""The families of models, by the model types of Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftjax.models import bert, deberta, distilbert, gpt2, llama, mixtral, t5, vit

# Hugging Face model_type to the file of its family: `CONFIG`, `MODEL`, `hf_name`, and the tensors
# that a checkpoint may lack or have too many of.
FAMILIES: Mapping[str, Any] = {
  "bert": bert,
  "roberta": bert,
  "xlm-roberta": bert,
  "camembert": bert,
  "electra": bert,
  "distilbert": distilbert,
  "deberta-v2": deberta,
  "vit": vit,
  "llama": llama,
  "mistral": llama,
  "qwen2": llama,
  "qwen3": llama,
  "gemma2": llama,
  "gemma3_text": llama,
  "phi3": llama,
  "qwen3_moe": llama,
  "mixtral": mixtral,
  "gpt2": gpt2,
  "t5": t5,
  "mt5": t5,
}


# Model types of an encoder and a decoder that reads it.
READERS = tuple(name for name, family in FAMILIES.items() if hasattr(family.CONFIG, "decoder"))


def ours(model: Any) -> bool:
  """Tells whether a module is of one of these families, with a `config`, and reads texts."""
  return _of_families(model) and hasattr(type(model.config), "max_length")


def family_of(model: Any) -> Any:
  """The file of a module's family; ValueError if it is of none of ours."""
  if not _of_families(model):
    raise ValueError(
      f"{type(model).__name__} is not a model of this library, and adapters of Hugging Face PEFT "
      "have the names of its families there; save pj.partition(params, mask)[0], e.g. with Orbax"
    )
  return FAMILIES[model.config.family]


def _of_families(model: Any) -> bool:
  return type(model).__module__ in {family.__name__ for family in FAMILIES.values()}
