"""The encoder itself: scanned and unrolled, dropout, lengths, precision."""

import collections
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj
from peftjax.core import paths
from peftjax.methods.lora_weight import LoRA
from peftjax.models import bert, encoder_heads
from peftjax.models.bert import BertClassifier, BertConfig, hf_name
from peftjax.nn import encoder
from tests.core.programs import jit
from tests.models import tiny

KEY = jax.random.key(2)


@functools.cache
def _program(config, train, hidden):
  model = BertClassifier(config)
  inputs = (tiny.TOKENS, tiny.MASK)
  how = dict(train=train, hidden=hidden)
  return jit(lambda p, key: pj.apply(model, p, *inputs, rngs={"dropout": key}, **how))


def forward(config, params, train=True, key=KEY, hidden=False):
  """Logits, in training mode by default."""
  return _program(config, train, hidden)(params, key)


@pytest.fixture(scope="module", params=["unrolled", "scanned"])
def layers(request):
  """Configuration overrides and parameters."""
  scan = request.param == "scanned"
  return dict(scan_layers=scan), tiny.scanned_params() if scan else tiny.params()


def attach(params, scan_layers, dropout):
  """All-linear LoRA with nothing zero in it, the same for scanned and unrolled."""
  model = BertClassifier(tiny.config(scan_layers=scan_layers))
  method = pj.lora(4, 8, "all-linear", dropout=dropout)
  params = method.attach(KEY, params, pj.linen.layout(model, tiny.TOKENS))
  draw = lambda w: w.replace(b=jnp.full_like(w.b, 0.1)) if isinstance(w, LoRA) else w
  return jax.tree.map(draw, params, is_leaf=paths.is_leaf)


def test_scanned_equals_unrolled_for_equal_keys():
  """With the model's dropout and the adapters', which changes the logits much more than that."""
  scan, unroll = (
    forward(tiny.dropout_config(scan_layers=scan), attach(params, scan, 0.3))
    for scan, params in ((True, tiny.scanned_params()), (False, tiny.params()))
  )
  np.testing.assert_allclose(scan, unroll, rtol=1e-4, atol=1e-5)
  other = forward(tiny.dropout_config(), attach(tiny.params(), False, 0.3), key=jax.random.key(9))
  assert np.abs(other - unroll).max() > 0.03


def test_two_steps_draw_different_masks_and_evaluation_draws_none(layers):
  how, params = layers
  config = tiny.dropout_config(**how)
  one, again, two = (forward(config, params, key=jax.random.key(i)) for i in (0, 0, 1))
  np.testing.assert_array_equal(one, again)
  still = forward(config, params, train=False)
  assert np.abs(one - two).max() > 0.03 and np.abs(one - still).max() > 0.03
  np.testing.assert_array_equal(still, forward(tiny.config(**how), params, train=False))


@pytest.mark.parametrize(
  "family, outputs, heads",
  [("bert", 2, 1), ("roberta", 2, 2), ("electra", 2, 2), ("distilbert", 1, 1)],
)
def test_every_place_of_dropout_has_its_own_key_and_rate(family, outputs, heads, monkeypatch):
  """As transformers has them: embeddings, probabilities and two outputs a layer, the head."""
  seen = []

  def note(key, x, rate):
    if key is not None:  # init has none
      seen.append((rate, jax.random.key_data(key).tobytes()))
    return x

  def attention(q, k, v, bias, num_heads, *, key, rate):
    return note(key, v, rate)

  for module in (bert, encoder_heads):
    monkeypatch.setattr(module, "dropout", note)
  monkeypatch.setattr(encoder, "attention", attention)
  rates = dict(dropout=0.1, attention_dropout=0.2, head_dropout=0.3)
  config = tiny.config(family=family, pad_id=int(family == "roberta"), **rates)
  model = BertClassifier(config)
  params = jax.eval_shape(lambda: model.init(KEY, tiny.TOKENS)["params"])
  params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), params)
  pj.apply(model, params, tiny.TOKENS, train=True, rngs={"dropout": KEY})
  assert collections.Counter(rate for rate, _ in seen) == {0.1: 1 + 2 * outputs, 0.2: 2, 0.3: heads}
  assert len(set(seen)) == len({key for _, key in seen}) == len(seen)


