"""T5: an encoder and a decoder that reads it; T5 1.1, Flan-T5 and mT5 too."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from peftjax.core.dropout import dropout
from peftjax.losses import Sums
from peftjax.models import hf_config, limits
from peftjax.models.cache import Cache, write
from peftjax.models.names import torch_name
from peftjax.models.stack import layer_input, layer_keys, run_layers
from peftjax.nn import relative_bias
from peftjax.nn.attention import attention
from peftjax.nn.ffn import activate
from peftjax.nn.linear import Embedding, Head, Linear
from peftjax.nn.mask import AttentionMask
from peftjax.nn.norm import RMSNorm
from peftjax.nn.residual import Residual

# Every tensor has to be there, ...
NEW = r"(?!)"
# ... and these may be: the table under its other names, the head where it is tied to it, and a bias
# of old files that attention to the source does not read.
UNUSED = (
  r"(en|de)coder\.embed_tokens\.weight|lm_head\.weight"
  r"|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
)
# Hugging Face keeps kernels [out, in].
OUT_FIRST = True
# What the layers are numbered in, of a tensor's name, and the field with their number.
LAYERS = {
  r"(encoder\.)block\.(\d+)\..*": "layers",
  r"(decoder\.)block\.(\d+)\..*": "decoder_layers",
}
# Other names of the table of words, whose values are one.
TABLES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")

# Where transformers reads a table from is its copies, one a stack: an adapter of it, or another one
# in a PEFT directory, changes nothing there.
COPIED = frozenset({"shared"})
# Where a stack's bias is in files, in its first layer.
_BIAS = "layers_0/layer_0/SelfAttention/relative_attention_bias"


def hf_name(path: str) -> str:
  """The Hugging Face tensor of a parameter.

  >>> hf_name("decoder/layers_0/layer_1/EncDecAttention/q/kernel")
  'decoder.block.0.layer.1.EncDecAttention.q.weight'
  >>> hf_name("encoder/relative_attention_bias/embedding")
  'encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight'
  """
  path = path.replace("/relative_attention_bias", f"/{_BIAS}")
  path = re.sub(r"^embed_tokens/", "shared/", path)  # peftjax.core.shared has that name for others
  return re.sub(r"\blayer_(?=\d)", "layer.", torch_name(path, "block."))


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
  """The shape of a model; one letter is what the shapes in this file are named by."""

  family: ClassVar[str] = "t5"
  table: ClassVar[str] = "embed_tokens/embedding"  # the path of the table of words
  free_head: ClassVar[bool] = True  # `tie_word_embeddings` does not say whether the head is tied
  vocab: int  # V
  width: int  # D
  layers: int  # L, of the encoder
  decoder_layers: int
  heads: int  # N
  head_size: int  # H
  ffn: int  # F
  activation: str  # of `nn.ffn.CURVES`
  gated: bool
  buckets: int  # of relative positions
  farthest: int  # distance with a bucket of its own
  eps: float
  dropout: float
  start_id: int  # what a target begins with
  scaled: bool  # the head reads the last hidden state over √D
  tied: bool = True  # whether `init` makes a head that is tied; of a model, its parameters tell
  scan_layers: bool = False
  remat: bool | str = False  # compute layers again in the backward pass: see `stack.REMAT`
  dtype: Any = jnp.float32  # of activations; parameters stay as they are

  @classmethod
  def from_hf(
    cls, config: Mapping[str, Any], where: str = "config.json", **overrides: Any
  ) -> T5Config:
    """Reads a Hugging Face `config.json`.

    Args:
      config: of its model type; what it leaves out has that type's defaults.
      where: the file, for messages.
      overrides: fields of this class.

    Raises:
      ValueError: on a field this model does not have, or out of range; see `hf_config`.
    """
    said = hf_config.read(config, where)
    fields = dict(
      vocab=said.vocab_size,
      width=said.d_model,
      layers=said.num_layers,
      decoder_layers=said.num_decoder_layers or said.num_layers,
      heads=said.num_heads,
      head_size=said.d_kv,
      ffn=said.d_ff,
      activation=said.curve,
      gated=said.gated,
      buckets=said.relative_attention_num_buckets,
      farthest=said.relative_attention_max_distance,
      eps=said.layer_norm_epsilon,
      dropout=said.dropout_rate,
      start_id=said.start_id,
      scaled=said.scales,
    )
    return cls(**{**fields, **overrides})

  @property
  def decoder(self) -> T5Config:
    """The same with the decoder's number of layers, as its stack and its cache read it."""
    return dataclasses.replace(self, layers=self.decoder_layers)

  @property
  def table_shape(self) -> tuple[int, ...]:
    return self.vocab, self.width

  @property
  def kv_heads(self) -> int:
    return self.heads

  @property
  def max_length(self) -> int:
    """Positions are relative, so there is no longest sequence but what is counted."""
    return 2**31 - 1


