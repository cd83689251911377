"""NNX models adapted in place: equal to the merged model, factored, trained by nnx's own tools."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, traverse_util

import peftjax as pj
from peftjax.core import paths
from peftjax.core.layout import Axes, TableAxes
from tests.core.programs import jit, producers

KEY = jax.random.key(0)
IDS = np.array([[1, 2, 3, 4, 5], [10, 9, 8, 7, 6]])
X = np.random.default_rng(0).standard_normal((2, 5, 16), np.float32)


class Experts(nnx.Module):
  """Parameters of a module's own, and an array that it keeps."""

  def __init__(self, rngs):
    self.up = nnx.Param(0.3 * jax.random.normal(rngs.params(), (3, 16, 12)))
    self.down = nnx.Param(0.3 * jax.random.normal(rngs.params(), (3, 12, 16)))
    self.used = nnx.Variable(jnp.zeros((), jnp.int32))

  def __call__(self, x):
    self.used[...] += 1
    self.seen = nnx.Intermediate(x.sum())
    each = [self.one(x, i) for i in range(3)]
    return sum(each)

  def one(self, x, i):
    return jnp.tanh(x @ self.up[...][i]) @ self.down[...][i]


class Toy(nnx.Module):
  def __init__(self, rngs):
    self.embed = nnx.Embed(11, 16, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
    self.norm = nnx.BatchNorm(16, rngs=rngs)
    self.up = nnx.Linear(16, 24, rngs=rngs)
    self.down = nnx.Einsum("btf,fd->btd", (24, 16), (16,), rngs=rngs)
    self.layers = nnx.List([Experts(rngs)])
    self.head = nnx.Linear(16, 11, rngs=rngs)

  def __call__(self, ids):
    x = self.embed(ids)
    x = self.norm(x + self.attention(x))
    x = x + self.down(nnx.relu(self.up(x)))
    return self.head(x + self.layers[0](x))


class Block(nnx.Module):
  def __init__(self, rngs):
    self.up, self.down = nnx.Linear(16, 24, rngs=rngs), nnx.Linear(24, 16, rngs=rngs)

  @nnx.jit
  @nnx.remat
  def __call__(self, x):
    return x + self.down(nnx.relu(self.up(x)))


class Scanned(nnx.Module):
  """Layers made by vmap and run by scan, each recomputed in the backward pass."""

  def __init__(self, rngs):
    make = nnx.split_rngs(splits=3)(nnx.vmap(Block, in_axes=0, out_axes=0))
    self.layers = make(rngs)

  def __call__(self, x):
    step = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    return step(x, self.layers)


MODELS = {"toy": (Toy, IDS), "scanned": (Scanned, X), "block": (Block, X)}
ALL = "all-linear"
LORA = pj.lora(2, targets=ALL)
METHODS = {
  "lora": pj.lora(2, targets=ALL),
  "dora": pj.dora(2, targets=ALL),
  "loha": pj.loha(2, targets=ALL),
  "lokr": pj.lokr(2, targets=ALL),
  "adalora": pj.adalora(2, targets=ALL, target_rank=1),
  "ia3": pj.ia3(["up"], ["down"]),
  "vera": pj.vera(4, targets=ALL),
  "unfreeze": pj.unfreeze([".*/bias", ".*/up(/kernel)?"]),
  "chain": pj.chain(pj.lora(2, targets=["up"]), pj.unfreeze(".*/bias")),
}


def adapted(name, method, **kwargs):
  """The model, adapted, with nothing zero in what is trained, and an input."""
  make, x = MODELS[name]
  model = make(nnx.Rngs(0))
  pj.nnx.attach(KEY, model, method, x, **kwargs)
  return shaken(model), x


def shaken(model):
  rng = np.random.default_rng(0)
  draw = lambda a: a + 0.1 * rng.standard_normal(a.shape).astype(a.dtype)
  nnx.update(model, jax.tree.map(draw, nnx.state(model, pj.nnx.Trained)))
  model.eval()
  return model


def call(model, x):
  graph, state = nnx.split(model)
  return jit(lambda state, x: nnx.merge(graph, state)(x))(state, x)


def arrays(model, kind=nnx.Param):
  return {path: np.asarray(x[...]) for path, x in nnx.to_flat_state(nnx.state(model, kind))}


QUICK = ("toy-lora", "toy-unfreeze")


def cases(methods, models=("toy", "scanned"), quick=QUICK):
  """Each method on each model, slow but for some."""
  slow = [pytest.mark.slow(reason="many programs")]
  for name in models:
    for method in methods:
      one = f"{name}-{method}"
      yield pytest.param(name, method, id=one, marks=[] if one in quick else slow)


@pytest.mark.parametrize(("name", "method"), [*cases(METHODS)])
def test_it_computes_what_the_merged_model_does(name, method):
  """Outputs stay at first; then they are those of the merged model, of its own classes."""
  make, x = MODELS[name]
  model, plain = make(nnx.Rngs(0)), make(nnx.Rngs(0))
  before = arrays(plain)
  assert pj.nnx.attach(KEY, model, METHODS[method], x) is model
  model.eval(), plain.eval()
  after = arrays(model, pj.nnx.base)
  if method not in ("unfreeze", "chain"):
    chex.assert_trees_all_equal(after, before)
  np.testing.assert_allclose(call(model, x), call(plain, x), rtol=1e-5, atol=1e-5)
  y = call(shaken(model), x)
  tree = pj.nnx.params(model)
  assert pj.nnx.merge(model) is model
  assert type(model) is make and nnx.graphdef(model) == nnx.graphdef(plain)
  np.testing.assert_allclose(y, call(model, x), rtol=1e-4, atol=1e-5)
  assert np.abs(y - call(plain, x)).max() > 1e-3
  chex.assert_trees_all_equal(pj.merge(tree), pj.nnx.params(model))


@pytest.mark.parametrize(
  ("name", "method"),
  [*cases(["lora", "vera", "adalora", "ia3", "loha"], quick=("toy-lora", "scanned-lora"))],
)
def test_no_equation_has_the_shape_of_a_weight(name, method):
  """Law 11, forward and backward."""
  model, x = adapted(name, METHODS[method])
  tree = pj.nnx.params(model)
  shapes = {
    w.shape[-2:] if name == "scanned" else w.shape
    for w in paths.leaves(tree).values()
    if isinstance(w, pj.Weight) and w.ndim > 1
  }
  pj.nnx.optimizer(model, optax.sgd(0.1))  # AdaLoRA may be trained
  graph, trained, rest = nnx.split(model, pj.nnx.Trained, ...)
  loss = lambda trained: (nnx.merge(graph, trained, rest, copy=True)(x) ** 2).sum()
  allow = (
    ("scan", "squeeze", "slice", "dynamic_slice") if name == "scanned" else ("slice", "squeeze")
  )
  assert producers(jax.value_and_grad(loss), shapes, trained, allow=allow) == []
  graph, dense, rest = nnx.split(MODELS[name][0](nnx.Rngs(0)), nnx.Param, ...)
  assert producers(jax.value_and_grad(loss), shapes, dense, allow=allow)


def train(model, tx, x, steps=2):
  """Steps of `nnx.Optimizer`; the losses."""
  optimizer = nnx.Optimizer(model, tx, wrt=pj.nnx.Trained)

  @nnx.jit
  def step(model, optimizer, x):
    loss = lambda model: (model(x) ** 2).mean()
    grad = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, pj.nnx.Trained))
    value, grads = grad(model)
    optimizer.update(model, grads)
    return value

  return [float(step(model, optimizer, x)) for _ in range(steps)], optimizer


