"""Third-party linen modules: the bridge, the layout of kernels, boxes."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj
from peftjax.core import paths
from peftjax.core.layout import Axes, Site
from peftjax.methods.lora_weight import LoRA
from tests.core.programs import jit, producers

KEY = jax.random.key(0)
X = np.random.default_rng(0).standard_normal((3, 5, 12), np.float32)
IDS = np.array([[0, 7, 19, 2, 2]])


class Heads(nn.Module):
  """Several input axes that are not the last, and several outputs."""

  @nn.compact
  def __call__(self, x):
    y = nn.DenseGeneral((4, 2), name="out")(x)
    return nn.DenseGeneral(9, axis=(-2, -1), name="in")(y)


class Batched(nn.Module):
  """A kernel for each row of a batch axis."""

  @nn.compact
  def __call__(self, x):
    return nn.DenseGeneral(7, axis=-1, batch_dims=(0,), name="per_row")(x)


class FirstAxis(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.DenseGeneral(7, axis=1, name="mix")(x)


class Embedding(nn.Module):
  """Lookup and tied logits."""

  @nn.compact
  def __call__(self, ids):
    embed = nn.Embed(20, 6, name="table")
    return embed.attend(nn.Dense(6, name="dense")(embed(ids)))


class Attention(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.MultiHeadDotProductAttention(4, qkv_features=8, name="mha")(x)


class Raw(nn.Module):
  """Reads its parameter itself, as no bridge knows."""

  @nn.compact
  def __call__(self, x):
    return jnp.tanh(x @ self.param("w", nn.initializers.lecun_normal(), (12, 12)))


MODELS = {
  "Dense": (nn.Dense(7), X),
  "Dense without bias": (nn.Dense(7, use_bias=False), X),
  "DenseGeneral": (Heads(), X),
  "DenseGeneral, batch": (Batched(), X),
  "DenseGeneral, axis 1": (FirstAxis(), X),
  "Einsum": (nn.Einsum((12, 4, 2), "btd,dnh->btnh"), X),
  "Einsum, order": (nn.Einsum((4, 12, 2), "btd,ndh->bnth"), X),
  "Einsum, ellipsis": (nn.Einsum((12, 7), "...d,df->...f", use_bias=False), X),
  "Embed": (Embedding(), IDS),
  "MultiHeadDotProductAttention": (Attention(), X),
}
FACTORED = list(MODELS)


def targets(params):
  return [p for p in paths.leaves(params) if p.endswith(("kernel", "embedding", "/w")) or p == "w"]


def build(model, x, rank=2):
  """Attached parameters with nothing zero in them, and the layout."""
  layout = pj.linen.layout(model, x)
  params = jit(lambda key: model.init(key, x)["params"])(KEY)
  method = pj.lora(rank, 4, targets(params))
  params = method.attach(KEY, params, layout)
  count = iter(range(99))

  def draw(leaf):
    if isinstance(leaf, LoRA):
      rng = np.random.default_rng(next(count))
      normal = lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape, np.float32))
      return leaf.replace(a=normal(leaf.a), b=normal(leaf.b))
    return leaf + 0.1 if leaf.ndim == 1 else leaf  # biases too

  return jax.tree.map(draw, params, is_leaf=paths.is_leaf), method, layout


def weights(params):
  return [leaf for leaf in paths.leaves(params).values() if isinstance(leaf, LoRA)]


@pytest.fixture(scope="module", params=FACTORED)
def case(request):
  model, x = MODELS[request.param]
  params, method, _ = build(model, x)
  return request.param, model, x, params, method


def test_the_bridge_computes_what_the_merged_model_does(case):
  """For every bridged module, biases and all."""
  _, model, x, params, _ = case
  want = jit(lambda p: model.apply({"params": p}, x))(pj.merge(params))
  base = jax.tree.map(lambda w: w.base if isinstance(w, LoRA) else w, params, is_leaf=paths.is_leaf)
  got, plain = jit(lambda p, b: (pj.apply(model, p, x), model.apply({"params": b}, x)))(
    params, base
  )
  chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)
  assert np.abs(got - plain).max() > 0.01


@pytest.mark.filterwarnings("ignore:.*read without pj.apply")
def test_the_bridge_builds_no_dense_array_and_linen_alone_does(case):
  """Forward and backward; the same check fails for `model.apply`, which unboxes."""
  _, model, x, params, method = case
  shapes = {w.shape for w in weights(params)} | {
    (w.a.shape[-1], w.b.shape[-2]) for w in weights(params)
  }
  train, frozen = pj.partition(params, method.trainable(params))
  grad = lambda apply: jax.value_and_grad(lambda t, f: apply(pj.combine(t, f)).sum())
  bridged = grad(lambda p: pj.apply(model, p, x))
  assert producers(bridged, shapes, train, frozen) == []
  assert producers(grad(lambda p: model.apply({"params": p}, x)), shapes, train, frozen)


class Own(nn.Module):
  """Multiplies by one parameter itself, and by another after adding to it."""

  @nn.compact
  def __call__(self, x):
    read = lambda name: self.param(name, nn.initializers.ones, (64, 64))
    return x @ read("own") @ (read("shifted") + 1)


def test_a_quantised_weight_that_is_made_dense_is_named_with_what_does_it():
  x = jnp.ones((2, 64))
  params = pj.quantize(Own().init(KEY, x)["params"], pj.quant.nf4(), ["own", "shifted"])
  with pytest.warns(UserWarning, match=r"^shifted is quantised and 'add' makes it") as caught:
    got = jax.jit(lambda p: pj.apply(Own(), p, x))(params)
  assert len(caught) == 1
  chex.assert_trees_all_close(got, pj.apply(Own(), pj.merge(params, dense=True), x), rtol=1e-5)
  with pytest.warns(UserWarning, match="is read as a dense array|without pj.apply"):
    Own().apply({"params": params}, x)


def test_describe_says_factored(case):
  _, model, x, params, _ = case
  rows = pj.describe(params, model=model, example=[x])
  assert {row.computed for row in rows if row.type == "LoRA"} == {"factored"}


def test_the_bridge_computes_in_the_modules_dtype():
  """As linen promotes: the module's dtype, or that of input and parameter."""
  for dtype in (None, jnp.bfloat16):
    for model in (nn.Dense(7, dtype=dtype), nn.Einsum((12, 7), "btd,df->btf", dtype=dtype)):
      params, _, _ = build(model, X)
      half = X.astype(jnp.bfloat16)
      for x in (X, half):
        want = jax.eval_shape(lambda p, m=model, x=x: m.apply({"params": p}, x), pj.merge(params))
        got = jax.eval_shape(lambda p, m=model, x=x: pj.apply(m, p, x), params)
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
  embed = nn.Embed(20, 6, dtype=jnp.bfloat16)
  params, _, _ = build(embed, IDS)
  assert jax.eval_shape(lambda p: pj.apply(embed, p, IDS), params).dtype == jnp.bfloat16


