"""Claims on how LoRA begins: A random, B zero."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import peftjax as pj
from experiments.claims import characters, sample_models
from experiments.claims.claim import CORRECTED, HOLDS, Finding, by_test, claim, found
from experiments.claims.float64 import CLOSE, error, in_float64
from peftjax.core import paths
from peftjax.methods.lora_weight import LoRA

RANK = 4


@functools.cache
def method() -> Any:
  return pj.lora(rank=RANK, alpha=RANK, targets=["up", "down"])


@functools.cache
def attached() -> Any:
  """The characters' model, trained on news, with fresh LoRA."""
  return method().attach(jax.random.key(0), characters.trained("gelu"))


def factors(params: Any, name: str) -> np.ndarray:
  """All of A ("a") or B ("b") as one row of numbers."""
  leaves = [x for x in paths.leaves(params).values() if isinstance(x, LoRA)]
  return np.concatenate([np.asarray(getattr(x, name)).ravel() for x in leaves])


def steps(params: Any, tx: Any, count: int) -> Any:
  """The parameters after `count` steps on the sentiment corpus."""
  train, frozen = pj.partition(params, method().trainable(params))
  rows = characters.batches("sentiment", count, seed=0)
  train = characters.run("gelu", tx, train, frozen, tx.init(train), rows)[0]
  return pj.combine(train, frozen)


def moved(before: Any, after: Any, name: str) -> float:
  return float(np.abs(factors(after, name) - factors(before, name)).max())


def filled(params: Any, name: str, value: Any) -> Any:
  """`params` with A or B replaced by `value(array)`."""
  change = lambda x: x.replace(**{name: value(getattr(x, name))}) if isinstance(x, LoRA) else x
  return paths.map_leaves(lambda _, x: change(x), params)


initial_factors = by_test(
  "beginning.initial_factors",
  says="A is drawn from a Gaussian, say, or as Kaiming He has it; B is zero.",
  tests=(
    "tests/methods/lora_test.py::test_kaiming_draws_a_from_the_uniform_of_one_over_root_in",
    "tests/methods/lora_test.py::test_gaussian_draws_a_with_deviation_one_over_rank",
  ),
)


