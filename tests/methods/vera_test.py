"""VeRA: the formula, the one pair that all weights share, and its errors."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze
from jax.sharding import PartitionSpec as P

import peftjax as pj
from peftjax.core import tree
from peftjax.core.layout import Axes
from peftjax.nn.linear import Linear
from tests.core.programs import fused, producers

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (2, 5, 12))


def vectors(params, mask):
  """`params` with random vectors d and b."""
  draw = lambda on, x: jax.random.normal(jax.random.key(1), x.shape) if on else x
  return jax.tree.map(draw, mask, params)


def adapted(model, *args, targets="kernel", rank=7):
  """Attached parameters with random vectors and biases, and the base's."""
  base = model.init(KEY, *args)["params"]
  base = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(KEY, x.shape), base)
  method = pj.vera(rank, targets)
  params = method.attach(KEY, base, pj.linen.layout(model, *args))
  return vectors(params, method.trainable(params)), base


class Two(nn.Module):
  """12 to 8 to 20: the widest input and the widest output are not of one matrix."""

  @nn.compact
  def __call__(self, x):
    return Linear(20, name="up")(nn.tanh(Linear(8, name="down")(x)))


@pytest.mark.parametrize("make", [lambda: Linear(8), lambda: nn.Dense(8)], ids=["ours", "linen"])
def test_outputs_follow_the_formula(make):
  """h = W x + b ⊙ B (d ⊙ A x), with the bias of the module untouched."""
  params, base = adapted(make(), X)
  kernel, pair = params["kernel"], params["shared"]["vera"]
  assert pair.a.shape == (7, 12) and pair.b.shape == (8, 7)
  low = jnp.einsum("btr,r->btr", X @ pair.a.T, kernel.d)
  branch = jnp.einsum("bto,o->bto", low @ pair.b.T, kernel.b)
  want = make().apply({"params": base}, X) + branch
  chex.assert_trees_all_close(pj.apply(make(), params, X), want, atol=1e-4)
  assert np.abs(branch).max() > 1


def test_matrices_of_any_size_use_the_first_rows_and_columns_of_one_pair():
  params, base = adapted(Two(), X, targets=["up", "down"])
  pair = params["shared"]["vera"]
  assert pair.a.shape == (7, 12) and pair.b.shape == (20, 7)
  for name, (n_in, n_out) in {"down": (12, 8), "up": (8, 20)}.items():
    leaf = params[name]["kernel"]
    delta = jnp.diag(leaf.b) @ pair.b[:n_out] @ jnp.diag(leaf.d) @ pair.a[:, :n_in]
    merged = pj.merge(params)[name]["kernel"]
    chex.assert_trees_all_close(merged, base[name]["kernel"] + delta.T, atol=1e-5)
  assert pj.count(params, pj.vera(7, ["up", "down"]).trainable(params)) == (7 + 8) + (7 + 20)


@pytest.mark.parametrize(
  "model",
  [
    nn.DenseGeneral((4, 2), axis=-1),
    nn.DenseGeneral(6, axis=(-2, -1)),
    nn.Einsum((12, 8), "btd,df->btf"),
    nn.MultiHeadDotProductAttention(num_heads=4),
  ],
  ids=lambda m: type(m).__name__,
)
def test_third_party_modules_compute_what_the_merged_tree_does(model):
  args = (X, X) if isinstance(model, nn.MultiHeadDotProductAttention) else (X,)
  params, base = adapted(model, *args, targets=".*kernel")
  got, merged = pj.apply(model, params, *args), pj.merge(params)
  chex.assert_trees_all_close(got, model.apply({"params": merged}, *args), atol=1e-4)
  assert np.abs(got - model.apply({"params": base}, *args)).max() > 0.1
  chex.assert_trees_all_close(pj.tree.unmerge(merged, params), params, atol=1e-5)