@pytest.mark.parametrize("name", ["toy", "scanned"])
def test_nnx_trains_what_is_trained_and_nothing_else(name):
  """The loss falls; frozen arrays stay bit for bit; statistics and counts go on as in the model."""
  model, x = adapted(name, pj.lora(2, targets=ALL))
  model.train()
  frozen = nnx.Any(pj.nnx.base, pj.nnx.Fixed)
  before, trained = arrays(model, frozen), arrays(model, nnx.LoRAParam)
  losses, _ = train(model, optax.adam(1e-2), x, steps=3)
  assert losses[0] > losses[1] > losses[2]
  chex.assert_trees_all_equal(arrays(model, frozen), before)
  after = arrays(model, nnx.LoRAParam)
  assert all((after[path] != x).any() for path, x in trained.items())
  if name == "toy":
    assert model.layers[0].used[...] == 3 and (model.norm.mean[...] != 0).all()
    assert model.layers[0].seen[...].shape == ()


def test_two_adapters_take_each_others_place_without_tracing_again():
  """Also of another alpha; the base is the one that is there."""
  model, x = adapted("block", pj.lora(2, alpha=4.0, targets=["up", "down"]))
  other, _ = adapted("block", pj.lora(2, alpha=64.0, targets=["up", "down"]))
  own = lambda model: nnx.state(model, (pj.nnx.Trained, pj.nnx.Fixed))
  count = 0

  @nnx.jit
  def forward(model, x):
    nonlocal count
    count += 1
    return model(x)

  first, second = jax.tree.map(jnp.array, own(model)), own(other)
  one = forward(model, x)
  nnx.update(model, second)
  two = forward(model, x)
  nnx.update(model, first)
  np.testing.assert_array_equal(forward(model, x), one)
  assert count == 1 and np.abs(one - two).max() > 1e-3
  np.testing.assert_allclose(two, call(other, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["all", "base"])
def test_checkpoints(kind, tmp_path):
  """Orbax: the state of an adapted model; and of the base, before and after it was adapted."""
  plain = Toy(nnx.Rngs(1))
  model, x = adapted("toy", pj.lora(2, targets=ALL))
  which = ... if kind == "all" else pj.nnx.base
  saved = nnx.to_pure_dict(nnx.state(model, which))
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "it", saved)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / "it", jax.tree.map(np.zeros_like, saved))
  target = plain
  if kind == "all":
    target = pj.nnx.attach(jax.random.key(5), plain, pj.lora(2, targets=ALL), x)
  state = nnx.state(target, which)
  nnx.replace_by_pure_dict(state, restored)
  nnx.update(target, state)
  chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(target, which)), saved)
  if kind == "all":
    target.eval()
    np.testing.assert_array_equal(call(target, x), call(model, x))


