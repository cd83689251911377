"""Claims on the gradients of a two-layer net.

z1 = W1 x + b1, a1 = f(z1), z2 = W2 a1 + b2, a2 = g(z2), for columns x, as in the text. All is in
float64 and compared with autodiff.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.claims.claim import CORRECTED, HOLDS, Finding, claim, found
from peftjax.nn.feed_forward import feed_forward

CLOSE = 1e-12


class Net(NamedTuple):
  """Parameters, an input and a target."""

  w1: jax.Array
  b1: jax.Array
  w2: jax.Array
  b2: jax.Array
  x: jax.Array
  y: jax.Array


Activation = Callable[[jax.Array], jax.Array]


def in_float64(run: Callable[[], Finding]) -> Callable[[], Finding]:
  """Runs a claim with 64-bit numbers."""

  @functools.wraps(run)
  def wide() -> Finding:
    with jax.enable_x64(True):
      return run()

  return wide


def draw(n_in: int = 7, hidden: int = 11, n_out: int = 5) -> Net:
  shapes = ((hidden, n_in), (hidden,), (n_out, hidden), (n_out,), (n_in,), (n_out,))
  keys = jax.random.split(jax.random.key(0), len(shapes))
  return Net(*(jax.random.normal(k, s, jnp.float64) for k, s in zip(keys, shapes, strict=True)))


def gelu(z: jax.Array) -> jax.Array:
  return jax.nn.gelu(z, approximate=False)


def forward(net: Net, f: Activation, g: Activation) -> tuple[jax.Array, ...]:
  z1 = net.w1 @ net.x + net.b1
  a1 = f(z1)
  z2 = net.w2 @ a1 + net.b2
  return z1, a1, z2, g(z2)


def autodiff(net: Net, f: Activation, g: Activation) -> Net:
  """Of L = |a2 − y|²."""
  return jax.grad(lambda n: jnp.square(forward(n, f, g)[-1] - n.y).sum())(net)


def slope(act: Activation, z: jax.Array) -> jax.Array:
  return jax.vmap(jax.grad(act))(z)


def error(one: Any, other: Any) -> float:
  """‖one − other‖ / ‖other‖."""
  return float(jnp.linalg.norm(one - other) / jnp.linalg.norm(other))


def delta2(net: Net, f: Activation, g: Activation) -> jax.Array:
  """∂L/∂a2 ⊙ g'(z2), as the text has it."""
  _, _, z2, a2 = forward(net, f, g)
  return 2 * (a2 - net.y) * slope(g, z2)


@claim(
  says="For L = (a2 − y)², ∂L/∂a2 = 2(a2 − y).",
  measured_by="against autodiff in float64",
  holds_if="relative error under 1e-12",
  expected=HOLDS,
)
@in_float64
def squared_error() -> Finding:
  net = draw()
  a2 = forward(net, gelu, jnp.tanh)[-1]
  off = error(2 * (a2 - net.y), jax.grad(lambda a: jnp.square(a - net.y).sum())(a2))
  return found({"relative error": off}, holds=off < CLOSE)


@claim(
  says="∂L/∂W2 = (∂L/∂a2 ⊙ g'(z2)) a1ᵀ.",
  measured_by="against autodiff in float64: f is GELU, g is tanh",
  holds_if="relative error under 1e-12",
  expected=HOLDS,
)
@in_float64
def output_weights() -> Finding:
  net = draw()
  a1 = forward(net, gelu, jnp.tanh)[1]
  off = error(jnp.outer(delta2(net, gelu, jnp.tanh), a1), autodiff(net, gelu, jnp.tanh).w2)
  return found({"relative error": off}, holds=off < CLOSE)


@claim(
  says="The output activation's part is ⊙ g'(z2), whatever g.",
  measured_by="error of ∂L/∂W2 with g = tanh, and with g = softmax, where g' is the diagonal of its"
  " Jacobian",
  holds_if="both under 1e-12; mended if tanh's is",
  expected=CORRECTED,
)
@in_float64
def softmax_output() -> Finding:
  net = draw()
  _, a1, z2, a2 = forward(net, gelu, jax.nn.softmax)
  diagonal = jnp.diagonal(jax.jacobian(jax.nn.softmax)(z2))
  by_text = jnp.outer(2 * (a2 - net.y) * diagonal, a1)
  off = error(by_text, autodiff(net, gelu, jax.nn.softmax).w2)
  fine = error(jnp.outer(delta2(net, gelu, jnp.tanh), a1), autodiff(net, gelu, jnp.tanh).w2)
  return found(
    {"with tanh": fine, "with softmax": off},
    holds=max(off, fine) < CLOSE,
    mended=fine < CLOSE,
    correction="for a g that acts entry by entry; softmax needs its whole Jacobian, Jᵀ ∂L/∂a2",
  )


