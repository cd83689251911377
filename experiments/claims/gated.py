"""Claims on SwiGLU and gated feed-forward blocks."""

from __future__ import annotations

import dataclasses
import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np

import peftjax as pj
from experiments.claims import characters, sample_models
from experiments.claims.activations import test_rows
from experiments.claims.claim import CORRECTED, FAILS, HOLDS, Finding, claim, found
from peftjax.models import llama, pretrained
from peftjax.nn import feed_forward, ffn
from peftjax.training.settings import Model

SEEDS = (0, 1, 2, 3)


@claim(
  says="Today's language models have GELU or SwiGLU where the first Transformer had ReLU.",
  measured_by="the activation that the pretrained sample models ask for",
  holds_if="none of them asks for ReLU",
  expected=HOLDS,
)
def no_relu_today() -> Finding:
  acts = [
    str(pretrained.config_of(Model(name=name).path()).get("hidden_act", "silu"))
    for name in ("minilm", "smollm2")
  ]
  share = {act: acts.count(act) / len(acts) for act in ("relu", "gelu", "silu")}
  return found(share, holds=share["relu"] == 0)


@claim(
  says="SwiGLU(x) = Swish(x W + b) ⊗ (x V + c) with Swish_β(x) = x σ(βx).",
  measured_by="peftjax.nn.ffn.swiglu against the formula in float64, 10,000 draws of N(0, 9)",
  holds_if="values differ by less than 1e-5",
  expected=HOLDS,
)
def swiglu_formula() -> Finding:
  gate, up = np.random.default_rng(0).normal(0, 3, (2, 10_000))
  exact = gate / (1 + np.exp(-gate)) * up
  ours = ffn.swiglu(jnp.asarray(gate, jnp.float32), jnp.asarray(up, jnp.float32))
  off = float(np.abs(np.asarray(ours) - exact).max())
  return found({"largest difference": off}, holds=off < 1e-5)


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
  says="The hidden layer is split in two: one part goes through Swish, the other is the gate.",
  measured_by="SmolLM2's block computed from its three matrices by (Swish(x W1) ⊗ x W2) W3, against"
  " the model's own; and gate and up taken as halves of one layer's output",
  holds_if="equal within 1e-4, and W1 and W2 are one matrix; mended if they are two",
  expected=CORRECTED,
)
def swiglu_block() -> Finding:
  model, params = sample_models.smollm2()
  layer = jax.tree.map(lambda x: x[0], params["model"]["layers"]["mlp"])
  w1, w2, w3 = (layer[name]["kernel"] for name in ("gate_proj", "up_proj", "down_proj"))
  x = jax.random.normal(jax.random.key(0), (1, 8, model.config.width))
  own = llama.Mlp(model.config).apply({"params": layer}, x)
  off = float(jnp.abs(jax.nn.silu(x @ w1) * (x @ w2) @ w3 - own).max())
  return found(
    {"largest difference": off, "matrices": len(layer)},
    holds=off < 1e-4 and len(layer) == 2,
    mended=off < 1e-4,
    correction="each part has a matrix of its own, and the part through Swish is the gate",
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
  """Of the first layers, unrolled: a scan would drop what is captured."""
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


CLAIMS = (
  no_relu_today,
  swiglu_formula,
  gated_width,
  swiglu_block,
  gates_in_unit_interval,
  swiglu_better,
)
