"""Virtual tokens before a text: keys and values (prefixes), or embeddings (prompts)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from peftjax.core import paths, tracing
from peftjax.core.attachment import Attachment, is_attachment
from peftjax.core.params import Params
from peftjax.nn.mask import AttentionMask


class Prefix(Attachment):
  """Keys and values of P virtual tokens, the parameter `prefix` of an attention module.

  Attributes:
    keys, values: `[*stack, P, K·H]`; in rotary models after the rotation.
  """

  keys: Any
  values: Any

  @property
  def length(self) -> int:
    return self.keys.shape[-2]


class Prompt(Attachment):
  """Embeddings of P virtual tokens, the parameter `prompt` of a model's body.

  Attributes:
    embeddings: `[P, D]`.
  """

  embeddings: Any

  @property
  def length(self) -> int:
    return self.embeddings.shape[-2]

  def put_before(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B PT D"]:
    """The embeddings of a text, `[B, P + T, D]`, after these."""
    return _before(self.embeddings, x_BTD)


def check_read(params: Params, read: Collection[str]) -> None:
  """Raises ValueError if no module has read one of the prefixes and prompts in `params`.

  Args:
    read: the paths that were read; see `core.tracing`.
  """
  flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_attachment)
  there = [paths.name(path) for path, node in flat if isinstance(node, Prefix | Prompt)]
  if unread := [path for path in there if path not in read]:
    raise ValueError(
      f"no module of this model reads {unread[0]}, so it changes nothing and would not be trained. "
      "Prefixes and prompts need the encoders and decoders of this library; adapt other models by "
      "their weights, e.g. with pj.lora."
    )


def _own(module: nn.Module, name: str) -> Any:
  """The module's own parameter of that name, or None; it counts as read."""
  if (read := tracing.current().read) is not None:
    read.add("/".join((*module.path, name)))
  return module.get_variable("params", name, None)


def with_prefix(
  module: nn.Module, k_BSD: Float[Array, "B S D"], v_BSD: Float[Array, "B S D"], mask: AttentionMask
) -> tuple[Float[Array, "B PS D"], Float[Array, "B PS D"], AttentionMask]:
  """Keys, values and mask with the module's prefix, if it has one, before them.

  Every token of a text attends to it: from any document in a packed row, however far behind.
  """
  prefix = _own(module, "prefix")
  if not isinstance(prefix, Prefix):
    return k_BSD, v_BSD, mask
  mask = mask.behind_prefix(prefix.keys.shape[0])
  return _before(prefix.keys, k_BSD), _before(prefix.values, v_BSD), mask


def prefix_length(module: nn.Module) -> int:
  """P of the prefixes inside the module, 0 if there are none: the shift of positions."""
  return _longest(_params(module), Prefix)


def prompt_of(module: nn.Module) -> tuple[Prompt | None, int]:
  """The module's own prompt and its P; None and 0 if it has none."""
  prompt = _own(module, "prompt")
  return (prompt, prompt.length) if isinstance(prompt, Prompt) else (None, 0)


def with_prompt(
  module: nn.Module, x_BTD: Float[Array, "B T D"], positions: Int[Array, "B PT"]
) -> Float[Array, "B PT D"]:
  """Embeddings after the module's prompt, where there are positions for it: not in mid-text."""
  prompt = _own(module, "prompt")
  return x_BTD if positions.shape[1] == x_BTD.shape[1] else prompt.put_before(x_BTD)


def length(params: Params) -> int:
  """The number of virtual tokens, in prompts and prefixes, among the parameters of a model."""
  found = jax.tree.leaves(params, is_leaf=is_attachment)
  return sum(
    max((n.length for n in found if isinstance(n, kind)), default=0) for kind in (Prefix, Prompt)
  )


def prompt_length(params: Params) -> int:
  """P of the prompt among the parameters of a model, or inside a module; 0 if there is none."""
  return _longest(_params(params) if isinstance(params, nn.Module) else params, Prompt)


def check_length(module: nn.Module, tokens: int, positions: int) -> None:
  """Raises ValueError if a model has fewer positions than virtual and other tokens."""
  extra = length(_params(module))
  if tokens + extra > positions:
    shown = f"{tokens} tokens" + (f" and {extra} virtual ones" if extra else "")
    raise ValueError(f"{shown}, but this model has {positions} positions")


def before(value: Any, x_BT: jax.Array, length: int) -> jax.Array:
  """`[B, length + T]`: `value`, a number or `[length]`, before each row."""
  row = jnp.broadcast_to(jnp.asarray(value, x_BT.dtype), (x_BT.shape[0], length))
  return jnp.concatenate([row, x_BT], axis=1)


def _params(module: nn.Module) -> Any:
  return module.variables.get("params", {})


def _longest(params: Any, kind: type[Prefix] | type[Prompt]) -> int:
  found = jax.tree.leaves(params, is_leaf=is_attachment)
  return max((node.length for node in found if isinstance(node, kind)), default=0)


@jax.named_scope("adapter")
def _before(own: jax.Array, x: jax.Array) -> jax.Array:
  """`[P, D]` before each row of `[B, S, D]`, in its dtype."""
  rows = jnp.broadcast_to(own.astype(x.dtype)[None], (x.shape[0], *own.shape))
  return jnp.concatenate([rows, x], axis=1)
