"""Claims on training over a base in four bits: what is kept, computed and paged."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import peftjax as pj
from experiments.claims import characters
from experiments.claims.claim import CORRECTED, HOLDS, Finding, by_test, claim, found
from experiments.claims.products import products_like
from peftjax.core import paths
from peftjax.methods.lora_weight import LoRA
from peftjax.nn import ffn
from peftjax.quant.formats import Format
from peftjax.quant.transform import quantize_leaf
from peftjax.quant.weight import Quantized

STEPS = 100


@functools.cache
def method() -> Any:
  return pj.lora(rank=8, alpha=16, targets=["up", "down"])


@functools.cache
def attached() -> Any:
  """The characters' model, trained on news, its block in NF4, with LoRA."""
  base = pj.quantize(characters.trained("gelu"), pj.quant.nf4(), where=["up", "down"])
  return method().attach(jax.random.key(0), base)


@functools.cache
def trained() -> tuple[Any, np.ndarray]:
  """The parameters after 100 steps on other texts, and the losses."""
  return _train(characters.adam(1e-3))


def _train(tx: Any) -> tuple[Any, np.ndarray]:
  train, frozen = pj.partition(attached(), method().trainable(attached()))
  rows = characters.batches("sentiment", STEPS, seed=0)
  train, _, losses = characters.run("gelu", tx, train, frozen, tx.init(train), rows)
  return pj.combine(train, frozen), np.asarray(losses)


def bases(params: Any) -> list[Any]:
  """Codes and scales of the quantised weights."""
  leaves = [x.base for x in paths.leaves(params).values() if isinstance(x, LoRA)]
  return jax.tree.leaves([x for x in leaves if isinstance(x, Quantized)])


@claim(
  says="Only the LoRA factors are trained, in high precision; the 4-bit base never changes.",
  measured_by="characters' model in NF4: products of the shape of one of its two matrices in the"
  " program of the gradient, and when the dense model is fine-tuned in full; 100 steps on other"
  " texts: bytes of the base that differ in the end, bits of a factor's entry, and the loss of the"
  " first and last ten steps",
  holds_if="none where full fine-tuning has one each, no byte, 16 bits or more, and the loss falls",
  expected=HOLDS,
)
def base_is_frozen() -> Finding:
  dense = characters.trained("gelu")
  everything = jax.tree.map(lambda _: True, dense)
  after, losses = trained()
  pairs = zip(bases(attached()), bases(after), strict=True)
  changed = sum(int((np.asarray(one) != np.asarray(two)).sum()) for one, two in pairs)
  bits = 8 * min(x.a.dtype.itemsize for x in paths.leaves(after).values() if isinstance(x, LoRA))
  numbers = {
    "weight gradients": weight_gradients(attached(), method().trainable(attached())),
    "in full fine-tuning": weight_gradients(dense, everything),
    "changed bytes": changed,
    "bits of a factor": bits,
    "loss, first": losses[:10].mean(),
    "loss, last": losses[-10:].mean(),
  }
  unmoved = numbers["weight gradients"] == 0 and numbers["in full fine-tuning"] == 2 and not changed
  return found(
    numbers, holds=unmoved and bits >= 16 and numbers["loss, last"] < numbers["loss, first"]
  )


def weight_gradients(params: Any, mask: Any) -> int:
  """Products of the shape of the block's `up` or `down` in the program of the gradient."""
  block = characters.trained("gelu")["block"]
  weights = [block[name]["kernel"] for name in ("up", "down")]
  rows = characters.batches("sentiment", 1, seed=0, size=100)[0]  # no activation has such a shape
  loss = lambda train, frozen: characters.loss("gelu", pj.combine(train, frozen), rows)
  return products_like(weights, jax.grad(loss), *pj.partition(params, mask))


