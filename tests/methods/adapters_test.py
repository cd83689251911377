"""Bottleneck adapters: where they lie, what they compute, in our models and in others'."""

import pathlib

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj
from peftjax.core import paths
from peftjax.methods.adapters import PLACEMENTS
from peftjax.models.bert import BertClassifier
from peftjax.nn.ffn import ACTIVATIONS
from peftjax.nn.norm import layer_norm
from tests.core.programs import jit
from tests.models import tiny

KEY = jax.random.key(0)
LAYER = "bert/encoder/layers_0"
GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
TOKENS = np.array([[3, 5, 7, 11, 2]], np.int32)


def attached(method, model, params, *example):
  """Nothing in the adapters is zero."""
  params = method.attach(KEY, params, pj.linen.layout(model, *example))
  mask = method.trainable(params)
  draw = lambda x: 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)
  return jax.tree.map(lambda on, x: draw(x) if on else x, mask, params)


def bert(placement, **more):
  model = BertClassifier(tiny.config())
  return model, attached(
    pj.adapters(8, placement, norms=False, **more), model, tiny.params(), tiny.TOKENS
  )


def calls(model, params, *names):
  """Arguments and result of the modules of these names, by an interceptor around the bridge."""
  seen = {}

  def watch(next_fn, args, kwargs, context):
    result = next_fn(*args, **kwargs)
    path = "/".join(context.module.path)
    if path.endswith(names) and path not in seen:
      seen[path] = (args, result)
    return result

  with nn.intercept_methods(watch):
    pj.apply(model, params, tiny.TOKENS, tiny.MASK)
  return seen


def written_out(node, u):
  """The formula, with no code of the library but its activation."""
  z = ACTIVATIONS[node.activation](
    jnp.einsum("btd,dm->btm", u, node.down) + node.down_bias[None, None]
  )
  return node.scale * (jnp.einsum("btm,md->btd", z, node.up) + node.up_bias[None, None])


@pytest.mark.parametrize(
  ("placement", "formula"),
  [
    ("houlsby", lambda f, update, stream: stream + update + f(update)),
    ("after_residual", lambda f, update, stream: stream + update + f(stream + update)),
    ("parallel", lambda f, update, stream: stream + update + f(stream)),
    ("scaled_parallel", lambda f, update, stream: stream + update + f(stream)),
  ],
)
def test_a_placement_computes_its_formula(placement, formula):
  model, params = bert(placement)
  flat = {**calls(model, params, f"{LAYER}/output/residual", f"{LAYER}/attention/output/residual")}
  places = [p for p in flat if "adapter" in _at(params, p)]
  assert len(places) == (1 if "parallel" in placement else 2)
  for path in places:
    node = _at(params, path)["adapter"]
    (update, stream), result = flat[path]
    want = formula(lambda u, node=node: written_out(node, u), update, stream)
    np.testing.assert_allclose(result, want, rtol=1e-5, atol=1e-5)
    assert np.abs(result - update - stream).max() > 0.1
    assert float(node.scale) == (4.0 if placement == "scaled_parallel" else 1.0)


def test_pfeiffers_adapter_lies_between_two_uses_of_the_norm():
  """LN(z + f(LN(z)))."""
  model, params = bert("pfeiffer")
  ((z,), result) = calls(model, params, f"{LAYER}/output/LayerNorm")[f"{LAYER}/output/LayerNorm"]
  own = _at(params, f"{LAYER}/output/LayerNorm")
  norm = lambda x: layer_norm(x, own["scale"], own["bias"], model.config.eps)
  np.testing.assert_allclose(
    result, norm(z + written_out(own["adapter"], norm(z))), rtol=1e-5, atol=1e-5
  )
  assert "adapter" not in _at(params, f"{LAYER}/attention/output/LayerNorm")


def _at(tree, path):
  for part in path.split("/"):
    tree = tree.get(part, {})
  return tree


