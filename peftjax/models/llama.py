"""Decoders of the Llama family: Llama, Mistral, Mixtral, Qwen2 and 3, Gemma 2 and 3, Phi-3."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from peftjax.losses import Sums
from peftjax.models import hf_config, limits
from peftjax.models.cache import Cache, context, write
from peftjax.models.config_fields import classifies
from peftjax.models.names import torch_name
from peftjax.models.stack import layer_input, run_layers
from peftjax.nn import rope, virtual
from peftjax.nn.attention import attention
from peftjax.nn.experts import Experts
from peftjax.nn.ffn import activate
from peftjax.nn.linear import Embedding, Head, Linear
from peftjax.nn.mask import AttentionMask
from peftjax.nn.norm import RMSNorm
from peftjax.nn.residual import Residual

# Every tensor has to be there but those of a head that is new with a task, ...
NEW = r"head/.*"
# ... and these may be: buffers, and the head that a tied table makes redundant.
UNUSED = r".*rotary_emb\.inv_freq|lm_head\.weight"
# Hugging Face keeps kernels [out, in].
OUT_FIRST = True
# The part of a tensor's name before the layer's number.
LAYER = r"(.*\.)?layers\.(\d+)\..*"


def hf_name(path: str) -> str:
  """The name of a parameter's Hugging Face tensor.

  >>> hf_name("model/layers_0/self_attn/q_proj/kernel")
  'model.layers.0.self_attn.q_proj.weight'
  """
  return torch_name(path.removeprefix("head/"), "layers.").replace(".router.", ".gate.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
  """The shape of a model; the letters are those in the shapes of this file."""

  family: ClassVar[str] = "llama"
  table: ClassVar[str] = "model/embed_tokens/embedding"  # the path of the table of words
  vocab: int  # V
  width: int  # D
  layers: int  # L
  heads: int  # N
  kv_heads: int  # K
  head_size: int  # H
  ffn: int  # F
  positions: int
  eps: float
  theta: float
  rope_scaling: tuple[tuple[str, Any], ...]  # items of Hugging Face's dictionary
  labels: int | None = None  # outputs for whole texts, in place of the next token's logits
  tied: bool  # whether `init` makes a tied head; for an existing model its parameters tell
  # Where a model type differs from Llama.
  qkv_bias: bool = False
  out_bias: bool = False
  ffn_bias: bool = False
  window: int | None = None  # of sliding attention
  global_layers: tuple[int, ...] = ()  # those that see all tokens, where others have a window
  fused: bool = False  # one kernel for queries, keys and values, one for gate and up
  qk_norm: bool = False  # queries and keys are normalised, head by head
  norm_offset: float = 0.0  # added to the scales of norms
  four_norms: bool = False  # the updates that a block adds are normalised, too
  gate: str = "swish"  # one of `nn.ffn.CURVES`
  experts: int = 0  # E in place of one feed-forward block, F wide each, ...
  routed: int = 0  # ... of which each token takes so many, ...
  routed_sum: bool = True  # ... at weights that are divided by their sum
  embedding_scale: float = 1.0
  query_size: float | None = None  # scores are divided by its root; by default H
  score_cap: float | None = None
  logit_cap: float | None = None
  window_theta: float | None = None  # for layers with a window, which are then not stretched
  scan_layers: bool = False
  remat: bool | str = False  # compute layers again in the backward pass: see `stack.REMAT`
  dtype: Any = jnp.float32  # of activations; parameters stay as they are

  @classmethod
  def from_hf(
    cls, config: Mapping[str, Any], where: str = "config.json", **overrides: Any
  ) -> LlamaConfig:
    """Reads a Hugging Face `config.json`.

    Args:
      config: the object of its model type; missing fields have that type's defaults.
      where: the file, for messages.
      overrides: fields of this class.

    Raises:
      ValueError: on a field this decoder does not have, or out of range; see `hf_config`.
    """
    said = hf_config.read(config, where)
    theta, scaling = said.rope(where)
    for field in ("attention_dropout", "resid_pdrop"):
      if rate := getattr(said, field, None):
        warnings.warn(
          f"{where}: {field} is {rate}, and this decoder has none: training goes without.",
          stacklevel=2,
        )
    fields = dict(
      vocab=said.vocab_size,
      width=said.hidden_size,
      layers=said.num_hidden_layers,
      heads=said.num_attention_heads,
      kv_heads=said.kv_heads,
      head_size=said.head_size,
      ffn=said.intermediate_size,
      positions=said.max_position_embeddings,
      eps=said.rms_norm_eps,
      theta=theta,
      rope_scaling=tuple(sorted(scaling.items())),
      tied=said.tie_word_embeddings,
      labels=said.labels if classifies(said.architectures) else None,
    )
    made = cls(**{**fields, **said.block(where), **overrides})
    made.frequencies()  # refuses an unknown kind before any weight is read
    return made

  @property
  def max_length(self) -> int:
    return self.positions

  @property
  def sees_all(self) -> np.ndarray | None:
    """True for each layer without a window; None where all are alike."""
    if not self.global_layers and self.window_theta is None:
      return None
    return np.isin(np.arange(self.layers), self.global_layers)

  def frequencies(self) -> tuple[np.ndarray, float]:
    """The frequencies of layers without a window: see `rope.frequencies`."""
    return rope.frequencies(self.head_size, self.theta, dict(self.rope_scaling), self.positions)


def _norm(c: LlamaConfig, name: str) -> RMSNorm:
  return RMSNorm(c.eps, c.norm_offset, name=name)


def _linears(x: jax.Array, fused: str, bias: bool, **widths: int) -> list[jax.Array]:
  """x through a `Linear` of each name and width, or through one that yields all side by side."""
  if not fused:
    return [Linear(width, bias, name=name)(x) for name, width in widths.items()]
  *ends, width = np.cumsum([*widths.values()]).tolist()
  return jnp.split(Linear(width, bias, name=fused)(x), ends, axis=-1)


def _angles(c: LlamaConfig, positions: jax.Array) -> Any:
  """`rope.angles` of layers without a window and of those with one."""
  wide = rope.angles(positions, *c.frequencies(), c.dtype)
  if c.window_theta is None:
    return wide, wide
  return wide, rope.angles(positions, *rope.frequencies(c.head_size, c.window_theta), c.dtype)


class SelfAttention(nn.Module):
  """Causal attention with rotated queries and keys; grouped heads share keys and values."""

  config: LlamaConfig

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, angles: Any, mask: AttentionMask, index: Any, cache: Any
  ) -> Any:
    c = self.config
    wide, narrow = c.heads * c.head_size, c.kv_heads * c.head_size
    widths = dict(q_proj=wide, k_proj=narrow, v_proj=narrow)
    q, k, v = _linears(x_BTD, "qkv_proj" if c.fused else "", c.qkv_bias, **widths)
    if c.qk_norm:
      heads = lambda x: x.reshape(*x.shape[:2], -1, c.head_size)
      q, k = (
        _norm(c, name)(heads(x)).reshape(x.shape) for name, x in (("q_norm", q), ("k_norm", k))
      )
    q, k = rope.rotate(q, angles, c.heads), rope.rotate(k, angles, c.kv_heads)
    if cache is not None:
      k, v = cache = write(cache, (k, v), index)
    k, v, mask = virtual.with_prefix(self, k, v, mask)
    if c.query_size is not None:
      q = q * (c.head_size / c.query_size) ** 0.5
    y = attention(q, k, v, mask, c.heads, c.kv_heads, cap=c.score_cap)
    return Linear(c.width, c.out_bias, name="o_proj")(y), cache


class Mlp(nn.Module):
  """Computes down(f(gate(x)) · up(x)), f = silu or another."""

  config: LlamaConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    widths = dict(gate_proj=c.ffn, up_proj=c.ffn)
    gate, up = _linears(x, "gate_up_proj" if c.fused else "", c.ffn_bias, **widths)
    return Linear(c.width, c.ffn_bias, name="down_proj")(activate(c.gate, up, gate))


def _ffn(c: LlamaConfig, name: str) -> nn.Module:
  if not c.experts:
    return Mlp(c, name=name)
  return Experts(c.experts, c.routed, c.ffn, c.gate, c.routed_sum, name=name)


class Layer(nn.Module):
  """One block; a scan step: (x, cache, whether it has no window, inputs) to (x, cache)."""

  config: LlamaConfig

  @nn.compact
  def __call__(
    self, x: jax.Array, cache: Any, sees_all: Any, angles: Any, mask: AttentionMask, index: Any
  ) -> Any:
    c = self.config
    x = layer_input(x)
    mask = mask.without_window(sees_all)
    wide, narrow = angles
    if sees_all is not None:
      wide = jax.tree.map(lambda one, other: jnp.where(sees_all, one, other), wide, narrow)
    h = _norm(c, "input_layernorm")(x)
    y, cache = SelfAttention(c, name="self_attn")(h, wide, mask, index, cache)
    if c.four_norms:
      y = _norm(c, "post_attention_layernorm")(y)
    x = Residual(name="self_attn_residual")(y, x)
    before = "pre_feedforward_layernorm" if c.four_norms else "post_attention_layernorm"
    y = _ffn(c, "mlp")(_norm(c, before)(x))
    if c.four_norms:
      y = _norm(c, "post_feedforward_layernorm")(y)
    return Residual(name="mlp_residual")(y, x), cache


class Body(nn.Module):
  """Tokens to the normalised last hidden state `[B, T, D]`, the table, and the caches."""

  config: LlamaConfig

  @nn.compact
  def __call__(
    self, tokens: jax.Array, positions: jax.Array, mask: AttentionMask, cache: Cache | None
  ) -> Any:
    c = self.config
    embed = Embedding(c.vocab, c.width, c.dtype, name="embed_tokens")
    x = embed(tokens)
    if c.embedding_scale != 1.0:
      x = x * jnp.asarray(c.embedding_scale, x.dtype)
    x = virtual.with_prompt(self, x, positions)
    shared = (_angles(c, positions), mask, cache and cache.index)
    own = (cache and cache.layers, c.sees_all)
    x, pairs = run_layers(Layer, c, x, own, shared, remat=c.remat)
    return _norm(c, "norm")(x[:, -tokens.shape[1] :]), embed.table(), pairs


class LlamaForCausalLM(nn.Module):
  """A decoder with its language-model head; parameters `{"model": ..., "lm_head": ...}`."""

  config: LlamaConfig

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
    """Logits of the next token at every place, float32; with a cache, also the updated cache.

    Args:
      tokens: ids below the vocabulary's size.
      mask: true on tokens, false on padding; by default all true.
      positions: places of the tokens in their text, by default counted along the mask.
      segments: the document of each token, where several share a row: none sees another.
      loss_weights: weights of the tokens as targets. With them the result is not the logits but
        `losses.next_token_sums` of them, and the logits never exist all at once.
      cache: keys and values of the tokens before; these tokens' are appended.
      train: has no effect: this family has no dropout of its own.
    """
    c = self.config
    limits.check(c, tokens)
    positions, visible, cache = context(self, tokens, mask, positions, segments, cache, c.window)
    x_BTD, table, pairs = Body(c, name="model")(tokens, positions, visible, cache)
    head = Head(c.vocab, c.table if c.tied else "", cap=c.logit_cap, name="lm_head")
    result: Any
    if loss_weights is None:
      result = head(x_BTD, table).astype(jnp.float32)
    else:
      result = head.sums(x_BTD, table, tokens, loss_weights)
    return result if cache is None else (result, cache.after(pairs, positions.shape[1]))


class Score(nn.Module):
  """Features of a text to logits `[B, labels]`."""

  labels: int

  @nn.compact
  def __call__(self, x_BD: jax.Array) -> jax.Array:
    return Linear(self.labels, use_bias=False, name="score")(x_BD)


class LlamaForSequenceClassification(nn.Module):
  """A decoder that scores whole texts by their last token; parameters `{"model", "head"}`."""

  config: LlamaConfig

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"] | None = None,
    types: Int[Array, "B T"] | None = None,
    *,
    train: bool = False,
  ) -> Float[Array, "B K"]:
    """Logits, float32; for a regression K = 1.

    Args:
      tokens: ids below the vocabulary's size.
      mask: true on tokens, false on padding on either side; by default all true.
      types: has no effect: decoders do not tell the texts of a pair apart.
      train: has no effect: this family has no dropout of its own.
    """
    c = self.config
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
    positions, visible, _ = context(self, tokens, mask, None, None, None, c.window)
    x_BTD, *_ = Body(c, name="model")(tokens, positions, visible, None)
    last = (jnp.arange(tokens.shape[1])[None] * mask).max(1)
    x_BD = jnp.take_along_axis(x_BTD, last[:, None, None], axis=1)[:, 0]
    return Score(c.labels or 1, name="head")(x_BD).astype(jnp.float32)


def model(config: LlamaConfig) -> nn.Module:
  """The module of a configuration: with `labels` one that scores whole texts."""
  return (LlamaForSequenceClassification if config.labels else LlamaForCausalLM)(config)


# The functions by which `pretrained` makes a model of this family.
CONFIG, MODEL = LlamaConfig, model
