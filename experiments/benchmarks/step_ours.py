"""Worker: our training step. Arguments: query_value | all_linear | full, model, batch, length."""

import os
import sys

import jax
import optax

import peftjax as pj
from experiments import runtime
from experiments.benchmarks.batch import example
from experiments.benchmarks.turns import serve
from peftjax.methods.base import Method
from peftjax.training import state, step
from peftjax.training.classification import CLASSES


def main(case: str, directory: str, batch_size: int, length: int) -> None:
  runtime.keep_programs(os.environ.get("PEFTJAX_BENCHMARK_CACHE"))
  model, params = pj.load_pretrained(directory, num_labels=2)
  targets = {"query_value": ["query", "value"], "all_linear": "all-linear"}
  method: Method
  if case == "full":
    method = pj.unfreeze(".*")
  else:
    method = pj.chain(pj.lora(rank=8, alpha=16, targets=targets[case]), pj.unfreeze("head/.*"))
  params = method.attach(jax.random.key(1), params)
  train, frozen = pj.partition(params, method.trainable(params))
  tx = method.optimizer(optax.adamw(1e-3, weight_decay=0.01), total_steps=1_000)
  current = jax.jit(lambda t: state.init(tx, t))(train)
  run = jax.jit(
    lambda s, f, b, k: step.train_step(model, tx, CLASSES, s, f, b, k),
    donate_argnums=0,
  )
  batch, key = example(batch_size, length), jax.random.key(2)

  def once() -> float:
    nonlocal current
    current, out = run(current, frozen, batch, key)
    return float(out["loss"])

  serve(once)


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
