"""Averages are of tokens: one batch equals any split of it into batches, devices and buckets."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import peftjax as pj
from peftjax import losses, sharding
from peftjax.core import paths
from peftjax.data.pack import Rows
from peftjax.training import build, state, step
from peftjax.training.causal_lm import KIND, LanguageModelling
from peftjax.training.classification import CLASSES, NUMBER
from peftjax.training.settings import from_config
from tests import tiny_lm
from tests.core.programs import jit

ROWS, LENGTH, VOCAB = 32, 6, 11
KINDS = {"causal_lm": (KIND, VOCAB), "classes": (CLASSES, 3), "number": (NUMBER, 1)}


class Reader(nn.Module):
  """Logits of every token, or, of rows with a label, of the mean of the tokens."""

  outputs: int
  pool: bool

  @nn.compact
  def __call__(self, tokens, mask, *rest):
    x = nn.Embed(VOCAB, 8, name="embed")(tokens)
    x = jnp.tanh(nn.Dense(8, name="hidden")(x))
    if self.pool:
      x = (x * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return nn.Dense(self.outputs, name="out")(x)


def rows_of(name, seed):
  """32 rows of very unequal numbers of tokens to predict."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, VOCAB, (ROWS, LENGTH), np.int32)
  if name == "causal_lm":
    weights = (rng.random((ROWS, LENGTH)) < rng.random((ROWS, 1)) ** 3).astype(np.float32)
    weights[16:24] = 0  # the third of four batches has nothing to predict
    return {
      "tokens": tokens,
      "segments": np.ones_like(tokens),
      "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape),
      "weights": weights,
    }
  labels = rng.integers(0, 3, ROWS, np.int32) if name == "classes" else rng.random(ROWS, np.float32)
  return {
    "tokens": tokens,
    "mask": np.arange(LENGTH) < rng.integers(1, LENGTH, (ROWS, 1)),
    "types": np.zeros_like(tokens),
    "labels": labels,
    "weights": np.ones(ROWS, np.float32),
  }


def cut(batch, sizes):
  """Batches of so many rows each, filled up with rows that count nothing to the size of all."""
  ends, top = np.cumsum(sizes), max(sizes)
  for end, size in zip(ends, sizes, strict=True):
    yield {
      name: np.concatenate(
        [x[end - size : end], (x[:1] if name != "weights" else 0 * x[:1]).repeat(top - size, 0)]
      )
      for name, x in batch.items()
    }


def method_of(name):
  if name == "causal_lm":
    allocate = pj.adalora(4, target_rank=2, targets=["hidden"], warmup=0, final=1, interval=1)
    return pj.chain(allocate, pj.unfreeze("out/.*"))
  return pj.unfreeze(".*")


@functools.cache
def attached(name):
  """The module and its two halves, each array that will be trained with a gradient."""
  kind, outputs = KINDS[name]
  model, method = Reader(outputs, name != "causal_lm"), method_of(name)
  example = tuple(kind.inputs(rows_of(name, 0)).values())
  layout = pj.linen.layout(model, *example)

  @jit
  def make(key):
    params = method.attach(key, model.init(key, *example)["params"], layout)
    more = lambda _, w: w.replace(e=w.e + 0.5, a=20 * w.a, b=20 * w.b) if hasattr(w, "e") else w
    return paths.map_leaves(more, params)

  params = make(jax.random.key(0))
  return model, *pj.partition(params, method.trainable(params))


def two_updates(name, sizes, mesh=None, loss=None):
  """Trained tree, state of the optimizer and numbers after two updates by gradient descent."""
  kind = KINDS[name][0]._replace(**({"loss": loss} if loss else {}))
  model, train, frozen = attached(name)
  tx = method_of(name).optimizer(
    optax.sgd(0.5, momentum=0.9), 3, clip_norm=0.4, accumulate=len(sizes), batches=3 * len(sizes)
  )
  run = jit(lambda s, b: step.train_step(model, tx, kind, s, frozen, b, jax.random.key(2)))
  current, out = jit(functools.partial(state.init, tx))(train), []
  for batch in (b for seed in (1, 2) for b in cut(rows_of(name, seed), sizes)):
    if mesh is not None:
      batch = jax.device_put(batch, sharding.batch_shardings(batch, mesh))
    current, metrics = run(current, batch)
    out.append(metrics)
  inner = current.opt_state.inner_opt_state if len(sizes) > 1 else current.opt_state
  return jax.device_get((current.train, inner, out))