def test_the_pair_depends_on_its_seed_and_sizes_alone():
  """Runs with other keys share it; entries have the deviation of He's uniform init."""
  base = {"a": {"kernel": jnp.ones((600, 300))}, "b": {"kernel": jnp.ones((600, 300))}}
  pair = lambda key, targets, seed: pj.vera(400, targets, projection_seed=seed).attach(
    jax.random.key(key), base
  )["shared"]["vera"]
  one = pair(0, "a", 5)
  chex.assert_trees_all_equal(one, pair(1, ["a", "b"], 5))
  assert not np.array_equal(one.a, pair(0, "a", 6).a)
  for x, inputs in ((one.a, 600), (one.b, 400)):
    np.testing.assert_allclose(np.std(x), np.sqrt(2 / inputs), rtol=0.01)
    assert np.abs(x).max() <= np.sqrt(6 / inputs)


def test_the_pair_is_frozen_and_saved_with_the_adapter():
  method = pj.chain(pj.vera(3, "up"), pj.lora(2, 4, "down"))
  params = method.attach(KEY, Two().init(KEY, X)["params"])
  mask = method.trainable(params)
  assert not any(jax.tree.leaves(mask["shared"]))
  adapter, base = pj.partition(params, pj.tree.adapter_mask(params, mask))
  chex.assert_trees_all_equal(adapter["shared"], params["shared"])
  assert not jax.tree.leaves(base["shared"]) and adapter["up"]["kernel"].base is None


def test_no_regex_reaches_the_pair():
  """It is no parameter of the model."""
  method = pj.chain(pj.vera(3, "up"), pj.unfreeze(r"(?!up/kernel).*"))
  params = method.attach(KEY, Two().init(KEY, X)["params"])
  mask = method.trainable(params)
  assert not any(jax.tree.leaves(mask["shared"]))
  assert mask["down"] == {"kernel": True, "bias": True} and mask["up"]["bias"]
  with pytest.raises(ValueError, match="matches no parameter"):
    pj.tree.select(params, "shared/.*")


def test_no_gradient_has_the_shape_of_a_factor():
  """The vectors scale activations: A and B are cut, cast and multiplied with, nothing else."""
  params, _ = adapted(Two(), X, targets=["up", "down"])
  mask = pj.vera(7, ["up", "down"]).trainable(params)
  shapes = {(7, 12), (7, 8), (8, 7), (20, 7)}
  loss = lambda train, frozen: pj.apply(Two(), pj.combine(train, frozen), X).sum()
  allow = ("slice", "broadcast_in_dim", "transpose", "reshape")
  both = pj.partition(params, mask)
  assert producers(jax.value_and_grad(loss), shapes, *both, allow=allow) == []
  # Of the pair itself it has, which the same check sees.
  whole = lambda params: pj.apply(Two(), params, X).sum()
  assert producers(jax.grad(whole), shapes, params, allow=allow)


class Scanned(nn.Module):
  layers: int
  remat: bool

  @nn.compact
  def __call__(self, x):
    class Step(nn.Module):
      @nn.compact
      def __call__(self, x, _):
        return nn.tanh(Linear(64, name="dense")(x)), None

    step = nn.remat(Step, prevent_cse=False) if self.remat else Step
    make = nn.scan(
      step, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers
    )
    return make(name="layers")(x, None)[0]


@pytest.mark.parametrize("remat", [False, True], ids=["scan", "scan of remat"])
def test_layers_of_a_scan_share_one_pair(remat):
  """Neither the loss nor its gradients hold a copy for each layer."""
  x = jax.ShapeDtypeStruct((4, 64), jnp.float32)
  method = pj.vera(1024, "dense")

  def temporaries(layers):
    model = Scanned(layers, remat)
    base = jax.eval_shape(lambda x: model.init(KEY, x)["params"], x)
    params = method.attach(KEY, base, pj.linen.layout(model, x))
    loss = lambda train, frozen, x: pj.apply(model, pj.combine(train, frozen), x).sum()
    arguments = *pj.partition(params, method.trainable(params)), x
    compiled = fused(jax.value_and_grad(loss)).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  pair = 4 * 2 * 1024 * 64
  assert (temporaries(8) - temporaries(2)) / 6 < pair / 4