@claim(
  says="In the backward pass gradients flow through the LoRA modules only.",
  measured_by="characters' model in NF4 after 100 steps: relative change of `up`'s B's gradient"
  " when nothing flows back through the frozen product of `down`, the layer above; and products of"
  " the shape of a frozen matrix in the program",
  holds_if="it changes by less than 1 %; mended if there are no such products",
  expected=CORRECTED,
)
def gradient_path() -> Finding:
  params, _ = trained()
  rows = characters.batches("sentiment", 1, seed=0)[0]
  x, down = characters.features(params, rows[:, :-1]), params["block"]["down"]["kernel"]
  up = params["block"]["up"]

  def loss(b: jax.Array, through_base: bool) -> jax.Array:
    layer = {**up, "kernel": up["kernel"].replace(b=b)}
    h = ffn.gelu(characters.before_activation({"block": {"up": layer}}, x))
    y, frozen = (pj.einsum("bf,fd->bd", h, weight) for weight in (down, down.base))
    if not through_base:
      y = y - frozen + jax.lax.stop_gradient(frozen)
    logits = pj.einsum("bd,dv->bv", x + y, params["out"]["kernel"])
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, rows[:, -1]).mean()

  whole, cut = (jax.grad(loss)(up["kernel"].b, through) for through in (True, False))
  differ = float(jnp.linalg.norm(cut - whole) / jnp.linalg.norm(whole))
  formed = weight_gradients(params, method().trainable(params))
  return found(
    {"relative change": differ, "weight gradients": formed},
    holds=differ < 0.01,
    mended=formed == 0,
    correction="they flow through the frozen 4-bit weights too, down to the LoRA below; only"
    " gradients of these weights are not formed",
  )


product = by_test(
  "qlora.product",
  says="h = D(W) x + B A x: the weights are dequantised at use, and the rest is LoRA.",
  tests=(
    "tests/method_contract_test.py::test_law_2_einsum_and_take_equal_those_of_the_dense_array",
  ),
)


@claim(
  says="Computing in 16 bits avoids the loss that computing in low precision would bring.",
  measured_by="relative error of W x, normal W (1024 x 1024) and x: NF4 weights computed in"
  " float32, in bfloat16, and with x in int4 too",
  holds_if="bfloat16 adds under 5 % to the error and int4 over 20 %; what the weights lost stays",
  expected=HOLDS,
)
def compute_precision() -> Finding:
  keys = jax.random.split(jax.random.key(0), 2)
  w, x = jax.random.normal(keys[0], (1024, 1024)), jax.random.normal(keys[1], (256, 1024))
  nf4 = quantize_leaf("w", w, pj.quant.nf4())
  rough = quantize_leaf("embedding", x, Format("int4", 64, False)).materialize()
  exact = x @ w

  def error(x: jax.Array) -> float:
    h = pj.einsum("ti,io->to", x, nf4).astype(jnp.float32)
    return float(jnp.linalg.norm(h - exact) / jnp.linalg.norm(exact))

  numbers = {"float32": error(x), "bfloat16": error(x.astype(jnp.bfloat16)), "int4": error(rough)}
  best = numbers["float32"]
  return found(numbers, holds=numbers["bfloat16"] < 1.05 * best and numbers["int4"] > 1.2 * best)


nothing_dense_stays = by_test(
  "qlora.nothing_dense_stays",
  says="A dequantised weight is thrown away right after its product.",
  tests=("tests/quant/residency_test.py::test_no_dense_weight_stays",),
)


paged_is_the_same = by_test(
  "qlora.paged_is_the_same",
  says="Paged optimizers keep their state in CPU memory and bring it to the GPU for the update: "
  "the training is the same.",
  tests=(
    "tests/optim/paged_test.py::test_the_trajectory_is_the_same_bit_for_bit",
    "tests/optim/paged_test.py::test_arrays_are_in_host_memory_and_scalars_are_not",
  ),
)


paged_when_needed = by_test(
  "qlora.paged_when_needed",
  says="When GPU memory runs short, the state is paged out automatically, and back on demand.",
  tests=("tests/optim/paged_test.py::test_paging_is_decided_by_what_the_program_needs",),
  verdict=CORRECTED,
  correction="here it is decided before the first step, from the compiled program, and then is"
  " part of every update; on-demand paging is CUDA's unified memory",
)


CLAIMS = (
  base_is_frozen,
  gradient_path,
  product,
  compute_precision,
  nothing_dense_stays,
  paged_is_the_same,
  paged_when_needed,
)
