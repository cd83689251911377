"""`pj.factored` against the bridge to linen's layers: the cost of evaluating a traced program.

  python -m experiments.benchmarks.traced --out=traced.jsonl

Value and gradients of LoRA on all linear layers of a linen MLP (8 x 512) and of the sample BERT (6
layers of 384). The bridge computes with the factors in the layers themselves; `pj.factored` traces
the model with dense shapes and evaluates the program. Both give the same numbers.

  time   per call, compiled; the median of several, the ways take turns
  trace  seconds from Python to the program that XLA compiles

float32. About two minutes on two cores that nothing else uses.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import app, flags

import peftjax as pj
from experiments import runtime, timing
from experiments.benchmarks import report
from peftjax.data import samples

OUT = flags.DEFINE_string("out", None, "Append the rows to this file as JSON lines.")
TURNS = flags.DEFINE_integer("turns", 21, "Number of turns that each way takes.")


class MLP(nn.Module):
  """Eight layers of 512."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for _ in range(8):
      x = nn.relu(nn.Dense(512)(x))
    return x


@runtime.readable_errors()
def main(argv: list[str]) -> None:
  runtime.set_up(None)
  x = jax.random.normal(jax.random.key(0), (256, 512))
  mlp = MLP()
  rows = compare("mlp", mlp, mlp.init(jax.random.key(1), x)["params"], x)
  bert, params = pj.load_pretrained(samples.model("minilm"), num_labels=5)
  tokens = jax.random.randint(jax.random.key(0), (16, 64), 1000, 2000, jnp.int32)
  rows += compare("bert", bert, params, tokens)
  if OUT.value:
    report.write(OUT.value, rows)
  report.show(f"Traced programs against the bridge, {report.machine()}", rows)


def compare(name: str, model: nn.Module, params: Any, x: jax.Array) -> list[report.Row]:
  """Time and tracing of both ways; the peer is the bridge."""
  lora = pj.lora(8, 16, "all-linear")
  params = lora.attach(jax.random.key(2), params)
  train, frozen = pj.partition(params, lora.trainable(params))
  plain = pj.factored(lambda params, x: model.apply({"params": params}, x))
  ways = [plain, lambda params, x: pj.apply(model, params, x)]
  steps = [jax.jit(partial(value_and_grad, way)) for way in ways]
  tracing = timing.seconds([partial(retraced, way, train, frozen, x) for way in ways], 5)
  times = timing.medians([partial(step, train, frozen, x) for step in steps], TURNS.value)
  return [
    report.Row.of(f"{name}_time", times, "ms", "peer: the bridge"),
    report.Row.of(f"{name}_trace", [min(own) for own in tracing], "s", "peer: the bridge"),
  ]


def value_and_grad(way: Callable[..., jax.Array], train: Any, frozen: Any, x: jax.Array) -> Any:
  loss = lambda train: jnp.square(way(pj.combine(train, frozen), x)).mean()
  return jax.value_and_grad(loss)(train)


def retraced(way: Callable[..., jax.Array], train: Any, frozen: Any, x: jax.Array) -> tuple[()]:
  """Traces and lowers as if for the first time."""
  jax.jit(lambda *args: value_and_grad(way, *args)).lower(train, frozen, x)
  return ()


if __name__ == "__main__":
  app.run(main, flags_parser=runtime.parse_flags)