def test_the_bridge_is_read_only():
  """Outside of it, and for plain parameters inside it, linen is as it was."""
  model = nn.Dense(7)
  params, _, _ = build(model, X)
  with pj.linen.bridge():
    fresh = model.init(KEY, X)["params"]
    plain = model.apply({"params": pj.merge(params)}, X)
  chex.assert_trees_all_equal(fresh, model.init(KEY, X)["params"])
  chex.assert_trees_all_equal(plain, model.apply({"params": pj.merge(params)}, X))


def stacked(module, length=3, remat=False):
  """A scan over `length` layers of a module, as `layers`."""

  class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      return x + module(name="inner")(x), None

  class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
      step = nn.remat(Step, prevent_cse=False) if remat else Step
      scan = nn.scan(step, variable_axes={"params": 0}, split_rngs={"params": True}, length=length)
      return scan(name="layers")(x, None)[0]

  return Stack()


_dense = lambda name: nn.Dense(12, name=name)
_mha = lambda name: nn.MultiHeadDotProductAttention(4, qkv_features=8, name=name)


@pytest.mark.parametrize("remat", [False, True], ids=["scan", "scan of remat"])
@pytest.mark.parametrize(
  "inner", [_dense, _mha, lambda name: Raw(name=name)], ids=["Dense", "attention", "raw param"]
)
def test_modules_in_scan_and_remat_equal_the_merged_model(inner, remat):
  """Outputs and gradients, for bridged modules and for one that reads its own parameter."""
  model = stacked(inner, remat=remat)
  layout = pj.linen.layout(model, X)
  raw = {"layers/inner/w": Axes()}
  params = jit(lambda key: model.init(key, X)["params"])(KEY)
  method = pj.lora(2, 4, targets(params))
  params = method.attach(KEY, params, {**layout, **raw})
  for i, weight in enumerate(weights(params)):
    object.__setattr__(weight, "b", jax.random.normal(jax.random.key(i), weight.b.shape) / 9)
  train, frozen = pj.partition(params, method.trainable(params))

  @jit
  def both(train, frozen):
    ours = lambda t: pj.apply(model, pj.combine(t, frozen), X)
    theirs = lambda t: model.apply({"params": pj.merge(pj.combine(t, frozen))}, X)
    value = lambda fn: jax.value_and_grad(lambda t: jnp.square(fn(t)).mean())(train)
    return value(ours), value(theirs), theirs(jax.tree.map(jnp.zeros_like, train))

  ours, theirs, plain = both(train, frozen)
  chex.assert_trees_all_close(ours, theirs, rtol=2e-4, atol=2e-6)
  assert abs(ours[0] - jnp.square(plain).mean()) > 1e-4


