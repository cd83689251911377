"""Claims on bottleneck adapters."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import peftjax as pj
from experiments import timing
from experiments.claims import deployment, runs, sample_models
from experiments.claims.claim import CORRECTED, HOLDS, Finding, by_test, claim, found
from experiments.claims.products import products_in_a_row
from peftjax.core import paths
from peftjax.nn.residual import Residual

SIZE = 8  # for MiniLM's 384: adapters of 64, the papers', would be over 1 % of so small a model


@functools.cache
def layout() -> Any:
  return pj.linen.layout(sample_models.minilm()[0], sample_models.batch(0).tokens)


@functools.cache
def attached(size: int = SIZE, seed: int = 0) -> tuple[Any, Any]:
  """MiniLM with fresh adapters, Houlsby's, and the mask of trained arrays."""
  method = pj.adapters(size=size, norms=False)
  params = method.attach(jax.random.key(seed), sample_models.minilm()[1], layout())
  return params, method.trainable(params)


formula = by_test(
  "adapters.formula",
  says="An adapter is down-projection, activation, up-projection and a residual: h' = h + f(h).",
  tests=("tests/methods/adapters_test.py::test_a_placement_computes_its_formula",),
)


@claim(
  says="Adapters are put after the attention and after the feed-forward of every block.",
  measured_by="adapters of the Houlsby placement in MiniLM's six blocks",
  holds_if="twelve",
  expected=HOLDS,
)
def two_a_block() -> Finding:
  flat = paths.leaves(attached()[0])
  count = sum(path.endswith("adapter/down") for path in flat)
  return found({"adapters": count}, holds=count == 12)


@claim(
  says="They are put before the layer normalisation.",
  measured_by="relative change of MiniLM's logits on 16 texts when every unit of every adapter's"
  " output is raised by 1, which a normalisation behind it takes away: Houlsby's adapters, and"
  " adapters after the normalisations",
  holds_if="under 0.001, and over 0.01 after the normalisations",
  expected=HOLDS,
)
def before_norm() -> Finding:
  behind = pj.adapters(size=SIZE, targets=r".*/output/LayerNorm", norms=False)
  after = behind.attach(jax.random.key(0), sample_models.minilm()[1], layout())
  rows = sample_models.batch(0)

  def change(params: Any) -> float:
    raised = paths.map_leaves(lambda p, x: x + 1 if p.endswith("adapter/up_bias") else x, params)
    one, two = (runs.logits(each, rows) for each in (params, raised))
    return float(jnp.linalg.norm(two - one) / jnp.linalg.norm(one))

  numbers = {"Houlsby's": change(attached()[0]), "after the normalisations": change(after)}
  return found(
    numbers,
    holds=numbers["Houlsby's"] < 1e-3 and numbers["after the normalisations"] > 1e-2,
  )


@claim(
  says="At first, with weights near 0, adapters hardly change the model.",
  measured_by="MiniLM's logits on 16 texts with fresh adapters, relative change; and with weights a"
  " hundred times larger",
  holds_if="under 1 %, and over 10 % with the larger ones",
  expected=HOLDS,
)
def near_identity() -> Finding:
  rows = sample_models.batch(0)
  params, _ = attached()
  big = paths.map_leaves(
    lambda path, x: (
      10 * x if path.split("/")[-2:] in (["adapter", "down"], ["adapter", "up"]) else x
    ),
    params,
  )
  before = runs.untrained_logits(rows)
  change = lambda p: float(jnp.linalg.norm(runs.logits(p, rows) - before) / jnp.linalg.norm(before))
  numbers = {"fresh": change(params), "100 times": change(big)}
  return found(numbers, holds=numbers["fresh"] < 0.01 and numbers["100 times"] > 0.1)


@claim(
  says="Only adapters are trained; over 99 % of the parameters stay frozen.",
  measured_by="trained share of MiniLM with adapters of 8 (of 384) and of 64, the papers' usual"
  " size; and of 64 in a model as wide as Llama-7B (4096), its blocks alone",
  holds_if="under 1 % in all; mended if some are",
  expected=CORRECTED,
)
def under_one_percent() -> Finding:
  share = lambda size: pj.count(*attached(size)) / pj.count(attached(size)[0])
  wide, ffn, size = 4096, 11008, 64
  block = 4 * wide * wide + 3 * wide * ffn
  adapter = 2 * (2 * wide * size + wide + size)
  numbers = {
    "% at 8": 100 * share(8),
    "% at 64": 100 * share(64),
    "% at 64, 4096 wide": 100 * adapter / (block + adapter),
  }
  values = list(numbers.values())
  return found(
    numbers,
    holds=max(values) < 1,
    mended=min(values) < 1,
    correction="it depends on the bottleneck's size and the model's width",
  )


