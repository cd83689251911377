"""Encoders of BERT's layers, with a head that labels texts or each of their tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from peftjax.core.dropout import dropout
from peftjax.models import hf_config, limits
from peftjax.models.encoder_heads import Head
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
UNUSED = (
  r".*position_ids|cls\..*|lm_head\..*|((bert|roberta)\.)?pooler\..*"
  r"|(discriminator|generator)_(predictions|lm_head)\..*"
)
# Hugging Face keeps kernels [out, in].
OUT_FIRST = True
# The part of a tensor's name before the layer's number.
LAYER = r"(.*\.)?encoder\.layer\.(\d+)\..*"


class Kind(NamedTuple):
  """The differences between the encoders that have these layers.

  Attributes:
    body: the name of the body, in the parameter tree and in files.
    head: head for whole texts, a key of `encoder_heads.HEADS`.
    pads_first: positions start after the padding id, and padding has its own.
    pools: the body has a `Pooler`, which the head of whole texts reads.
    drops_attention: there is dropout after the attention's output projection.
  """

  body: str
  head: str
  pads_first: bool = False
  pools: bool = False
  drops_attention: bool = True


_ROBERTA = Kind("roberta", "tanh", pads_first=True)
KINDS: Mapping[str, Kind] = {
  "bert": Kind("bert", "plain", pools=True),
  "roberta": _ROBERTA,
  "xlm-roberta": _ROBERTA,
  "camembert": _ROBERTA,
  "electra": Kind("electra", "gelu"),
  "distilbert": Kind("distilbert", "relu", drops_attention=False),
  "deberta-v2": Kind("deberta", "context"),
}


def hf_name(path: str) -> str:
  """The name of a parameter's Hugging Face tensor.

  >>> hf_name("bert/encoder/layers_0/attention/self/query/kernel")
  'bert.encoder.layer.0.attention.self.query.weight'
  """
  return torch_name(path.removeprefix("head/"), "layer.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
  """The shape of a model; the letters are those in the shapes of this file."""

  family: str  # the model type, a key of `KINDS`
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
  labels_of: str = "text"  # or "token", or "span": see `heads.of_files`
  embedding: int | None = None  # E, the width of the tables, if that is not D
  absolute: bool = True  # there is a table of positions
  scan_layers: bool = False
  dtype: Any = jnp.float32  # of activations; parameters stay as they are

  @classmethod
  def from_hf(
    cls, config: Mapping[str, Any], where: str = "config.json", **overrides: Any
  ) -> BertConfig:
    """Reads a Hugging Face `config.json`.

    Args:
      config: the object of its model type; missing fields have that type's defaults.
      where: the file, for messages.
      overrides: fields of this class.

    Raises:
      ValueError: on a field this encoder does not have, or out of range; see `hf_config`.
    """
    said = hf_config.read(config, where)
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
      dropout=said.hidden_dropout_prob,
      attention_dropout=said.attention_probs_dropout_prob,
      head_dropout=said.head_dropout(overrides.get("labels_of", "text")),
      embedding=said.embedding_width,
      pad_id=said.padding,
      labels=said.labels,
    )
    return cls(**{**fields, **overrides})

  @property
  def kind(self) -> Kind:
    return KINDS[self.family]

  @property
  def table(self) -> str:
    """The path of the table of words."""
    return f"{self.kind.body}/embeddings/word_embeddings/embedding"

  @property
  def table_width(self) -> int:
    return self.embedding or self.width

  @property
  def max_length(self) -> int:
    """Longest sequence: RoBERTa's positions start after the padding id."""
    return self.positions - (self.pad_id + 1 if self.kind.pads_first else 0)


