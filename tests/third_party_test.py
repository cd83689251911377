"""Models as others write them: factored, merged, quantised and trained without a change."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import peftjax as pj
from peftjax.core import paths
from peftjax.core.adapted import bare
from peftjax.core.layout import ConvAxes
from peftjax.core.weight import is_weight
from tests import third_party
from tests.core.programs import jit, producers

KEY = jax.random.key(0)


class Case:
  """A model with LoRA on every matrix that its layout knows, nothing zero in it."""

  def __init__(self, name):
    self.model, self.x, self.kwargs = third_party.MODELS[name]
    self.layout = pj.linen.layout(self.model, self.x, **self.kwargs)
    variables = jit(lambda: self.model.init(KEY, self.x, **self.kwargs))()
    self.base = variables["params"]
    self.rest = {k: v for k, v in variables.items() if k != "params"}
    flat = paths.leaves(self.base)
    # A convolution in groups is computed densely.
    known = [p for p in flat if p in self.layout and p != "grouped/kernel"]
    self.targets = [p for p in known if len(bare(flat[p]).shape) >= 2]
    self.method = pj.lora(2, 4, [rf"{p}" if "/" in p else p for p in self.targets])
    rng = np.random.default_rng(0)
    draw = lambda w: w.replace(b=jnp.asarray(0.2 * rng.standard_normal(w.b.shape), jnp.float32))
    attached = self.method.attach(KEY, self.base, self.layout)
    self.params = jax.tree.map(
      lambda w: draw(w) if is_weight(w) else w, attached, is_leaf=paths.is_leaf
    )

  def apply(self, params):
    return pj.apply(self.model, params, self.x, variables=self.rest, **self.kwargs)

  def plain(self, params):
    return self.model.apply({"params": params, **self.rest}, self.x, **self.kwargs)

  def weights(self):
    return {p: w for p, w in paths.leaves(self.params).items() if is_weight(w)}


def test_modules_that_map_over_parameters_get_the_dense_array():
  """WeightNorm and SpectralNorm; no child of a weight is taken for a parameter."""
  model, x = third_party.Normalised(), third_party.X
  variables = model.init(KEY, x)
  rest = {"batch_stats": variables["batch_stats"]}
  params = pj.lora(2, targets=["weight", "spectral"]).attach(KEY, variables["params"])
  for name in ("weight", "spectral"):
    params[name]["kernel"] = params[name]["kernel"].replace(b=jnp.ones((8, 2)))
  got = pj.apply(model, params, x, variables=rest)
  want = model.apply({"params": pj.merge(params), **rest}, x)
  chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)


SLOW = pytest.mark.slow(reason="as the others; these differ in how layers are put together")
CASES = [pytest.param(x, marks=[SLOW] * (x in third_party.WHOLE)) for x in third_party.MODELS]


@pytest.fixture(scope="module", params=CASES)
def case(request):
  return Case(request.param)


def test_every_matrix_is_found_and_adapted(case):
  matrices = [
    path
    for path, x in paths.leaves(case.base).items()
    if len(bare(x).shape) >= 2 and not path.endswith(("bias", "scale"))
  ]
  assert set(case.targets) == set(matrices) - {"grouped/kernel"} == set(case.weights())


def test_outputs_are_those_of_the_merged_model(case):
  got, want, plain = jit(lambda p, b: (case.apply(p), case.plain(pj.merge(p)), case.plain(b)))(
    case.params, case.base
  )
  chex.assert_trees_all_close(got, want, rtol=2e-5, atol=2e-5)
  assert np.abs(got - plain).max() > 1e-3


def test_no_dense_array_is_built(case):
  """Forward and backward; the same check sees those of the merged model."""
  train, frozen = pj.partition(case.params, case.method.trainable(case.params))
  grad = lambda apply: jax.value_and_grad(lambda t, f: jnp.square(apply(pj.combine(t, f))).sum())
  # The gradient of a table that is a head too has rows for every word, as have one-hot rows.
  shapes = {w.shape for w in case.weights().values()}
  shapes |= {w.shape[len(w.stack) :] for w in case.weights().values()}
  # Of the base: a layer cut out of a stack, and what a convolution's gradient turns round.
  allow = ("slice", "squeeze", "rev", "reshape")
  assert producers(grad(case.apply), shapes, train, frozen, allow=allow) == []
  dense = grad(lambda p: case.plain(pj.merge(p)))
  assert producers(dense, shapes, train, frozen)


def test_describe_says_factored(case):
  if case.rest:
    pytest.skip("describe gives a model its parameters alone, and this one has running means")
  rows = pj.describe(case.params, model=case.model, example=[case.x])
  assert {row.computed for row in rows if row.type == "LoRA"} == {"factored"}


@pytest.mark.fast_for("subclass of Dense|vmapped experts|lm1b|own products")
def test_four_bits_and_dropout_work_through_it(case):
  """The kernels that can be in four bits; a step draws anew, and evaluation does not."""
  layout = case.layout
  flat = paths.leaves(case.base)
  fits = [
    p for p in case.targets if np.prod([bare(flat[p]).shape[a] for a in layout[p].ins]) % 2 == 0
  ]
  fits = [p for p in fits if "embedding" not in p and not isinstance(layout[p], ConvAxes)]
  if not fits:
    pytest.skip("no kernel of an even number of inputs")
  params = pj.quantize(case.base, pj.quant.nf4(), fits, layout)
  method = pj.lora(2, 4, fits, dropout=0.5)
  params = method.attach(KEY, params, layout)
  draw = lambda w: w.replace(b=jnp.full_like(w.b, 0.2)) if hasattr(w, "b") else w
  params = jax.tree.map(draw, params, is_leaf=is_weight)

  @jit
  def run(params, keys):
    kwargs = {name: x for name, x in case.kwargs.items() if name != "train"}
    mutable = dict(mutable=list(case.rest)) if case.rest else {}
    step = lambda key: pj.apply(
      case.model, params, case.x, variables=case.rest, train=True, rngs={"dropout": key},
      **kwargs, **mutable,
    )  # fmt: skip
    steps = [jax.tree.leaves(step(key))[0] for key in keys]
    return case.apply(params), case.plain(pj.merge(params, dense=True)), steps

  if any(w.stack and "experts" in path for path, w in case.weights().items()):
    with pytest.raises(ValueError, match="whole stack of LoRA layers with dropout"):
      run(params, list(jax.random.split(KEY)))
    return
  got, want, (one, two) = run(params, list(jax.random.split(KEY)))
  chex.assert_trees_all_close(got, want, rtol=2e-5, atol=2e-5)
  assert np.abs(one - two).max() > 1e-4


def test_an_nnx_module_that_was_made_linen():
  """By `nnx.bridge.to_linen`, which has its parameters as linen has them."""

  class Two(nnx.Module):
    def __init__(self, rngs):
      self.up, self.down = nnx.Linear(12, 16, rngs=rngs), nnx.Linear(16, 6, rngs=rngs)

    def __call__(self, x):
      return self.down(nnx.relu(self.up(x)))

  model, x = nnx.bridge.to_linen(Two), third_party.X
  params = model.init(KEY, x)["params"]
  lora = pj.lora(2, targets="all-linear")
  params = lora.attach(KEY, params, pj.linen.layout(model, x))
  params = jax.tree.map(lambda w: w + 0.1, params)
  got, want = pj.apply(model, params, x), model.apply({"params": pj.merge(params)}, x)
  chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)
  rows = pj.describe(params, model=model, example=[x])
  assert [row.computed for row in rows if row.type == "LoRA"] == ["factored"] * 2


def test_a_convolution_is_adapted_by_name_alone():
  """ "all-linear" means none of them, in `attach` and in `quantize`."""
  model = third_party.Vit()
  params = model.init(KEY, third_party.IMAGE)["params"]
  layout = pj.linen.layout(model, third_party.IMAGE)
  params = pj.quantize(params, pj.quant.int8(), "all-linear", layout)
  params = pj.lora(2, targets="all-linear").attach(KEY, params, layout)
  leaves = paths.leaves(params)
  assert not is_weight(leaves["embedding_patches/kernel"]) and not is_weight(leaves["head/kernel"])
  assert all(leaves[f"block_1/{name}/kernel"].base.quantised for name in ("up", "attention/out"))
  pj.apply(model, params, third_party.IMAGE)
