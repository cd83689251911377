"""Claims on training over a base in four bits: what is kept, what is computed in, what is paged."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import peftjax as pj
from experiments.claims import characters
from experiments.claims.claim import CORRECTED, HOLDS, Finding, claim, found
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


@claim(
  says="h = D(W) x + B A x: the weights are dequantised at use, and the rest is LoRA.",
  measured_by="a 1024 x 1024 NF4 weight with LoRA in bfloat16: the leaf's product against the"
  " formula with the dense D(W), relative to the largest entry",
  holds_if="they differ by less than 2⁻⁷, bfloat16's spacing",
  expected=HOLDS,
)
def product() -> Finding:
  keys = jax.random.split(jax.random.key(0), 3)
  base = quantize_leaf("w", jax.random.normal(keys[0], (1024, 1024), jnp.bfloat16), pj.quant.nf4())
  leaf = pj.lora(rank=8, targets=["w"]).attach(keys[1], {"w": base})["w"]
  leaf = leaf.replace(b=0.1 * jax.random.normal(keys[1], leaf.b.shape))
  x = jax.random.normal(keys[2], (64, 1024), jnp.bfloat16)
  ours = pj.einsum("ti,io->to", x, leaf).astype(jnp.float32)
  wide = lambda a: a.astype(jnp.float32)
  exact = wide(x) @ wide(base.materialize()) + leaf.scale * (wide(x) @ leaf.a.T) @ leaf.b.T
  off = float(jnp.abs(ours - exact).max() / jnp.abs(exact).max())
  return found({"relative difference": off}, holds=off < 2**-7)


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


@claim(
  says="A dequantised weight is thrown away right after its product.",
  measured_by="temporaries of a compiled forward and backward pass of 8 layers less those of 2, a"
  " layer, over the bytes of one dense 512 x 512 weight",
  holds_if="under half a dense weight a layer",
  expected=HOLDS,
)
def nothing_dense_stays() -> Finding:
  size = 512
  weight = jax.eval_shape(
    lambda: quantize_leaf("w", jnp.zeros((size, size)), pj.quant.nf4(double_quant=False))
  )

  def net(x: jax.Array, weights: list[Any]) -> jax.Array:
    for w in weights:
      x = x + jnp.tanh(pj.einsum("ti,io->to", x, w))
    return x.sum()

  def temporaries(layers: int) -> int:
    x = jax.ShapeDtypeStruct((32, size), jnp.float32)
    compiled = jax.jit(jax.grad(net)).lower(x, [weight] * layers).compile()
    stats: Any = compiled.memory_analysis()
    return stats.temp_size_in_bytes

  growth = (temporaries(8) - temporaries(2)) / 6 / (4 * size * size)
  return found({"dense weights a layer": growth}, holds=growth < 0.5)


@claim(
  says="Paged optimizers keep their state in CPU memory and bring it to the GPU for the update: the"
  " training is the same.",
  measured_by="largest difference of the factors after 10 steps with and without optim.paged, over"
  " the largest entry, and the share of the state's bytes in host memory",
  holds_if="under 1e-4 (the programs round differently), and over 99 %",
  expected=HOLDS,
)
def paged_is_the_same() -> Finding:
  paged = pj.optim.paged(optax.adam(1e-3))
  train, frozen = pj.partition(attached(), method().trainable(attached()))
  rows = characters.batches("sentiment", 10, seed=0)

  def run(tx: Any) -> tuple[Any, Any]:
    now, state = train, tx.init(train)

    @jax.jit
    def step(now: Any, state: Any, batch: jax.Array) -> Any:
      grads = jax.grad(lambda t: characters.loss("gelu", pj.combine(t, frozen), batch))(now)
      updates, state = tx.update(grads, state, now)
      return optax.apply_updates(now, updates), state

    for batch in rows:
      now, state = step(now, state, batch)
    return now, state

  (one, _), (two, state) = run(optax.adam(1e-3)), run(paged)
  pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
  differ = max(float(jnp.abs(a - b).max() / jnp.abs(a).max()) for a, b in pairs)
  leaves = jax.tree.leaves(state)
  away = sum(x.nbytes for x in leaves if "host" in str(x.sharding.memory_kind))
  share = away / sum(x.nbytes for x in leaves)
  return found(
    {"difference": differ, "share in host memory": share}, holds=differ < 1e-4 and share > 0.99
  )


@claim(
  says="When GPU memory runs short, the state is paged out automatically, and back on demand.",
  measured_by="optim.decide_paging of a compiled step, on a device with twice what it needs, and"
  " with half",
  holds_if="it pages only where memory is short, and during the step; mended if before it",
  expected=CORRECTED,
)
def paged_when_needed() -> Finding:
  train, frozen = pj.partition(attached(), method().trainable(attached()))
  rows = characters.batches("sentiment", 1, seed=0)[0]
  loss = lambda t: characters.loss("gelu", pj.combine(t, frozen), rows)
  compiled = jax.jit(jax.grad(loss)).lower(train).compile()
  stats: Any = compiled.memory_analysis()
  needed = sum(
    getattr(stats, f"{part}_size_in_bytes")
    for part in ("argument", "output", "temp", "generated_code")
  )
  decide = lambda size: pj.optim.decide_paging(compiled, jax.devices()[0], int(size))[0]
  short, ample = decide(needed / 2), decide(2 * needed)
  return found(
    {"pages at half": short, "pages at double": ample, "pages during a step": False},
    holds=False,
    mended=short and not ample,
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
