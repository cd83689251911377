"""Claims on ReLU and GELU, in nets trained on real text."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import log_ndtr, ndtr

import peftjax as pj
from experiments import timing
from experiments.claims import characters, cost, sample_models
from experiments.claims.claim import CORRECTED, HOLDS, Finding, by_test, claim, found
from peftjax.nn import ffn

FAST = 1e-2  # a learning rate at which units die


def slope(act: Callable[[jax.Array], jax.Array], z: Any) -> jax.Array:
  """act'(z), entry by entry."""
  z = jnp.asarray(z, jnp.float32)
  return jax.vjp(act, z)[1](jnp.ones_like(z))[0]


@functools.cache
def test_rows() -> jax.Array:
  return characters.rows_of(characters.texts("bbc").test, 20_000, seed=1)


@functools.cache
def pre_activations(variant: str, rate: float) -> jax.Array:
  """Pre-activations [20000, F] of a net trained at that rate, on held-out text."""
  params = characters.trained(variant, rate)
  return characters.before_activation(params, characters.features(params, test_rows()[:, :-1]))


def silent_units(variant: str, rate: float) -> float:
  """Share of units whose activation has a slope of exactly 0 on every held-out text."""
  act = characters.VARIANTS[variant][0]
  return float((slope(act, pre_activations(variant, rate)) == 0).all(0).mean())


ffn_formula = by_test(
  "activations.ffn_formula",
  says="The first Transformer's feed-forward block is FFN(x) = max(0, x W1 + b1) W2 + b2.",
  tests=("tests/nn/feed_forward_test.py::test_backward_by_hand_is_autodiffs",),
)


@claim(
  says="The slope of ReLU is 1 for every positive input and 0 for every negative one.",
  measured_by="autodiff of jax.nn.relu at 20,001 points of [-10, 10]; x = 0 apart",
  holds_if="no point deviates",
  expected=HOLDS,
)
def relu_slope() -> Finding:
  z = np.linspace(-10, 10, 20_001, dtype=np.float32)
  z = z[z != 0]
  off = int((np.asarray(slope(jax.nn.relu, z)) != (z > 0)).sum())
  return found(
    {"deviating points": off, "slope at 0": float(slope(jax.nn.relu, 0.0))}, holds=off == 0
  )


@claim(
  says="Sigmoid's and tanh's slopes go to 0 at large inputs, positive or negative; ReLU passes"
  " gradients undiminished through many layers.",
  measured_by="slopes at ±5, the larger of the two; and gradient norm at the first of 24 layers"
  " over that at the last, fresh nets of width 256 (He's init for ReLU, Glorot's else), features of"
  " news",
  holds_if="both slopes are under 0.01 and ReLU's ratio is in [0.1, 10]",
  expected=HOLDS,
)
def vanishing_gradients() -> Finding:
  x_BD = characters.features(characters.init("relu"), test_rows()[:256, :-1])
  x_BD = x_BD / x_BD.std()
  nets = {"ReLU": (jax.nn.relu, 2.0), "sigmoid": (jax.nn.sigmoid, 1.0), "tanh": (jnp.tanh, 1.0)}
  ratio = {
    f"{name}, first over last": _first_over_last(act, gain, x_BD)
    for name, (act, gain) in nets.items()
  }
  slopes = {
    f"{name}'(±5)": float(slope(nets[name][0], [-5.0, 5.0]).max()) for name in ("sigmoid", "tanh")
  }
  return found(
    {**slopes, **ratio},
    holds=max(slopes.values()) < 0.01 and 0.1 <= ratio["ReLU, first over last"] <= 10,
  )


def _first_over_last(act: Callable[[jax.Array], jax.Array], gain: float, x_BD: jax.Array) -> float:
  width = x_BD.shape[1]
  draw = lambda key: jax.random.normal(key, (width, width)) * (gain / width) ** 0.5
  layers = [draw(key) for key in jax.random.split(jax.random.key(0), 24)]

  def output(layers: list[jax.Array]) -> jax.Array:
    h = x_BD
    for w in layers:
      h = act(h @ w)
    return jnp.square(h).mean()

  grads = jax.grad(output)(layers)
  return float(jnp.linalg.norm(grads[0]) / jnp.linalg.norm(grads[-1]))


