"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691)."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp

from peftjax.core import given, paths, ranges
from peftjax.core.einsum import take
from peftjax.core.layout import Layout
from peftjax.core.params import Mask, Params
from peftjax.core.ranges import DType, Length
from peftjax.methods.adapters import put
from peftjax.methods.base import Method, claimed_mask
from peftjax.nn.virtual import Prompt

INITS = ("vocabulary", "normal")
# Tables of words in our models, and the module that puts a prompt before their rows.
_TABLE = re.compile(r"(?P<body>\w+)/(embeddings/word_embeddings|embed_tokens|wte)/embedding")


@dataclasses.dataclass(frozen=True)
class PromptMethod(Method):
  """Prompt tuning: the model reads [P; E(x)], P trained embeddings before those of the text.

  Lester et al. 2021, section 2. Outputs are those of the text's own tokens, so loss and metrics
  never see the virtual ones; the texts' positions come after them. An encoder's first token, which
  its head reads, is then a virtual one, as in PEFT.

  Not the identity at first.

  Args:
    length: P.
    init: `"vocabulary"`, random rows of the whole table of words (there, section 3.2, rows of the
      5,000 commonest tokens), or `"normal"`, N(0, 0.02²).
    dtype: dtype of P.

  Raises:
    ValueError: on a number out of range, or an unknown init.
  """

  length: Length = 20
  _: dataclasses.KW_ONLY
  init: str = "vocabulary"
  dtype: DType = jnp.float32

  def __post_init__(self) -> None:
    super().__post_init__()
    ranges.one_of("init", self.init, INITS)

  def claims(self, params: Params, layout: Layout | None = None) -> list[str]:
    return [p for p in paths.leaves(params) if p.endswith("/prompt/embeddings")]

  def attach(self, key: jax.Array, params: Params, layout: Layout | None = None) -> Params:
    """`params` with the parameter `prompt` in the body of the model.

    Args:
      key: random key of the initial embeddings.
      params: parameters of an encoder or decoder of this library; plain, quantised or abstract.
        Another model's that names its modules alike is refused by `pj.apply`, as none of them reads
        a prompt.
      layout: not used.

    Raises:
      ValueError: the model has no table of words that is known, or a prompt already.
    """
    given.check_params(params)
    tables = {p: leaf for p, leaf in paths.leaves(params).items() if _TABLE.fullmatch(p)}
    if not tables:
      raise ValueError(
        "no table of words known to take a prompt is among these parameters; those of the encoders "
        "and decoders of this library are: .../word_embeddings, .../embed_tokens, .../wte"
      )
    if self.claims(params):
      raise ValueError(f"{self.claims(params)[0]}: this model has a prompt already")
    ((path, table),) = tables.items()
    abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(table))
    node = jax.eval_shape(self._make, key, table) if abstract else self._make(key, table)
    return put(params, [path.split("/")[0], "prompt"], node)

  def trainable(self, params: Params) -> Mask:
    return claimed_mask(self, params)

  def _make(self, key: jax.Array, table: Any) -> Prompt:
    vocab, width = table.shape
    if self.init == "normal":
      return Prompt(embeddings=0.02 * jax.random.normal(key, (self.length, width), self.dtype))
    ids = jax.random.choice(key, vocab, (self.length,), replace=self.length > vocab)
    return Prompt(embeddings=take(table, ids).astype(self.dtype))


prompt = PromptMethod
