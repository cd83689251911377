"""`factored`: any function computes with the factors what it computes with the dense array."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj
from peftjax.core.factored import factored, traced
from peftjax.core.layout import Axes, ConvAxes
from peftjax.core.probe import layout
from peftjax.core.view import Uses
from peftjax.methods.bottleneck import Bottleneck
from tests.core.programs import jit, producers

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((3, 5, 6)), jnp.float32)
IMAGE = jnp.asarray(RNG.standard_normal((2, 7, 9, 6)), jnp.float32)
GROUPS = jnp.array([3, 0, 2, 5])
IDS = jnp.array([[1, 2], [3, 19]])
HIGHEST = dict(precision="highest", preferred_element_type=jnp.float32)

MATRIX = ((6, 8), Axes())
SQUARE = ((6, 6), Axes())
TABLE = ((20, 6), Axes())
STACK = ((4, 6, 6), Axes())


def loop(w, x):
  return jax.lax.fori_loop(0, 4, lambda i, x: jnp.tanh(x @ w[i]), x)


def scan(w, x):
  return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w.astype(x.dtype)), x.sum()), x, w)


def scan_remat(w, x):
  return jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), x.sum())), x, w)


def carried(w, x):
  step = lambda carry, _: ((jnp.tanh(carry[0] @ carry[1]), carry[1]), None)
  return jax.lax.scan(step, (x, w), None, length=3)[0][0]


def branches(w, x):
  return jax.lax.cond(x.sum() > 0, lambda w, x: x @ w, lambda w, x: 2 * x @ w, w, x)


def conv(w, x):
  dims = ("NHWC", "HWIO", "NHWC")
  return jax.lax.conv_general_dilated(x, w, (2, 1), "SAME", dimension_numbers=dims)


def conv_torch(w, x):
  x, dims = x.transpose(0, 3, 1, 2), ("NCHW", "OIHW", "NCHW")
  return jax.lax.conv_general_dilated(x, w, (1, 1), "VALID", None, (1, 2), dimension_numbers=dims)


# A function, its weight, its input.
FACTORED = {
  "matmul": (lambda w, x: x @ w, MATRIX, X),
  "order": (lambda w, x: jnp.einsum("btd,df->fbt", x, w), MATRIX, X),
  "transposed": (lambda w, x: x @ w.T, ((8, 6), Axes()), X),
  "left": (lambda w, x: jnp.einsum("df,btd->ftb", w, x), MATRIX, X),
  "dtype": (lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16), MATRIX, X),
  "precision": (lambda w, x: jnp.dot(x, w, **HIGHEST), MATRIX, X),
  "outputs split": (
    lambda w, x: jnp.einsum("btd,dnh->btnh", x, w.reshape(6, 4, 2)),
    MATRIX,
    X,
  ),
  "inputs split": (
    lambda w, x: jnp.einsum(
      "jbtk,kjf->btf", x.reshape(3, 5, 2, 3).T.T.transpose(3, 0, 1, 2), w.reshape(2, 3, 8)
    ),
    MATRIX,
    X,
  ),
  "outputs merged": (lambda w, x: x @ w.reshape(6, 8), ((6, 4, 2), Axes((-3,), (-2, -1))), X),
  "inputs merged": (lambda w, x: x @ w.reshape(6, 8), ((2, 3, 8), Axes((-3, -2), (-1,))), X),
  "query, key, value": (
    lambda w, x: jnp.einsum("btd,sndh->sbtnh", x, w),
    ((3, 2, 6, 4), Axes((-2,), (-4, -3, -1))),
    X,
  ),
  "layers by number": (lambda w, x: x @ w[1] @ w[2], STACK, X),
  "fori_loop": (loop, STACK, X),
  "scan": (scan, STACK, X),
  "scan of remat": (scan_remat, STACK, X),
  "carried unchanged": (carried, SQUARE, X),
  "vmap of weights": (lambda w, x: jax.vmap(jnp.matmul)(x, w[:3]), STACK, X),
  "vmap of rows": (lambda w, x: jax.vmap(lambda x: x @ w)(x), MATRIX, X),
  "a layer for each row": (
    lambda w, x: jnp.einsum("btd,bdf->btf", x, w[jnp.array([0, 3, 3])]),
    STACK,
    X,
  ),
  "outputs joined": (lambda w, x: x @ jnp.concatenate([w, jnp.ones((6, 2)), w], 1), MATRIX, X),
  "inputs joined": (
    lambda w, x: jnp.concatenate([x, x[..., :2], x], -1) @ jnp.concatenate([w, w[:2], w]),
    MATRIX,
    X,
  ),
  "cond": (branches, MATRIX, X),
  "jit": (lambda w, x: jax.jit(lambda w, x: jax.nn.relu(x @ w))(w, x), MATRIX, X),
  "barrier": (
    lambda w, x: (lambda both: both[1] @ both[0])(jax.lax.optimization_barrier((w, x))),
    MATRIX,
    X,
  ),
  "lookup": (lambda w, ids: (jnp.take(w, ids, axis=0), w[ids]), TABLE, IDS),
  "outputs split in three": (
    lambda w, x: [x @ part for part in jnp.split(w, (2, 3), axis=1)],
    MATRIX,
    X,
  ),
  "in torch's order": (
    lambda w, x: [x @ part.T for part in jnp.split(w, (3, 8))],
    ((20, 6), Axes((-1,), (-2,))),
    X,
  ),
  "part of the inputs": (
    lambda w, x: (
      x[..., :2] @ w[:2] + x[..., 2:] @ jax.lax.dynamic_slice(w, (x.size // 45, 0), (4, 8))
    ),
    MATRIX,
    X,
  ),
  "table, tied": (lambda w, ids: w[ids] @ w.T, TABLE, IDS),
  "convolution": (conv, ((3, 3, 6, 8), ConvAxes((-4, -3, -2), (-1,))), IMAGE),
  "convolution, torch's order": (conv_torch, ((8, 6, 3, 3), ConvAxes((-3, -2, -1), (-4,))), IMAGE),
  "experts": (
    lambda w, x: jax.lax.ragged_dot(x.reshape(-1, 6)[:10], w, GROUPS),
    STACK,
    X,
  ),
}
METHODS = {"dora": pj.dora, "adalora": lambda *a, **k: pj.adalora(*a, target_rank=None, **k)}


def attached(shape, axes, method=pj.lora):
  """A weight with nothing zero in it."""
  base = {"w": jnp.asarray(RNG.standard_normal(shape), jnp.float32)}
  made = method(2, targets=["w"])
  weight = made.attach(KEY, base, {"w": axes})["w"]
  draw = lambda x: jnp.asarray(RNG.standard_normal(x.shape), jnp.float32)
  e = {"e": draw(weight.e)} if hasattr(weight, "e") else {}
  return weight.replace(b=draw(weight.b), **e)


@pytest.mark.parametrize("name", FACTORED)
def test_it_computes_what_the_dense_array_gives_and_builds_none(name):
  """Values and gradients, and no equation with the weight's shape, forward or backward."""
  fn, (shape, axes), x = FACTORED[name]
  weight = attached(shape, axes)
  total = lambda y: sum(jnp.sin(z.astype(jnp.float32)).sum() for z in jax.tree.leaves(y))
  uses = Uses()
  ours = lambda a: traced(fn, uses, weight.replace(a=a), x)
  theirs = lambda a: fn(weight.replace(a=a).materialize(), x)

  @jit
  def both(a):
    return [(f(a), jax.grad(lambda a, f=f: total(f(a)))(a)) for f in (ours, theirs)]

  (got, got_grad), (want, want_grad) = both(weight.a)
  rtol = 0.05 if name == "dtype" else 1e-5
  chex.assert_trees_all_close(got, want, rtol=rtol, atol=10 * rtol)
  chex.assert_trees_all_close(got_grad, want_grad, rtol=10 * rtol, atol=200 * rtol)
  assert uses.by_path == {"0": {"factored"}}
  grad = lambda fn: jax.value_and_grad(lambda a: total(fn(a)))
  # A loop keeps, for its gradient, the layers of the base that it sliced, as it does of an array.
  allow = {"dtype": ("convert_element_type",), "fori_loop": ("scan",)}.get(name, ())
  assert producers(grad(ours), [shape], weight.a, allow=allow) == []
  assert producers(grad(theirs), [shape], weight.a)