def test_params_are_a_tree_as_all_of_peftjax_takes():
  model, x = adapted("toy", pj.lora(2, targets=ALL))
  tree, mask = pj.nnx.params(model), pj.nnx.trainable(model)
  rows = {row.path: row for row in pj.describe(tree, mask)}
  assert rows["up/kernel"].type == "LoRA" and rows["up/kernel"].trainable == 2 * (16 + 24)
  assert rows["layers/0/down"].trainable == 3 * 2 * (12 + 16)
  assert rows["embed/embedding"].trainable == rows["head/kernel"].trainable == 0
  assert pj.count(tree, mask) == sum(row.trainable for row in rows.values())
  train, frozen = pj.partition(tree, mask)
  assert len(jax.tree.leaves(train)) == len(jax.tree.leaves(nnx.state(model, pj.nnx.Trained)))
  chex.assert_trees_all_equal(pj.combine(train, frozen), tree)


class Busy(nnx.Module):
  """Owns a parameter, has a module with one, draws from what it is given, and counts."""

  def __init__(self, rngs):
    self.own = nnx.Param(jax.random.normal(rngs.params(), (16, 16)))
    self.up, self.drop = nnx.Linear(16, 16, rngs=rngs), nnx.Dropout(0.5)
    self.calls = 0

  def __call__(self, x, rngs=None, name="y"):
    self.calls += 1
    return {name: self.up(self.drop(self._back(x), rngs=rngs)), "name": name}

  def _back(self, x):
    return x @ self.own[...].T

  @property
  def doubled(self):
    return 2 * self.own[...]


