"""The two-layer feed-forward block, its backward pass written by hand from the chain rule."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peftjax.core.fence import fence
from peftjax.core.weight import is_weight
from peftjax.nn.ffn import CURVES, activate, hidden, hidden_gradients
from peftjax.nn.linear import Linear


class Variant(NamedTuple):
  """A variant of the block: h = f(x W₁), or gated f(x W_gate) ⊙ x W₁."""

  activation: str  # f, one of `ffn.CURVES`
  gated: bool


# Shazeer 2020, arXiv 2002.05202, eq. 1-3 (not gated), 5 and 6 (gated).
VARIANTS: Mapping[str, Variant] = {
  "relu": Variant("relu", gated=False),
  "gelu": Variant("gelu", gated=False),
  "gelu_tanh": Variant("gelu_tanh", gated=False),
  "swish": Variant("swish", gated=False),
  "glu": Variant("sigmoid", gated=True),
  "bilinear": Variant("identity", gated=True),
  "reglu": Variant("relu", gated=True),
  "geglu": Variant("gelu", gated=True),
  "swiglu": Variant("swish", gated=True),
}


def gated_width(ffn: int) -> int:
  """2/3 of an ungated block's width F, to the nearest integer: 3072 to 2048.

  A gated block has three kernels, 3 D F' parameters against 2 D F (Shazeer 2020, section 2).
  Rounding leaves a difference of at most D; biases, F' + F' against F, are not made equal.
  """
  return (2 * ffn + 1) // 3


def feed_forward(
  x: Float[Array, "... D"],
  w1: Float[Array, "D F"],
  b1: Float[Array, " F"] | None,
  w2: Float[Array, "F D"],
  b2: Float[Array, " D"] | None,
  *,
  w_gate: Float[Array, "D F"] | None = None,
  b_gate: Float[Array, " F"] | None = None,
  activation: str = "gelu",
  beta: jax.Array | float | None = None,
) -> Float[Array, "... D"]:
  """f(x W₁ + b₁) W₂ + b₂ or, gated, (f(x W_g + b_g) ⊙ (x W₁ + b₁)) W₂ + b₂, in the dtype of x.

  With z₁ = x W₁ + b₁, h = f(z₁) and z₂ = h W₂ + b₂ the backward pass is
  δ₂ = ∂L/∂z₂, δ₁ = δ₂ W₂ᵀ ⊙ f'(z₁), ∂L/∂W₂ = hᵀ δ₂, ∂L/∂W₁ = xᵀ δ₁, ∂L/∂x = δ₁ W₁ᵀ, and a bias
  has the sum of its δ (Rumelhart et al. 1986, for rows x). Of activations it keeps x and z₁, and
  when gated z_g; h and f' are computed again.

  Args:
    x: `[..., D]`.
    w1, w_gate: `[D, F]`, plain arrays, cast to the dtype of x at use. `FeedForward` takes a
      `Weight` too.
    w2: `[F, D]`.
    b1, b_gate, b2: `[F]`, `[F]` and `[D]`, or None.
    activation: f, one of `ffn.CURVES`.
    beta: scalar β of swish, z σ(βz); an array gets a gradient. None is 1.

  Raises:
    ValueError: on an unknown activation, a β of one that has none, a gate's bias without a gate,
      a `Weight`, or kernels whose shapes do not fit.
  """
  _check(x, w1, w2, w_gate, b_gate, activation, beta)
  rows = x.reshape(-1, x.shape[-1])
  # Cast out here, so that the gradients get the dtypes back without the biases being kept.
  b1, b_gate, b2 = (b if b is None else b.astype(x.dtype)[None] for b in (b1, b_gate, b2))
  beta = None if beta is None else jnp.asarray(beta, jnp.promote_types(x.dtype, jnp.float32))
  y = _block(activation, rows, (w1, w_gate, w2), (b1, b_gate, b2), beta)
  return y.reshape(*x.shape[:-1], y.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block(activation: str, x: jax.Array, kernels: Any, biases: Any, beta: Any) -> jax.Array:
  return _forward(activation, x, kernels, biases, beta)[0]


def _forward(activation: str, x: jax.Array, kernels: Any, biases: Any, beta: Any) -> Any:
  w1, w_gate, w2 = kernels
  b1, b_gate, b2 = biases
  z = _affine(x, w1, b1)
  gate = None if w_gate is None else _affine(x, w_gate, b_gate)
  z, gate = fence((z, gate))
  y = _affine(hidden(activation, z, gate, beta), w2, b2)
  # The backward pass needs to know only whether there are biases: empty trees say it.
  has = tuple(None if b is None else () for b in biases)
  return y, (x, z, gate, kernels, has, beta)


def _backward(activation: str, saved: Any, g: jax.Array) -> Any:
  x, z, gate, (w1, w_gate, w2), has, beta = saved
  # Else XLA:CPU merges the recomputation with the forward pass, and keeps its results (GELU, frozen
  # kernels, layers not scanned, 1,024 tokens at BERT-base's widths: 25 MiB per layer against 13).
  z, gate, g = fence((z, gate, g))
  h = hidden(activation, z, gate, beta)
  dh = jnp.einsum("td,fd->tf", g, w2.astype(g.dtype))
  dz, dgate, dbeta = hidden_gradients(activation, z, gate, beta, dh)
  dx = jnp.einsum("tf,df->td", dz, w1.astype(g.dtype))
  if dgate is not None:
    dx = dx + jnp.einsum("tf,df->td", dgate, w_gate.astype(g.dtype))
  pairs = ((w1, x, dz), (w_gate, x, dgate), (w2, h, g))
  outer = lambda a, delta: jnp.einsum("ti,to->io", a, delta)
  kernels = tuple(None if w is None else outer(*ab).astype(w.dtype) for w, *ab in pairs)
  deltas = zip(has, (dz, dgate, g), strict=True)
  biases = tuple(None if b is None else d.sum(0, keepdims=True) for b, d in deltas)
  return dx, kernels, biases, dbeta


_block.defvjp(_forward, _backward)


def _affine(x: jax.Array, w: jax.Array, b: jax.Array | None) -> jax.Array:
  y = x @ w.astype(x.dtype)
  return y if b is None else y + b


def _check(x: Any, w1: Any, w2: Any, w_gate: Any, b_gate: Any, activation: str, beta: Any) -> None:
  if any(map(is_weight, (w1, w2, w_gate))):
    raise ValueError("feed_forward takes plain arrays; for a Weight use the module FeedForward")
  if activation not in CURVES:
    raise ValueError(f"activation {activation!r} is none of {', '.join(CURVES)}")
  if beta is not None and activation != "swish":
    raise ValueError(f"{activation} has no beta: that is of swish, z σ(βz). Leave beta=None")
  if b_gate is not None and w_gate is None:
    raise ValueError("b_gate without w_gate: a block that is not gated has b1 and b2 only")
  width = w1.shape[-1]
  want = {"w1": (w1, (x.shape[-1], width)), "w2": (w2, (width, w2.shape[-1]))}
  if w_gate is not None:
    want["w_gate"] = w_gate, (x.shape[-1], width)
  for name, (w, shape) in want.items():
    if w.shape != shape:
      raise ValueError(f"{name} is {w.shape}; x {x.shape} and w1 {w1.shape} ask for {shape}")


class FeedForward(nn.Module):
  """`feed_forward` with its parameters: `up`, `down` and, gated, `gate`, each as in a `Linear`.

  Where the layers' parameters are plain arrays, the whole block's backward pass is the one written
  by hand. Where a method made a `Weight` of any, or put an adapter beside one, each product goes
  through `Linear`, and only the activation's derivative is by hand.

  Attributes:
    variant: one of `VARIANTS`.
    width: F. For as many parameters as an ungated block has: `gated_width(F)`.
    use_bias: in all two or three layers; Shazeer's and T5's blocks have none.
    beta: β of swish and SwiGLU, fixed or, with `learn_beta`, the initial value of the scalar
      parameter `beta`.
    learn_beta: train it.
  """

  variant: str
  width: int
  use_bias: bool = True
  beta: float = 1.0
  learn_beta: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Applies the block: `[..., D]` to `[..., D]`, in the dtype of x.

    Raises:
      ValueError: on an unknown variant, or a β of one that has none.
    """
    if self.variant not in VARIANTS:
      raise ValueError(f"variant {self.variant!r} is none of {', '.join(VARIANTS)}")
    name, gated = VARIANTS[self.variant]
    beta = self._beta(name)
    layers = ("up", "gate", "down") if gated else ("up", "down")
    params = self._plain(layers)
    if params is not None:
      w, b = ({k: params[k].get(kind) for k in layers} for kind in ("kernel", "bias"))
      gates = dict(w_gate=w.get("gate"), b_gate=b.get("gate"))
      return feed_forward(
        x, w["up"], b["up"], w["down"], b["down"], **gates, activation=name, beta=beta
      )
    z = Linear(self.width, self.use_bias, name="up")(x)
    gate = Linear(self.width, self.use_bias, name="gate")(x) if gated else None
    h = activate(name, z, gate, beta)
    return Linear(x.shape[-1], self.use_bias, name="down")(h)

  def _plain(self, layers: tuple[str, ...]) -> Mapping[str, Any] | None:
    """The parameters of `layers` if they are there, plain arrays, and no adapter beside one."""
    params = self.variables.get("params", {})
    names = {"kernel", "bias"} if self.use_bias else {"kernel"}
    if not set(layers) <= set(params) or any(set(params[k]) != names for k in layers):
      return None
    leaves = jax.tree.leaves([params[k] for k in layers], is_leaf=is_weight)
    return None if any(map(is_weight, leaves)) else params

  def _beta(self, activation: str) -> jax.Array | None:
    if activation != "swish" and (self.learn_beta or self.beta != 1.0):
      raise ValueError(f"variant {self.variant!r} has no beta; only swish and swiglu have")
    if self.learn_beta:
      return self.param("beta", nn.initializers.constant(self.beta), (), jnp.float32)
    return None if self.beta == 1.0 else jnp.float32(self.beta)
