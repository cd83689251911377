"""Claims on the gradients of a two-layer net.

z1 = W1 x + b1, a1 = f(z1), z2 = W2 a1 + b2, a2 = g(z2), for columns x, as in the text. All is in
float64 and compared with autodiff.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.claims.claim import CORRECTED, HOLDS, Finding, claim, found
from experiments.claims.float64 import CLOSE, error, in_float64
from peftjax.nn.feed_forward import feed_forward


class Net(NamedTuple):
  """Parameters, an input and a target."""

  w1: jax.Array
  b1: jax.Array
  w2: jax.Array
  b2: jax.Array
  x: jax.Array
  y: jax.Array


Activation = Callable[[jax.Array], jax.Array]


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
  """The gradients of L = |a2 − y|²."""
  return jax.grad(lambda n: jnp.square(forward(n, f, g)[-1] - n.y).sum())(net)


def slope(act: Activation, z: jax.Array) -> jax.Array:
  return jax.vmap(jax.grad(act))(z)


def delta2(net: Net, f: Activation, g: Activation) -> jax.Array:
  """∂L/∂a2 ⊙ g'(z2), as in the text."""
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
  says="∂L/∂z1 = ∂L/∂a1 ⊙ f'(z1) and ∂L/∂W1 = ∂L/∂z1 xᵀ.",
  measured_by="from autodiff's ∂L/∂a1, against autodiff in float64: f is GELU and ReLU, g is tanh;"
  " also ∂L/∂b1 = ∂L/∂z1, and the hand-written backward pass of peftjax.nn.feed_forward",
  holds_if="relative errors under 1e-12",
  expected=HOLDS,
)
@in_float64
def hidden_layer() -> Finding:
  net, numbers = draw(), {}
  for name, f in (("GELU", gelu), ("ReLU", jax.nn.relu)):
    delta1 = to_hidden(net, f) * slope(f, forward(net, f, jnp.tanh)[0])
    grads = autodiff(net, f, jnp.tanh)
    numbers[f"{name}, W1"] = error(jnp.outer(delta1, net.x), grads.w1)
    numbers[f"{name}, b1"] = error(delta1, grads.b1)
    numbers[f"{name}, peftjax.nn.feed_forward"] = error(_library(net, name.lower()), grads.w1)
  return found(numbers, holds=max(numbers.values()) < CLOSE)


def to_hidden(net: Net, f: Activation) -> jax.Array:
  """∂L/∂a1 by autodiff."""
  of_a1 = lambda a1: jnp.square(jnp.tanh(net.w2 @ a1 + net.b2) - net.y).sum()
  return jax.grad(of_a1)(forward(net, f, jnp.tanh)[1])


@claim(
  says="∂L/∂a1 = (W2ᵀ)ᵀ (∂L/∂a2 ⊙ g'(z2)), and so ∂L/∂W1 = ((W2ᵀ)ᵀ (∂L/∂a2 ⊙ g'(z2)) ⊙ f'(z1)) xᵀ.",
  measured_by="whether the shapes multiply (5 outputs, 11 hidden); where they do (9 and 9), the"
  " errors against autodiff in float64; and with W2ᵀ: f is GELU, g is tanh",
  holds_if="they multiply and the errors are under 1e-12; mended if W2ᵀ's are",
  expected=CORRECTED,
)
@in_float64
def hidden_weights() -> Finding:
  net, square = draw(), draw(hidden=9, n_out=9)
  fits = net.w2.T.T.shape[1] == delta2(net, gelu, jnp.tanh).shape[0]
  printed, mended = _errors(square, square.w2.T.T), _errors(net, net.w2.T)
  return found(
    {
      "shapes multiply": fits,
      "∂L/∂a1, square net": printed[0],
      "∂L/∂W1, square net": printed[1],
      "∂L/∂a1 with W2ᵀ": mended[0],
      "∂L/∂W1 with W2ᵀ": mended[1],
    },
    holds=fits and max(printed) < CLOSE,
    mended=max(mended) < CLOSE,
    correction="one transpose too many: it is W2ᵀ (∂L/∂a2 ⊙ g'(z2))",
  )


def _errors(net: Net, back: jax.Array) -> tuple[float, float]:
  """The errors of ∂L/∂a1 = back δ2, and of ∂L/∂W1 made from it."""
  to_a1 = back @ delta2(net, gelu, jnp.tanh)
  to_w1 = jnp.outer(to_a1 * slope(gelu, forward(net, gelu, jnp.tanh)[0]), net.x)
  return error(to_a1, to_hidden(net, gelu)), error(to_w1, autodiff(net, gelu, jnp.tanh).w1)


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
  hidden_layer,
  hidden_weights,
)