@pytest.mark.parametrize("method", ["dora", "adalora"])
@pytest.mark.parametrize("name", ["matmul", "convolution", "experts", "scan"])
def test_other_weights_than_lora(name, method):
  fn, (shape, axes), x = FACTORED[name]
  weight = attached(shape, axes, METHODS[method])
  got, want = jit(lambda w: (factored(fn)(w, x), fn(w.materialize(), x)))(weight)
  chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-4)


@jax.custom_vjp
def own_rule(x, w):
  return x @ w


own_rule.defvjp(
  lambda x, w: (x @ w, (x, w)),
  lambda kept, g: (g @ kept[1].T, 3 * jnp.einsum("btd,btf->df", kept[0], g)),
)

MATERIALISED = {
  "convert_element_type": lambda w, x: x @ w.astype(jnp.float8_e4m3fn).astype(x.dtype),
  "add ": lambda w, x: x @ (w[:, :4] + 1),
  "mul": lambda w, x: x @ (2 * w),
  "add": lambda w, x: x @ jnp.concatenate([w + 1, w], axis=1),
  "custom_vjp_call": lambda w, x: own_rule(x, w),
  "uneven reshape": lambda w, x: x.reshape(3, 10, 3) @ w.reshape(3, 16),
}


@pytest.mark.parametrize("name", MATERIALISED)
def test_all_else_is_done_to_the_dense_array_and_named(name):
  """A rule for gradients of the function's own is followed."""
  fn, weight, uses = MATERIALISED[name], attached(*MATRIX), Uses()
  ours = lambda a: traced(fn, uses, weight.replace(a=a), X).sum()
  theirs = lambda a: fn(weight.replace(a=a).materialize(), X).sum()
  got, want = (jax.value_and_grad(f)(weight.a) for f in (ours, theirs))
  chex.assert_trees_all_close(got, want, rtol=1e-5)
  assert uses.by_path["0"] & {name.strip(), "dot_general"}


