"""A feed-forward block of many experts, a few of which a router chooses for each token."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from peftjax.core.einsum import ragged_dot
from peftjax.nn.ffn import activate
from peftjax.nn.linear import PRODUCT, Linear, normal, weight


class Experts(nn.Module):
  """y = Σ_e p_e down_e(f(gate_e(x)) · up_e(x)) over the `routed` experts e of the largest p.

  p = softmax(router(x)) in float32 (Shazeer et al. 2017, arXiv 1701.06538, with the softmax first).
  Each expert multiplies the tokens that chose it and no others, however many they are.

  Attributes:
    experts: E.
    routed: experts of a token, at most E.
    ffn: F, the width of an expert.
    gate: f, of `nn.ffn.CURVES`.
    normalise: divide the p_e by their sum.
  """

  experts: int
  routed: int
  ffn: int
  gate: str
  normalise: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[..., D]` to `[..., D]`, in the dtype of x."""
    x_MD = x.reshape(-1, x.shape[-1])
    logits_ME = Linear(self.experts, use_bias=False, name="router")(x_MD)
    p_ME = jax.nn.softmax(logits_ME.astype(jnp.float32))
    p_MK, chosen_MK = jax.lax.top_k(p_ME, self.routed)
    if self.normalise:
      p_MK = p_MK / p_MK.sum(-1, keepdims=True)
    order = jnp.argsort(chosen_MK.reshape(-1))  # of tokens by their expert, each K times
    sizes = jnp.bincount(chosen_MK.reshape(-1), length=self.experts)
    y = _Stack(self.experts, self.ffn, self.gate, name="experts")(x_MD[order // self.routed], sizes)
    y_MKD = y[jnp.argsort(order)].reshape(*p_MK.shape, -1)
    return jnp.einsum("mk,mkd->md", p_MK.astype(x.dtype), y_MKD).reshape(x.shape)


class _Stack(nn.Module):
  """The outputs of the experts for rows `[M, D]` that lie expert by expert, `sizes` [E] of each."""

  experts: int
  ffn: int
  gate: str

  @nn.compact
  def __call__(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
    product = lambda name, n, x: _Product(self.experts, n, name=name)(x, sizes)
    gate, up = product("gate_proj", self.ffn, x), product("up_proj", self.ffn, x)
    return product("down_proj", x.shape[-1], activate(self.gate, up, gate))


class _Product(nn.Module):
  """x W_e for the rows of each expert, with W `[E, in, out]`, in the dtype of x."""

  experts: int
  features: int

  @nn.compact
  def __call__(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
    kernel: Any = weight(self, "kernel", normal, (self.experts, x.shape[-1], self.features))
    return checkpoint_name(ragged_dot(x, kernel, sizes), PRODUCT)