def test_what_a_call_changes_is_changed():
  """Counts of keys among the arguments, attributes. Any method computes, of a copy too."""
  model = Busy(nnx.Rngs(0))
  model.eval()
  pj.nnx.attach(KEY, model, LORA, X)
  shaken(model)
  assert model.calls == 0
  merged = pj.nnx.merge(nnx.clone(model))
  for of in (model, nnx.clone(model)):
    np.testing.assert_allclose(of._back(X), merged._back(X), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(of.doubled, merged.doubled, rtol=1e-4, atol=1e-4)
  y = model(X, name="z")
  assert model.calls == 1 and y["name"] == "z"
  np.testing.assert_allclose(y["z"], merged(X)["y"], rtol=1e-4, atol=1e-4)
  model.train()
  rngs = nnx.Rngs(dropout=7)
  first, second = model(X, rngs)["y"], model(X, rngs=rngs)["y"]
  assert rngs.dropout.count[...] == 2 and (first != second).any()
  model.eval()
  mapped = nnx.vmap(lambda model, x: model(x)["y"], in_axes=(None, 0))(model, X)
  np.testing.assert_allclose(mapped, y["z"], rtol=1e-4, atol=1e-4)
  jax.grad(lambda x: model._back(x).sum())(X)  # nothing is written to a model from outside


def test_a_second_method_takes_other_parameters():
  model = pj.nnx.attach(KEY, Block(nnx.Rngs(0)), pj.lora(2, targets=["up"]), X)
  pj.nnx.attach(KEY, model, pj.ia3(inputs=["down"]), X)
  pj.nnx.attach(KEY, shaken(model), pj.unfreeze(".*/bias"), X)
  tree = pj.nnx.params(model)
  kinds = {path: type(leaf).__name__ for path, leaf in paths.leaves(tree).items()}
  assert (kinds["up/kernel"], kinds["down/kernel"]) == ("LoRA", "IA3")
  assert pj.nnx.trainable(model)["down"]["bias"] is True
  y = call(shaken(model), X)
  np.testing.assert_allclose(call(pj.nnx.merge(model), X), y, rtol=1e-4, atol=1e-5)


def test_layout_is_of_every_parameter_that_is_used():
  found = pj.nnx.layout(Toy(nnx.Rngs(0)), IDS)
  assert isinstance(found["embed/embedding"], TableAxes)
  assert found["attention/query/kernel"] == Axes((-3,), (-2, -1))
  assert found["attention/out/kernel"] == Axes((-3, -2), (-1,))
  assert found["layers/0/up"] == found["head/kernel"] == Axes()
  model = nnx.eval_shape(lambda: Toy(nnx.Rngs(0)))
  assert pj.nnx.layout(model, jax.ShapeDtypeStruct((1, 2), jnp.int32)) == found


def test_dropout_draws_anew_at_every_call_while_training():
  """And only then; two runs of one key draw alike."""
  make = lambda: adapted("block", pj.lora(2, targets=ALL, dropout=0.5))
  (model, x), (again, _) = make(), make()
  still, merged = call(model, x), pj.nnx.merge(make()[0])
  np.testing.assert_allclose(still, call(merged, x), rtol=1e-4, atol=1e-5)
  for one in (model, again):
    one.train()
  forward = nnx.jit(lambda model, x: model(x))
  first, second = forward(model, x), forward(model, x)
  assert np.abs(first - second).max() > 1e-3 and np.abs(first - still).max() > 1e-3
  np.testing.assert_array_equal(forward(again, x), first)


def test_dropout_of_scanned_layers_differs_by_layer():
  method = pj.lora(2, targets=["up"], dropout=0.5)
  model = pj.nnx.attach(nnx.Rngs(0), Scanned(nnx.Rngs(0)), method, X)
  keys = model.layers.up.kernel_adapter.dropout_key[...]
  assert keys.shape == (3, 2) and len(np.unique(keys, axis=0)) == 3
  shaken(model).train()
  one, two = model(X), model(X)
  assert np.abs(one - two).max() > 1e-3
  np.testing.assert_array_equal(model.layers.up.kernel_adapter.draws[...], [2, 2, 2])


def test_vera_has_its_pair_once():
  """A stack of layers, which a scan takes apart, has a copy for each layer."""
  model, _ = adapted("block", METHODS["vera"])
  fixed = nnx.to_flat_state(nnx.state(model, pj.nnx.Fixed))
  assert sorted(path[-1] for path, _ in fixed) == ["a", "b"]
  assert model.up.kernel_adapter.lender is model.shared_vera
  scanned, _ = adapted("scanned", METHODS["vera"])
  assert scanned.layers.up.kernel_adapter.a.shape == (3, 4, 16)


def test_adalora_is_trained_by_its_own_optimizer_alone():
  """A gradient raises before that was made; with it triplets are pruned."""
  method = pj.adalora(2, targets=ALL, target_rank=1, warmup=1, final=1, interval=1)
  model, x = adapted("block", method)
  assert call(model, x).shape == x.shape  # to use it is no training
  with pytest.raises(ValueError, match="write tx = pj.nnx.optimizer"):
    train(model, optax.adam(1e-2), x)
  tx = pj.nnx.optimizer(model, optax.adam(1e-2))
  with pytest.raises(ValueError, match="optimizer of its own method"):
    train(model, tx, x)
  train(model, pj.nnx.optimizer(model, method.optimizer(optax.adam(1e-2), 5)), x, steps=5)
  left = [np.count_nonzero(of.kernel_adapter.e[...]) for of in (model.up, model.down)]
  assert sum(left) == 2


def test_the_optimizer_of_a_method_does_what_it_does_to_a_tree():
  """LoRA+ has two rates: the same steps on the model and on its parameters as a tree."""
  method = pj.chain(pj.lora(2, targets=ALL, b_rate=4.0), pj.unfreeze(".*/bias"))
  model, x = adapted("block", method)
  tree, mask = pj.nnx.params(model), pj.nnx.trainable(model)
  tx = method.optimizer(optax.adam(1e-2), 2)

  def loss(p):
    low = nnx.relu(x @ p["up"]["kernel"] + p["up"]["bias"][None, None])
    return ((x + low @ p["down"]["kernel"] + p["down"]["bias"][None, None]) ** 2).mean()

  grad = jit(lambda tree: pj.value_and_grad(pj.factored(loss), mask)(tree)[1])
  held, frozen = pj.partition(tree, mask)
  state = tx.init(held)
  for _ in range(2):
    updates, state = tx.update(grad(pj.combine(held, frozen)), state, held)
    held = optax.apply_updates(held, updates)
  with pytest.raises(ValueError, match="write tx = pj.nnx.optimizer"):
    train(model, optax.adam(1e-2), x)
  train(model, pj.nnx.optimizer(model, tx), x, steps=2)
  got = pj.nnx.params(model)
  chex.assert_trees_all_close(got, pj.combine(held, frozen), rtol=1e-3, atol=1e-5)


QLORA = dict(quant=pj.quant.nf4(block_size=32))


def test_a_quantised_base():
  """NF4 under LoRA: the dense kernels are gone, codes stay, and merging has to be asked for."""
  model, x = adapted("block", pj.lora(2, targets=ALL), **QLORA)
  assert not hasattr(model.up, "kernel")
  tree = pj.nnx.params(model)
  assert [row.type for row in pj.describe(tree) if "kernel" in row.path] == ["LoRA(Quantized)"] * 2
  before = arrays(model, pj.nnx.base)
  assert sum(x.dtype == np.uint8 for x in before.values()) >= 2
  losses, _ = train(model, optax.adam(1e-2), x)
  assert losses[1] < losses[0]
  chex.assert_trees_all_equal(arrays(model, pj.nnx.base), before)
  y = call(model, x)
  with pytest.raises(ValueError, match="dense=True"):
    pj.nnx.merge(model)
  pj.nnx.merge(model, dense=True)
  np.testing.assert_allclose(call(model, x), y, rtol=1e-4, atol=1e-5)


def test_a_quantised_attention():
  """Kernels of several axes, whose layout is not that of a matrix."""
  x = np.random.default_rng(0).standard_normal((2, 5, 8), np.float32)
  model = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
  pj.nnx.attach(KEY, model, pj.lora(2, targets=ALL), x, quant=pj.quant.nf4(block_size=32))
  y = call(model, x)
  pj.nnx.merge(model, dense=True)
  assert model.query.kernel.shape == (8, 2, 4)
  np.testing.assert_allclose(call(model, x), y, rtol=1e-4, atol=1e-5)


def test_a_model_is_read_and_quantised_array_by_array():
  """An abstract model, and what it is loaded from: the same as quantising the dense one."""
  dense = Block(nnx.Rngs(3))
  flat = {path: np.asarray(x) for path, x in paths.leaves(pj.nnx.params(dense)).items()}
  model = nnx.eval_shape(lambda: Block(nnx.Rngs(0)))
  method = pj.lora(2, targets=ALL)
  pj.nnx.attach(KEY, model, method, X, **QLORA, read=flat.__getitem__)
  pj.nnx.attach(KEY, dense, method, X, **QLORA)
  chex.assert_trees_all_equal(arrays(model), arrays(dense))
  with pytest.raises(ValueError, match="read gave"):
    model = nnx.eval_shape(lambda: Block(nnx.Rngs(0)))
    pj.nnx.attach(KEY, model, method, X, read=lambda path: np.zeros(3))


def test_an_abstract_model_is_adapted_as_one():
  model = nnx.eval_shape(lambda: Block(nnx.Rngs(0)))
  pj.nnx.attach(KEY, model, METHODS["vera"], X)
  state = nnx.state(model)
  assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(state))


