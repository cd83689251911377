"""The feed-forward block: every variant against autodiff of its plain formula, and what is kept."""

import itertools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj
from peftjax.core import paths
from peftjax.nn.feed_forward import VARIANTS, FeedForward, feed_forward, gated_width
from tests.core.programs import equations, fused, jit

B, T, D, F = 2, 3, 5, 11

# f(z, β) as the papers write it, in JAX's own words.
PLAIN = {
  "identity": lambda z, beta: z,
  "relu": lambda z, beta: jax.nn.relu(z),
  "sigmoid": lambda z, beta: jax.nn.sigmoid(z),
  "gelu": lambda z, beta: jax.nn.gelu(z, approximate=False),
  "gelu_tanh": lambda z, beta: jax.nn.gelu(z, approximate=True),
  "swish": lambda z, beta: z * jax.nn.sigmoid(beta * z),
}
BIASES = ("b1", "b2", "b_gate")
SWISH = [name for name, variant in VARIANTS.items() if variant.activation == "swish"]


def draw(seed, *shape, dtype=np.float64):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def arguments(name, bias, *, dtype=np.float64):
  """Keyword arguments of `feed_forward` in which it is differentiated."""
  make = lambda seed, *shape: draw(seed, *shape, dtype=dtype)
  made = dict(w1=make(1, D, F), b1=make(2, F), w2=make(3, F, D), b2=make(4, D))
  if VARIANTS[name].gated:
    made |= dict(w_gate=make(5, D, F), b_gate=make(6, F))
  if VARIANTS[name].activation == "swish":
    made["beta"] = jnp.asarray(1.3, dtype)
  return {k: v for k, v in made.items() if bias or k not in BIASES}


def hand(name, x, given):
  given = {"b1": None, "b2": None} | given
  return feed_forward(x, **given, activation=VARIANTS[name].activation)


def plain(name, x, given):
  add = lambda y, b: y if b not in given else y + given[b].reshape((1,) * (y.ndim - 1) + (-1,))
  f = lambda z: PLAIN[VARIANTS[name].activation](z, given.get("beta"))
  z = add(x @ given["w1"], "b1")
  h = f(add(x @ given["w_gate"], "b_gate")) * z if "w_gate" in given else f(z)
  return add(h @ given["w2"], "b2")


def value_and_gradients(fn, name, x, given, g):
  y, pull = jax.vjp(lambda x, given: fn(name, x, given), x, given)
  return y, pull(g)


def tree(name="gelu", **fields):
  """Parameters of the module, drawn anew so that biases are not 0."""
  x = jnp.zeros((B, T, D), jnp.float32)
  params = FeedForward(name, F, **fields).init(jax.random.key(0), x)["params"]
  flat, build = jax.tree.flatten(params)
  return build.unflatten([draw(i, *leaf.shape, dtype=np.float32) for i, leaf in enumerate(flat)])


def by_name(params):
  """The parameters of the module as the function names them."""
  renamed = {"up": "1", "gate": "_gate", "down": "2"}
  kinds = {"kernel": "w", "bias": "b"}
  pairs = ((layer, kind) for layer in renamed for kind in params.get(layer, {}))
  given = {kinds[kind] + renamed[layer]: params[layer][kind] for layer, kind in pairs}
  return given | {k: v for k, v in params.items() if k == "beta"}


@pytest.mark.parametrize("name", VARIANTS)
def test_backward_by_hand_is_autodiffs(name):
  """To 1e-12 in float64, in x, every kernel and bias, and β; with biases or not, of 2 axes or 3."""
  with jax.enable_x64(True):
    leads, biases = ((B * T,), (B, T)), (True, False)
    cases = [
      (draw(7, *lead, D), arguments(name, bias), draw(8, *lead, D))
      for lead, bias in itertools.product(leads, biases)
    ]
    for (_, given, _), (_, bias) in zip(cases, itertools.product(leads, biases), strict=True):
      assert ("b1" in given) == bias and ("beta" in given) == (name in SWISH)
    # One program for all is compiled faster.
    each = lambda fn, cases: [value_and_gradients(fn, name, *case) for case in cases]
    ours, theirs = jit(lambda cases: [each(fn, cases) for fn in (hand, plain)])(cases)
    assert {leaf.dtype for leaf in jax.tree.leaves(ours)} == {np.dtype(np.float64)}
    chex.assert_trees_all_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", VARIANTS)
