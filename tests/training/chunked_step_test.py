"""A decoder's training step: that of all logits at once, which are never there."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import peftjax as pj
from peftjax import sharding
from peftjax.models import gpt2, llama
from peftjax.nn import chunked_loss
from peftjax.training import state, step
from peftjax.training.causal_lm import KIND
from tests.core.programs import equations, jit

# Logits are larger than all else: weights, and what attention and feed-forward blocks make.
BATCH, LENGTH, VOCAB = 8, 13, 320
LOGITS = BATCH * (LENGTH - 1) * VOCAB  # that are of account
COMMON = {"vocab_size": VOCAB, "tie_word_embeddings": True}
LLAMA = {
  **COMMON,
  "model_type": "llama",
  "hidden_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "intermediate_size": 32,
  "max_position_embeddings": 32,
}
GPT2 = {**COMMON, "model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
PLAIN = KIND._replace(summed=None)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 1)
  monkeypatch.setattr(chunked_loss, "CHUNK_TOKENS", 4)


def model_of(family, **how):
  if family == "gpt2":
    return gpt2.GPT2LMHeadModel(gpt2.GPT2Config.from_hf(GPT2, **how))
  said = {**LLAMA, "tie_word_embeddings": family != "untied"}
  return llama.LlamaForCausalLM(llama.LlamaConfig.from_hf(said, **how))


def batch_of(seed):
  """Two documents a row; few tokens to predict, in one chunk none."""
  rng = np.random.default_rng(seed)
  segments = np.where(np.arange(LENGTH) < rng.integers(3, 10, (BATCH, 1)), 1, 2)
  weights = (rng.random((BATCH, LENGTH)) < rng.random((BATCH, 1))).astype(np.float32)
  weights[:, 5:9] = 0
  return {
    "tokens": rng.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32),
    "segments": segments.astype(np.int32),
    "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), segments.shape),
    "weights": weights,
  }


def halves(model, method):
  tokens = jnp.zeros((1, 4), jnp.int32)
  layout = pj.linen.layout(model, tokens)
  make = lambda key: method.attach(key, model.init(key, tokens)["params"], layout)
  params = jit(make)(jax.random.key(0))
  return pj.partition(params, method.trainable(params))


def stepper(model, tx, kind):
  return functools.partial(step.train_step, model, tx, kind)


def two_batches(model, method, kind, mesh=None):
  """The update of two accumulated batches, their numbers, and an evaluation."""
  tx = method.optimizer(optax.sgd(100.0), 1, clip_norm=None, accumulate=2, batches=2)
  train, frozen = halves(model, method)
  run = jit(stepper(model, tx, kind))
  current, out = state.init(tx, train), []
  for seed in (1, 2):
    batch = batch_of(seed)
    if mesh is not None:
      batch = jax.device_put(batch, sharding.batch_shardings(batch, mesh))
    current, metrics = run(current, frozen, batch, jax.random.key(3))
    out.append(metrics)
  scores = jit(functools.partial(step.eval_step, model, kind))(current.train, frozen, batch_of(3))
  moved = jax.tree.map(lambda new, old: new - old, current.train, train)
  return jax.device_get((moved, out, scores))


LORA = pj.lora(2, 4, "all-linear", dropout=0.2)
HEAD_TOO = pj.lora(2, 4, ["all-linear", "lm_head/kernel"], dropout=0.2)
_SLOW = pytest.mark.slow(reason="the same law for more models; three seconds each")


@pytest.mark.slow(reason="whole steps; chunked_loss_test has the equality")
@pytest.mark.parametrize(
  ("family", "method", "how", "mesh"),
  [
    ("tied", pj.unfreeze(".*"), dict(scan_layers=True), ""),
    *(
      pytest.param(*case, marks=_SLOW)
      for case in (
        ("untied", HEAD_TOO, {}, "data:2,fsdp:4"),
        ("tied", LORA, {}, ""),
        ("untied", HEAD_TOO, dict(scan_layers=True, remat=True), ""),
        ("gpt2", LORA, dict(scan_layers=True), ""),
        ("gpt2", pj.unfreeze(".*"), {}, ""),
      )
    ),
  ],
)
def test_steps_are_those_of_all_logits_at_once(family, method, how, mesh):
  """Update, loss and norm of accumulated batches, and the sums of an evaluation."""
  model = model_of(family, **how)
  mesh = sharding.make_mesh(mesh) if mesh else None
  got, want = two_batches(model, method, KIND, mesh), two_batches(model, method, PLAIN)
  near = lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-5 * np.abs(y).max())
  jax.tree.map(near, got, want)
  assert want[1][1]["grad_norm"] > 1e-3


@pytest.mark.parametrize(
  ("family", "method"), [("untied", HEAD_TOO), pytest.param("gpt2", LORA, marks=_SLOW)]
)
def test_no_array_is_as_large_as_the_logits(family, method):
  """In no equation of the step, nor of the evaluation; with the plain loss there are many."""
  model = model_of(family)
  train, frozen = halves(model, method)
  tx = method.optimizer(optax.sgd(0.5), 1, clip_norm=None)

  def large(kind):
    current = jax.eval_shape(functools.partial(state.init, tx), train)
    evaluation = functools.partial(step.eval_step, model, kind)
    programs = (
      jax.make_jaxpr(stepper(model, tx, kind))(current, frozen, batch_of(1), jax.random.key(3)),
      jax.make_jaxpr(evaluation)(train, frozen, batch_of(1)),
    )
    sizes = (math.prod(v.aval.shape) for p in programs for e in equations(p) for v in e.outvars)
    return sum(size >= LOGITS for size in sizes)

  assert large(KIND) == 0
  assert large(PLAIN) > 5
