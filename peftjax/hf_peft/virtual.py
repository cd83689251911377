"""Prefixes and prompts as Hugging Face's PEFT library has them (0.21).

`adapter_model.safetensors` then has one tensor, `prompt_embeddings`: for a prompt [P, D]; for a
prefix [P, 2·L·K·H], the keys and values of layer 0, then of layer 1, ... Modules saved whole are
named as in the model, after `base_model.`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.core import paths
from peftjax.core.attachment import attachments
from peftjax.core.layout import Axes
from peftjax.core.params import Params
from peftjax.hf_peft.fields import Virtual
from peftjax.methods.prefix import prefix
from peftjax.methods.prompt import prompt
from peftjax.nn.virtual import Prefix, Prompt


def found(params: Params) -> bool:
  """Tells whether there is a prefix or a prompt among the parameters."""
  return any(isinstance(node, Prefix | Prompt) for node in attachments(params))


def without(tree: Any) -> Any:
  """The tree, parameters or a mask over them, without prefixes and prompts."""
  if not isinstance(tree, Mapping):
    return tree
  return {k: without(v) for k, v in tree.items() if not isinstance(v, Prefix | Prompt)}


def build(
  params: Params,
  model: Any,
  *,
  modules_to_save: Sequence[str],
  task_type: str | None,
  base_model: str,
) -> tuple[dict[str, Any], np.ndarray]:
  """`adapter_config.json` and the tensor, from parameters with attachments of one kind.

  Raises:
    ValueError: a prefix before a sliding window, or of a model of images.
  """
  node = attachments(params)[0]
  if getattr(model.config, "labels_of", "") == "image":
    raise ValueError(
      "peft has prefixes for models of texts alone, and this one reads images: keep the checkpoint"
    )
  if isinstance(node, Prompt):
    kind, rows = "PROMPT_TUNING", np.asarray(node.embeddings)
    width = rows.shape[1]
  else:
    if getattr(model.config, "window", None):
      raise ValueError(
        "this decoder's attention slides, and transformers lets a prefix slide out of the window; "
        "here every token attends to it. Keep the checkpoint, or train a prompt."
      )
    kind, rows, width = "PREFIX_TUNING", *_rows(params)
  is_prompt = kind == "PROMPT_TUNING"
  own: dict[str, Any] = {"prefix_projection": False, "encoder_hidden_size": width}
  config = {
    **({"prompt_tuning_init": "RANDOM"} if is_prompt else own),
    "base_model_name_or_path": base_model or None,
    "inference_mode": True,
    "modules_to_save": list(modules_to_save) or None,
    "num_attention_heads": model.config.heads if is_prompt else _kv_heads(model.config),
    "num_layers": model.config.layers,
    "num_transformer_submodules": 1,
    "num_virtual_tokens": len(rows),
    "peft_type": kind,
    "task_type": task_type,
    "token_dim": width,
  }
  return config, rows


def shape_of(config: Virtual, model: Any, where: str) -> tuple[int, int]:
  """The shape of the tensor, from a PEFT config and a model's `config`.

  Raises:
    ValueError: they differ in a size.
  """
  is_prompt = config.peft_type == "PROMPT_TUNING"
  heads = model.heads if is_prompt else _kv_heads(model)
  size = getattr(model, "head_size", model.width // model.heads)
  width = getattr(model, "table_width", model.width) if is_prompt else heads * size
  for field, own in (
    ("token_dim", width),
    # Nobody asks for a prompt's heads, and older files of ours have those of the keys.
    ("num_attention_heads", None if is_prompt else heads),
    ("num_layers", model.layers),
    ("num_transformer_submodules", 1),
  ):
    if own and getattr(config, field) not in (None, own):
      raise ValueError(
        f"{where} has {field}={getattr(config, field)}, and this model {own}: it belongs to "
        "another model."
      )
  return config.num_virtual_tokens, width if is_prompt else 2 * model.layers * width


def load(config: Virtual, rows: np.ndarray, params: Params) -> tuple[Any, set[str]]:
  """`params` with the prefix or prompt that a tensor holds, and the paths of its arrays."""
  length = config.num_virtual_tokens
  is_prompt = config.peft_type == "PROMPT_TUNING"
  method = prompt(length, init="normal") if is_prompt else prefix(length)
  # Every kernel of our models is a matrix, and what lies before its two axes are layers.
  layout = dict.fromkeys(paths.leaves(params), Axes())
  attached = method.attach(jax.random.key(0), params, layout)
  shapes = {path: paths.leaves(attached)[path].shape for path in method.claims(attached)}
  width = next(iter(shapes.values()))[-1]
  matrices = sum(math.prod(shape[:-2]) for shape in shapes.values())
  rows = rows.reshape(length, matrices, width)

  def value(path: str) -> np.ndarray:
    shape = shapes[path]
    if is_prompt:
      return rows.reshape(shape)
    layers = (_layer(x) for x in paths.layer_paths(path, shape[:-2]))
    at = [2 * layer + path.endswith("/values") for layer in layers]
    return np.moveaxis(rows[:, at], 0, 1).reshape(shape)

  put = lambda path, x: jnp.asarray(value(path)) if path in shapes else x
  return paths.map_leaves(put, attached), set(shapes)


def _rows(params: Any) -> tuple[np.ndarray, int]:
  """A prefix as one matrix, and K·H."""
  matrices = {}
  for path, x in paths.leaves(params).items():
    if path.endswith(("/prefix/keys", "/prefix/values")):
      layers = paths.layer_paths(path, x.shape[:-2])
      for layer, row in zip(layers, np.asarray(x).reshape(-1, *x.shape[-2:]), strict=True):
        matrices[_layer(layer), path.endswith("/values")] = row
  return np.concatenate([matrices[at] for at in sorted(matrices)], axis=1), row.shape[-1]


def _kv_heads(model: Any) -> int:
  return getattr(model, "kv_heads", model.heads)


def _layer(path: str) -> int:
  return int(path.partition("layers_")[2].partition("/")[0])