def test_loses_no_more_than_autodiff(name):
  """With float32 parameters, whose gradients stay float32; the yardstick is float64."""
  with jax.enable_x64(True):
    exact = draw(7, B, T, D), arguments(name, True), draw(8, B, T, D)
    lower = lambda tree, dtype: jax.tree.map(
      lambda leaf: jnp.asarray(np.asarray(leaf), dtype), tree
    )
    dtypes, ours, theirs = (jnp.float32, jnp.bfloat16), [], []
    for dtype in dtypes:
      x, given, g = (lower(part, dtype) for part in exact)
      ours.append((x, lower(exact[1], jnp.float32), g))
      theirs.append((x, given, g))  # autodiff's products would be float32 if its weights were
    of = lambda fn, case: value_and_gradients(fn, name, *case)
    want, got, autodiff = jit(
      lambda exact, ours, theirs: (
        of(plain, exact),
        [of(hand, case) for case in ours],
        [of(plain, case) for case in theirs],
      )
    )(exact, ours, theirs)
    scaled = lambda a, b: np.abs(np.asarray(a, b.dtype) - b).max() / np.abs(b).max()
    error = lambda values: max(jax.tree.leaves(jax.tree.map(scaled, values, want)))
    want = jax.device_get(want)
    for dtype, mine, plains in zip(dtypes, got, autodiff, strict=True):
      y, (dx, dgiven) = mine
      assert y.dtype == dx.dtype == dtype
      assert {leaf.dtype for leaf in jax.tree.leaves(dgiven)} == {np.dtype(np.float32)}
      assert error(mine) < 1.5 * error(plains) + 10 * float(jnp.finfo(dtype).eps)


def test_relu_has_no_gradient_at_zero():
  """And lets NaN through, as `jax.nn.relu`."""
  one = jnp.ones((1, 1))
  f = lambda x: feed_forward(x, one, None, one, None, activation="relu")[0, 0]
  for z in (0.0, -0.0, 1e-30):
    x = jnp.full((1, 1), z)
    assert jax.grad(f)(x) == jax.grad(lambda x: jax.nn.relu(x)[0, 0])(x)
  assert jnp.isnan(f(jnp.full((1, 1), jnp.nan)))


@pytest.mark.parametrize("name", VARIANTS)
def test_keeps_x_and_the_preactivations(name):
  """Beside the parameters, which are there anyway: 4 T (D + F) bytes, 4 T F more if gated."""
  given, x = arguments(name, True, dtype=np.float32), draw(7, B, T, D, dtype=np.float32)
  pull = jax.vjp(lambda x, given: hand(name, x, given), x, given)[1]
  kept = sorted(leaf.shape for leaf in jax.tree.leaves(pull))
  gated, swish = VARIANTS[name].gated, name in SWISH
  rows = [(B * T, D), *[(B * T, F)] * (1 + gated)]
  weights = [(D, F)] * (1 + gated) + [(F, D)] + [()] * swish
  assert kept == sorted(rows + weights)
  tokens = [leaf for leaf in jax.tree.leaves(pull) if leaf.shape[:1] == (B * T,)]
  assert sum(leaf.nbytes for leaf in tokens) == 4 * B * T * (D + F + gated * F)
  x = x.reshape(-1, D)
  pairs = (("w1", "b1"), ("w_gate", "b_gate"))
  for value in (x, *(x @ given[w] + given[b][None] for w, b in pairs if w in given)):
    assert any(leaf.shape == value.shape and jnp.allclose(leaf, value) for leaf in tokens)


@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_a_scanned_layer_keeps_them_too(name):
  """What the compiled program holds from the forward to the backward pass, a layer."""
  tokens, width, wide = 256, 32, 64
  given = arguments(name, True, dtype=np.float32)
  sizes = {D: width, F: wide}
  shapes = {k: tuple(sizes[n] for n in v.shape) for k, v in given.items()}
  x = jax.ShapeDtypeStruct((tokens, width), jnp.float32)

  def kept(fn):
    def temporaries(layers):
      stack = {k: jax.ShapeDtypeStruct((layers, *s), jnp.float32) for k, s in shapes.items()}
      run = lambda x, p: jax.lax.scan(lambda x, p: (x + fn(name, x, p), None), x, p)[0].sum()
      grad = fused(jax.grad(run, (0, 1))).lower(x, stack).compile()
      return grad.memory_analysis().temp_size_in_bytes

    return (temporaries(10) - temporaries(2)) / 8

  of = lambda rows: 4 * tokens * rows
  want = of(width + wide * (1 + VARIANTS[name].gated))
  assert want <= kept(hand) <= 1.1 * want
  assert kept(plain) > 1.5 * want