class Attention(nn.Module):
  """Attention to keys and values of `source`, or to those that were made of it before."""

  config: T5Config

  @nn.compact
  def __call__(self, x_BTD: jax.Array, source: Any, pair: Any, visible: Any, key: Any) -> Any:
    """The result and the pair.

    Args:
      x_BTD: what queries are made of.
      source: what keys and values are made of, if there is no pair.
      pair: a function from new keys and values to all, or all of them.
      visible: the mask and the bias.
      key: of dropout.
    """
    c = self.config
    mask, bias = visible
    wide = c.heads * c.head_size
    linear = lambda name, x: Linear(wide, use_bias=False, name=name)(x)
    # Trained without a division by √H, which `attention` does.
    q = linear("q", x_BTD) * c.head_size**0.5
    if pair is None or callable(pair):
      new = linear("k", source), linear("v", source)
      pair = pair(new) if pair else new
    k, v = pair
    y = attention(q, k, v, mask, c.heads, key=key, rate=c.dropout, bias_NTS=bias)
    return Linear(c.width, use_bias=False, name="o")(y), pair


class SelfLayer(nn.Module):
  """Attention among the tokens of a text, and the residual."""

  config: T5Config

  @nn.compact
  def __call__(self, x: jax.Array, visible: Any, cache: Any, index: Any, key: Any) -> Any:
    c = self.config
    keys = _split(key)
    h = RMSNorm(c.eps, name="layer_norm")(x)
    kept = None if cache is None else lambda new: write(cache, new, index)
    y, pair = Attention(c, name="SelfAttention")(h, h, kept, visible, keys[0])
    x = Residual(name="attention_residual")(dropout(keys[1], y, c.dropout), x)
    return x, None if cache is None else pair


class CrossLayer(nn.Module):
  """Attention to the source, and the residual."""

  config: T5Config

  @nn.compact
  def __call__(self, x: jax.Array, source: Any, pair: Any, visible: Any, key: Any) -> Any:
    c = self.config
    keys = _split(key)
    h = RMSNorm(c.eps, name="layer_norm")(x)
    y, pair = Attention(c, name="EncDecAttention")(h, source, pair, visible, keys[0])
    return Residual(name="cross_residual")(dropout(keys[1], y, c.dropout), x), pair


class Mlp(nn.Module):
  """wo(f(wi(x))) or, gated, wo(f(wi_0(x)) · wi_1(x))."""

  config: T5Config

  @nn.compact
  def __call__(self, x: jax.Array, key: Any) -> jax.Array:
    c = self.config
    up = lambda name: Linear(c.ffn, use_bias=False, name=name)(x)
    h = (
      activate(c.activation, up("wi_1"), up("wi_0"))
      if c.gated
      else activate(c.activation, up("wi"))
    )
    return Linear(c.width, use_bias=False, name="wo")(dropout(key, h, c.dropout))


class MlpLayer(nn.Module):
  """The feed-forward block and the residual."""

  config: T5Config

  @nn.compact
  def __call__(self, x: jax.Array, key: Any) -> jax.Array:
    c = self.config
    keys = _split(key)
    y = Mlp(c, name="DenseReluDense")(RMSNorm(c.eps, name="layer_norm")(x), keys[0])
    return Residual(name="mlp_residual")(dropout(keys[1], y, c.dropout), x)


class EncoderLayer(nn.Module):
  """One block; a scan step: (x, key, what it sees) to (x, None)."""

  config: T5Config

  @nn.compact
  def __call__(self, x: jax.Array, key: Any, visible: Any) -> Any:
    keys = _split(key)
    x, _ = SelfLayer(self.config, name="layer_0")(layer_input(x), visible, None, None, keys[0])
    return MlpLayer(self.config, name="layer_1")(x, keys[1]), None


class DecoderLayer(nn.Module):
  """One block; a scan step: (x, cache, source's pair, key, inputs) to (x, (cache, pair))."""

  config: T5Config

  @nn.compact
  def __call__(
    self, x: jax.Array, cache: Any, pair: Any, key: Any, visible: Any, index: Any, source: Any
  ) -> Any:
    c = self.config
    keys = _split(key, 3)
    source_BSD, mask = source
    x, cache = SelfLayer(c, name="layer_0")(layer_input(x), visible, cache, index, keys[0])
    x, pair = CrossLayer(c, name="layer_1")(x, source_BSD, pair, (mask, None), keys[1])
    return MlpLayer(c, name="layer_2")(x, keys[2]), (cache, None if cache is None else pair)


