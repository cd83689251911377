"""Models whose rows are long enough for attention in blocks: as those with short ones."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj
from peftjax.nn import attention, blockwise
from tests.core.programs import jit
from tests.models import tiny
from tests.models.decoder_test import load

pytestmark = pytest.mark.slow(reason="the kernel and the models have fast laws of their own")
T = 14
SEGMENTS = jnp.asarray([[1] * 5 + [2] * 9, [1] * 14])
POSITIONS = jnp.concatenate([jnp.arange(5), jnp.arange(9)])[None].repeat(2, 0)


@pytest.fixture
def in_blocks(monkeypatch):
  """Calls a function with attention over whole rows and again in blocks of 8."""

  def run(fn):
    whole = fn()
    monkeypatch.setattr(attention, "MANY_SCORES", 0)
    for name in ("ROWS", "COLUMNS", "CAUSAL_COLUMNS"):
      monkeypatch.setattr(blockwise, name, 8)
    calls = []
    count = blockwise.blockwise_attention
    counted = lambda *a, **cap: calls.append(1) or count(*a, **cap)
    monkeypatch.setitem(attention.KERNELS, "blockwise", counted)
    blocks = fn()
    assert calls
    return blocks, whole

  return run


@pytest.mark.parametrize(
  "family, method",
  [
    ("mistral_tiny", "prefix"),  # its window is 4
    ("gemma2_tiny", "prefix"),  # one layer has a window, both cap their scores
    ("gemma3_tiny", "prompt"),
    ("llama3_tiny", "prompt"),
    ("gpt2_tiny", "prefix"),
    ("gpt2_tiny", "prompt"),
  ],
)
def test_packed_decoders_have_the_same_logits_and_gradients(family, method, in_blocks):
  """Scanned and rematerialised, with virtual tokens, packed documents and, of Mistral, a window."""
  model, params, _ = load(family, scan_layers=True, remat=True)
  tokens = jnp.asarray(np.random.default_rng(0).integers(1, 90, (2, T)), jnp.int32)
  made = {"prefix": pj.prefix(3, deviation=0.5), "prompt": pj.prompt(3)}[method]
  params = made.attach(jax.random.key(0), params, pj.linen.layout(model, tokens))
  mask = jnp.ones((2, T), bool).at[1, 11:].set(False)

  def loss(params):
    logits = pj.apply(model, params, tokens, mask, POSITIONS, SEGMENTS)
    logits = jnp.where(mask[..., None], logits, 0)
    return (logits * jnp.cos(jnp.arange(96.0))[None, None]).sum(), logits

  run = lambda: jit(lambda p: jax.value_and_grad(loss, has_aux=True)(p))(params)
  blocks, whole = map(jax.tree.leaves, in_blocks(run))
  for got, want in zip(blocks, whole, strict=True):  # Gemma's gradients reach 50
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * max(10, np.abs(want).max()))


def test_encoders_have_the_same_hidden_states(in_blocks):
  model = pj.models.bert.BertClassifier(tiny.config())
  params = model.init(jax.random.key(0), tiny.TOKENS)["params"]
  run = lambda: jit(
    lambda p: model.apply({"params": p}, tiny.TOKENS, jnp.asarray(tiny.MASK), hidden=True)[0]
  )(params)
  chex.assert_trees_all_close(*in_blocks(run), rtol=1e-4, atol=1e-5)