def test_only_what_is_vera_s_leaves_the_tree():
  """A model may have a module named "shared" itself, and its parameters may be frozen dicts."""
  base = freeze({"shared": {"embedding": jnp.ones((3, 4))}, "query": {"kernel": jnp.ones((4, 4))}})
  params = pj.vera(2, "query").attach(KEY, base)
  assert set(params["shared"]) == {"embedding", "vera"}
  chex.assert_trees_all_equal(pj.merge(params), base)
  chex.assert_trees_all_equal(pj.tree.unmerge(base, params), params)
  plain = {"query": base["query"]}
  chex.assert_trees_all_equal(pj.merge(pj.vera(2, "query").attach(KEY, plain)), plain)


def test_vectors_lie_as_their_kernel_and_the_pair_everywhere():
  base = {"layers": {"query": {"kernel": jnp.ones((3, 8, 16))}}}
  layout = {"layers/query/kernel": Axes()}
  params = pj.vera(4, "query").attach(KEY, base, layout)
  specs = pj.sharding.specs(params, pj.sharding.make_mesh("data:2,fsdp:2,tensor:2"))
  leaf = specs["layers"]["query"]["kernel"]
  assert leaf.base == P(None, "fsdp", "tensor")
  both = ("tensor", "fsdp")
  assert leaf.d == P(None, None) and leaf.b == P(None, both)
  assert specs["shared"]["vera"].a == specs["shared"]["vera"].b == P(None, None)
  tied = tree.tie(params)
  leaf = pj.sharding.specs(tied, pj.sharding.make_mesh("fsdp:2,tensor:4"))["layers"]["query"][
    "kernel"
  ]
  assert leaf.a == P(None, None, both) and leaf.b_proj == P(None, both, None)
  assert tied["layers"]["query"]["kernel"].a.shape == (3, 4, 8)


def test_boxed_kernels_keep_their_names():
  """Of `nn.with_partitioning`."""
  model = nn.Dense(8, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), ("x", "y")))
  params = pj.vera(2, "kernel").attach(KEY, model.init(KEY, X)["params"])
  assert params["kernel"].names == ("x", "y") and isinstance(params["kernel"].base, jax.Array)


def test_errors():
  params = {"key": {"kernel": jnp.ones((4, 4))}, "value": {"kernel": jnp.ones((4, 4))}}
  for wrong in (dict(rank=0), dict(rank=2.0), dict(dropout=1.0), dict(d_initial=0.0)):
    with pytest.raises(ValueError, match=next(iter(wrong))):
      pj.vera(**wrong)
  with pytest.raises(ValueError, match="query"):
    pj.vera(2).attach(KEY, params)
  with pytest.raises(ValueError, match="table/embedding is a table"):
    pj.vera(2, "table").attach(KEY, {"table": {"embedding": jnp.ones((4, 4))}})
  with pytest.raises(ValueError, match="key/kernel has an adapter already"):
    pj.vera(2, "key").attach(KEY, pj.lora(2, 4, "key").attach(KEY, params))
  with pytest.raises(ValueError, match="shared/vera is there already.*one pair"):
    pj.chain(pj.vera(2, "key"), pj.vera(3, "value")).attach(KEY, params)
  with pytest.raises(ValueError, match="shared/vera.*are a list"):
    pj.vera(2, ".*kernel").attach(KEY, [params])
  attached = pj.vera(2, "key").attach(KEY, params)
  with pytest.raises(ValueError, match="no A and B of its own"):
    attached["key"]["kernel"].materialize()
  with pytest.raises(ValueError, match="kernel uses arrays of shared/vera"):
    pj.merge(attached["key"])