@claim(
  says="∂z2/∂a1 is W2ᵀ.",
  measured_by="the Jacobian by autodiff, against W2 and W2ᵀ (5 outputs, 11 hidden)",
  holds_if="the Jacobian is W2ᵀ; mended if it is W2, which is the same in the layout that writes"
  " ∂L/∂a1 = (∂z2/∂a1) δ2",
  expected=CORRECTED,
)
@in_float64
def jacobian() -> Finding:
  net = draw()
  found_jacobian = jax.jacobian(lambda a1: net.w2 @ a1 + net.b2)(jnp.ones(net.w2.shape[1]))
  is_w2 = found_jacobian.shape == net.w2.shape and bool((found_jacobian == net.w2).all())
  return found(
    {"rows": found_jacobian.shape[0], "columns": found_jacobian.shape[1], "equals W2": is_w2},
    holds=found_jacobian.shape == net.w2.T.shape,
    mended=is_w2,
    correction="the Jacobian is W2; W2ᵀ is its transpose, the one that ∂L/∂a1 is multiplied by",
  )


@claim(
  says="∂L/∂a1 = (W2ᵀ)ᵀ (∂L/∂a2 ⊙ g'(z2)).",
  measured_by="whether the shapes multiply (5 outputs, 11 hidden); where they do (9 and 9), the"
  " error against autodiff; and with W2ᵀ",
  holds_if="they multiply and the error is under 1e-12; mended if W2ᵀ's is",
  expected=CORRECTED,
)
@in_float64
def superfluous_transpose() -> Finding:
  def right(net: Net) -> jax.Array:
    of_a1 = lambda a1: jnp.square(jnp.tanh(net.w2 @ a1 + net.b2) - net.y).sum()
    return jax.grad(of_a1)(forward(net, gelu, jnp.tanh)[1])

  net, square = draw(), draw(hidden=9, n_out=9)
  fits = net.w2.T.T.shape[1] == delta2(net, gelu, jnp.tanh).shape[0]
  twice = error(square.w2.T.T @ delta2(square, gelu, jnp.tanh), right(square))
  once = error(net.w2.T @ delta2(net, gelu, jnp.tanh), right(net))
  return found(
    {"shapes multiply": fits, "error, square net": twice, "error of W2ᵀ": once},
    holds=fits and twice < CLOSE,
    mended=once < CLOSE,
    correction="one transpose too many: it is W2ᵀ δ2",
  )


@claim(
  says="∂L/∂W1 = (…(∂L/∂a2 ⊙ g'(z2)) ⊙ f'(z1)) xᵀ: the next layer's gradient through its transposed"
  " weights, this layer's slope, this layer's input.",
  measured_by="with W2ᵀ, against autodiff in float64: f is GELU and ReLU, g is tanh; also ∂L/∂b1"
  " and ∂L/∂b2, the same without xᵀ and a1ᵀ",
  holds_if="relative errors under 1e-12",
  expected=HOLDS,
)
@in_float64
def hidden_weights() -> Finding:
  net, numbers = draw(), {}
  for name, f in (("GELU", gelu), ("ReLU", jax.nn.relu)):
    back = delta2(net, f, jnp.tanh)
    delta1 = (net.w2.T @ back) * slope(f, forward(net, f, jnp.tanh)[0])
    grads = autodiff(net, f, jnp.tanh)
    numbers[f"{name}, W1"] = error(jnp.outer(delta1, net.x), grads.w1)
    numbers[f"{name}, biases"] = max(error(delta1, grads.b1), error(back, grads.b2))
    numbers[f"{name}, peftjax.nn.feed_forward"] = error(_library(net, name.lower()), grads.w1)
  return found(numbers, holds=max(numbers.values()) < CLOSE)


def _library(net: Net, activation: str) -> jax.Array:
  """∂L/∂W1 by the hand-written backward pass of our feed-forward block, which has rows x."""

  def of(w1: jax.Array) -> jax.Array:
    z2 = feed_forward(net.x[None], w1.T, net.b1, net.w2.T, net.b2, activation=activation)[0]
    return jnp.square(jnp.tanh(z2) - net.y).sum()

  return jax.grad(of)(net.w1)


CLAIMS = (
  squared_error,
  output_weights,
  softmax_output,
  jacobian,
  superfluous_transpose,
  hidden_weights,
)
