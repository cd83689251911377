"""Ten AdamW steps from one start: our losses are those of torch and peft."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import peftjax as pj
from peftjax import hf_peft
from tests.golden.make_bert import draw
from tests.parity.reference import GOLDEN, classifier, inputs

pytestmark = [
  pytest.mark.parity,
  pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

_STEPS = 10
_LR, _BETAS, _EPS, _DECAY = 5e-3, (0.8, 0.95), 1e-6, 0.1
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _data():
  """One batch a step, and labels int [6]."""
  rng = np.random.default_rng(0)
  return [(inputs(120, seed=seed), rng.integers(0, 3, 6)) for seed in range(_STEPS)]


def _torch_losses(start):
  model = PeftModel.from_pretrained(
    classifier(GOLDEN / "bert_tiny", **_NO_DROPOUT), start, is_trainable=True
  ).train()
  trained = [x for x in model.parameters() if x.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=_LR, betas=_BETAS, eps=_EPS, weight_decay=_DECAY)
  losses = []
  for batch, labels in _data():
    tokens, mask, types = map(torch.from_numpy, batch)
    out = model(
      input_ids=tokens,
      attention_mask=mask,
      token_type_ids=types,
      labels=torch.from_numpy(labels),
    )
    optimizer.zero_grad()
    out.loss.backward()
    optimizer.step()
    losses.append(out.loss.item())
  return losses


def _our_losses(start, scan):
  model, params = pj.load_pretrained(GOLDEN / "bert_tiny", scan_layers=scan)
  config = dataclasses.replace(model.config, dropout=0.0, attention_dropout=0.0, head_dropout=0.0)
  model = model.clone(config=config)
  loaded, mask = hf_peft.load(start, params, model)
  method = pj.chain(pj.lora(4, 8), pj.unfreeze("head/.*"))
  train, frozen = pj.partition(loaded, method.trainable(loaded))
  assert pj.count(loaded, mask) == pj.count(loaded, method.trainable(loaded))
  tx = method.optimizer(optax.adamw(_LR, *_BETAS, eps=_EPS, weight_decay=_DECAY), _STEPS)
  state = tx.init(train)

  @jax.jit
  def step(train, state, batch, labels):
    def loss_fn(train):
      key = jax.random.key(0)
      logits = pj.apply(model, pj.combine(train, frozen), *batch, train=True, rngs={"dropout": key})
      return pj.losses.classification(logits, labels, np.ones(6, np.float32))

    loss, grads = jax.value_and_grad(loss_fn)(train)
    updates, state = tx.update(grads, state, train)
    return optax.apply_updates(train, updates), state, loss

  losses = []
  for batch, labels in _data():
    train, state, loss = step(train, state, batch, labels)
    losses.append(float(loss))
  return losses


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_ten_steps_of_lora_and_head(scan, tmp_path):
  config = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["query", "value"])
  start = get_peft_model(classifier(GOLDEN / "bert_tiny"), config)
  draw(start, 0, "lora_A")  # B stays zero, as at the start of a training
  start.save_pretrained(tmp_path)
  theirs = _torch_losses(tmp_path)
  assert max(theirs) - min(theirs) > 0.1
  np.testing.assert_allclose(_our_losses(tmp_path, scan), theirs, atol=1e-4, rtol=1e-4)