def test_an_unmodified_module_reads_a_weight_through_plain_apply():
  """The box protocol alone: `model.apply` without the bridge gives the merged outputs."""
  for model in (Raw(), stacked(lambda name: Raw(name=name))):
    params = model.init(KEY, X)["params"]
    method = pj.lora(2, 4, targets(params))
    params = method.attach(KEY, params, {"layers/inner/w": Axes()})
    for weight in weights(params):
      object.__setattr__(weight, "b", jnp.ones_like(weight.b))
    want = model.apply({"params": pj.merge(params)}, X)
    chex.assert_trees_all_close(model.apply({"params": params}, X), want, rtol=1e-5, atol=1e-5)


def test_dropout_of_a_weight_that_is_made_dense_raises():
  """Rather than training without it; a product as such drops."""
  x = jnp.ones((2, 64))
  attached = lambda name: pj.lora(2, targets=name, dropout=0.5).attach(
    KEY, Own().init(KEY, x)["params"]
  )
  step = lambda params: pj.apply(Own(), params, x, train=True, rngs={"dropout": KEY})
  with pytest.raises(ValueError, match=r"shifted has dropout and is used by 'add'"):
    step(attached("shifted"))
  params = attached("own")
  params["own"] = params["own"].replace(b=jnp.ones_like(params["own"].b))
  assert np.abs(step(params) - pj.apply(Own(), params, x)).max() > 0.1


@pytest.mark.parametrize("name", ["MultiHeadDotProductAttention", "DenseGeneral, batch"])
def test_dropout_of_adapters_in_third_party_modules(name):
  """On with `train`, drawn from the step's key, absent in evaluation."""
  model, x = MODELS[name]
  params, _, _ = build(model, x)
  params = jax.tree.map(
    lambda w: w.replace(dropout=0.5) if isinstance(w, LoRA) else w, params, is_leaf=paths.is_leaf
  )
  if name == "DenseGeneral, batch":  # one kernel for each row: a stack inside one product
    with pytest.raises(ValueError, match="whole stack"):
      pj.apply(model, params, x, train=True, rngs={"dropout": KEY})
    return
  step = jit(lambda p, key: pj.apply(model, p, x, train=True, rngs={"dropout": key}))
  one, again, two = (step(params, jax.random.key(i)) for i in (0, 0, 1))
  still = pj.apply(model, params, x)
  np.testing.assert_array_equal(one, again)
  assert np.abs(one - two).max() > 0.01 and np.abs(one - still).max() > 0.01