@pytest.mark.fast_for("houlsby-llama|pfeiffer-gpt2")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_decoders_scanned_and_unrolled_agree(family, placement):
  """The same keys make the same adapters; every layer has them where the placement says."""
  method, outputs = pj.adapters(4, placement, init="bert"), []
  for scan in (False, True):
    model, params = pj.load_pretrained(GOLDEN / f"{family}_tiny", scan_layers=scan)
    params = method.attach(KEY, params, pj.linen.layout(model, TOKENS))
    outputs.append(jit(lambda p, model=model: pj.apply(model, p, TOKENS))(params))
    layers = model.config.layers
    places = 2 if placement in ("houlsby", "after_residual") else 1
    width = model.config.width
    only = {p: x for p, x in paths.leaves(params).items() if "/adapter/" in p}
    assert sum(x.size for p, x in only.items() if not p.endswith("adapter/scale")) == (
      layers * places * (2 * width * 4 + width + 4)
    )
  np.testing.assert_allclose(*outputs, rtol=2e-5, atol=2e-5)


class Block(nn.Module):
  """Third-party."""

  @nn.compact
  def __call__(self, x):
    y = nn.Dense(16, name="wide")(x)
    return nn.Dense(x.shape[-1], name="narrow")(nn.relu(y)), y


class Stack(nn.Module):
  @nn.compact
  def __call__(self, x):
    scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    return scan(name="blocks")(x)[0]


X = np.random.default_rng(0).standard_normal((2, 5, 12), np.float32)


@pytest.mark.parametrize("placement", ["houlsby", "parallel"])
def test_third_party_modules_by_path(placement):
  """After a module, or beside it from its first argument; of several results, the first."""
  model = Block()
  params = model.init(KEY, X)["params"]
  method = pj.adapters(4, placement, "narrow")
  params = attached(method, model, params, X)
  _, hidden = model.apply({"params": {k: params[k] for k in ("wide", "narrow")}}, X)
  plain = nn.Dense(12).apply(
    {"params": {k: params["narrow"][k] for k in ("kernel", "bias")}}, nn.relu(hidden)
  )
  u = nn.relu(hidden) if placement == "parallel" else plain
  want = plain + written_out(params["narrow"]["adapter"], u)
  np.testing.assert_allclose(pj.apply(model, params, X)[0], want, rtol=1e-5, atol=1e-5)


def test_a_scanned_third_party_block_has_an_adapter_a_layer():
  model = Stack()
  params = model.init(KEY, X)["params"]
  params = attached(pj.adapters(4, targets="blocks"), model, params, X)
  node = params["blocks"]["adapter"]
  assert node.down.shape == (3, 12, 4) and node.scale.shape == (3,)
  x = X
  for i in range(3):
    layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
    y = Block().apply({"params": {k: layer[k] for k in ("wide", "narrow")}}, x)[0]
    x = y + written_out(layer["adapter"], y)
  np.testing.assert_allclose(pj.apply(model, params, X), x, rtol=1e-5, atol=1e-5)


@pytest.mark.slow(reason="7 s")
def test_norms_are_trained_by_flag_and_by_the_papers_default():
  for placement, kind in PLACEMENTS.items():
    for norms in (None, True, False):
      model = BertClassifier(tiny.config())
      method = pj.adapters(8, placement, norms=norms)
      params = method.attach(KEY, tiny.params(), pj.linen.layout(model, tiny.TOKENS))
      mask = paths.leaves(method.trainable(params))
      trained = {p for p, on in mask.items() if on and "LayerNorm" in p and "adapter" not in p}
      assert bool(trained) == (kind.norms if norms is None else norms)
      if trained:  # all of them, the embeddings' too
        assert trained == {
          p for p in paths.leaves(tiny.params()) if "LayerNorm" in p and "adapter" not in p
        }


def test_rules_of_other_methods_do_not_reach_into_an_adapter():
  """The frozen scale of a bottleneck is no parameter of the model."""
  model = BertClassifier(tiny.config())
  method = pj.chain(pj.adapters(4, norms=False), pj.unfreeze(".*/scale"))
  params = method.attach(KEY, tiny.params(), pj.linen.layout(model, tiny.TOKENS))
  mask = paths.leaves(method.trainable(params))
  scales = {path: on for path, on in mask.items() if path.endswith("/scale")}
  assert all(on != path.endswith("adapter/scale") for path, on in scales.items())
  assert len(set(scales.values())) == 2


class Narrow(nn.Module):
  by_name: bool

  @nn.compact
  def __call__(self, x):
    dense = nn.Dense(12, name="narrow")
    return dense(inputs=x) if self.by_name else dense(x)


def test_a_module_called_with_keywords_has_no_first_argument_to_read():
  params = Narrow(False).init(KEY, X)["params"]
  layout = pj.linen.layout(Narrow(False), X)
  params = pj.adapters(4, "parallel", "narrow").attach(KEY, params, layout)
  with pytest.raises(ValueError, match="keywords alone; call it with positions"):
    pj.apply(Narrow(True), params, X)