@claim(
  says="So adapters too are trained cheaply and deployed flexibly.",
  measured_by="what the compiler counts for one step of MiniLM, 16 x 32 tokens, adapters over full"
  " fine-tuning: operations, and memory of arguments and temporaries; and two adapters in one"
  " compiled function on one base: programs, and the largest difference to each one's own model,"
  " beside that between the two",
  holds_if="operations and memory under 0.5, one program, each its own model's output within 1e-5"
  " and not the other's; mended if so but for the operations",
  expected=CORRECTED,
)
def cheap_and_swapped() -> Finding:
  own, full = runs.training(*attached()), runs.full_training()
  operations = own.cost.flops / full.cost.flops
  memory = own.cost.memory / full.cost.memory
  rows, traced = deployment.one_text(), 0
  tasks = [attached(), attached(seed=1)]
  base = pj.partition(*tasks[0])[1]

  @jax.jit
  def run(adapter: Any, frozen: Any) -> jax.Array:
    nonlocal traced
    traced += 1
    return pj.apply(sample_models.minilm()[0], pj.combine(adapter, frozen), rows.tokens, rows.mask)

  alone = [runs.logits(params, rows) for params, _ in tasks]
  swapped = [run(pj.partition(*task)[0], base) for task in tasks]
  off = max(float(jnp.abs(one - two).max()) for one, two in zip(alone, swapped, strict=True))
  apart = float(jnp.abs(alone[0] - alone[1]).max())
  flexible = traced == 1 and off < 1e-5 < apart
  return found(
    {
      "operations": operations,
      "memory": memory,
      "programs": traced,
      "difference to its own": off,
      "to each other": apart,
    },
    holds=max(operations, memory) < 0.5 and flexible,
    mended=memory < 0.5 and flexible,
    correction="flexible, yes, and cheap in memory; of the operations a third goes, as with LoRA",
  )


@claim(
  says="In code: x_adapter1 = Adapter1(x_attn) + x_attn, with h' = h + f(h) for the adapter.",
  measured_by="perplexity of SmolLM2 on held-out news when every block's residuals pass an adapter"
  " with f = 0: as printed, x + (x + f(x)), and with one residual",
  holds_if="both are the pretrained model's within 0.1 %; mended if the second is",
  expected=CORRECTED,
)
def double_residual() -> Finding:
  model, params = sample_models.smollm2()

  def twice(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    result = call(*args, **kwargs)
    return 2 * result if isinstance(context.module, Residual) else result

  own = sample_models.perplexity(params)
  method = pj.adapters(size=SIZE, placement="after_residual", init="lora")
  where = pj.linen.layout(model, sample_models.prose())
  once = sample_models.perplexity(method.attach(jax.random.key(0), params, where))
  with nn.intercept_methods(twice):
    printed = sample_models.perplexity_now(params)
  near = lambda value: abs(value / own - 1) < 1e-3
  return found(
    {"pretrained": own, "as printed": printed, "one residual": once},
    holds=near(printed) and near(once),
    mended=near(once),
    correction="one residual too many: the adapter's own is enough; 2x + f(x) is not near x",
  )


@claim(
  says="Adapters run in series and deepen the network; LoRA runs in parallel and does not.",
  measured_by="the most matrix products one after the other from MiniLM's input to its logits:"
  " alone, with adapters, with LoRA on query and value, and merged",
  holds_if="adapters have more and LoRA as many as the model alone; mended if merged LoRA has",
  expected=CORRECTED,
)
def depth() -> Finding:
  rows, base = deployment.one_text(), sample_models.minilm()[1]
  lora = runs.METHODS["small"]().attach(jax.random.key(0), base)
  models = {"alone": base, "adapters": attached()[0], "LoRA": lora, "merged": pj.merge(lora)}
  call = lambda params: pj.apply(sample_models.minilm()[0], params, rows.tokens, rows.mask)
  count = {name: products_in_a_row(call, params) for name, params in models.items()}
  deeper = count["adapters"] > count["alone"]
  return found(
    count,
    holds=deeper and count["LoRA"] == count["alone"],
    mended=deeper and count["merged"] == count["alone"],
    correction="beside its layer, yes, but B (A x) is two products where W x is one; merged it is"
    " none",
  )


@claim(
  says="Adapters make inference slower; merged LoRA does not.",
  measured_by="time of one text through MiniLM over that of the model alone, turn by turn, medians:"
  " adapters of 64 (Houlsby), and merged LoRA; whether merged LoRA's program is the model's own",
  holds_if="adapters over 1.02, and merged LoRA has the same program",
  expected=HOLDS,
)
def latency() -> Finding:
  rows, original = deployment.one_text(), sample_models.minilm()[1]
  models = (original, attached(64)[0], deployment.merged())
  calls = [functools.partial(runs.program(), p, rows.tokens, rows.mask) for p in models]
  base, adapters, merged = timing.medians(calls, turns=101, uncounted=1)
  same = deployment.program_text(original) == deployment.program_text(deployment.merged())
  return found(
    {
      "adapters": adapters / base,
      "merged LoRA": merged / base,
      "same program": same,
      "ms": base,
    },
    holds=adapters / base > 1.02 and same,
  )


CLAIMS = (
  formula,
  two_a_block,
  before_norm,
  near_identity,
  under_one_percent,
  cheap_and_swapped,
  double_residual,
  depth,
  latency,
)
