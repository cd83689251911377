"""Rows of eight adapters in one step, against one adapter and against a call for each.

  python -m experiments.benchmarks.many_adapters --out=many_adapters.jsonl

A Llama of SmolLM2-135M's widths with --layers layers, words in the proportion of the layers, random
weights and LoRA on all linear layers; float32. A batch has --adapters x --each rows of --length
tokens, and every adapter --each of them.

  train     the loss of the next token and its gradient with respect to the factors
  generate  --new tokens after each prompt, with a cache

The peer is the whole batch with one adapter (_one), or a call for each adapter with its own rows
(_calls).

Each side is a process of its own; they take turns. About ten minutes on two cores that nothing else
uses.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import peftjax as pj
from experiments import runtime
from experiments.benchmarks import report, shapes, turns
from peftjax.models.llama import LlamaConfig, LlamaForCausalLM

OUT = flags.DEFINE_string("out", None, "Append the rows to this file as JSON lines.")
LAYERS = flags.DEFINE_integer("layers", 6, "Layers of the model.")
RANK = flags.DEFINE_integer("rank", 8, "r of each adapter.")
ADAPTERS = flags.DEFINE_integer("adapters", 8, "Number of adapters.")
EACH = flags.DEFINE_integer("each", 1, "Rows per adapter.")
LENGTH = flags.DEFINE_integer("length", 64, "Tokens per row.")
NEW = flags.DEFINE_integer("new", 32, "Tokens to generate.")
TURNS = flags.DEFINE_integer("turns", 8, "Number of turns that each side takes.")
STEPS = flags.DEFINE_integer("steps", 3, "Steps per turn.")

WORK = ("train", "generate")
SIDES = ("rows", "one", "calls")


@runtime.readable_errors()
def main(argv: list[str]) -> None:
  given = [LAYERS, RANK, ADAPTERS, EACH, LENGTH, NEW]
  numbers = [str(flag.value) for flag in given]
  rows = []
  for work in WORK:
    module = "experiments.benchmarks.many_adapters"
    workers = [turns.Worker(module, "--", work, side, *numbers) for side in SIDES]
    seconds = turns.medians(workers, TURNS.value, STEPS.value, uncounted=1)
    peaks = [worker.close() for worker in workers]
    told = f"{ADAPTERS.value} x {EACH.value} rows of {LENGTH.value}, r = {RANK.value}"
    for side, peer, peak in zip(SIDES[1:], seconds[1:], peaks[1:], strict=True):
      costs = (1e3 * seconds[0], 1e3 * peer)
      rows.append(report.Row.of(f"{work}_{side}", costs, "ms", told))
      rows.append(report.Row.of(f"{work}_{side}_memory", (peaks[0], peak), "MiB", told))
  report.end("A step of many adapters", rows, OUT.value)


def worker(
  work: str, side: str, layers: int, rank: int, adapters: int, each: int, length: int, new: int
) -> None:
  """One side, until its input ends."""
  vocab = 1_638 * layers  # SmolLM2-135M has 49,152 words and 30 layers
  model = LlamaForCausalLM(LlamaConfig.from_hf(shapes.llama(576, layers, 9, 1536, 2048, vocab, 3)))
  count = adapters * each
  tokens = np.random.default_rng(0).integers(5, vocab, (count, length)).astype(np.int32)
  params = jax.jit(model.init)(jax.random.key(0), tokens[:1, :4])["params"]
  method = pj.lora(rank, 16, "all-linear")
  trees = [
    method.attach(jax.random.key(i), params) for i in range(1 if side == "one" else adapters)
  ]
  rows = jnp.asarray(np.repeat(np.arange(adapters), each), jnp.int32)

  def loss(train: Any, frozen: Any, tokens: jax.Array, rows: Any) -> jax.Array:
    weights = jnp.ones(tokens.shape)
    return pj.apply(model, pj.combine(train, frozen), tokens, loss_weights=weights, rows=rows)[0]

  gradient = jax.jit(jax.value_and_grad(loss))

  given = [pj.stack_adapters(trees)] if side == "rows" else trees
  parts = [pj.partition(p, method.trainable(p)) for p in given]
  batches = jnp.split(jnp.asarray(tokens), len(given))
  index = rows if side == "rows" else None

  def once() -> float:
    total = 0.0
    for (train, frozen), batch in zip(parts, batches, strict=True):
      if work == "train":
        value, grads = jax.block_until_ready(gradient(train, frozen, batch, index))
        total += float(value)
      else:
        whole = pj.combine(train, frozen)
        texts, _ = pj.generate(model, whole, batch, rows=index, max_new_tokens=new)
        total += float(texts.sum())
    return total

  turns.serve(once)


if __name__ == "__main__":
  if sys.argv[1:2] == ["--"]:
    worker(sys.argv[2], sys.argv[3], *map(int, sys.argv[4:]))
  else:
    app.run(main, flags_parser=runtime.parse_flags)
