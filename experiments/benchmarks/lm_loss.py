"""The language-model loss in chunks against the loss from all logits at once.

  python -m experiments.benchmarks.lm_loss --out=lm_loss.jsonl

Value and gradients of the mean −log p of the next tokens of one text, by the last hidden state and
the trained arrays of the head, at SmolLM2-135M's widths. For each length and kind of head:

  time    per call, compiled; the least of several, the ways take turns
  memory  temporaries of the compiled program, beside its arguments and results

Heads: `frozen`, dense; `nf4`, frozen in four bits; `lora`, frozen with LoRA; `trained`, dense,
with a gradient of its size. float32. About five minutes on two cores that nothing else uses.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

import peftjax as pj
from experiments import runtime, timing
from experiments.benchmarks import report
from peftjax import losses
from peftjax.core.einsum import linear
from peftjax.nn.chunked_loss import chunk_length, chunked_sums

OUT = flags.DEFINE_string("out", None, "Append the rows to this file as JSON lines.")
HEADS = flags.DEFINE_list("heads", ["frozen", "nf4", "lora", "trained"], "Heads to measure.")
LENGTHS = flags.DEFINE_list("lengths", ["512", "1024", "2048", "4096"], "Tokens, T.")
VOCAB = flags.DEFINE_integer("vocab", 49_152, "V.")
WIDTH = flags.DEFINE_integer("width", 576, "D.")
TURNS = flags.DEFINE_integer("turns", 8, "Number of turns that each way takes.")

MIB = 2**20
PATH = "lm_head/kernel"
METHODS: Mapping[str, Any] = {
  "frozen": None,
  "nf4": None,
  "lora": pj.lora(8, 16, [PATH]),
  "trained": pj.unfreeze(PATH),
}


@runtime.readable_errors()
def main(argv: list[str]) -> None:
  runtime.set_up(None)
  if unknown := set(HEADS.value) - set(METHODS):
    raise app.UsageError(f"unknown heads {sorted(unknown)}; there are {', '.join(METHODS)}")
  rows: list[report.Row] = []
  for name in HEADS.value:
    halves = jax.jit(partial(head_of, name))(jax.random.key(0))
    for length in map(int, LENGTHS.value):
      compared = compare(name, length, halves)
      rows += compared
      if OUT.value:
        report.write(OUT.value, compared)
  report.show(f"Loss of V = {VOCAB.value}, D = {WIDTH.value}, {report.machine()}", rows)


def head_of(name: str, key: jax.Array) -> tuple[Any, Any]:
  """The trained and the frozen half of a head `[D, V]`."""
  kernel = 0.02 * jax.random.normal(key, (WIDTH.value, VOCAB.value))
  params: Any = {"lm_head": {"kernel": kernel}}
  if name == "nf4":
    params = pj.quantize(params, pj.quant.nf4(64), where=PATH)
  method = METHODS[name]
  if method is None:
    return pj.partition(params, jax.tree.map(lambda _: False, params))
  params = method.attach(key, params)
  return pj.partition(params, method.trainable(params))


def compare(name: str, length: int, halves: tuple[Any, Any]) -> list[report.Row]:
  """Time and memory, chunked and plain."""
  keys = jax.random.split(jax.random.key(1), 2)
  x = jax.random.normal(keys[0], (1, length, WIDTH.value))
  tokens = jax.random.randint(keys[1], (1, length), 0, VOCAB.value)
  size = chunk_length(1, length, VOCAB.value)
  logits_of = lambda head, x: linear(x, head)

  def chunked(head: Any, x: jax.Array, tokens: jax.Array, weights: jax.Array) -> losses.Sums:
    return chunked_sums(logits_of, head, x, tokens, weights, size)

  def plain(head: Any, x: jax.Array, tokens: jax.Array, weights: jax.Array) -> losses.Sums:
    return losses.next_token_sums(logits_of(head, x), dict(tokens=tokens, weights=weights))

  args = (halves[0], x, halves[1], tokens, jnp.ones(x.shape[:2]))
  programs = [compiled(way, args) for way in (chunked, plain)]
  note = f"T = {length}, chunks of {size} tokens"
  case = f"{name}_{length}"
  return [
    report.Row.of(
      f"{case}_time", timing.least([partial(p, *args) for p in programs], TURNS.value), "ms", note
    ),
    report.Row.of(f"{case}_memory", [temporaries(p) for p in programs], "MiB", note),
  ]


def compiled(sums: Callable[..., losses.Sums], args: tuple[Any, ...]) -> Any:
  """The program of value and gradients by the trained arrays and by x."""

  def loss(train: Any, x: jax.Array, frozen: Any, *batch: jax.Array) -> jax.Array:
    head = pj.combine(train, frozen)["lm_head"]["kernel"]
    return losses.mean(*sums(head, x, *batch))

  return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*args).compile()


def temporaries(program: Any) -> float:
  return program.memory_analysis().temp_size_in_bytes / MIB


if __name__ == "__main__":
  app.run(main, flags_parser=runtime.parse_flags)
