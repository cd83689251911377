"""DeBERTa, versions 2 and 3: BERT's layers with attention to contents and relative positions."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from peftjax.core.dropout import dropout
from peftjax.models import bert, hf_config
from peftjax.models.stack import layer_keys, run_layers
from peftjax.nn.disentangled import disentangled_attention, relative_rows
from peftjax.nn.linear import Embedding, Linear
from peftjax.nn.mask import AttentionMask
from peftjax.nn.norm import LayerNorm

# As in `bert`; a table of positions may be left over from pretraining.
NEW = r"head/.*"
UNUSED = (
  r".*position_ids|cls\..*|(lm|mask)_predictions\..*|pooler\..*"
  r"|(deberta\.)?embeddings\.position_embeddings\.weight"
)
OUT_FIRST = True
LAYER = bert.LAYER


def hf_name(path: str) -> str:
  """The name of a parameter's Hugging Face tensor.

  >>> hf_name("deberta/encoder/layers_0/attention/self/query/kernel")
  'deberta.encoder.layer.0.attention.self.query_proj.weight'
  """
  return re.sub(r"\.self\.(\w+)\.", r".self.\1_proj.", bert.hf_name(path))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DebertaConfig(bert.BertConfig):
  """The shape of a DeBERTa."""

  buckets: int  # for distances on either side; 0 if each has its own
  farthest: int  # distance
  c2p: bool  # contents attend to positions
  p2c: bool  # positions attend to contents
  shares_projections: bool  # contents' queries and keys project positions too
  norms_positions: bool
  pooler_dropout: float
  pooler_activation: str

  @classmethod
  def from_hf(
    cls, config: Mapping[str, Any], where: str = "config.json", **overrides: Any
  ) -> DebertaConfig:
    """Reads a configuration as `BertConfig.from_hf` does."""
    said = hf_config.read(config, where)
    own = dict(
      absolute=said.position_biased_input,
      buckets=said.buckets,
      farthest=said.farthest,
      c2p="c2p" in said.directions,
      p2c="p2c" in said.directions,
      shares_projections=said.share_att_key,
      norms_positions="layer_norm" in said.norms,
      pooler_dropout=said.pooler_dropout,
      pooler_activation=said.pooler_hidden_act,
    )
    return super().from_hf(config, where, **{**own, **overrides})  # type: ignore[return-value]


class Relative(flax.struct.PyTreeNode):
  """The arrays that the layers share: mask, table of relative positions and its rows by token.

  Attributes:
    mask: the mask of keys.
    table_PD: the embeddings of relative positions; None where nothing attends to them.
    rows_TT: see `nn.disentangled.relative_rows`.
  """

  mask: AttentionMask
  table_PD: Any
  rows_TT: Any


class SelfAttention(nn.Module):
  """Projections of contents and of relative positions, and attention among them."""

  config: DebertaConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array, shared: Relative, key: jax.Array | None) -> jax.Array:
    c = self.config
    keys = (None, None) if key is None else jax.random.split(key)
    q, k, v = (Linear(c.width, name=name) for name in ("query", "key", "value"))
    table: Any = shared.table_PD
    if c.c2p or c.p2c:
      table = dropout(keys[1], table, c.dropout)
    projection = lambda name, of: of if c.shares_projections else Linear(c.width, name=name)
    positions = (
      projection("pos_query", q)(table) if c.p2c else None,
      projection("pos_key", k)(table) if c.c2p else None,
    )
    return disentangled_attention(
      *(q(x_BTD), k(x_BTD), v(x_BTD)),
      positions,
      shared.rows_TT,
      shared.mask.valid,
      c.heads,
      key=keys[0],
      rate=c.attention_dropout,
    )


class Layer(bert.Layer):
  """`bert.Layer` with this attention."""

  SELF: ClassVar[type[nn.Module]] = SelfAttention


class Encoder(nn.Module):
  """The stack of layers and the table of relative positions that they read, if they do."""

  config: DebertaConfig

  @nn.compact
  def __call__(self, x: jax.Array, mask: AttentionMask, key: jax.Array | None) -> jax.Array:
    c = self.config
    table = rows = None
    if c.c2p or c.p2c:
      size = 2 * (c.buckets or c.farthest)
      table = Embedding(size, c.width, c.dtype, name="rel_embeddings")(jnp.arange(size))
      table = LayerNorm(c.eps, name="LayerNorm")(table) if c.norms_positions else table
      rows = jnp.asarray(relative_rows(x.shape[1], c.buckets, c.farthest))
    shared = Relative(mask=mask, table_PD=table, rows_TT=rows)
    x = x * mask.valid[:, :, None].astype(x.dtype)
    return run_layers(Layer, c, x, (layer_keys(key, c.layers),), (shared,))[0]


class Body(bert.Body):
  """`bert.Body` around this encoder."""

  ENCODER: ClassVar[type[nn.Module]] = Encoder


class DebertaClassifier(bert.BertClassifier):
  """`bert.BertClassifier` with this body."""

  config: DebertaConfig

  BODY: ClassVar[type[nn.Module]] = Body


CONFIG, MODEL = DebertaConfig, DebertaClassifier
