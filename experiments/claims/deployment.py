"""Claims on using adapters: merging, swapping, latency."""

from __future__ import annotations

import functools
from typing import Any

import jax

import peftjax as pj
from experiments import timing
from experiments.claims import runs, sample_models
from experiments.claims.claim import HOLDS, Finding, by_test, claim, found
from experiments.claims.sample_models import Classes
from peftjax.methods.lora_weight import LoRA


def one_text() -> Classes:
  """A single text, as a server would get it."""
  return Classes(*(x[:1] for x in sample_models.batch(0)))


@functools.cache
def merged() -> Any:
  return pj.merge(runs.minilm("lora").params)


merge_changes_nothing = by_test(
  "deployment.merge_changes_nothing",
  says="Merging, W' = W0 + B A, changes no output.",
  tests=(
    "tests/method_contract_test.py::test_law_3_merge_preserves_outputs_and_unmerge_gives_the_base_back",
  ),
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
  base, after, before = timing.medians(calls, turns=51, uncounted=1)
  same = program_text(original) == program_text(merged())
  return found(
    {"same program": same, "merged": after / base, "not merged": before / base, "ms": base},
    holds=same,
  )


swapping = by_test(
  "deployment.swapping",
  says="Adapters of several tasks are swapped on one base as needed, without a copy of the model.",
  tests=("tests/method_contract_test.py::test_law_6_an_adapter_is_swapped_without_tracing_again",),
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
  return pj.partition(params, pj.tree.adapter_mask(params, method.trainable(params)))


CLAIMS = (merge_changes_nothing, merge_costs_nothing, swapping)
