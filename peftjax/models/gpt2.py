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
from peftjax.models.cache import Cache, context, write
from peftjax.models.names import torch_name
from peftjax.models.stack import layer_keys, run_layers
from peftjax.nn import virtual
from peftjax.nn.attention import attention
from peftjax.nn.ffn import ACTIVATIONS
from peftjax.nn.linear import Embedding, Head, Linear
from peftjax.nn.norm import LayerNorm
from peftjax.nn.residual import Residual

# Every tensor has to be there, ...
NEW = r"(?!)"
# ... and these may be: causal masks, and the head, which is the table of the words.
UNUSED = r".*attn\.(masked_)?bias|lm_head\.weight"
# Hugging Face keeps these kernels [in, out], as here.
OUT_FIRST = False
# What a tied head is tied to.
TABLE = "transformer/wte/embedding"


def hf_name(path: str) -> str:
  """The Hugging Face tensor of a parameter.

  >>> hf_name("transformer/layers_0/attn/c_attn/kernel")
  'transformer.h.0.attn.c_attn.weight'
  """
  return torch_name(path, "h.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config:
  """The shape of a model; one letter is what the shapes in this file are named by."""

  family: ClassVar[str] = "gpt2"
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
  tied: bool = True  # whether `init` makes a head that is tied; of a model, its parameters tell
  scan_layers: bool = False
  remat: bool = False  # compute each layer's activations again in the backward pass
  dtype: Any = jnp.float32  # of activations; parameters stay as they are

  @classmethod
  def from_hf(cls, config: Mapping[str, Any], **overrides: Any) -> GPT2Config:
    """Reads a Hugging Face `config.json`.

    Raises:
      ValueError: on a field this decoder does not have.
    """
    activation = config.get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
      raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    for field, wanted in (
      ("scale_attn_weights", True),
      ("scale_attn_by_inverse_layer_idx", False),
    ):
      if config.get(field, wanted) != wanted:
        raise ValueError(f"config.json has {field}={config[field]}; only {wanted} is supported")
    fields = dict(
      vocab=config["vocab_size"],
      width=config["n_embd"],
      layers=config["n_layer"],
      heads=config["n_head"],
      ffn=config.get("n_inner") or 4 * config["n_embd"],
      positions=config["n_positions"],
      activation=activation,
      eps=config["layer_norm_epsilon"],
      dropout=config["embd_pdrop"],
      attention_dropout=config["attn_pdrop"],
      residual_dropout=config["resid_pdrop"],
      tied=config.get("tie_word_embeddings", True),
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
  def __call__(self, x_BTD: jax.Array, bias: jax.Array, index: Any, cache: Any, keys: Any) -> Any:
    c = self.config
    q, k, v = jnp.split(Linear(3 * c.width, name="c_attn")(x_BTD), 3, axis=-1)
    if cache is not None:
      k, v = cache = write(cache, (k, v), index)
    k, v, bias = virtual.with_prefix(self, k, v, bias)
    y = attention(q, k, v, bias, c.heads, key=keys[0], rate=c.attention_dropout)
    return dropout(keys[1], Linear(c.width, name="c_proj")(y), c.residual_dropout), cache


class Mlp(nn.Module):
  """proj(act(fc(x)))."""

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
  def __call__(self, x: jax.Array, cache: Any, key: Any, bias: jax.Array, index: Any) -> Any:
    c = self.config
    keys = (None,) * 3 if key is None else jax.random.split(key, 3)
    h = LayerNorm(c.eps, name="ln_1")(x)
    y, cache = SelfAttention(c, name="attn")(h, bias, index, cache, keys[:2])
    x = Residual(name="attn_residual")(y, x)
    y = Mlp(c, name="mlp")(LayerNorm(c.eps, name="ln_2")(x), keys[2])
    return Residual(name="mlp_residual")(y, x), cache


class Body(nn.Module):
  """Tokens to the normalised last hidden state `[B, T, D]`, the table, and the caches."""

  config: GPT2Config

  @nn.compact
  def __call__(
    self, tokens: jax.Array, positions: jax.Array, bias: jax.Array, cache: Any, key: Any
  ) -> Any:
    c = self.config
    embed = Embedding(c.vocab, c.width, c.dtype, name="wte")
    x = virtual.with_prompt(self, embed(tokens), positions)
    x = x + Embedding(c.positions, c.width, c.dtype, name="wpe")(positions)
    keys = layer_keys(key, c.layers)
    if key is not None:
      x = dropout(jax.random.fold_in(key, c.layers), x, c.dropout)
    shared = (bias, cache and cache.index)
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
    cache: Cache | None = None,
    train: bool = False,
  ) -> Float[Array, "B T V"] | tuple[Float[Array, "B T V"], Cache]:
    """Logits of the next token at every place, float32; see `llama.LlamaForCausalLM`.

    Args:
      train: applies dropout, from the `"dropout"` rng.
    """
    c = self.config
    positions, bias, cache = context(self, tokens, mask, positions, segments, cache)
    key = self.make_rng("dropout") if train else None
    x_BTD, table, pairs = Body(c, name="transformer")(tokens, positions, bias, cache, key)
    logits = Head(c.vocab, TABLE if c.tied else "", name="lm_head")(x_BTD, table)
    logits = logits.astype(jnp.float32)
    return logits if cache is None else (logits, cache.after(pairs, positions.shape[1]))


# What `pretrained` makes a model of this family with.
CONFIG, MODEL = GPT2Config, GPT2LMHeadModel