def test_a_rule_for_gradients_of_activations_is_kept():
  @jax.custom_vjp
  def seven(x):
    return x

  seven.defvjp(lambda x: (x, None), lambda _, g: (7 * g,))
  weight = attached(*MATRIX)
  grad = lambda fn: jax.grad(lambda x: factored(fn)(weight, x).sum())(X)
  ours, plain = grad(lambda w, x: seven(x @ w)), grad(lambda w, x: x @ w)
  chex.assert_trees_all_close(ours, 7 * plain, rtol=1e-4, atol=1e-4)


def test_rows_of_a_weight_whose_outputs_come_first():
  """A table's way of looking up, by its inputs, would give other numbers."""
  weight = attached((6, 6), Axes((-1,), (-2,)))
  ids = jnp.array([0, 5, 2])
  got = factored(lambda w: w[ids])(weight)
  np.testing.assert_allclose(got, weight.materialize()[ids], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_parts_of_other_weights_than_lora(method):
  """Of DoRA not of the inputs, whose norms are of all."""
  weight = attached(*MATRIX, METHODS[method])
  for fn in (lambda w, x: x @ w[:, 2:5], lambda w, x: x[..., 1:4] @ w[1:4]):
    got = factored(fn)(weight, X)
    np.testing.assert_allclose(got, fn(weight.materialize(), X), rtol=1e-4, atol=1e-4)


def test_what_is_no_array_passes_through():
  """Arguments and results: strings, numbers, None."""
  fn = lambda params, x, mode, scale=1.0: {"y": scale * x @ params["w"], "mode": mode, "none": None}
  weight = attached(*MATRIX)
  got = factored(fn)({"w": weight}, X, "train", scale=2.0)
  want = fn({"w": weight.materialize()}, X, "train", scale=2.0)
  assert got["mode"] == "train" and got["none"] is None
  chex.assert_trees_all_close(got["y"], want["y"], rtol=1e-5, atol=1e-5)


def test_dropout_needs_its_key_and_draws_anew():
  params = {"w": attached(*MATRIX).replace(dropout=0.5)}
  fn = lambda params, x: x @ params["w"]
  still = factored(fn)(params, X)
  one, again, two = (factored(fn, dropout_key=jax.random.key(i))(params, X) for i in (1, 1, 2))
  np.testing.assert_array_equal(one, again)
  assert np.abs(one - two).max() > 0.01 and np.abs(one - still).max() > 0.01


def test_borrowed_arrays_are_found():
  """VeRA's pair lies beside the weights."""
  method = pj.vera(4, targets=["w"])
  params = method.attach(KEY, {"w": jnp.asarray(RNG.standard_normal((6, 8)), jnp.float32)})
  params["w"] = params["w"].replace(b=jnp.ones_like(params["w"].b))
  got = factored(lambda p, x: x @ p["w"])(params, X)
  np.testing.assert_allclose(got, X @ pj.merge(params)["w"], rtol=1e-4, atol=1e-4)


def test_adapters_beside_modules_are_refused():
  model = nn.Dense(6)
  params = {"dense": model.init(KEY, X)["params"]}
  params["dense"]["adapter"] = Bottleneck(*[jnp.ones(2)] * 5)
  with pytest.raises(ValueError, match="call pj.apply"):
    factored(lambda p, x: x @ p["dense"]["kernel"])(params, X)


def test_layout_is_that_of_every_use():
  """Products, convolutions, lookups; a lookup wins over the product with the same table."""
  fns = {
    name: (FACTORED[name][0], *FACTORED[name][1], FACTORED[name][2])
    for name in ("query, key, value", "outputs merged", "scan", "convolution", "table, tied")
  }
  params = {name: jnp.zeros(shape) for name, (_, shape, _, _) in fns.items()}
  run = lambda p, flag: [fn(p[name], x) for name, (fn, _, _, x) in fns.items() if flag]
  found = layout(run, params, True)
  assert found == {name: axes for name, (_, _, axes, _) in fns.items()}
  assert isinstance(found["convolution"], ConvAxes)
