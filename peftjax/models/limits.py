"""Checks that a model's inputs are within its tables: beyond them a lookup gives NaN, silently."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def check(
  config: Any, tokens: Any, types: Any = None, *, length: int = 0, what: str = "the texts"
) -> None:
  """Raises ValueError unless all ids are in the model's tables and there are enough positions.

  Padding counts: a masked NaN is still NaN. For arrays that are traced, or lie on other processes'
  devices too, the dtype alone is checked.

  Args:
    config: config of one of our modules: `vocab`, `max_length` and, for encoders, `types`.
    tokens, types: integer arrays of any shape, or None.
    length: tokens of the longest text, virtual ones included. RoBERTa's `max_length` counts places
      after its padding id.
    what: name of the inputs, for the message.
  """
  rows = (
    ("token", tokens, config.vocab, "vocab_size", "Is the tokenizer another model's, or has it "
     "added tokens that the table was not resized for?"),
    ("type", types, getattr(config, "types", 0), "type_vocab_size", "This model was not made for "
     "pairs of texts: give single ones, or another model."),
  )  # fmt: skip
  for kind, ids, size, field, hint in rows:
    if ids is None or not size or not np.size(ids):
      continue
    ids = ids if isinstance(ids, jax.Array) else np.asarray(ids)
    if not np.issubdtype(ids.dtype, np.integer):
      raise ValueError(
        f"{what}: {kind} ids are {ids.dtype}; they must be integers: write ids.astype(jnp.int32)."
      )
    if isinstance(ids, jax.core.Tracer) or not getattr(ids, "is_fully_addressable", True):
      continue
    ids = np.asarray(ids)
    for worst in (int(ids.min()), int(ids.max())):
      if not 0 <= worst < size:
        raise ValueError(
          f"{what} have the {kind} id {worst}, and the model's table has {size} rows ({field}): "
          f"allowed are 0 to {size - 1}. {hint}"
        )
  if length > config.max_length:
    raise ValueError(
      f"{what} have up to {length} tokens, virtual ones counted, and this model has "
      f"{config.max_length} positions: cut them, or take fewer virtual tokens."
    )