def test_training_with_adapter_dropout_needs_a_key():
  params, _, _ = build(nn.Dense(7), X)
  params["kernel"] = params["kernel"].replace(dropout=0.5)
  with pytest.raises(ValueError, match=r"kernel has dropout 0.5, so training needs rngs="):
    pj.apply(nn.Dense(7), params, X, train=True)
  with pytest.raises(ValueError, match="training needs rngs"):
    pj.apply(nn.Dense(7), params, X, train=True, rngs={"params": KEY})
  pj.apply(nn.Dense(7), params, X)


def test_apply_passes_everything_through():
  """train, rngs, other collections, mutable, method (by function or name), keywords."""

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x, *, train, gain=1.0):
      x = nn.BatchNorm(use_running_average=not train)(x)
      return gain * nn.Dropout(0.5, deterministic=not train)(x)

    def named(self, x):
      return x + 1

  model, x = Model(), X
  variables = model.init(KEY, x, train=False)
  params, stats = variables["params"], {"batch_stats": variables["batch_stats"]}
  rngs = {"dropout": KEY}
  got = pj.apply(
    model, params, x, train=True, rngs=rngs, variables=stats, gain=3.0, mutable=["batch_stats"]
  )
  want = model.apply(variables, x, train=True, rngs=rngs, gain=3.0, mutable=["batch_stats"])
  chex.assert_trees_all_equal(got, want)
  still = pj.apply(model, params, x, variables=stats)
  chex.assert_trees_all_equal(still, model.apply(variables, x, train=False))
  for method in ("named", Model.named):
    np.testing.assert_array_equal(pj.apply(model, params, x, method=method), x + 1)


def test_layout_records_contracted_and_output_axes():
  """From one abstract trace; the leading rest of a kernel is a stack."""
  heads = pj.linen.layout(Heads(), jax.ShapeDtypeStruct(X.shape, X.dtype))
  assert heads == {
    "out/kernel": Axes((-3,), (-2, -1)),
    "in/kernel": Axes((-3, -2), (-1,)),
    "out": Site((12,), 2),
    "in": Site((2,), 9),
  }
  assert pj.linen.layout(Embedding(), IDS) == {
    "table/embedding": Axes(),
    "dense/kernel": Axes(),
    "table": Site((None,), 6),
    "dense": Site((6,), 6),
  }
  assert pj.linen.layout(*MODELS["Einsum, order"])["kernel"] == Axes((-2,), (-3, -1))
  assert pj.linen.layout(Batched(), X)["per_row/kernel"].stack((3, 12, 7)) == (3,)
  attention = pj.linen.layout(Attention(), X)
  assert attention["mha/query/kernel"] == Axes((-3,), (-2, -1))
  assert attention["mha/out/kernel"] == Axes((-3, -2), (-1,))


def test_layout_under_scan_is_that_of_the_layer():
  """`layers/...` once, with the axes it has inside; the stack is what lies before them."""
  for inner, path in ((_dense, "layers/inner/kernel"), (_mha, "layers/inner/query/kernel")):
    model = stacked(inner)
    layout = pj.linen.layout(model, X)
    shape = paths.leaves(jax.eval_shape(lambda m=model: m.init(KEY, X))["params"])[path].shape
    assert layout[path].stack(shape) == (3,)
    assert layout[path].ins[0] == 1 - len(shape)


def test_partitioned_boxes_are_opened_and_the_model_still_runs():
  """Names kept as the spec of the base, also under scan, where a box has one axis more."""

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "tensor"))
      return nn.Dense(8, kernel_init=init, name="dense")(x)

  boxed = Model().init(KEY, X)["params"]
  assert isinstance(boxed["dense"]["kernel"], nn.Partitioned)
  params = pj.lora(2, targets="dense").attach(KEY, boxed)
  assert params["dense"]["kernel"].names == (None, "tensor")
  want = Model().apply({"params": boxed}, X)
  np.testing.assert_allclose(pj.apply(Model(), params, X), want, rtol=1e-6)
  specs = nn.get_partition_spec(params)["dense"]["kernel"]
  assert (specs.base, specs.a, specs.b) == (
    jax.P(None, "tensor"),
    jax.P(None, None),
    jax.P("tensor", None),
  )
