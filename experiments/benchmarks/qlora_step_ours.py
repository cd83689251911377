"""Worker: our QLoRA step. Arguments: model, batch, length, cpu | cuda."""

import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import peftjax as pj
from experiments.benchmarks import shapes, turns
from experiments.benchmarks.batch import packed
from experiments.benchmarks.stepping import stepping
from peftjax.core import paths
from peftjax.data import samples
from peftjax.models.llama import LlamaConfig, LlamaForCausalLM
from peftjax.quant import transform
from peftjax.training.causal_lm import KIND

TOKENS = jax.ShapeDtypeStruct((1, 4), jnp.int32)


def main(name: str, batch_size: int, length: int, device: str) -> None:
  jax.config.update("jax_platforms", device)
  dtype = jnp.bfloat16 if device == "cuda" else jnp.float32
  options: dict[str, Any] = dict(scan_layers=True, remat=True, dtype=dtype)
  model: nn.Module
  if name in shapes.RANDOM:
    model = LlamaForCausalLM(LlamaConfig.from_hf(shapes.RANDOM[name], **options))
    params = random_params(model, dtype)
  else:
    model, params = pj.load_pretrained(samples.model(name), quant=pj.quant.nf4(), **options)
  method = pj.lora(16, 16, "all-linear")
  batch = packed(batch_size, length, shapes.config(name)["vocab_size"])
  once = stepping(model, params, method, KIND, batch, total=1_000, tx=optax.adamw(1e-4))
  turns.serve(
    lambda: float(once()["loss"]), peak_allocated if device == "cuda" else turns.peak_resident
  )


def random_params(model: nn.Module, dtype: Any) -> Any:
  """Parameters of a scanned Llama, its linear layers in NF4: never more than one of them is dense.

  Norms are ones, all else is normal with a deviation of 0.02.
  """
  abstract = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
  linear = set(paths.select(abstract, "all-linear"))
  normal = lambda key, shape: jax.random.normal(key, shape, dtype) * jnp.asarray(0.02, dtype)

  def make(path: str, leaf: Any) -> Any:
    key = paths.fold_in_path(jax.random.key(0), path)
    layer = lambda key: transform.quantize_leaf(path, normal(key, leaf.shape[1:]), pj.quant.nf4())
    if path in linear:
      return jax.jit(lambda keys: jax.lax.map(layer, keys))(jax.random.split(key, leaf.shape[0]))
    return jnp.ones(leaf.shape, dtype) if path.endswith("scale") else normal(key, leaf.shape)

  return paths.map_leaves(make, abstract)


def peak_allocated() -> float:
  """The most of the GPU's memory that JAX has allocated, in MiB."""
  return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] / 2**20


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