class Stack(nn.Module):
  """Embeddings to the normalised last hidden state, and what the layers return besides."""

  config: T5Config
  layer: type[nn.Module]

  @nn.compact
  def __call__(self, x: jax.Array, mask: AttentionMask, own: Any, shared: Any, key: Any) -> Any:
    c = self.config
    source, length = mask.valid.shape[1], x.shape[1]
    # The first layer's in the files: all layers add the same.
    table = Embedding(c.buckets, c.heads, name="relative_attention_bias")
    rows = relative_bias.relative_buckets(
      relative_bias.distances(source), c.buckets, c.farthest, causal=mask.causal
    )
    bias = relative_bias.spread(table(jnp.asarray(rows)), length, source, mask.offset)
    before, after, of_layers = _split(key, 3)
    own = (*own, layer_keys(of_layers, c.layers))
    x = dropout(before, x, c.dropout)
    x, made = run_layers(self.layer, c, x, own, ((mask, bias), *shared), remat=c.remat)
    return dropout(after, RMSNorm(c.eps, name="final_layer_norm")(x), c.dropout), made


class T5ForConditionalGeneration(nn.Module):
  """The encoder, the decoder and its head.

  Parameters are `{"embed_tokens": ..., "encoder": ..., "decoder": ..., "lm_head": ...}`.
  """

  config: T5Config

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, "B S"],
    mask: Bool[Array, "B S"] | None = None,
    targets: Int[Array, "B T"] | None = None,
    target_mask: Bool[Array, "B T"] | None = None,
    *,
    loss_weights: Float[Array, "B T"] | None = None,
    cache: Cache | None = None,
    train: bool = False,
  ) -> Float[Array, "B T V"] | Sums | tuple[Float[Array, "B T V"] | Sums, Cache]:
    """Logits of the next token at every place of the target, float32; with a cache, and the cache
    as it is then.

    Args:
      tokens: ids of the source. Once a cache is begun, which holds what the decoder reads of the
        source, the next ids of the target.
      mask: true on them, false on padding on either side; by default all true.
      targets: ids of the target behind `config.start_id`, by default that alone.
      target_mask: true on them; by default all true.
      loss_weights: of the targets, as what is to be predicted. With them the result is, in place of
        logits, what `losses.next_token_sums` makes of these, which then never exist at once.
      cache: `Cache.empty(config.decoder, ...)`, or as an earlier call returned it.
      train: applies dropout, from the `"dropout"` rng.
    """
    c = self.config
    for ids in (tokens, targets):
      limits.check(c, ids)
    keys = _split(self.make_rng("dropout") if train else None)
    embed = Embedding(c.vocab, c.width, c.dtype, name="embed_tokens")
    mask = _whole(tokens, mask)
    source_BSD: Any = None
    if cache is not None and cache.begun:
      targets, target_mask = tokens, mask
    else:
      seen = AttentionMask(mask)
      source_BSD, _ = Stack(c, EncoderLayer, name="encoder")(embed(tokens), seen, (), (), keys[0])
      cache = cache and cache.replace(source=mask)
    if targets is None:
      targets = jnp.full((tokens.shape[0], 1), c.start_id, jnp.int32)
    cache, visible = _visible(cache, _whole(targets, target_mask))
    x_BTD, made = Stack(c.decoder, DecoderLayer, name="decoder")(
      embed(targets),
      visible,
      (None, None) if cache is None else (cache.layers, cache.cross),
      (cache and cache.index, (source_BSD, AttentionMask(mask if cache is None else cache.source))),
      keys[1],
    )
    x_BTD = x_BTD * c.width**-0.5 if c.scaled else x_BTD
    head = Head(c.vocab, c.table if c.tied else "", name="lm_head")
    result: Any
    if loss_weights is None:
      result = head(x_BTD, embed.table()).astype(jnp.float32)
    else:
      result = head.sums(x_BTD, embed.table(), targets, loss_weights)
    if cache is None:
      return result
    layers, cross = made if c.scan_layers else (tuple(of) for of in zip(*made, strict=True))
    return result, cache.replace(cross=cross).after(layers, targets.shape[1])


def _whole(tokens: jax.Array, mask: jax.Array | None) -> jax.Array:
  return jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)


def _visible(cache: Cache | None, mask: jax.Array) -> tuple[Cache | None, AttentionMask]:
  """The cache, if any, with the tokens of a mask in it, and what these may attend to."""
  if cache is None:
    return None, AttentionMask.of_decoder(mask)
  cache = cache.advance(mask)
  return cache, AttentionMask.of_decoder(cache.valid, first=cache.index)


def _split(key: jax.Array | None, count: int = 2) -> Any:
  return (None,) * count if key is None else jax.random.split(key, count)


# What `pretrained` makes a model of this family with.
CONFIG, MODEL = T5Config, T5ForConditionalGeneration