class Writes(nnx.Module):
  """Normalises its kernel at every call."""

  def __init__(self, rngs):
    self.kernel = nnx.Param(jax.random.normal(rngs.params(), (16, 16)))

  def __call__(self, x):
    self.kernel[...] = self.kernel[...] / jnp.linalg.norm(self.kernel[...])
    return x @ self.kernel[...]


class Reads(nnx.Module):
  """Multiplies by the kernel of another module."""

  def __init__(self, rngs):
    self.up = nnx.Linear(16, 24, rngs=rngs)

  def __call__(self, x):
    return x @ self.up.kernel[...]


class Listed(nnx.Module):
  def __init__(self, rngs, kind=nnx.Param):
    self.kernels = nnx.List([kind(jnp.eye(16)), kind(jnp.eye(16))])

  def __call__(self, x):
    for kernel in self.kernels:
      x = x @ kernel[...]
    return x


class Tied(nnx.Module):
  def __init__(self, rngs):
    self.up, self.down = nnx.Linear(16, 16, rngs=rngs), nnx.Linear(16, 16, rngs=rngs)
    self.down.kernel = self.up.kernel

  def __call__(self, x):
    return self.down(self.up(x))


def in_a_parameter():
  linear = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
  weight = pj.lora(2, targets="kernel").attach(KEY, {"kernel": linear.kernel[...]})["kernel"]
  linear.kernel = nnx.Param(weight)
  return linear