def test_an_adapter_of_the_result_does_not_mind_keywords():
  params = Narrow(True).init(KEY, X)["params"]
  params = attached(pj.adapters(4, "houlsby", "narrow"), Narrow(True), params, X)
  got = pj.apply(Narrow(True), params, X)
  np.testing.assert_array_equal(got, pj.apply(Narrow(False), params, X))
  # One that calls its module again with a changed argument needs that argument.
  again = params["narrow"]["adapter"].replace(again=True)
  with pytest.raises(ValueError, match="keywords alone"):
    pj.apply(Narrow(True), {"narrow": {**params["narrow"], "adapter": again}}, X)


class Named(nn.Module):
  """A third party's block with a module called as our parameter is."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(12, name="adapter")(nn.Dense(12, name="narrow")(x))


class Outer(nn.Module):
  @nn.compact
  def __call__(self, x):
    return Named(name="block")(x)


def test_a_third_partys_module_called_adapter_is_its_own():
  """Neither trained nor overwritten, and it can be adapted itself."""
  params = Named().init(KEY, X)["params"]
  method = pj.adapters(4, targets=["narrow", "adapter"])
  params = method.attach(KEY, params, pj.linen.layout(Named(), X))
  mask = paths.leaves(method.trainable(params))
  arrays = ("down", "down_bias", "up", "up_bias")
  places = ("adapter/adapter", "narrow/adapter")
  assert {p for p, on in mask.items() if on} == {f"{p}/{x}" for p in places for x in arrays}
  assert pj.apply(Named(), params, X).shape == X.shape
  outer = Outer()
  params = outer.init(KEY, X)["params"]
  with pytest.raises(ValueError, match="block has a module or parameter of its own.*'adapter'"):
    pj.adapters(4, targets="block").attach(KEY, params, pj.linen.layout(outer, X))


@pytest.mark.fast_for("parallel")
@pytest.mark.parametrize("placement", ["houlsby", "parallel"])
def test_gradients_are_the_same_where_activations_are_computed_again(placement):
  """In a scan, as configs/causal_lm.py trains."""
  method, found = pj.adapters(4, placement, init="bert", norms=False), []
  for remat in (False, True):
    model, params = pj.load_pretrained(GOLDEN / "llama_tiny", scan_layers=True, remat=remat)
    params = method.attach(KEY, params, pj.linen.layout(model, TOKENS))
    train, frozen = pj.partition(params, method.trainable(params))
    loss = lambda t, f, model=model: jnp.sin(pj.apply(model, pj.combine(t, f), TOKENS)).sum()
    found.append(jit(jax.grad(loss))(train, frozen))
  chex.assert_trees_all_close(*found, rtol=1e-4, atol=1e-5)
  assert all(np.any(x) for x in jax.tree.leaves(found[1]))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(size=0), "size=0: write"),
    (dict(placement="before"), "placement 'before' is not one of houlsby"),
    (dict(init="zeros"), "init 'zeros' is not one of"),
    (dict(activation="tan"), "activation 'tan' is not one of"),
  ],
)
def test_wrong_arguments_say_what_is_allowed(change, message):
  with pytest.raises(ValueError, match=message):
    pj.adapters(**change)


def test_wrong_places_say_what_there_is():
  model, params = BertClassifier(tiny.config()), tiny.params()
  layout = pj.linen.layout(model, tiny.TOKENS)
  with pytest.raises(ValueError, match=r"peftjax\.linen\.layout\(model"):
    pj.adapters().attach(KEY, params)
  with pytest.raises(ValueError, match=r"(?s)target 'mlp' matches no module.*bert/encoder"):
    pj.adapters(targets="mlp").attach(KEY, params, layout)
  with pytest.raises(ValueError, match="cannot be put around"):
    pj.adapters(4, "parallel", "word_embeddings").attach(KEY, params, layout)
  twice = pj.adapters().attach(KEY, params, layout)
  with pytest.raises(ValueError, match="residual has an adapter already"):
    pj.adapters().attach(KEY, twice, layout)
  with pytest.raises(ValueError, match=r"(?s)'houlsby' adapters go.*targets="):
    block = Block()
    pj.adapters().attach(KEY, block.init(KEY, X)["params"], pj.linen.layout(block, X))
