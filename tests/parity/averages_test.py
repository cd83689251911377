"""Accumulated gradients equal those of transformers, which divides by the tokens of all batches."""

import jax
import numpy as np
import optax
import pytest
import torch

import peftjax as pj
from peftjax import optim
from peftjax.training import state, step
from peftjax.training.causal_lm import KIND
from tests.golden.make_decoders import CASES, make

pytestmark = pytest.mark.parity

# Completions of 11, 2, 0 and 5 tokens: a mean of means would weigh each of the two as 5.5.
TARGETS = (11, 2, 0, 5)
LENGTH = 12


def rows(vocab):
  """One row a batch, of which the last tokens are the completion."""
  tokens = np.random.default_rng(0).integers(3, vocab, (len(TARGETS), LENGTH), np.int32)
  asked = np.arange(LENGTH) >= LENGTH - np.array(TARGETS)[:, None]
  return tokens, asked.astype(np.float32)


@pytest.mark.parametrize("split", [(4,), (1, 1, 1, 1), (1, 3)], ids=str)
def test_gradients_of_ragged_completions(split, tmp_path):
  """`num_items_in_batch`, as its `Trainer` passes it: the tokens of all accumulated batches."""
  theirs = make(*CASES["llama3_tiny"], seed=3).eval()
  theirs.save_pretrained(tmp_path)
  tokens, weights = rows(theirs.config.vocab_size)
  labels = torch.from_numpy(np.where(weights > 0, tokens, -100)).long()
  for one, label in zip(torch.from_numpy(tokens).long(), labels, strict=True):
    given = dict(input_ids=one[None], labels=label[None])
    theirs(**given, num_items_in_batch=torch.tensor(sum(TARGETS))).loss.backward()
  want = {name: p.grad.numpy() for name, p in theirs.named_parameters()}

  model, params = pj.load_pretrained(tmp_path)
  params, frozen = pj.partition(params, jax.tree.map(lambda _: True, params))
  tx = optim.wrap(optax.sgd(1.0), clip_norm=None, accumulate=len(split))
  run = jax.jit(lambda s, b: step.train_step(model, tx, KIND, s, frozen, b, jax.random.key(0)))
  current, at = state.init(tx, params), 0
  for size in split:
    take = slice(at, at := at + size)
    ones = np.ones_like(tokens[take])
    batch = dict(tokens=tokens[take], segments=ones, weights=weights[take])
    current, out = run(current, {**batch, "positions": ones.cumsum(1, dtype=np.int32) - 1})
  norm = np.sqrt(sum(float((x.astype(np.float64) ** 2).sum()) for x in want.values()))
  np.testing.assert_allclose(float(out["grad_norm"]), norm, rtol=1e-5)
  for layer in (0, 1):
    ours = [
      tree["model"][f"layers_{layer}"]["self_attn"]["q_proj"]["kernel"]
      for tree in (params, current.train)
    ]
    theirs_too = want[f"model.layers.{layer}.self_attn.q_proj.weight"].T
    np.testing.assert_allclose(ours[0] - ours[1], theirs_too, rtol=1e-4, atol=1e-6)
