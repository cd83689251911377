"""Attention block by block against whole rows: forward and backward of one layer, and its memory.

  python -m experiments.benchmarks.attention --out=attention.jsonl

Value and gradients in q, k and v, at the heads of SmolLM2-135M and causal, or at those of BERT-base
and not; float32, one row. For every length:

  time    milliseconds, compiled; the least of several turns of five calls, the kernels taking turns
  memory  MiB of the compiled program's temporaries

The length from which `peftjax.nn.attention` takes the blocks comes from here. About two minutes on
two cores that nothing else uses.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments import runtime, timing
from experiments.benchmarks import report
from peftjax.nn.attention import KERNELS, kernel_name
from peftjax.nn.mask import AttentionMask

OUT = flags.DEFINE_string("out", None, "Append the rows to this file as JSON lines.")
LENGTHS = flags.DEFINE_list("lengths", ["128", "256", "512", "1024", "2048", "4096"], "Lengths, T.")
TURNS = flags.DEFINE_integer("turns", 8, "Number of turns that each kernel takes.")

MIB = 2**20
# Heads, heads of keys and values, size of a head, and whether later tokens are hidden.
SHAPES = {"causal": (9, 3, 64, True), "whole": (12, 12, 64, False)}


@runtime.readable_errors()
def main(argv: list[str]) -> None:
  if wrong := [text for text in LENGTHS.value if not text.isdecimal() or int(text) < 1]:
    raise app.UsageError(f"--lengths has {wrong[0]!r}; write numbers of tokens, e.g. 512,1024")
  runtime.set_up(None)
  rows = [
    row for shape in SHAPES for length in LENGTHS.value for row in compare(shape, int(length))
  ]
  report.end("Attention, blocks (ours) against whole rows (peer)", rows, OUT.value)


def compare(shape: str, length: int) -> list[report.Row]:
  heads, kv_heads, size, causal = SHAPES[shape]
  valid = jnp.ones((1, length), bool)
  mask = AttentionMask.of_decoder(valid) if causal else AttentionMask(valid)
  widths = (heads * size, kv_heads * size, kv_heads * size, heads * size)
  keys = jax.random.split(jax.random.key(0), len(widths))
  args = [jax.random.normal(k, (1, length, w)) for k, w in zip(keys, widths, strict=True)]

  def program(kernel: Callable[..., jax.Array]) -> Any:
    # The mask is an argument, as in a model: no constant to fold.
    loss = lambda q, k, v, g, m: (kernel(q, k, v, m, heads, kv_heads, None, 0.0) * g).sum()
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*args, mask).compile()

  programs = {name: program(KERNELS[name]) for name in ("blockwise", "dense")}
  calls = [partial(run, *args, mask) for run in programs.values()]
  times = timing.least(calls, TURNS.value, steps=5, uncounted=1)
  memory = {name: p.memory_analysis().temp_size_in_bytes / MIB for name, p in programs.items()}
  note = f"used: {kernel_name(mask, length)}"
  return [
    report.Row.of(f"{shape}_{length}_time", times, "ms", note),
    report.Row.of(f"{shape}_{length}_memory", list(memory.values()), "MiB", note),
  ]


if __name__ == "__main__":
  app.run(main, flags_parser=runtime.parse_flags)
