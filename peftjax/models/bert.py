"""BERT and RoBERTa encoders with a classification or regression head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from peftjax.core.dropout import dropout
from peftjax.models import hf_config, limits
from peftjax.models.names import torch_name
from peftjax.models.stack import layer_keys, run_layers
from peftjax.nn import virtual
from peftjax.nn.attention import attention
from peftjax.nn.ffn import ACTIVATIONS
from peftjax.nn.linear import Embedding, Linear
from peftjax.nn.mask import AttentionMask
from peftjax.nn.norm import LayerNorm
from peftjax.nn.residual import Residual

# Parameters a checkpoint may lack, because they are new with the task, ...
NEW = r"head/.*|bert/pooler/.*"
# ... and tensors it may have that a classifier does not use: buffers and pretraining heads.
UNUSED = r".*position_ids|cls\..*|lm_head\..*|(roberta\.)?pooler\..*"
# Hugging Face keeps kernels [out, in].
OUT_FIRST = True
# What the layers are numbered in, of a tensor's name.
LAYER = r"(.*\.)?encoder\.layer\.(\d+)\..*"


def hf_name(path: str) -> str:
  """The Hugging Face tensor of a parameter.

  >>> hf_name("bert/encoder/layers_0/attention/self/query/kernel")
  'bert.encoder.layer.0.attention.self.query.weight'
  """
  return torch_name(path.removeprefix("head/"), "layer.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
  """The shape of a model; one letter is what the shapes in this file are named by."""

  family: str  # "bert" or "roberta": also the name of the body in the parameter tree
  vocab: int  # V
  width: int  # D
  layers: int  # L
  heads: int  # N
  ffn: int  # F
  positions: int
  types: int
  activation: str
  eps: float
  dropout: float
  attention_dropout: float
  head_dropout: float
  pad_id: int
  labels: int  # outputs of the head; 1 is a regression
  scan_layers: bool = False
  dtype: Any = jnp.float32  # of activations; parameters stay as they are

  @classmethod
  def from_hf(
    cls, config: Mapping[str, Any], where: str = "config.json", **overrides: Any
  ) -> BertConfig:
    """Reads a Hugging Face `config.json`.

    Args:
      config: of its model type; what it leaves out has that type's defaults.
      where: the file, for messages.
      overrides: fields of this class.

    Raises:
      ValueError: on a field this encoder does not have, or out of range; see `hf_config`.
    """
    said = hf_config.read(config, where)
    hidden, head = said.hidden_dropout_prob, said.classifier_dropout
    fields = dict(
      family=said.model_type,
      vocab=said.vocab_size,
      width=said.hidden_size,
      layers=said.num_hidden_layers,
      heads=said.num_attention_heads,
      ffn=said.intermediate_size,
      positions=said.max_position_embeddings,
      types=said.type_vocab_size,
      activation=said.hidden_act,
      eps=said.layer_norm_eps,
      dropout=hidden,
      attention_dropout=said.attention_probs_dropout_prob,
      head_dropout=hidden if head is None else head,
      pad_id=said.padding,
      labels=said.labels,
    )
    return cls(**{**fields, **overrides})

  @property
  def table(self) -> str:
    """The path of the table of words."""
    return f"{self.family}/embeddings/word_embeddings/embedding"

  @property
  def max_length(self) -> int:
    """Longest sequence: RoBERTa's positions start behind the padding id."""
    return self.positions - (self.pad_id + 1 if self.family == "roberta" else 0)


class Embeddings(nn.Module):
  """Sum of word, position and type embeddings, normalised."""

  config: BertConfig

  @nn.compact
  def __call__(
    self, tokens_BT: jax.Array, types_BT: jax.Array, key: jax.Array | None, prompt: Any, shift: int
  ) -> jax.Array:
    """`[B, P + T, D]`: behind the prompt, if any, and all positions `shift` on."""
    c = self.config
    x = Embedding(c.vocab, c.width, c.dtype, name="word_embeddings")(tokens_BT)
    real = (tokens_BT != c.pad_id).astype(jnp.int32)
    if prompt is not None:
      x, length = prompt.put_before(x), prompt.length
      types_BT, real = (virtual.before(n, y, length) for n, y in ((0, types_BT), (1, real)))
    if c.family == "roberta":
      positions = (jnp.cumsum(real, axis=1) + shift) * real + c.pad_id
    else:
      positions = jnp.arange(shift, shift + x.shape[1])[None, :]
    x = x + Embedding(c.types, c.width, c.dtype, name="token_type_embeddings")(types_BT)
    x = x + Embedding(c.positions, c.width, c.dtype, name="position_embeddings")(positions)
    return dropout(key, LayerNorm(c.eps, name="LayerNorm")(x), c.dropout)


class SelfAttention(nn.Module):
  """Projections to query, key and value, and attention among them."""

  config: BertConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array, mask: AttentionMask, key: jax.Array | None) -> jax.Array:
    c = self.config
    q, k, v = (Linear(c.width, name=name)(x_BTD) for name in ("query", "key", "value"))
    k, v, mask = virtual.with_prefix(self, k, v, mask)
    return attention(q, k, v, mask, c.heads, key=key, rate=c.attention_dropout)


