"""GPT-2: learned positions, LayerNorm before each block, one kernel for query, key and value."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from peftjax.core.dropout import dropout
from peftjax.losses import Sums
from peftjax.models import hf_config, limits
from peftjax.models.cache import Cache, context, write
from peftjax.models.names import torch_name
from peftjax.models.stack import layer_input, layer_keys, run_layers
from peftjax.nn import virtual
from peftjax.nn.attention import attention
from peftjax.nn.ffn import ACTIVATIONS
from peftjax.nn.linear import Embedding, Head, Linear
from peftjax.nn.mask import AttentionMask
from peftjax.nn.norm import LayerNorm
from peftjax.nn.residual import Residual

# Every tensor has to be there, ...
NEW = r"(?!)"
# ... and these may be: causal masks, and the head, which is the table of the words.
UNUSED = r".*attn\.(masked_)?bias|lm_head\.weight"
# Hugging Face keeps these kernels [in, out], as here.
OUT_FIRST = False
# The part of a tensor's name before the layer's number.
LAYER = r"(.*\.)?h\.(\d+)\..*"


def hf_name(path: str) -> str:
  """The name of a parameter's Hugging Face tensor.

  >>> hf_name("transformer/layers_0/attn/c_attn/kernel")
  'transformer.h.0.attn.c_attn.weight'
  """
  return torch_name(path, "h.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config:
  """The shape of a model; the letters are those in the shapes of this file."""

  family: ClassVar[str] = "gpt2"
  table: ClassVar[str] = "transformer/wte/embedding"  # the path of the table of words
  vocab: int  # V
  width: int  # D
  layers: int  # L
  heads: int  # N
  ffn: int  # F
  positions: int
  activation: str
  eps: float
  dropout: float  # of embeddings
  attention_dropout: float
  residual_dropout: float
  tied: bool = True  # whether `init` makes a tied head; for an existing model its parameters tell
  scan_layers: bool = False
  remat: bool | str = False  # compute layers again in the backward pass: see `stack.REMAT`
  dtype: Any = jnp.float32  # of activations; parameters stay as they are

  @classmethod
  def from_hf(
    cls, config: Mapping[str, Any], where: str = "config.json", **overrides: Any
  ) -> GPT2Config:
    """Reads a Hugging Face `config.json`.

    Args:
      config: the object; missing fields have the defaults of GPT-2.
      where: the file, for messages.
      overrides: fields of this class.

    Raises:
      ValueError: on a field this decoder does not have, or out of range; see `hf_config`.
    """
    said = hf_config.read(config, where)
    fields = dict(
      vocab=said.vocab_size,
      width=said.n_embd,
      layers=said.n_layer,
      heads=said.n_head,
      ffn=said.n_inner or 4 * said.n_embd,
      positions=said.n_positions,
      activation=said.activation_function,
      eps=said.layer_norm_epsilon,
      dropout=said.embd_pdrop,
      attention_dropout=said.attn_pdrop,
      residual_dropout=said.resid_pdrop,
      tied=said.tie_word_embeddings,
    )
    return cls(**{**fields, **overrides})

  @property
  def kv_heads(self) -> int:
    return self.heads

  @property
  def head_size(self) -> int:
    return self.width // self.heads

  @property
  def max_length(self) -> int:
    return self.positions


class SelfAttention(nn.Module):
  """Causal attention."""

  config: GPT2Config

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, mask: AttentionMask, index: Any, cache: Any, keys: Any
  ) -> Any:
    c = self.config
    q, k, v = jnp.split(Linear(3 * c.width, name="c_attn")(x_BTD), 3, axis=-1)
    if cache is not None:
      k, v = cache = write(cache, (k, v), index)
    k, v, mask = virtual.with_prefix(self, k, v, mask)
    y = attention(q, k, v, mask, c.heads, key=keys[0], rate=c.attention_dropout)
    return dropout(keys[1], Linear(c.width, name="c_proj")(y), c.residual_dropout), cache


class Mlp(nn.Module):
  """Computes proj(act(fc(x)))."""

  config: GPT2Config

  @nn.compact
  def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
    c = self.config
    y = ACTIVATIONS[c.activation](Linear(c.ffn, name="c_fc")(x))
    return dropout(key, Linear(c.width, name="c_proj")(y), c.residual_dropout)


class Layer(nn.Module):
  """One block; a scan step: (x, cache, key, inputs) to (x, cache)."""

  config: GPT2Config

  @nn.compact
  def __call__(self, x: jax.Array, cache: Any, key: Any, mask: AttentionMask, index: Any) -> Any:
    c = self.config
    keys = (None,) * 3 if key is None else jax.random.split(key, 3)
    x = layer_input(x)
    h = LayerNorm(c.eps, name="ln_1")(x)
    y, cache = SelfAttention(c, name="attn")(h, mask, index, cache, keys[:2])
    x = Residual(name="attn_residual")(y, x)
    y = Mlp(c, name="mlp")(LayerNorm(c.eps, name="ln_2")(x), keys[2])
    return Residual(name="mlp_residual")(y, x), cache


class Body(nn.Module):
  """Tokens to the normalised last hidden state `[B, T, D]`, the table, and the caches."""

  config: GPT2Config

  @nn.compact
  def __call__(
    self, tokens: jax.Array, positions: jax.Array, mask: AttentionMask, cache: Any, key: Any
  ) -> Any:
    c = self.config
    embed = Embedding(c.vocab, c.width, c.dtype, name="wte")
    x = virtual.with_prompt(self, embed(tokens), positions)
    x = x + Embedding(c.positions, c.width, c.dtype, name="wpe")(positions)
    keys = layer_keys(key, c.layers)
    if key is not None:
      x = dropout(jax.random.fold_in(key, c.layers), x, c.dropout)
    shared = (mask, cache and cache.index)
    x, pairs = run_layers(Layer, c, x, (cache and cache.layers, keys), shared, remat=c.remat)
    return LayerNorm(c.eps, name="ln_f")(x[:, -tokens.shape[1] :]), embed.table(), pairs


class GPT2LMHeadModel(nn.Module):
  """A decoder with its language-model head; parameters `{"transformer": ..., "lm_head": ...}`."""

  config: GPT2Config

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    *,
    loss_weights: Float[Array, "B T"] | None = None,
    cache: Cache | None = None,
    train: bool = False,
  ) -> Float[Array, "B T V"] | Sums | tuple[Float[Array, "B T V"] | Sums, Cache]:
    """Logits of the next token at every place, float32; see `llama.LlamaForCausalLM`.

    Args:
      train: applies dropout, from the `"dropout"` rng.
    """
    c = self.config
    limits.check(c, tokens)
    positions, visible, cache = context(self, tokens, mask, positions, segments, cache)
    key = self.make_rng("dropout") if train else None
    x_BTD, table, pairs = Body(c, name="transformer")(tokens, positions, visible, cache, key)
    head = Head(c.vocab, c.table if c.tied else "", name="lm_head")
    result: Any
    if loss_weights is None:
      result = head(x_BTD, table).astype(jnp.float32)
    else:
      result = head.sums(x_BTD, table, tokens, loss_weights)
    return result if cache is None else (result, cache.after(pairs, positions.shape[1]))


# The functions by which `pretrained` makes a model of this family.
CONFIG, MODEL = GPT2Config, GPT2LMHeadModel