def test_an_unrolled_frozen_layer_keeps_its_preactivations():
  """Where kernels have no gradient not even x is held; without the fence, a slope of f beside z."""
  tokens, width, wide = 1024, 192, 768
  x, w1, w2 = (
    jax.ShapeDtypeStruct(s, jnp.float32) for s in [(tokens, width), (width, wide), (wide, width)]
  )

  def temporaries(layers):
    def loss(x, pairs):
      for w1, w2 in pairs:
        x = x + feed_forward(x, w1, None, w2, None)
      return x.sum()

    grad = fused(jax.grad(loss)).lower(x, [(w1, w2)] * layers).compile()
    return grad.memory_analysis().temp_size_in_bytes

  assert (temporaries(8) - temporaries(2)) / 6 < 1.5 * 4 * tokens * wide


def test_refuses_what_does_not_fit():
  x, w1, w2 = (draw(i, *s, dtype=np.float32) for i, s in enumerate([(T, D), (D, F), (F, D)]))
  block = lambda **changes: feed_forward(**(dict(x=x, w1=w1, b1=None, w2=w2, b2=None) | changes))
  for changes, message in (
    (dict(activation="silu"), "'silu' is none of identity, relu"),
    (dict(activation="gelu", beta=2.0), "gelu has no beta"),
    (dict(b_gate=w1[0]), "b_gate without w_gate"),
    (dict(w2=w1), r"w2 is \(5, 11\); .* ask for \(11, 11\)"),
    (dict(w_gate=w2), r"w_gate is \(11, 5\); .* ask for \(5, 11\)"),
    (dict(w1=w1.T), r"w1 is \(11, 5\); .* ask for \(5, 5\)"),
    (dict(w1=pj.lora(2, 4, ["up"]).attach(jax.random.key(0), tree())["up"]["kernel"]), "Weight"),
  ):
    with pytest.raises(ValueError, match=message):
      block(**changes)
  with pytest.raises(ValueError, match="'silu' is none of relu, gelu"):
    FeedForward("silu", F).init(jax.random.key(0), x)
  with pytest.raises(ValueError, match="'glu' has no beta"):
    FeedForward("glu", F, learn_beta=True).init(jax.random.key(0), x)