REFUSED = {
  "no inputs": (lambda: pj.nnx.attach(KEY, Block(nnx.Rngs(0)), LORA), "example inputs"),
  "a state": (lambda: pj.nnx.attach(KEY, nnx.state(Block(nnx.Rngs(0))), LORA, X), "nnx.Module"),
  "no parameter": (lambda: pj.nnx.attach(KEY, nnx.Dropout(0.5), LORA, X), "has no nnx.Param"),
  "where without quant": (
    lambda: pj.nnx.attach(KEY, Block(nnx.Rngs(0)), LORA, X, where=["up"]),
    "quant=pj.quant.nf4",
  ),
  "no method": (lambda: pj.nnx.attach(KEY, Block(nnx.Rngs(0)), "lora", X), "is no method"),
  "writes": (
    lambda: pj.nnx.attach(KEY, Writes(nnx.Rngs(0)), pj.lora(2, targets="kernel"), X),
    "writes to its parameter 'kernel'",
  ),
  "reads": (lambda: pj.nnx.attach(KEY, Reads(nnx.Rngs(0)), LORA, X), "read by another module"),
  "in a list": (lambda: pj.nnx.attach(KEY, Listed(nnx.Rngs(0)), LORA, X), "lies in a list"),
  "an array in a list": (
    lambda: pj.nnx.attach(
      KEY, Listed(nnx.Rngs(0), jnp.asarray), pj.lora(2, targets=["kernels/0"]), X
    ),
    "nnx.Param",
  ),
  "tied": (lambda: pj.nnx.attach(KEY, Tied(nnx.Rngs(0)), LORA, X), "one variable of two modules"),
  "adapters": (
    lambda: pj.nnx.attach(KEY, Block(nnx.Rngs(0)), pj.chain(LORA, pj.adapters(4)), X),
    "pj.adapters lies beside modules",
  ),
  "prefix": (lambda: pj.nnx.attach(KEY, Block(nnx.Rngs(0)), pj.prefix(4), X), "pj.prefix lies"),
  "twice": (
    lambda: [
      pj.nnx.attach(KEY, m, pj.lora(2, targets=["up"]), X) for m in 2 * [Block(nnx.Rngs(0))]
    ],
    "pj.nnx.merge",
  ),
  "the tree's way": (lambda: LORA.attach(KEY, Block(nnx.Rngs(0))), "pj.nnx.attach"),
  "the tree's way, a state": (
    lambda: LORA.attach(KEY, nnx.state(Block(nnx.Rngs(0)))),
    "pj.nnx.att",
  ),
  "quantize": (
    lambda: pj.quantize(nnx.state(Block(nnx.Rngs(0))), pj.quant.nf4()),
    "pj.nnx.attach",
  ),
  "apply": (lambda: pj.apply(Block(nnx.Rngs(0)), {}, X), "pj.nnx.attach"),
  "a weight in a parameter": (lambda: in_a_parameter()(X), "stands for an array and is none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_in_a_sentence(name):
  fn, said = REFUSED[name]
  with pytest.raises(ValueError, match=said):
    fn()


def test_what_is_refused_leaves_the_model_as_it_was():
  model = Reads(nnx.Rngs(0))
  before, values = nnx.graphdef(model), arrays(model)
  with pytest.raises(ValueError, match="is read by another"):
    pj.nnx.attach(KEY, model, pj.chain(LORA, pj.unfreeze(".*/bias")), X, **QLORA)
  assert nnx.graphdef(model) == before and type(model.up) is nnx.Linear
  chex.assert_trees_all_equal(arrays(model), values)


def test_a_split_model_is_a_pure_function_of_its_parameters():
  """`pj.apply` calls it as a linen module; its dropout draws from the step's key alone."""

  class Model(nnx.Module):
    def __init__(self, rngs):
      self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])
      self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
      for layer in self.layers:
        x = self.dropout(layer(x))
      return x

  model, x = Model(nnx.Rngs(0)), jnp.ones((3, 8))
  pure, params = pj.nnx.split(model)
  lora = pj.lora(2, targets="all-linear")
  adapted = lora.attach(jax.random.key(0), params, pure.layout(params, x))
  assert set(paths.leaves(lora.trainable(adapted))) == {
    f"layers/{i}/{name}" for i in range(2) for name in ("kernel", "bias")
  }
  adapted = jax.tree.map(lambda w: w + 0.1, adapted)
  merged = nnx.clone(model)
  nnx.update(merged, nnx.from_flat_state(traverse_util.flatten_dict(pj.merge(adapted)).items()))
  merged.eval()
  np.testing.assert_allclose(pj.apply(pure, adapted, x), merged(x), rtol=1e-5, atol=1e-5)
  draw = jax.jit(lambda key: pj.apply(pure, adapted, x, train=True, rngs={"dropout": key}))
  one, again, other = (draw(jax.random.key(seed)) for seed in (1, 1, 2))
  assert (one == again).all() and (one == 0).any() and (one != other).any()
  for call, told in (
    (lambda: pj.apply(pure, adapted, x, train=True), "draws at random with train=True"),
    (lambda: pj.apply(pure, {"layers": params["layers"][0]}, x), "params lack layers/0/bias"),
    (lambda: pj.nnx.split(pj.nnx.attach(jax.random.key(0), model, lora, x)), "adapted already"),
  ):
    with pytest.raises(ValueError, match=told):
      call()
