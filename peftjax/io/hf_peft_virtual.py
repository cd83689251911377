"""Prefixes and prompts as Hugging Face's PEFT library has them (0.21).

A directory holds `adapter_config.json` and, in `adapter_model.safetensors`, one tensor
`prompt_embeddings`: of a prompt [P, D]; of a prefix [P, 2·L·K·H], the keys and values of layer 0,
then of layer 1, ... Modules saved whole are named as in the model, behind `base_model.`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.core import paths
from peftjax.core.attachment import attachments
from peftjax.core.layout import Axes
from peftjax.io.safetensors_dir import TensorDir
from peftjax.methods.prefix import prefix
from peftjax.methods.prompt import prompt
from peftjax.nn.virtual import Prefix, Prompt

KINDS = ("PREFIX_TUNING", "PROMPT_TUNING")
ROOT, TENSOR = "base_model.", "prompt_embeddings"


def found(params: Any) -> bool:
  """Whether there is a prefix or a prompt among the parameters."""
  return any(isinstance(node, Prefix | Prompt) for node in attachments(params))


def without(tree: Any) -> Any:
  """The tree less prefixes and prompts."""
  if not isinstance(tree, Mapping):
    return tree
  kept = {k: v for k, v in tree.items() if not isinstance(v, Prefix | Prompt)}
  return {k: without(v) for k, v in kept.items()}


def build(
  params: Any, model: Any, task_type: str | None, base_model: str, saved: list[str]
) -> tuple[dict[str, Any], np.ndarray]:
  """`adapter_config.json`, and the tensor.

  Raises:
    ValueError: attachments of more than one kind; a prefix before a sliding window.
  """
  kinds = {type(node) for node in attachments(params)}
  if len(kinds) > 1:
    names = " and ".join(sorted(kind.__name__ for kind in kinds))
    raise ValueError(f"a PEFT directory holds one kind of adapter, and these are {names}")
  c = model.config
  heads = getattr(c, "kv_heads", c.heads)
  common = dict(
    base_model_name_or_path=base_model,
    inference_mode=True,
    modules_to_save=saved or None,
    num_attention_heads=heads,
    num_layers=c.layers,
    num_transformer_submodules=1,
    task_type=task_type,
  )
  node = attachments(params)[0]
  if isinstance(node, Prompt):
    embeddings = np.asarray(node.embeddings)
    own = dict(peft_type="PROMPT_TUNING", prompt_tuning_init="RANDOM", token_dim=c.width)
    return {**common, **own, "num_virtual_tokens": len(embeddings)}, embeddings
  if getattr(c, "window", None):
    raise ValueError(
      "this decoder's attention slides, and transformers lets a prefix slide out of the window; "
      "here every token attends to it. Keep the checkpoint, or train a prompt."
    )
  pairs = _pairs(params)
  width = pairs[0][0].shape[-1]
  own = dict(peft_type="PREFIX_TUNING", prefix_projection=False, token_dim=width)
  flat = np.stack([x for pair in pairs for x in pair], axis=1).reshape(len(pairs[0][0]), -1)
  more = dict(encoder_hidden_size=width, num_virtual_tokens=len(flat))
  return {**common, **own, **more}, flat


def load(
  tensors: TensorDir, config: Mapping[str, Any], where: str | os.PathLike, params: Any
) -> tuple[Any, set[str]]:
  """`params` with the prefix or prompt of a PEFT directory, and the paths of its arrays.

  Raises:
    ValueError: no number of virtual tokens; a tensor missing or of another shape than model and
      config mean.
  """
  length = config.get("num_virtual_tokens")
  if type(length) is not int or length < 1:
    raise ValueError(f"{where}: num_virtual_tokens {length!r} is not a positive integer")
  is_prompt = config["peft_type"] == "PROMPT_TUNING"
  method = prompt(length, init="normal") if is_prompt else prefix(length)
  # Every kernel of ours is a matrix; what lies before its two axes are layers.
  layout = dict.fromkeys(paths.leaves(params), Axes())
  attached = method.attach(jax.random.key(0), params, layout)
  own = {p: x.shape for p, x in paths.leaves(attached).items() if p in method.claims(attached)}
  shapes = list(own.values())
  layers = sum(math.prod(shape[:-2]) for shape in shapes)  # keys and values apart
  width = shapes[0][-1]
  want = (length, width if is_prompt else layers * width)
  there = TENSOR in tensors.names()
  if not there or tensors.info(TENSOR).shape != want:
    shown = tensors.info(TENSOR).shape if there else "not there"
    raise ValueError(
      f"{where}: tensor {TENSOR} is {shown}; model and config mean {want}. Was it trained on "
      "another model, or with prefix_projection?"
    )
  rows = tensors.read(TENSOR).astype(np.float32)
  pairs = rows.reshape(length, -1, 2, width) if not is_prompt else None

  def value(path: str, shape: tuple[int, ...]) -> np.ndarray:
    if pairs is None:
      return rows
    at = [_layer(p) for p in paths.layer_paths(path, shape[:-2])]
    which = 0 if path.endswith("keys") else 1
    return np.moveaxis(pairs[:, at, which], 0, 1).reshape(shape)

  put = lambda p, x: jnp.asarray(value(p, own[p])) if p in own else x
  return paths.map_leaves(put, attached), set(own)


def _pairs(params: Any) -> list[tuple[np.ndarray, np.ndarray]]:
  """Keys and values `[P, K·H]` of every layer, in order."""
  found: dict[int, dict[str, np.ndarray]] = {}
  for path, x in paths.leaves(params).items():
    if "/prefix/" in path:
      layers = paths.layer_paths(path, tuple(x.shape[:-2]))
      for layer, row in zip(layers, np.asarray(x).reshape(-1, *x.shape[-2:]), strict=True):
        found.setdefault(_layer(layer), {})[path.rpartition("/")[2]] = row
  return [(found[i]["keys"], found[i]["values"]) for i in sorted(found)]


def _layer(path: str) -> int:
  return int(path.partition("layers_")[2].partition("/")[0])