@claim(
  says="ReLU is a mere comparison, without exponentials or powers, which makes training and"
  " inference very fast.",
  measured_by="what the compiler counts: exponentials and the like an entry, ReLU and GELU; and"
  " operations of ReLU's over GELU's, alone and in a whole feed-forward block [512, 256 → 1024 →"
  " 256]. Times over GELU's are shown",
  holds_if="ReLU has no exponentials and under 0.85 of GELU's operations, alone and in the block;"
  " mended if alone",
  expected=CORRECTED,
)
def relu_speed() -> Finding:
  x = jax.random.normal(jax.random.key(0), (512, 1024))
  small, up = x[:, :256], x[:256] / 16
  acts = (jax.nn.relu, ffn.gelu)
  relu, gelu = (jax.jit(act).lower(x).compile() for act in acts)
  blocks = [jax.jit(lambda x, act=act: act(x @ up) @ up.T).lower(small).compile() for act in acts]
  one, other, one_block, other_block = map(cost.of, (relu, gelu, *blocks))
  alone, inside = one.flops / other.flops, one_block.flops / other_block.flops
  times = timing.medians([functools.partial(run, x) for run in (relu, gelu)], uncounted=1)
  block_times = timing.medians([functools.partial(run, small) for run in blocks], uncounted=1)
  cheap = one.transcendentals == 0 and alone < 0.85
  return found(
    {
      "exponentials, ReLU": one.transcendentals / x.size,
      "exponentials, GELU": other.transcendentals / x.size,
      "operations, alone": alone,
      "operations, block": inside,
      "time, alone": times[0] / times[1],
      "time, block": block_times[0] / block_times[1],
    },
    holds=cheap and inside < 0.85,
    mended=cheap,
    correction="alone yes; next to the block's two products it hardly counts",
  )


@claim(
  says="ReLU makes part of the neurons 'die' (output 0), which makes activations sparse.",
  measured_by="trained net, 20,000 held-out contexts: share of zeros, and of units that are 0 on"
  " all of them",
  holds_if="over 30 % zeros, and some units are dead; mended if zeros alone",
  expected=CORRECTED,
)
def relu_sparsity() -> Finding:
  z = pre_activations("relu", 3e-3)
  zeros, dead = float((z <= 0).mean()), float((z <= 0).all(0).mean())
  return found(
    {"share of zeros": zeros, "share of dead units": dead},
    holds=zeros > 0.3 and dead > 0,
    mended=zeros > 0.3,
    correction="sparse, but a unit that is 0 on one text is not dead: it fires on others",
  )


@claim(
  says="A ReLU unit whose input is always negative never gets a gradient and never learns again.",
  measured_by="net trained at rate 0.01 until units are off on all 20,000 held-out contexts; their"
  " gradients there, and their weights after 50 more steps of Adam on these",
  holds_if="there are such units, and both their gradient and their movement are exactly 0",
  expected=HOLDS,
)
def dying_relu() -> Finding:
  params, rows = characters.trained("relu", FAST), test_rows()
  dead = np.asarray((pre_activations("relu", FAST) <= 0).all(0))
  mask = jax.tree.map(lambda _: False, params)
  mask["block"] = jax.tree.map(lambda _: True, params["block"])
  train, frozen = pj.partition(params, mask)
  grad = jax.grad(lambda t: characters.loss("relu", pj.combine(t, frozen), rows))(train)
  tx = characters.adam(1e-3)
  again = rows[:12_800].reshape(50, 256, -1)
  after, _, _ = characters.run("relu", tx, train, frozen, tx.init(train), again)
  up = lambda tree: tree["block"]["up"]["kernel"]
  moved = np.abs(np.asarray(up(after) - up(train))).max(0)
  off = float(np.abs(np.asarray(up(grad)))[:, dead].max(initial=0.0))
  still = float(moved[dead].max(initial=0.0))
  return found(
    {
      "dead units": dead.sum(),
      "of": dead.size,
      "largest gradient": off,
      "largest movement": still,
      "median movement of the others": np.median(moved[~dead]),
    },
    holds=bool(dead.any()) and off == 0 and still == 0,
  )


@claim(
  says="ReLU's outputs are not centred at zero.",
  measured_by="mean over standard deviation of the hidden layer, held-out text, ReLU and GELU",
  holds_if="ReLU's is above 0.1",
  expected=HOLDS,
)
def relu_mean() -> Finding:
  h = {v: characters.VARIANTS[v][0](pre_activations(v, 3e-3)) for v in ("relu", "gelu")}
  share = {name: float(x.mean() / x.std()) for name, x in h.items()}
  return found(share, holds=share["relu"] > 0.1)


gelu_formula = by_test(
  "activations.gelu_formula",
  says="GELU(x) = x Φ(x) with Φ(x) = (1 + erf(x/√2))/2, the normal distribution function.",
  tests=(
    "tests/nn/layers_test.py::test_gelu_and_its_derivative_in_float32_and_tightly_in_float64",
  ),
)


