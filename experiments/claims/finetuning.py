"""On quality, from committed runs of SmolLM2-135M on news, three seeds; one of full tuning."""

from __future__ import annotations

from experiments.claims import results
from experiments.claims.claim import FAILS, HOLDS, Finding, claim, found


@claim(
  says="LoRA performs like full fine-tuning, or better.",
  measured_by="perplexity of held-out news after 60 steps, seed 0, from table qlora_vs_lora",
  holds_if="LoRA's is at most 2 % above full fine-tuning's",
  expected=HOLDS,
)
def near_full() -> Finding:
  numbers = {
    "before": results.perplexity("none-lora", "before", "test", (0,)),
    "full": results.perplexity("none-full", "after", "test", (0,)),
    "LoRA": results.perplexity("none-lora", "after", "test", (0,)),
  }
  return found(numbers, holds=numbers["LoRA"] <= 1.02 * numbers["full"])


@claim(
  says="LoRA avoids the catastrophic forgetting that full fine-tuning may bring.",
  measured_by="perplexity of another domain (short texts of the web) before and after fine-tuning"
  " on news, seed 0, from table qlora_vs_lora",
  holds_if="full fine-tuning raises it and LoRA by less",
  expected=FAILS,
)
def forgets_less() -> Finding:
  before, full, lora = (
    results.perplexity(base, when, "other", (0,))
    for base, when in (("none-lora", "before"), ("none-full", "after"), ("none-lora", "after"))
  )
  return found(
    {"before": before, "full": full, "LoRA": lora},
    holds=full > before and lora < full,
    correction="nothing is forgotten at this budget: both get better at the other domain, full"
    " fine-tuning more",
  )


@claim(
  says="QLoRA sacrifices hardly any performance.",
  measured_by="perplexity of held-out news after LoRA over a dense, int8 and NF4 base, and before,"
  " means of three seeds, from table qlora_vs_lora",
  holds_if="NF4's is at most 2 % above dense",
  expected=FAILS,
)
def qlora_keeps_quality() -> Finding:
  after = lambda base: results.perplexity(f"{base}-lora", "after", "test")
  numbers = {
    name: after(base) for name, base in (("LoRA", "none"), ("int8", "int8"), ("NF4", "nf4"))
  }
  numbers["not tuned, dense"] = results.perplexity("none-lora", "before", "test")
  numbers["not tuned, NF4"] = results.perplexity("nf4-lora", "before", "test")
  return found(
    numbers,
    holds=numbers["NF4"] <= 1.02 * numbers["LoRA"],
    correction="four bits cost a small model a lot, and a short LoRA wins back part of it; int8"
    " costs nothing",
  )


CLAIMS = (near_full, forgets_less, qlora_keeps_quality)
