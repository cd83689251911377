"""Claims on memory, counted from abstract models: nothing of 7 or 65 billion is ever made."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import peftjax as pj
from experiments.claims.claim import CORRECTED, HOLDS, Finding, by_test, claim, found
from experiments.tables.abstract_models import shapes_of
from peftjax.core import paths
from peftjax.quant.weight import Quantized

GIGA = 1e9


@functools.cache
def abstract(size: str) -> Any:
  """A Llama's parameters as shapes, bfloat16, and its layout."""
  params, layout = shapes_of(f"LLaMA-{size}")
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params), layout


def nbytes(tree: Any) -> int:
  """The bytes of arrays or shapes."""
  return sum(x.size * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


@functools.cache
def quantised(size: str, double_quant: bool) -> Any:
  params, layout = abstract(size)
  return pj.quantize(params, pj.quant.nf4(double_quant=double_quant), layout=layout)


def linear(size: str, double_quant: bool) -> list[Quantized]:
  leaves = paths.leaves(quantised(size, double_quant)).values()
  return [leaf for leaf in leaves if isinstance(leaf, Quantized)]


def bits(size: str, double_quant: bool) -> float:
  """Bits per parameter of the linear layers, with everything that belongs to it."""
  leaves = linear(size, double_quant)
  return 8 * nbytes(leaves) / sum(leaf.size for leaf in leaves)


@claim(
  says="In NF4 the body of a model takes about a quarter of its 16-bit size.",
  measured_by="Llama-7B, abstract: bits of a parameter of the linear layers, with double"
  " quantisation, over 16; and without it. Bytes of the whole model, whose embeddings and head stay"
  " in 16 bits, over those in bfloat16 are shown",
  holds_if="under 0.26; mended if under 0.3",
  expected=HOLDS,
)
def a_quarter() -> Finding:
  plain, double = bits("7B", False), bits("7B", True)
  whole = nbytes(quantised("7B", True)) / nbytes(abstract("7B")[0])
  return found(
    {"bits": plain, "bits with DQ": double, "of 16": double / 16, "whole model": whole},
    holds=double / 16 < 0.26,
    mended=double / 16 < 0.3,
    correction="the constants add to the four bits",
  )


@claim(
  says="A 7B model's quantisation constants take several hundred MB.",
  measured_by="bytes of the scales of Llama-7B in NF4, blocks of 64, float32: abstract",
  holds_if="between 200 and 1000 MB",
  expected=HOLDS,
)
def constants() -> Finding:
  size = sum(nbytes(leaf.scales) for leaf in linear("7B", False)) / 1e6
  return found({"MB": size}, holds=200 < size < 1000)


double_quantisation = by_test(
  "memory.double_quantisation",
  says="Double quantisation saves about 0.5 bits a parameter.",
  tests=("tests/quant/formats_test.py::test_bits_per_weight",),
  verdict=CORRECTED,
  correction="0.37: constants cost 0.5 bits in all, of which 0.13 stay",
)


@claim(
  says="The state of an optimizer such as Adam is at least twice the parameters that are trained.",
  measured_by="bytes of state over bytes of LoRA's factors (float32), Llama-7B, r = 16, abstract:"
  " AdamW. adamw8bit's, whose moments take a byte each, are shown",
  holds_if="AdamW's are 2 or more",
  expected=HOLDS,
)
def optimizer_state() -> Finding:
  params, layout = abstract("7B")
  method = pj.lora(rank=16, targets="all-linear")
  params = method.attach(jax.random.key(0), params, layout)
  train, _ = pj.partition(params, method.trainable(params))
  share = lambda tx: nbytes(jax.eval_shape(tx.init, train)) / nbytes(train)
  adam, small = share(optax.adamw(1e-3)), share(pj.optim.adamw8bit(1e-3))
  return found({"AdamW": adam, "adamw8bit": small}, holds=adam >= 2)


@claim(
  says="Fine-tuning a 65B model goes from over 780 GB to a single GPU of 48 GB.",
  measured_by="abstract Llama-65B: weights and gradients in 16 bits and Adam's two float32 moments;"
  " NF4 with double quantisation, LoRA r = 64 on all linear layers in 16 bits, its gradients and"
  " float32 moments. Activations come on top",
  holds_if="at least 780 GB and at most 48 GB",
  expected=HOLDS,
)
def sixty_five_billion() -> Finding:
  full, qlora, base = _sixty_five()
  return found(
    {"full, GB": full, "QLoRA, GB": qlora, "its base, GB": base}, holds=full >= 780 and qlora <= 48
  )


@functools.cache
def _sixty_five() -> tuple[float, float, float]:
  params, layout = abstract("65B")
  full = (2 + 2 + 8) * pj.count(params)
  method = pj.lora(rank=64, targets="all-linear", dtype=jnp.bfloat16)
  attached = method.attach(jax.random.key(0), quantised("65B", True), layout)
  trained = sum(
    x.size for x in jax.tree.leaves(pj.partition(attached, method.trainable(attached))[0])
  )
  base = nbytes(quantised("65B", True))
  return full / GIGA, (base + (2 + 2 + 8) * trained) / GIGA, base / GIGA


@claim(
  says="So a single consumer or professional GPU fine-tunes a 65B model.",
  measured_by="the same sum against a professional GPU of 48 GB and consumer ones of 24 and 32 GB",
  holds_if="it fits 24 GB; mended if it fits 48 GB",
  expected=CORRECTED,
)
def consumer_gpu() -> Finding:
  needed = _sixty_five()[1]
  fits = {f"fits {size} GB": needed <= size for size in (24, 32, 48)}
  return found(
    {"GB": needed, **fits},
    holds=fits["fits 24 GB"],
    mended=fits["fits 48 GB"],
    correction="a professional one: the base alone is larger than a consumer GPU's memory",
  )


CLAIMS = (
  a_quarter,
  constants,
  double_quantisation,
  optimizer_state,
  sixty_five_billion,
  consumer_gpu,
)