@claim(
  says="GELU ≈ 0.5 x (1 + tanh(√(2/π)(x + 0.044715 x³))).",
  measured_by="largest difference in float64, 200,001 points of [-10, 10]; and of the slopes",
  holds_if="values differ by less than 1e-3",
  expected=HOLDS,
)
def gelu_tanh() -> Finding:
  x = np.linspace(-10, 10, 200_001)
  approximate = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
  off = np.abs(approximate - x * ndtr(x))
  slopes = np.gradient(approximate, x) - np.gradient(x * ndtr(x), x)
  return found(
    {"largest error": off.max(), "at |x|": abs(x[off.argmax()]), "of slopes": abs(slopes).max()},
    holds=bool(off.max() < 1e-3),
  )


@claim(
  says="GELU is the input times a random 0/1 mask, kept with probability Φ(x): more often the"
  " larger it is.",
  measured_by="mean of x·m, m ~ Bernoulli(Φ(x)), over 100,000 draws at 81 points of [-4, 4],"
  " in standard errors from GELU",
  holds_if="GELU is within 4.5 errors everywhere and is itself deterministic; mended if only its"
  " mean is meant",
  expected=CORRECTED,
)
def gelu_bernoulli() -> Finding:
  x = np.linspace(-4, 4, 81)
  kept = np.random.default_rng(0).binomial(100_000, ndtr(x)) / 100_000
  error = np.abs(x) * np.sqrt(ndtr(x) * (1 - ndtr(x)) / 100_000)
  off = np.abs(x * kept - np.asarray(ffn.gelu(jnp.asarray(x, jnp.float32))))
  z = (off / np.maximum(error, 1e-12))[error > 0].max()
  twice = np.asarray(ffn.gelu(jnp.asarray([x, x], jnp.float32)))
  random = float(np.abs(twice[0] - twice[1]).max())
  return found(
    {"largest, in standard errors": z, "difference of two calls": random},
    holds=bool(z < 4.5) and random > 0,
    mended=bool(z < 4.5),
    correction="it is that product's mean, E[x·Bernoulli(Φ(x))]; nothing in it is random",
  )


@claim(
  says="Where inputs are negative GELU has outputs and slopes that are not zero.",
  measured_by="pretrained MiniLM on news: share of its negative pre-activations where the slope is"
  " exactly 0 (ReLU's is on all of them), and where it is below 1e-3",
  holds_if="exactly 0 on less than 0.1 %",
  expected=HOLDS,
)
def gelu_negative() -> Finding:
  z = minilm_pre_activations()
  z = z[z < 0]
  size = jnp.abs(slope(ffn.gelu, z))
  gone, faint = float((size == 0).mean()), float((size < 1e-3).mean())
  return found(
    {
      "share with slope 0": gone,
      "share with |slope| < 1e-3": faint,
      "median |slope|": float(jnp.median(size)),
      "lowest pre-activation": float(z.min()),
    },
    holds=gone < 1e-3,
  )


@functools.cache
def minilm_pre_activations() -> jax.Array:
  """Pre-activations of all six layers on 16 texts, real tokens only, `[n]`."""
  model, params = sample_models.minilm()
  rows = sample_models.batch(0)
  seen = lambda module, _: module.name == "dense" and "intermediate" in module.path
  args = (rows.tokens, rows.mask)
  _, kept = model.apply(
    {"params": params}, *args, capture_intermediates=seen, mutable=["intermediates"]
  )
  layers = jax.tree.leaves(kept["intermediates"])
  return jnp.concatenate([z[rows.mask].ravel() for z in layers])


@claim(
  says="GELU does not let units die as ReLU does; nor does SwiGLU.",
  measured_by="nets trained at rate 0.01 and at 0.1: share of units with slope exactly 0 on all"
  " 20,000 held-out contexts",
  holds_if="under 1 % at both rates; mended if at 0.01 alone, where over 10 % of ReLU's are dead",
  expected=CORRECTED,
)
def gelu_units_live() -> Finding:
  share = {
    f"{name} at {rate}": silent_units(name, rate)
    for rate in (FAST, 0.1)
    for name in ("relu", "gelu", "swiglu")
  }
  fine = share["relu at 0.01"] > 0.1 and max(share["gelu at 0.01"], share["swiglu at 0.01"]) < 0.01
  lasting = max(share["gelu at 0.1"], share["swiglu at 0.1"]) < 0.01
  return found(
    {**share, "log10 of Φ(-14)": log_ndtr(-14.0) / np.log(10)},
    holds=fine and lasting,
    mended=fine,
    correction="it helps up to a point: pushed far enough left (x < -14 or so for GELU) the slope"
    " is 0 in float32",
  )


CLAIMS = (
  ffn_formula,
  relu_slope,
  vanishing_gradients,
  relu_speed,
  relu_sparsity,
  dying_relu,
  relu_mean,
  gelu_formula,
  gelu_tanh,
  gelu_bernoulli,
  gelu_negative,
  gelu_units_live,
)
