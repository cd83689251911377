"""Claims on quality, from committed runs: SmolLM2-135M on news, and MiniLM on two tasks."""

from __future__ import annotations

import statistics

from experiments.claims import results
from experiments.claims.claim import FAILS, HOLDS, Finding, claim, found
from experiments.tables import methods
from experiments.tables.runs import accuracy

LORAS = ("LoRA q,v, r=8", "LoRA all, r=8")


@claim(
  says="LoRA performs like full fine-tuning, or better.",
  measured_by="table qlora_vs_lora: perplexity of held-out news, LoRA's over full fine-tuning's;"
  " table methods: LoRA's share of what full fine-tuning"
  " gains over the head alone, test accuracy, on query and value and on all linear layers, the"
  " least of two tasks",
  holds_if="at most 1.02 in every seed, and both shares at least 0.9; mended if but for that of"
  " query and value",
  expected=HOLDS,
)
def near_full() -> Finding:
  full = results.perplexity("full fine-tuning", "metrics", "test")
  lora = results.perplexity("LoRA, dense", "metrics", "test")
  ratios = [lora[seed] / full[seed] for seed in full]
  shares = {name: {data: _share(name, data) for data in methods.CORPORA} for name in LORAS}
  few, every = (min(shares[name].values()) >= 0.9 for name in LORAS)
  near = max(ratios) <= 1.02
  return found(
    {
      "perplexity, over full": max(ratios),
      "seeds": len(ratios),
      **{f"{name}, {data}": x for name, own in shares.items() for data, x in own.items()},
    },
    holds=near and few and every,
    mended=near and every,
    correction="with every linear layer adapted; query and value alone leave part of the gain",
  )


def _share(name: str, data: str) -> float:
  """The share of full fine-tuning's gain on a task over the head alone, means over the seeds."""
  lines = {line.name: line.of(data) for line in methods.LINES}
  wanted = [lines[each] for each in ("head only", "full fine-tuning", name)]
  found = results.classifier("methods", wanted)
  head, full, own = (statistics.mean(map(accuracy, each)) for each in found)
  return (own - head) / (full - head)


@claim(
  says="LoRA avoids the catastrophic forgetting that full fine-tuning may bring.",
  measured_by="table qlora_vs_lora: perplexity of another domain (short texts of the web) after"
  " fine-tuning on news over that before, by seed",
  holds_if="full fine-tuning raises it in every seed and LoRA in none; mended if LoRA raises it"
  " too, but by less in every seed",
  expected=FAILS,
)
def forgets_less() -> Finding:
  risen = {}
  for name, base in (("full", "full fine-tuning"), ("LoRA", "LoRA, dense")):
    before, after = (results.perplexity(base, when, "other") for when in ("before", "metrics"))
    risen[name] = {seed: after[seed] / before[seed] for seed in after}
  full, lora = risen["full"], risen["LoRA"]
  forgets = min(full.values()) > 1
  return found(
    {f"{name}, seed {seed}": x for name, own in risen.items() for seed, x in own.items()},
    holds=forgets and max(lora.values()) <= 1,
    mended=forgets and all(lora[seed] < full[seed] for seed in full),
    correction="nothing is forgotten at this budget: both get better at the other domain, full"
    " fine-tuning more",
  )


@claim(
  says="QLoRA sacrifices hardly any performance.",
  measured_by="table qlora_vs_lora: perplexity of held-out news after LoRA over a dense, int8 and"
  " NF4 base, and before, means of three seeds",
  holds_if="NF4's is at most 2 % above dense",
  expected=FAILS,
)
def qlora_keeps_quality() -> Finding:
  mean = lambda base, when: statistics.mean(results.perplexity(base, when, "test").values())
  numbers = {
    name: mean(base, "metrics")
    for name, base in (("LoRA", "LoRA, dense"), ("int8", "LoRA, int8"), ("NF4", "LoRA, NF4 + DQ"))
  }
  numbers["not tuned, dense"] = mean("LoRA, dense", "before")
  numbers["not tuned, NF4"] = mean("LoRA, NF4 + DQ", "before")
  return found(
    numbers,
    holds=numbers["NF4"] <= 1.02 * numbers["LoRA"],
    correction="four bits cost a small model a lot, and a short LoRA wins back part of it; int8"
    " costs nothing",
  )


CLAIMS = (near_full, forgets_less, qlora_keeps_quality)