@claim(
  says="∇_B ∝ (∇_L)(A x)ᵀ and ∇_A ∝ Bᵀ (∇_L) xᵀ.",
  measured_by="with the factor s = α/r, summed over 32 columns x, against autodiff through LoRA"
  " in float64: B not zero; and the norm of ∇_A where it is",
  holds_if="relative errors under 1e-12, and the norm is 0",
  expected=HOLDS,
)
@in_float64
def gradients() -> Finding:
  keys = jax.random.split(jax.random.key(0), 4)
  w, x, y, b = (
    jax.random.normal(key, shape, jnp.float64)
    for key, shape in zip(keys, ((9, 7), (32, 9), (32, 7), (7, 3)), strict=True)
  )
  fresh = pj.lora(rank=3, alpha=6, targets=["w"], dtype=jnp.float64)
  leaf = fresh.attach(jax.random.key(1), {"w": w})["w"]

  def loss(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.square(pj.einsum("ti,io->to", x, leaf.replace(a=a, b=b)) - y).sum()

  grads = jax.grad(loss, (0, 1))(leaf.a, b)
  delta = 2 * (x @ w + leaf.scale * x @ leaf.a.T @ b.T - y)
  numbers = {
    "∇_B": error(leaf.scale * delta.T @ (x @ leaf.a.T), grads[1]),
    "∇_A": error(leaf.scale * b.T @ delta.T @ x, grads[0]),
  }
  norm = float(jnp.linalg.norm(jax.grad(loss)(leaf.a, leaf.b)))
  return found({**numbers, "‖∇_A‖, B = 0": norm}, holds=max(numbers.values()) < CLOSE and norm == 0)


identity = by_test(
  "beginning.identity",
  says="At t = 0 the model with LoRA is exactly the pretrained one.",
  tests=("tests/method_contract_test.py::test_law_1_attach_is_the_identity_on_outputs",),
)


@claim(
  says="That spares the start the jump that random adapters would make.",
  measured_by="perplexity of SmolLM2 on held-out news (512 tokens) with LoRA r = 8, α = 16 on all"
  " linear layers: B = 0, and B drawn as A is",
  holds_if="a random B at least doubles it",
  expected=HOLDS,
)
def random_start() -> Finding:
  model, params = sample_models.smollm2()
  layout = pj.linen.layout(model, sample_models.prose())
  everywhere = pj.lora(rank=8, alpha=16, targets="all-linear")
  fresh = everywhere.attach(jax.random.key(0), params, layout)

  def draw(path: str, leaf: Any) -> Any:
    if not isinstance(leaf, LoRA):
      return leaf
    bound = 1 / leaf.b.shape[-1] ** 0.5
    key = paths.fold_in_path(jax.random.key(1), path)
    return leaf.replace(b=jax.random.uniform(key, leaf.b.shape, minval=-bound, maxval=bound))

  zero, drawn = (sample_models.perplexity(p) for p in (fresh, paths.map_leaves(draw, fresh)))
  return found({"B = 0": zero, "random B": drawn}, holds=drawn > 2 * zero)


@claim(
  says="In the first step only B has a gradient and moves; from the second on A does too.",
  measured_by="largest movement of A and of B by Adam without decay, characters' model on new"
  " texts",
  holds_if="A: 0 after step 1 and not after step 2; B: not 0 after step 1",
  expected=HOLDS,
)
def first_steps() -> Finding:
  start, tx = attached(), characters.adam(1e-3)
  one, two = steps(start, tx, 1), steps(start, tx, 2)
  numbers = {
    "A, step 1": moved(start, one, "a"),
    "B, step 1": moved(start, one, "b"),
    "A, step 2": moved(start, two, "a"),
  }
  return found(
    numbers, holds=numbers["A, step 1"] == 0 and min(numbers["B, step 1"], numbers["A, step 2"]) > 0
  )


@claim(
  says="So A is not updated in the first step.",
  measured_by="largest movement of A in step 1 by AdamW, the usual optimizer, weight decay 0.01",
  holds_if="0; mended if it is what the decay alone does",
  expected=CORRECTED,
)
def decay_moves_a() -> Finding:
  start, rate, decay = attached(), 1e-3, 0.01
  one = steps(start, optax.adamw(rate, weight_decay=decay), 1)
  shift, alone = moved(start, one, "a"), rate * decay * float(np.abs(factors(start, "a")).max())
  return found(
    {"moved": shift, "decay alone": alone},
    holds=shift == 0,
    mended=abs(shift / alone - 1) < 0.1,
    correction="not by its gradient, which is 0; weight decay shrinks it all the same",
  )


@claim(
  says="If A and B were both zero the adapter would never learn.",
  measured_by="largest |A| and |B| after 200 steps of Adam from zero and zero; |B| from the usual"
  " start",
  holds_if="both exactly 0, and the usual start moves",
  expected=HOLDS,
)
def zero_and_zero() -> Finding:
  tx = characters.adam(1e-3)
  end = steps(filled(attached(), "a", jnp.zeros_like), tx, 200)
  a, b = (float(np.abs(factors(end, name)).max()) for name in ("a", "b"))
  usual = float(np.abs(factors(steps(attached(), tx, 200), "b")).max())
  return found({"|A|": a, "|B|": b, "|B|, usual": usual}, holds=a == b == 0 and usual > 0)


@claim(
  says="A has to be random to break the symmetry.",
  measured_by="numerical rank of B A (r = 4) after 200 steps, every row of A the same, and random",
  holds_if="the rank stays 1, and is 4 from a random A",
  expected=HOLDS,
)
def symmetry() -> Finding:
  tx = characters.adam(1e-3)
  same = filled(attached(), "a", lambda a: jnp.broadcast_to(a[:1], a.shape))
  numbers = {
    "equal rows": _rank(steps(same, tx, 200)),
    "random": _rank(steps(attached(), tx, 200)),
  }
  return found(numbers, holds=numbers == {"equal rows": 1, "random": RANK})


def _rank(params: Any) -> int:
  """The rank of ΔW of the first block's `up`: singular values over 1e-5 of the largest."""
  weight = params["block"]["up"]["kernel"]
  s = np.linalg.svd(np.asarray(weight.b @ weight.a), compute_uv=False)
  return int((s > 1e-5 * s[0]).sum())


CLAIMS = (
  initial_factors,
  identity,
  random_start,
  gradients,
  first_steps,
  decay_moves_a,
  zero_and_zero,
  symmetry,
)
