"""Worker: one of our operations on a matrix. Arguments: operation, dtype, size, cpu | cuda."""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import peftjax as pj
from experiments.benchmarks.turns import serve
from peftjax.quant.weight import Quantized


def main(operation: str, dtype: str, size: int, device: str) -> None:
  jax.config.update("jax_platforms", device)
  fmt = pj.quant.nf4(64, double_quant=True)
  dense = (0.02 * jax.random.normal(jax.random.key(0), (size, size))).astype(dtype)
  quantize = jax.jit(fmt.quantize)
  codes, scales = quantize(dense)
  decode = lambda c, s: fmt.dequantize(c, s, -2, dense.dtype)
  run: Callable[[], Any]
  if operation == "quantize":
    run = lambda: quantize(dense)
  elif operation == "dequantize_fresh":
    fresh = jax.jit(decode)
    run = lambda: fresh(codes, scales)
  elif operation == "dequantize_warm":
    warm = jax.jit(lambda old, c, s: decode(c, s), donate_argnums=0, keep_unused=True)
    held = [jnp.zeros_like(dense)]

    def run() -> Any:
      held[0] = warm(held[0], codes, scales)
      return held[0]
  else:
    weight = Quantized(codes=codes, scales=scales, fmt=fmt, dense_dtype=dtype)
    x = jax.random.normal(jax.random.key(1), (2048, size)).astype(dtype)
    product = jax.jit(lambda x, w: pj.einsum("ti,io->to", x, w))
    run = lambda: product(x, weight)

  def once() -> float:
    jax.block_until_ready(run())
    return 0.0

  serve(once)


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