class Output(nn.Module):
  """LayerNorm(residual + dropout(dense(x)))."""

  config: BertConfig

  @nn.compact
  def __call__(self, x: jax.Array, residual: jax.Array, key: jax.Array | None) -> jax.Array:
    y = Linear(self.config.width, name="dense")(x)
    y = Residual(name="residual")(dropout(key, y, self.config.dropout), residual)
    return LayerNorm(self.config.eps, name="LayerNorm")(y)


class Attention(nn.Module):
  """Self-attention and its output projection."""

  config: BertConfig

  @nn.compact
  def __call__(self, x: jax.Array, mask: AttentionMask, keys: Any) -> jax.Array:
    y = SelfAttention(self.config, name="self")(x, mask, keys[0])
    return Output(self.config, name="output")(y, x, keys[1])


class Intermediate(nn.Module):
  """act(dense(x)), `[B, T, F]`."""

  config: BertConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return ACTIVATIONS[self.config.activation](Linear(self.config.ffn, name="dense")(x))


class Layer(nn.Module):
  """One block; a scan step: (x, key, inputs) to (x, None)."""

  config: BertConfig

  @nn.compact
  def __call__(self, x: jax.Array, key: jax.Array | None, mask: AttentionMask) -> Any:
    keys = (None,) * 3 if key is None else jax.random.split(key, 3)
    x = Attention(self.config, name="attention")(x, mask, keys[:2])
    y = Intermediate(self.config, name="intermediate")(x)
    return Output(self.config, name="output")(y, x, keys[2]), None


class Encoder(nn.Module):
  """The stack of layers, unrolled or scanned: `layers_0`, `layers_1`, ... or `layers`."""

  config: BertConfig

  @nn.compact
  def __call__(self, x: jax.Array, mask: AttentionMask, key: jax.Array | None) -> jax.Array:
    c = self.config
    return run_layers(Layer, c, x, (layer_keys(key, c.layers),), (mask,))[0]


class Body(nn.Module):
  """Tokens to the last hidden state `[B, T, D]` and, for BERT, the pooled first token."""

  config: BertConfig

  @nn.compact
  def __call__(self, tokens: jax.Array, mask: jax.Array, types: jax.Array, key: Any) -> Any:
    c = self.config
    keys = (None, None) if key is None else jax.random.split(key)
    prompt, length = virtual.prompt_of(self)
    visible = AttentionMask(virtual.before(True, mask, length))
    shift = virtual.prefix_length(self)
    x = Embeddings(c, name="embeddings")(tokens, types, keys[0], prompt, shift)
    x_BTD = Encoder(c, name="encoder")(x, visible, keys[1])
    # As in PEFT, the first token is a virtual one where there is a prompt.
    first = x_BTD[:, 0] if c.family == "roberta" else Pooler(c, name="pooler")(x_BTD)
    return x_BTD[:, length:], first


class Pooler(nn.Module):
  """tanh(dense(first token))."""

  config: BertConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    return jnp.tanh(Linear(self.config.width, name="dense")(x_BTD[:, 0]))


class RobertaHead(nn.Module):
  """RoBERTa's classifier: dropout, dense, tanh, dropout, projection."""

  config: BertConfig

  @nn.compact
  def __call__(self, x_BD: jax.Array, keys: Any) -> jax.Array:
    c = self.config
    x = jnp.tanh(Linear(c.width, name="dense")(dropout(keys[0], x_BD, c.head_dropout)))
    return Linear(c.labels, name="out_proj")(dropout(keys[1], x, c.head_dropout))


class Head(nn.Module):
  """Features of the first token to logits `[B, labels]`."""

  config: BertConfig

  @nn.compact
  def __call__(self, x_BD: jax.Array, key: jax.Array | None) -> jax.Array:
    c = self.config
    keys = (None, None) if key is None else jax.random.split(key)
    if c.family == "roberta":
      return RobertaHead(c, name="classifier")(x_BD, keys)
    return Linear(c.labels, name="classifier")(dropout(keys[0], x_BD, c.head_dropout))


class BertClassifier(nn.Module):
  """An encoder and a task head; parameters `{config.family: ..., "head": ...}`."""

  config: BertConfig

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"] | None = None,
    types: Int[Array, "B T"] | None = None,
    *,
    train: bool = False,
    hidden: bool = False,
  ) -> Float[Array, "B K"] | tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
    """Logits, float32; for a regression K = 1.

    Args:
      tokens: ids below the vocabulary's size.
      mask: true on tokens, false on padding; by default all true.
      types: 0 for the first text, 1 for the second; by default all 0.
      train: applies dropout, from the `"dropout"` rng.
      hidden: return the last hidden state and the head's input instead.
    """
    c = self.config
    limits.check(c, tokens, types)
    virtual.check_length(self, tokens.shape[1], c.max_length)
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
    types = jnp.zeros_like(tokens) if types is None else types
    keys = jax.random.split(self.make_rng("dropout")) if train else (None, None)
    x_BTD, first_BD = Body(c, name=c.family)(tokens, mask, types, keys[0])
    logits = Head(c, name="head")(first_BD, keys[1]).astype(jnp.float32)
    return (x_BTD, first_BD) if hidden else logits


# What `pretrained` makes a model of this family with.
CONFIG, MODEL = BertConfig, BertClassifier
