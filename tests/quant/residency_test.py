"""Nothing dense stays: temporaries of compiled programs, per quantised layer.

One layer of D = 1024 is 4 MiB dense. The programs of 8 layers need hardly more than those of 2;
with the data dependence taken out, a dense weight more for each layer.
"""

import jax
import jax.numpy as jnp
import pytest

import peftjax as pj
from peftjax.core.einsum import einsum, ragged_dot
from peftjax.methods import dora_weight
from peftjax.quant import product
from peftjax.quant.weight import Quantized
from tests.core.programs import fused

D, RANK = 1024, 8
DENSE = 4 * D * D  # bytes
WIDTH = {0: D, 4: D // 2}  # by the number of experts


def layers(count, stacked, dora=False, experts=0):
  """Abstract quantised weights and factors; of DoRA the weight around it, to have them put in.

  Four experts have half of D.
  """
  D = WIDTH[experts]
  make = lambda key: pj.quant.nf4().quantize(
    jax.random.normal(key, (experts, D, D) if experts else (D, D))
  )
  codes, scales = jax.eval_shape(make, jax.random.key(0))
  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
  weight = Quantized(codes=codes, scales=scales, fmt=pj.quant.nf4())
  if dora:
    method = pj.dora(RANK, targets="kernel", from_quantised=True)
    weight = method.attach(jax.random.key(0), {"kernel": weight})["kernel"]
  layer = (weight, shape(RANK, D), shape(D, RANK))
  if not stacked:
    return [layer] * count
  widen = lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype)
  return jax.tree.map(widen, layer)


def block(x, layer):
  weight, a, b = layer
  if isinstance(weight, dora_weight.DoRA):
    return jnp.tanh(einsum("ti,io->to", x, weight.replace(a=a, b=b)))
  if weight.ndim == 3:
    y = ragged_dot(x, weight, jnp.full(len(weight.codes), len(x) // len(weight.codes)))
    return jnp.tanh(y + (x @ a.T) @ b.T)
  return jnp.tanh(einsum("ti,io->to", x, weight) + (x @ a.T) @ b.T)


def unrolled(layers, x):
  for layer in layers:
    x = block(x, layer)
  return x


def traced(layers, x):
  """As code that knows nothing of weights: the program is traced, then evaluated on them."""

  def forward(layers, x):
    for weight, a, b in layers:
      x = jnp.tanh(x @ weight + (x @ a.T) @ b.T)
    return x

  return pj.factored(forward)(layers, x)


def scanned(layers, x, wrap=lambda f: f):
  return jax.lax.scan(wrap(lambda x, layer: (block(x, layer), None)), x, layers)[0]


def gradient(forward):
  """Of the factors, as training takes it."""

  def of(layers, x):
    whole = [layers] if isinstance(layers, tuple) else layers
    weights, factors = [layer[0] for layer in whole], [layer[1:] for layer in whole]

    def loss(factors):
      joined = [(w, *f) for w, f in zip(weights, factors, strict=True)]
      return forward(joined[0] if isinstance(layers, tuple) else joined, x).sum()

    return jax.grad(loss)(factors)

  return of


def accumulated(layers, x):
  """Gradients of two micro-batches, one after the other."""
  step = lambda total, part: (jax.tree.map(jnp.add, total, gradient(unrolled)(layers, part)), None)
  zero = jax.tree.map(jnp.zeros_like, [layer[1:] for layer in layers])
  return jax.lax.scan(step, zero, x.reshape(2, -1, D))[0]


def decode(layers, x):
  """Thirty-two steps, each through all layers."""
  return jax.lax.scan(lambda x, _: (unrolled(layers, x), x), x, length=32)[1]


PROGRAMS = {
  "unrolled": (gradient(unrolled), False, 64),
  "traced": (gradient(traced), False, 64),
  "scan": (gradient(scanned), True, 64),
  "scan and remat": (gradient(lambda *args: scanned(*args, wrap=jax.checkpoint)), True, 64),
  "accumulation": (accumulated, False, 64),
  "decode": (decode, False, 1),
  # The norm of DoRA depends on no activation.
  "DoRA, unrolled": (gradient(unrolled), False, 64),
  "DoRA, decode": (decode, False, 1),
  "experts, unrolled": (gradient(unrolled), False, 64),
  "experts, scan": (gradient(scanned), True, 64),
}


def grows(name, sharding=None):
  """Bytes of temporaries a layer, from 2 layers to 8; on the devices of a sharding."""
  program, stacked, rows = PROGRAMS[name]

  def temporaries(count):
    experts = 4 * name.startswith("experts")
    made = layers(count, stacked, name.startswith("DoRA"), experts)
    arguments = made, jax.ShapeDtypeStruct((rows, WIDTH[experts]), jnp.float32)
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    run = fused(lambda q, x: program(q, x))  # a new function: nothing is cached
    compiled = run.lower(*jax.tree.map(place, arguments)).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  return (temporaries(8) - temporaries(2)) / 6


@pytest.mark.fast_for("traced|scan and remat|DoRA, decode")
@pytest.mark.parametrize("name", PROGRAMS)
def test_no_dense_weight_stays(name):
  """Less than half a dense weight a layer."""
  assert grows(name) < DENSE / 2


@pytest.mark.fast_for("decode|accumulation")
@pytest.mark.parametrize(
  "name", ["unrolled", "decode", "accumulation", "DoRA, decode", "experts, unrolled"]
)
def test_without_the_data_dependence_they_stay(name, monkeypatch):
  """What the test above would miss if it could not fail."""
  where = dora_weight if name.startswith("DoRA") else product
  monkeypatch.setattr(where, "tied", lambda codes, x: codes)
  assert grows(name) > 0.9 * DENSE


def test_many_adapters_on_one_base_decode_it_once():
  """Mapped over activations, codes stay unmapped: the dense weight is computed one time."""
  [(weight, *_)] = layers(1, False)
  x = jax.ShapeDtypeStruct((8, 4, D), jnp.float32)
  run = jax.vmap(lambda x, w: einsum("ti,io->to", x, w), in_axes=(0, None))
  size = fused(run).lower(x, weight).compile().memory_analysis().temp_size_in_bytes
  assert size < 2 * DENSE
