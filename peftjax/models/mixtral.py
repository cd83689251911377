"""Mixtral: a decoder of the Llama family with experts, under names of its own in files."""

from __future__ import annotations

from typing import ClassVar

from peftjax.models import llama

# As of `llama`.
NEW, UNUSED, OUT_FIRST, LAYER = llama.NEW, llama.UNUSED, llama.OUT_FIRST, llama.LAYER

_NAMES = (
  (".mlp.", ".block_sparse_moe."),
  (".gate_proj.", ".w1."),
  (".down_proj.", ".w2."),
  (".up_proj.", ".w3."),
)


class MixtralConfig(llama.LlamaConfig):
  """A `LlamaConfig` whose parameters have this file's names."""

  family: ClassVar[str] = "mixtral"


def hf_name(path: str) -> str:
  """The Hugging Face tensor of a parameter.

  >>> hf_name("model/layers_0/mlp/experts_3/up_proj/kernel")
  'model.layers.0.block_sparse_moe.experts.3.w3.weight'
  """
  name = llama.hf_name(path)
  for ours, theirs in _NAMES:
    name = name.replace(ours, theirs)
  return name


CONFIG, MODEL = MixtralConfig, llama.model