@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize("name", VARIANTS)
def test_module_is_the_function(name, bias):
  """Its parameters lie as those of `Linear`s."""
  x, fields = draw(7, B, T, D, dtype=np.float32), dict(use_bias=bias, learn_beta=name in SWISH)
  model, params = FeedForward(name, F, **fields), tree(name, **fields)
  layers = ["up", "down", *["gate"] * VARIANTS[name].gated]
  kinds = ["kernel", *["bias"] * bias]
  want = {f"{layer}/{kind}" for layer in layers for kind in kinds} | {"beta"} & set(params)
  assert ("beta" in params) == (name in SWISH)
  assert set(paths.leaves(params)) == want
  y = plain(name, x, by_name(params))
  np.testing.assert_allclose(pj.apply(model, params, x), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_go_another_way_to_the_same(name):
  """LoRA on one kernel: outputs and gradients are those of the merged block, backward by hand."""
  x, fields = draw(7, B, T, D, dtype=np.float32), dict(learn_beta=name in SWISH)
  model, params = FeedForward(name, F, **fields), tree(name, **fields)
  attached = pj.lora(2, 4, ["down"]).attach(jax.random.key(1), params)
  down = attached["down"]["kernel"]
  attached["down"]["kernel"] = down.replace(b=draw(9, *down.b.shape, dtype=np.float32))
  merged = pj.merge(attached)
  gap = merged["down"]["kernel"] - params["down"]["kernel"]
  assert jnp.abs(gap).max() > 0.1

  def loss(x, rest, down):
    return jnp.sin(pj.apply(model, {**rest, "down": down}, x)).sum()

  def both(params):
    rest = {k: v for k, v in params.items() if k != "down"}
    return jit(jax.value_and_grad(loss, (0, 1)))(x, rest, params["down"])

  chex.assert_trees_all_close(both(attached), both(merged), rtol=2e-4, atol=2e-4)
  assert custom_backward(model, merged, x) == {"_block"}
  assert custom_backward(model, attached, x) == {"activate"}


def custom_backward(model, params, x):
  """Names of the functions with a derivative of their own in the module's program."""
  program = jax.make_jaxpr(lambda p, x: pj.apply(model, p, x))(params, x)
  named = (eqn for eqn in equations(program) if "custom_vjp" in eqn.primitive.name)
  return {eqn.params["call_jaxpr"].jaxpr.debug_info.func_name.split(".")[-1] for eqn in named}


def test_quantised_and_adapted_stays_factored():
  """Under scan too: leaves of a stack are sliced, not opened."""
  x = draw(7, B, T, 64, dtype=np.float32)
  model = FeedForward("swiglu", 128)
  params = model.init(jax.random.key(0), x)["params"]
  params = pj.quantize(params, pj.quant.nf4(64), ".*/kernel")
  method = pj.lora(2, 4, ["up", "gate", "down"])
  params = method.attach(jax.random.key(1), params)
  rows = pj.describe(params, method.trainable(params), model=model, example=(x,))
  assert {row.computed for row in rows if row.path.endswith("kernel")} == {"factored"}
  both = jit(lambda p, x: [pj.apply(model, q, x) for q in (p, pj.merge(p, dense=True))])
  np.testing.assert_allclose(*both(params, x), atol=1e-6)


@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_under_scan_and_vmap(name):
  """Layers stacked, as our models scan them, and kernels stacked, as trials train together."""

  class Layers(nn.Module):
    scanned: bool

    @nn.compact
    def __call__(self, x):
      step = lambda layer, x: (x + layer(x), None)
      if self.scanned:
        scan = nn.scan(step, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return scan(FeedForward(name, F, name="layers"), x)[0]
      for i in range(2):
        x, _ = step(FeedForward(name, F, name=f"layers_{i}"), x)
      return x

  x, one, two = draw(7, B, T, D, dtype=np.float32), tree(name), jax.tree.map(jnp.sin, tree(name))
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), one, two)
  grad = lambda model: jit(jax.grad(lambda p, x: model.apply({"params": p}, x).sum(), (0, 1)))
  scanned, dx = grad(Layers(True))({"layers": stacked}, x)
  unrolled, want = grad(Layers(False))({"layers_0": one, "layers_1": two}, x)
  unrolled = jax.tree.map(lambda *g: jnp.stack(g), unrolled["layers_0"], unrolled["layers_1"])
  chex.assert_trees_all_close((scanned["layers"], dx), (unrolled, want), rtol=1e-4, atol=1e-3)
  block = grad(FeedForward(name, F))
  together = jax.vmap(block, (0, None))(stacked, x)
  chex.assert_trees_all_close(
    jax.tree.map(lambda leaf: leaf[1], together), block(two, x), rtol=1e-4, atol=1e-4
  )


def test_layout_knows_the_layers():
  """As axes of kernels and as modules that an adapter can follow."""
  layers = {"up", "gate", "down"}
  found = pj.linen.layout(FeedForward("glu", F), draw(0, T, D, dtype=np.float32))
  assert set(found) == layers | {f"{layer}/kernel" for layer in layers}


@pytest.mark.parametrize("layer", ["up", "down"])
def test_an_adapter_of_a_layer_is_not_passed_by(layer):
  """It lies beside the kernel, which stays plain."""
  x, model, params = draw(7, T, D, dtype=np.float32), FeedForward("gelu", F), tree()
  method = pj.adapters(3, targets=[layer], init="bert")
  attached = method.attach(jax.random.key(0), params, pj.linen.layout(model, x))
  adapter = jax.tree.map(lambda p: p + 0.1, attached[layer]["adapter"])
  attached[layer]["adapter"] = adapter
  adapt = lambda at, y: y + adapter(y) if at == layer else y
  given = by_name(params)
  z = adapt("up", x @ given["w1"] + given["b1"][None])
  want = adapt("down", jax.nn.gelu(z, approximate=False) @ given["w2"] + given["b2"][None])
  got = pj.apply(model, attached, x)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  assert jnp.abs(got - pj.apply(model, params, x)).max() > 0.05


def test_a_fixed_beta_is_no_parameter():
  x, params = draw(7, T, D, dtype=np.float32), tree("swish")
  y = FeedForward("swish", F, beta=1.7).apply({"params": params}, x)
  want = plain("swish", x, by_name(params) | {"beta": 1.7})
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


def test_gated_width_matches_parameters():
  """To the nearest integer, so within D of the ungated block's kernels."""
  assert gated_width(3072) == 2048
  assert all(abs(3 * gated_width(ffn) - 2 * ffn) <= 1 for ffn in range(1, 200))