@functools.cache
def whole(name):
  return two_updates(name, (ROWS,))


@pytest.mark.fast_for("causal_lm-sizes1.*|classes.*")
@pytest.mark.parametrize(
  ("name", "sizes", "devices"),
  [
    ("causal_lm", (1, 24, 2, 5), ""),
    ("causal_lm", (8, 8, 8, 8), "data:4,fsdp:2"),
    ("classes", (5, 5, 5, 5, 5, 5, 2), ""),
    ("number", (24, 8), ""),
  ],
)
def test_a_batch_equals_any_split_of_it(name, sizes, devices):
  """Parameters, momentum, AdaLoRA's scores, penalty and budget; the norm that is reported."""
  mesh = sharding.make_mesh(devices) if devices else None
  train, inner, out = two_updates(name, sizes, mesh)
  want, inner_wanted, out_wanted = whole(name)
  near = lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-6)
  jax.tree.map(near, (train, inner), (want, inner_wanted))
  for update, wanted in enumerate(out_wanted, 1):
    got = out[update * len(sizes) - 1]
    assert got.keys() == wanted.keys()
    for key in {*wanted} - {"loss"}:  # which is that of the last of them
      near(got[key], wanted[key])
  if name == "causal_lm":
    assert inner.budget < 4 and inner.penalty > 0
    assert max(np.abs(w.a).max() for w in inner.mean.values()) > 1e-4


def test_a_mean_of_means_is_far_off():
  """The control: the same batches, each counted as one."""
  alike = lambda logits, batch: (losses.next_token(logits, batch), jnp.ones(()))
  train, _, _ = two_updates("causal_lm", (1, 24, 2, 5), loss=alike)
  pairs = zip(jax.tree.leaves(train), jax.tree.leaves(whole("causal_lm")[0]), strict=True)
  assert max(np.abs(x - y).max() for x, y in pairs) > 1e-2


def rows_with(weights):
  """Packed rows of whose tokens those with a weight are to be predicted."""
  weights = np.asarray(weights, np.float32)
  tokens = np.arange(weights.size, dtype=np.int32).reshape(weights.shape)
  return Rows(tokens, np.ones_like(tokens), np.zeros_like(tokens), weights, len(weights))


def test_perplexity_is_of_tokens_whatever_the_batches():
  """Four tokens in three rows: exp of their mean, not of a mean of rows or batches."""
  rows = rows_with([[0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]])
  task = LanguageModelling("ours", {"train": rows, "test": rows})
  given = lambda batch: ((batch["weights"] * batch["tokens"]).sum() / 8, batch["weights"].sum())
  want = (1 + 2 + 3 + 11) / 8 / 4
  for size in (1, 2, 3, 8):
    scores = task.evaluate(given, "test", size)
    np.testing.assert_allclose(scores["loss"], want, rtol=1e-12)
    np.testing.assert_allclose(scores["perplexity"], np.exp(want), rtol=1e-12)


def test_rows_of_prompts_alone_are_no_training_batch(tmp_path):
  """A batch of nothing else would be a step without a gradient; a part of nothing else is none."""
  table = tmp_path / "long.jsonl"
  rows = [{"prompt": " ".join("0123456789"[-i % 10 :] * 3), "answer": " 7 8"} for i in range(40)]
  table.write_text("".join(json.dumps(row) + "\n" for row in rows))
  model = tiny_lm.model_dir(tmp_path / "model")
  task = build.task(from_config(tiny_lm.config(model, table, data__max_length=8)))
  assert task.rows["train"].weights.any(1).all() and task.idle > 0
  assert f"{task.idle} more of train are prompts alone, left out" in task.describe()
  rows = rows_with([[0, 0, 1], [0, 1, 1]])
  for part in ("train", "test"):
    with pytest.raises(ValueError, match=f"{part}: none of the 2 texts has a token to predict"):
      LanguageModelling("ours", {"train": rows, "test": rows, part: rows_with([[0, 0], [0, 0]])})
