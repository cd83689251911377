"""Worker: our QLoRA step. Arguments: batch, length."""

import sys

import jax
import jax.numpy as jnp
import optax

import peftjax as pj
from experiments.benchmarks.batch import packed
from experiments.benchmarks.turns import serve
from peftjax.training import state, step
from peftjax.training.causal_lm import KIND
from peftjax.training.settings import Model


def main(batch_size: int, length: int) -> None:
  path = Model(name="smollm2").path()
  model, params = pj.load_pretrained(path, scan_layers=True, remat=True, quant=pj.nf4())
  method = pj.lora(16, 16, "all-linear")
  layout = pj.linen.layout(model, jnp.ones((1, 4), jnp.int32))
  params = method.attach(jax.random.key(1), params, layout)
  train, frozen = pj.partition(params, method.trainable(params))
  tx = method.optimizer(optax.adamw(1e-4), total_steps=1_000)
  current = jax.jit(lambda t: state.init(tx, t))(train)
  run = jax.jit(lambda s, f, b, k: step.train_step(model, tx, KIND, s, f, b, k), donate_argnums=0)
  batch, key = packed(batch_size, length), jax.random.key(2)

  def once() -> float:
    nonlocal current
    current, out = run(current, frozen, batch, key)
    return float(out["loss"])

  serve(once)


if __name__ == "__main__":
  main(int(sys.argv[1]), int(sys.argv[2]))