def test_a_rate_of_zero_is_off(layers):
  """Training mode then computes what evaluation does."""
  how, params = layers
  train, still = (forward(tiny.config(**how), params, train=train) for train in (True, False))
  np.testing.assert_allclose(train, still, rtol=1e-5, atol=1e-6)


def test_padding_does_not_change_the_logits(layers):
  """Other tokens behind the mask, or none."""
  how, params = layers
  run = jit(lambda t, m: BertClassifier(tiny.config(**how)).apply({"params": params}, t, m))
  tokens = np.where(tiny.MASK, tiny.TOKENS, 77)
  want = run(tiny.TOKENS, tiny.MASK)
  np.testing.assert_allclose(run(tokens, tiny.MASK), want, rtol=1e-5, atol=1e-6)
  assert np.abs(run(tokens, np.ones_like(tiny.MASK)) - want).max() > 0.01


def test_too_long_an_input_raises():
  """For RoBERTa positions start behind the padding id."""
  ids = lambda n: jax.ShapeDtypeStruct((1, n), jnp.int32)
  for family, longest in (("bert", 42), ("roberta", 40)):
    model = BertClassifier(tiny.config(family=family, pad_id=int(family == "roberta"), types=1))
    init = lambda t, m=model: m.init(jax.random.key(0), t)
    jax.eval_shape(init, ids(longest))
    with pytest.raises(ValueError, match=f"{longest + 1} tokens, but this model has {longest} pos"):
      jax.eval_shape(init, ids(longest + 1))


def test_bfloat16_compute_is_close_and_gives_float32_logits(layers):
  how, params = layers
  full = forward(tiny.config(**how), params, train=False)
  half = forward(tiny.config(**how, dtype=jnp.bfloat16), params, train=False)
  assert half.dtype == jnp.float32
  assert 0 < np.abs(half - full).max() < 0.05 * np.abs(full).max()
  hidden, first = forward(tiny.config(**how, dtype=jnp.bfloat16), params, train=False, hidden=True)
  assert hidden.dtype == first.dtype == jnp.bfloat16 and hidden.shape == (4, 10, 64)


def test_gradients_are_those_of_scanned_layers_too():
  loss = lambda config: jit(
    jax.grad(lambda p: BertClassifier(config).apply({"params": p}, tiny.TOKENS, tiny.MASK).sum())
  )
  unrolled = loss(tiny.config())(tiny.params())["bert"]["encoder"]
  scanned = loss(tiny.config(scan_layers=True))(tiny.scanned_params())["bert"]["encoder"]["layers"]
  for i in range(2):
    chex.assert_trees_all_close(
      jax.tree.map(lambda x, i=i: x[i], scanned), unrolled[f"layers_{i}"], rtol=2e-4, atol=2e-4
    )


def test_names_of_tensors():
  assert hf_name("bert/embeddings/LayerNorm/scale") == "bert.embeddings.LayerNorm.weight"
  assert hf_name("roberta/encoder/layers_11/output/dense/bias") == (
    "roberta.encoder.layer.11.output.dense.bias"
  )
  assert hf_name("head/classifier/out_proj/kernel") == "classifier.out_proj.weight"


def test_what_the_encoder_does_not_have_raises():
  base = dict(model_type="bert", hidden_act="gelu")
  with pytest.raises(ValueError, match="position_embedding_type is 'relative_key'"):
    BertConfig.from_hf({**base, "position_embedding_type": "relative_key"})
  with pytest.raises(ValueError, match="is_decoder is True"):
    BertConfig.from_hf({**base, "is_decoder": True})
  with pytest.raises(ValueError, match="hidden_act is 'mish'; it must be one of gelu"):
    BertConfig.from_hf({**base, "hidden_act": "mish"})
