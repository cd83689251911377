"""Frequent mistakes get a sentence that says what to write."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import peftjax as pj
from peftjax.core import weight

KEY = jax.random.key(0)
X = jnp.ones((2, 8))
GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


class Net(nn.Module):
  rate: float = 0.0

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dropout(self.rate, deterministic=not train)(nn.Dense(8, name="first")(x))
    return nn.Dense(2, name="out")(x)


MODEL = Net()
PLAIN = MODEL.init(KEY, X)["params"]
METHOD = pj.lora(rank=2, targets="first")
PARAMS = METHOD.attach(KEY, PLAIN)
TRAIN, FROZEN = pj.partition(PARAMS, METHOD.trainable(PARAMS))


class Tensor:
  """Stands in for a tensor of torch, which the tests go without."""


Tensor.__module__ = "torch"
VARIABLES = {"params": PLAIN}
PUT = lambda leaf: {"first": {**PLAIN["first"], "kernel": leaf}, "out": PLAIN["out"]}
RAGGED = np.array([[1], [1, 2]], dtype=object)


@pytest.mark.parametrize(
  "params, message",
  [
    (VARIABLES, r'variables\["params"\]'),
    (PUT(Tensor()), r"first/kernel is a tensor of torch.*jnp\.asarray\(x\.numpy"),
    (PUT(RAGGED), r"first/kernel is an array of Python objects \(2,\).*np\.float32"),
  ],
)
@pytest.mark.parametrize(
  "use",
  [
    lambda p: METHOD.attach(KEY, p),
    lambda p: pj.prefix(length=2).attach(KEY, p),
    lambda p: pj.prompt(length=2).attach(KEY, p),
    lambda p: pj.adapters().attach(KEY, p),
    lambda p: pj.quantize(p, pj.quant.int8()),
    lambda p: pj.describe(p),
    lambda p: pj.apply(MODEL, p, X),
  ],
  ids=["attach", "prefix", "prompt", "adapters", "quantize", "describe", "apply"],
)
def test_what_are_no_parameters(use, params, message):
  with pytest.raises(ValueError, match=message):
    use(params)


@pytest.mark.parametrize("half", [TRAIN, FROZEN], ids=["train", "frozen"])
def test_a_half_is_not_applied(half):
  with pytest.raises(ValueError, match=r"params lacks first/.*pj\.combine\(train, frozen\)"):
    pj.apply(MODEL, half, X)
  pj.apply(MODEL, pj.combine(TRAIN, FROZEN), X)


@pytest.mark.parametrize("method", [METHOD, pj.unfreeze("out/.*")], ids=["lora", "unfreeze"])
def test_an_optimizer_of_the_whole_tree_is_refused(method):
  """JAX's own word for it, at the gradient, is "grad requires real- or complex-valued inputs"."""
  params = method.attach(KEY, PLAIN)
  tx = method.optimizer(optax.sgd(0.1), total_steps=2)
  with pytest.raises(ValueError, match=r"whole tree: \S+ is not trained.*pj\.partition"):
    tx.init(params)
  train, _ = pj.partition(params, method.trainable(params))
  tx.init(train)
  everything = pj.unfreeze(".*")
  everything.optimizer(optax.sgd(0.1), total_steps=2).init(PLAIN)
  method.optimizer(optax.sgd(0.1), total_steps=2).init({"another": jnp.ones(2)})


@pytest.mark.parametrize("x, what", [(Tensor(), "tensor of torch"), (RAGGED, "Python objects")])
def test_inputs_of_others(x, what):
  with pytest.raises(ValueError, match=f"an input of the model is .*{what}"):
    pj.apply(MODEL, PLAIN, x)


def test_training_without_a_key():
  model = Net(rate=0.5)
  with pytest.raises(ValueError, match=r'Net draws at random.*rngs=\{"dropout": key\}'):
    pj.apply(model, PLAIN, X, train=True)
  pj.apply(model, PLAIN, X, train=True, rngs={"dropout": KEY})
  pj.apply(model, PLAIN, X)


@pytest.mark.parametrize("name", ["bert_tiny", "llama_tiny", "gpt2_tiny"])
def test_ids_that_are_none(name):
  model, params = pj.load_pretrained(GOLDEN / name)
  ids = jnp.ones((1, 4), jnp.int32)
  with pytest.raises(ValueError, match=r"token id \d+, and the model's table has"):
    pj.apply(model, params, ids * model.config.vocab)
  with pytest.raises(ValueError, match="token id -1"):
    pj.apply(model, params, -ids)
  for call in (pj.apply, jax.eval_shape):
    with pytest.raises(ValueError, match=r"token ids are float32.*astype\(jnp\.int32\)"):
      floats = ids.astype(jnp.float32)
      call(lambda p, x: pj.apply(model, p, x), params, floats) if call is jax.eval_shape else call(
        model, params, floats
      )


@pytest.fixture
def untold(monkeypatch):
  monkeypatch.setattr(weight, "_told", set())


def test_apply_of_flax_warns_once_and_ours_never(untold):
  with pytest.warns(UserWarning, match=r"a LoRA of shape \(8, 8\) was read without pj\.apply"):
    MODEL.apply({"params": PARAMS}, X)
  MODEL.apply({"params": PARAMS}, X)  # a second time would be an error here


def test_apply_and_describe_never_warn_of_it(untold):
  pj.apply(MODEL, PARAMS, X)
  pj.describe(PARAMS, model=MODEL, example=(X,))
  pj.merge(PARAMS)


def test_our_modules_name_the_leaf(untold):
  model, params = pj.load_pretrained(GOLDEN / "llama_tiny")
  params = pj.lora(rank=2, targets="q_proj").attach(KEY, params)
  with pytest.warns(UserWarning, match=r"a LoRA of model/layers_0/self_attn/q_proj was read"):
    jax.eval_shape(lambda p: model.apply({"params": p}, jnp.ones((1, 4), jnp.int32)), params)


def test_parameters_that_a_jitted_function_closes_over(monkeypatch):
  monkeypatch.setattr(pj.linen, "BAKED", 100)
  step = lambda train, frozen, x: pj.apply(MODEL, pj.combine(train, frozen), x).sum()
  jax.jit(step)(TRAIN, FROZEN, X)
  jax.grad(step)(TRAIN, FROZEN, X)  # traces too, and compiles nothing
  jax.jit(jax.grad(step))(TRAIN, FROZEN, X)
  step(TRAIN, FROZEN, X)
  with pytest.warns(UserWarning, match=r"\d+ bytes of parameters are constants.*step\(train, fro"):
    jax.jit(lambda train, x: step(train, FROZEN, x))(TRAIN, X)
  with pytest.warns(UserWarning, match="closes over them"):
    jax.jit(jax.grad(lambda train: step(train, FROZEN, X)))(TRAIN)