class Embeddings(nn.Module):
  """Sum of word, position and type embeddings, as far as they exist, normalised."""

  config: BertConfig

  @nn.compact
  def __call__(
    self, tokens_BT: jax.Array, types_BT: jax.Array, key: jax.Array | None, prompt: Any, shift: int
  ) -> jax.Array:
    """Embeddings `[B, P + T, E]`: after the prompt, if any, and with all positions `shift` on."""
    c = self.config
    look_up = lambda name, size, ids: Embedding(size, c.table_width, c.dtype, name=name)(ids)
    x = look_up("word_embeddings", c.vocab, tokens_BT)
    real = (tokens_BT != c.pad_id).astype(jnp.int32)
    if prompt is not None:
      x, length = prompt.put_before(x), prompt.length
      types_BT, real = (virtual.before(n, y, length) for n, y in ((0, types_BT), (1, real)))
    if c.kind.pads_first:
      positions = (jnp.cumsum(real, axis=1) + shift) * real + c.pad_id
    else:
      positions = jnp.arange(shift, shift + x.shape[1])[None, :]
    if c.types:
      x = x + look_up("token_type_embeddings", c.types, types_BT)
    if c.absolute:
      x = x + look_up("position_embeddings", c.positions, positions)
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
  """Computes LayerNorm(residual + dropout(dense(x)))."""

  config: BertConfig
  drops: bool = True

  @nn.compact
  def __call__(self, x: jax.Array, residual: jax.Array, key: jax.Array | None) -> jax.Array:
    y = Linear(self.config.width, name="dense")(x)
    y = dropout(key, y, self.config.dropout) if self.drops else y
    y = Residual(name="residual")(y, residual)
    return LayerNorm(self.config.eps, name="LayerNorm")(y)


class Attention(nn.Module):
  """Self-attention and its output projection."""

  config: BertConfig
  inner: type[nn.Module]

  @nn.compact
  def __call__(self, x: jax.Array, mask: Any, keys: Any) -> jax.Array:
    y = self.inner(self.config, name="self")(x, mask, keys[0])
    return Output(self.config, self.config.kind.drops_attention, name="output")(y, x, keys[1])


class Intermediate(nn.Module):
  """Computes act(dense(x)), `[B, T, F]`."""

  config: BertConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return ACTIVATIONS[self.config.activation](Linear(self.config.ffn, name="dense")(x))


class Layer(nn.Module):
  """One block; a scan step: (x, key, the arguments of `SELF`) to (x, None)."""

  config: BertConfig

  SELF: ClassVar[type[nn.Module]] = SelfAttention

  @nn.compact
  def __call__(self, x: jax.Array, key: jax.Array | None, mask: Any) -> Any:
    keys = (None,) * 3 if key is None else jax.random.split(key, 3)
    x = Attention(self.config, self.SELF, name="attention")(x, mask, keys[:2])
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
  """Tokens to the last hidden state `[B, T, D]` and the head's input.

  The input is the first token, BERT's is pooled, and a head that labels tokens takes all of them.
  """

  config: BertConfig

  ENCODER: ClassVar[type[nn.Module]] = Encoder

  @nn.compact
  def __call__(self, tokens: jax.Array, mask: jax.Array, types: jax.Array, key: Any) -> Any:
    c = self.config
    keys = (None, None) if key is None else jax.random.split(key)
    prompt, length = virtual.prompt_of(self)
    visible = AttentionMask(virtual.before(True, mask, length))
    shift = virtual.prefix_length(self)
    x = Embeddings(c, name="embeddings")(tokens, types, keys[0], prompt, shift)
    if c.table_width != c.width:
      x = Linear(c.width, name="embeddings_project")(x)
    x_BTD = self.ENCODER(c, name="encoder")(x, visible, keys[1])
    text_BTD = x_BTD[:, length:]
    if c.labels_of != "text":
      return text_BTD, text_BTD
    # As in PEFT, the first token is a virtual one where there is a prompt.
    return text_BTD, Pooler(c, name="pooler")(x_BTD) if c.kind.pools else x_BTD[:, 0]


class Pooler(nn.Module):
  """Computes tanh(dense(first token))."""

  config: BertConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    return jnp.tanh(Linear(self.config.width, name="dense")(x_BTD[:, 0]))


class BertClassifier(nn.Module):
  """An encoder and a task head; parameters `{config.kind.body: ..., "head": ...}`."""

  config: BertConfig

  BODY: ClassVar[type[nn.Module]] = Body

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"] | None = None,
    types: Int[Array, "B T"] | None = None,
    *,
    train: bool = False,
    hidden: bool = False,
  ) -> Float[Array, "B *T K"] | tuple[Float[Array, "B T D"], Float[Array, "B *T D"]]:
    """Logits of each text, or of each token unless `config.labels_of` is "text"; float32.

    For a regression K = 1.

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
    x_BTD, read = self.BODY(c, name=c.kind.body)(tokens, mask, types, keys[0])
    logits = Head(c, name="head")(read, keys[1]).astype(jnp.float32)
    return (x_BTD, read) if hidden else logits


# The functions by which `pretrained` makes a model of this family.
CONFIG, MODEL = BertConfig, BertClassifier
