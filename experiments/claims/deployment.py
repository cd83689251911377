"""Claims on using adapters: merging, swapping, latency."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

import peftjax as pj
from experiments.claims import clock, runs, sample_models
from experiments.claims.claim import HOLDS, Finding, claim, found
from experiments.claims.sample_models import Classes
from peftjax.methods.lora_weight import LoRA


def one_text() -> Classes:
  """A single text, as a server would get it."""
  return Classes(*(x[:1] for x in sample_models.batch(0)))


@functools.cache
def merged() -> Any:
  return pj.merge(runs.minilm("lora").params)


@claim(
  says="Merging, W' = W0 + B A, changes no output.",
  measured_by="MiniLM with trained LoRA on all linear layers: largest difference of the logits on"
  " the test split, and labels that change",
  holds_if="under 1e-4 and no label",
  expected=HOLDS,
)
def merge_changes_nothing() -> Finding:
  rows = sample_models.news("test")
  one, two = (runs.logits(params, rows) for params in (runs.minilm("lora").params, merged()))
  off, changed = float(jnp.abs(one - two).max()), int((one.argmax(1) != two.argmax(1)).sum())
  return found(
    {"largest difference": off, "changed labels": changed}, holds=off < 1e-4 and not changed
  )


def program_text(params: Any) -> str:
  """MiniLM's program on one text, before it is compiled: the weights are arguments of it."""
  rows = one_text()
  return runs.program().lower(params, rows.tokens, rows.mask).as_text()


@claim(
  says="A merged model has the structure and the cost of the original: no latency is added.",
  measured_by="whether MiniLM's program is the same text with merged and with original weights."
  " Times of one text over the original's, merged and before merging, are shown",
  holds_if="the same program",
  expected=HOLDS,
)
def merge_costs_nothing() -> Finding:
  rows, original = one_text(), sample_models.minilm()[1]
  models = (original, merged(), runs.minilm("lora").params)
  calls = [functools.partial(runs.program(), p, rows.tokens, rows.mask) for p in models]
  base, after, before = clock.medians(calls, turns=51)
  same = program_text(original) == program_text(merged())
  return found(
    {"same program": same, "merged": after / base, "not merged": before / base, "ms": base},
    holds=same,
  )


@claim(
  says="Adapters of several tasks are swapped on one base as needed, without a copy of the model.",
  measured_by="two adapters, of ranks 2 and 8, in one compiled function: programs traced, base"
  " arrays shared, and the difference to each adapter's own model",
  holds_if="one program, every base array shared, differences under 1e-4",
  expected=HOLDS,
)
def swapping() -> Finding:
  rows, base = one_text(), sample_models.minilm()[1]
  halves = [_task(rank, seed, base) for rank, seed in ((2, 1), (8, 2))]
  aligned = pj.align_ranks(*(adapter for adapter, _ in halves))
  traced = 0

  @jax.jit
  def run(adapter: Any, frozen: Any) -> jax.Array:
    nonlocal traced
    traced += 1
    params = pj.combine(adapter, frozen)
    return pj.apply(sample_models.minilm()[0], params, rows.tokens, rows.mask)

  shared = halves[0][1]
  off = 0.0
  for adapter, (own, frozen) in zip(aligned, halves, strict=True):
    alone = runs.logits(pj.merge(pj.combine(own, frozen)), rows)
    off = max(off, float(jnp.abs(run(adapter, shared) - alone).max()))
  pairs = zip(jax.tree.leaves(shared), jax.tree.leaves(halves[1][1]), strict=True)
  copies = sum(one is not two for one, two in pairs)
  return found(
    {"programs": traced, "base arrays copied": copies, "largest difference": off},
    holds=traced == 1 and copies == 0 and off < 1e-4,
  )


def _task(rank: int, seed: int, base: Any) -> tuple[Any, Any]:
  """An adapter that changes something, and the base it is on."""
  method = pj.lora(rank=rank, targets=["query", "value"])
  params = method.attach(jax.random.key(seed), base)
  noise = lambda x: x.replace(b=0.1 * jax.random.normal(jax.random.key(seed), x.b.shape))
  params = jax.tree.map(
    lambda x: noise(x) if isinstance(x, LoRA) else x,
    params,
    is_leaf=lambda x: isinstance(x, LoRA),
  )
  return pj.partition(params, pj.adapter_mask(params, method.trainable(params)))


CLAIMS = (merge_changes_nothing, merge_costs_nothing, swapping)
