"""Claims on SwiGLU and gated feed-forward blocks."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import peftjax as pj
from experiments.claims import characters, cost, sample_models
from experiments.claims.activations import test_rows
from experiments.claims.claim import CORRECTED, FAILS, HOLDS, Finding, by_test, claim, found
from experiments.claims.float64 import error
from peftjax.data import samples
from peftjax.models import configuration, llama
from peftjax.nn import feed_forward, ffn

SEEDS = (0, 1, 2, 3)


@claim(
  says="Today's language models have GELU or SwiGLU where the first Transformer had ReLU.",
  measured_by="the activation that MiniLM's file asks for; SmolLM2's names none: its perplexity on"
  " held-out news by the activation of its blocks",
  holds_if="MiniLM does not ask for ReLU, and SmolLM2 is worse with it than with Swish or GELU",
  expected=HOLDS,
)
def no_relu_today() -> Finding:
  named = configuration.config_of(samples.model("minilm"))["hidden_act"]
  acts = {"Swish": jax.nn.silu, "GELU": ffn.gelu, "ReLU": jax.nn.relu}
  perplexity = {name: _perplexity_with(act) for name, act in acts.items()}
  return found(
    {
      "MiniLM has GELU": named == "gelu",
      **{f"SmolLM2, {name}": value for name, value in perplexity.items()},
    },
    holds=named != "relu" and min(perplexity, key=lambda name: perplexity[name]) != "ReLU",
  )


def _perplexity_with(act: Callable[[jax.Array], jax.Array]) -> float:
  """The perplexity of SmolLM2 with that activation in its gates."""

  def block(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    module = context.module
    # A scan traces its body without parameters first, for its shapes.
    if not isinstance(module, llama.Mlp) or not module.has_variable("params", "gate_proj"):
      return call(*args, **kwargs)
    w_gate, w_up, w_down = kernels(module.variables["params"])
    return act(args[0] @ w_gate) * (args[0] @ w_up) @ w_down

  with nn.intercept_methods(block):
    return sample_models.perplexity_now(sample_models.smollm2()[1])


def kernels(layer: Any) -> tuple[jax.Array, ...]:
  """W_gate, W_up and W_down of a block of SmolLM2."""
  return tuple(layer[name]["kernel"] for name in ("gate_proj", "up_proj", "down_proj"))


swiglu_formula = by_test(
  "gated.swiglu_formula",
  says="SwiGLU(x) = Swish_β(x W + b) ⊗ (x V + c) with Swish_β(x) = x σ(βx).",
  tests=("tests/nn/feed_forward_test.py::test_backward_by_hand_is_autodiffs",),
)


@claim(
  says="With SwiGLU the hidden width is enlarged, by 2/3 say.",
  measured_by="parameters of a block at full and at 2/3 width, over an ungated one's (D = 4096,"
  " F = 4 D); and Llama-7B's width, 11008, over 4 D",
  holds_if="the ratio at a larger width than F is 1 ± 0.01; mended if it is at 2/3 of it",
  expected=CORRECTED,
)
def gated_width() -> Finding:
  d, f = 4096, 4 * 4096
  ratio = lambda gated: 3 * d * gated / (2 * d * f)
  shrunk = ratio(feed_forward.gated_width(f))
  return found(
    {
      "at 5/3 F": ratio(round(5 / 3 * f)),
      "at F": ratio(f),
      "at 2/3 F": shrunk,
      "Llama-7B, of 4 D": 11008 / f,
    },
    holds=abs(ratio(round(5 / 3 * f)) - 1) < 0.01,
    mended=abs(shrunk - 1) < 0.01,
    correction="it shrinks to 2/3: three matrices instead of two, at equal parameters",
  )


@claim(
  says="The hidden layer is split in two: one part goes through Swish, the other is the gate."
  " FFN(x) = (Swish(x W1) ⊗ x W2) W3.",
  measured_by="SmolLM2's block against halves of one layer's output, x [W1 W2]: with `gate_proj`"
  " going through Swish, and with the other part",
  holds_if="relative error under 1e-4 with the other part; mended if with `gate_proj`",
  expected=CORRECTED,
)
def swiglu_block() -> Finding:
  model, params = sample_models.smollm2()
  layer = jax.tree.map(lambda x: x[0], params["model"]["layers"]["mlp"])
  w_gate, w_up, w_down = kernels(layer)
  x = jax.random.normal(jax.random.key(0), (1, 8, model.config.width))
  own: Any = llama.Mlp(model.config).apply({"params": layer}, x)

  def off(w1: jax.Array, w2: jax.Array) -> float:
    one, two = jnp.split(x @ jnp.concatenate([w1, w2], 1), 2, -1)
    return error(jax.nn.silu(one) * two @ w_down, own)

  through_swish, bare = off(w_gate, w_up), off(w_up, w_gate)
  return found(
    {"error, Swish on `gate_proj`": through_swish, "on the other part": bare},
    holds=bare < 1e-4,
    mended=through_swish < 1e-4,
    correction="split in two, yes, but the part through Swish is the gate",
  )


@claim(
  says="A gate of 0 lets nothing through and a gate of 1 all of it.",
  measured_by="SmolLM2's gates Swish(x W) on held-out news, six layers: share outside [0, 1]",
  holds_if="under 1 % are outside [0, 1]; mended if a gate of 0 does block",
  expected=CORRECTED,
)
def gates_in_unit_interval() -> Finding:
  gates = np.asarray(_gates())
  outside = float(((gates < 0) | (gates > 1)).mean())
  blocked = float(ffn.swiglu(jnp.zeros(()), jnp.asarray(7.0)))
  return found(
    {
      "share outside [0, 1]": outside,
      "lowest": gates.min(),
      "highest": gates.max(),
      "what a gate of 0 passes": blocked,
    },
    holds=outside < 0.01 and blocked == 0,
    mended=blocked == 0,
    correction="0 blocks, but only GLU's sigmoid ends at 1: Swish is negative on one side and"
    " unbounded on the other",
  )


@functools.cache
def _gates(layers: int = 6) -> jax.Array:
  """The gates of the first layers, unrolled: a scan would drop captured values."""
  model, params = sample_models.smollm2()
  body = {key: value for key, value in params["model"].items() if key != "layers"}
  for i in range(layers):
    body[f"layers_{i}"] = jax.tree.map(lambda x, i=i: x[i], params["model"]["layers"])
  first = dataclasses.replace(model.config, layers=layers, scan_layers=False)
  _, kept = llama.LlamaForCausalLM(first).apply(
    {"params": {**params, "model": body}},
    sample_models.prose()[:2],
    capture_intermediates=lambda module, _: module.name == "gate_proj",
    mutable=["intermediates"],
  )
  return jnp.concatenate([jax.nn.silu(z).ravel() for z in jax.tree.leaves(kept["intermediates"])])


@claim(
  says="SwiGLU in place of ReLU or GELU, at equal parameters, is much better and converges faster.",
  measured_by="test loss (nats a character) after 100 and 400 steps from scratch on news,"
  f" {len(SEEDS)} seeds; same width but 2/3 when gated, same everything else",
  holds_if="SwiGLU is ahead of both, by over 1 % and two standard errors of the paired differences,"
  " at both times; mended if it is ahead by two errors in the end",
  expected=FAILS,
)
def swiglu_better() -> Finding:
  loss = lambda variant, steps, seed: float(
    characters.test_loss(variant, characters.trained(variant, steps=steps, seed=seed), test_rows())
  )
  numbers: dict[str, float] = {}
  clear, large = [], []
  for steps in (100, 400):
    mine = [loss("swiglu", steps, seed) for seed in SEEDS]
    numbers[f"SwiGLU, {steps} steps"] = statistics.mean(mine)
    for other in ("relu", "gelu"):
      theirs = [loss(other, steps, seed) for seed in SEEDS]
      gains = [b - a for a, b in zip(mine, theirs, strict=True)]
      error = statistics.stdev(gains) / len(gains) ** 0.5
      gain = statistics.mean(gains)
      numbers[f"{other} - SwiGLU, {steps} steps"] = gain
      numbers[f"  its error, {other}, {steps}"] = error
      clear.append(gain > 2 * error)
      large.append(gain > 0.01 * statistics.mean(theirs))
  sizes = [pj.count(characters.init(name)) for name in ("relu", "swiglu")]
  numbers["parameters, SwiGLU over ReLU"] = sizes[1] / sizes[0]
  return found(
    numbers,
    holds=all(clear) and all(large),
    mended=all(clear[2:]),
    correction="not in a net of 0.28 M parameters and 400 steps: it begins slower and ends between"
    " ReLU and GELU",
  )


@claim(
  says="From ReLU to SwiGLU the computational cost does not rise notably.",
  measured_by="operations that the compiler counts, SwiGLU's over ReLU's: blocks of 384 and 1536"
  " (2/3 of it when gated), 512 rows, forward, and forward and backward; exponentials beside them",
  holds_if="both under 1.05",
  expected=HOLDS,
)
def swiglu_cost() -> Finding:
  forward, both = zip(*(_block_costs(name) for name in ("relu", "swiglu")), strict=True)
  ratio = lambda costs: costs[1].flops / costs[0].flops
  return found(
    {
      "forward": ratio(forward),
      "forward and backward": ratio(both),
      "exponentials, of all operations": both[1].transcendentals / both[1].flops,
    },
    holds=max(ratio(forward), ratio(both)) < 1.05,
  )


def _block_costs(name: str) -> list[cost.Cost]:
  """The costs of a block's forward pass, and of its forward and backward pass."""
  variant = feed_forward.VARIANTS[name]
  width = feed_forward.gated_width(1536) if variant.gated else 1536
  block = feed_forward.FeedForward(name, width, use_bias=False)
  x = jax.ShapeDtypeStruct((512, 384), jnp.float32)
  params = jax.eval_shape(block.init, jax.random.key(0), x)
  forward: Any = block.apply
  loss = lambda params, x: jnp.square(forward(params, x)).sum()
  passes = (forward, jax.value_and_grad(loss, argnums=(0, 1)))
  return [cost.of(jax.jit(run).lower(params, x).compile()) for run in passes]


CLAIMS = (
  no_relu_today,
  swiglu_formula,
  gated_width,
  swiglu_block,
  gates_in_unit_interval,
  swiglu_better,
  swiglu_cost,
)
