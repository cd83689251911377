"""AdaLoRA against the real peft library: its allocator step for step, and its directories."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model

import peftjax as pj
from peftjax import hf_peft
from peftjax.core import paths
from peftjax.methods.adalora_weight import SVDLoRA
from tests.golden import make_adalora
from tests.golden.make_bert import draw
from tests.methods import adalora_test as ours
from tests.parity.reference import GOLDEN, assert_near, classifier, inputs, logits

pytestmark = [
  pytest.mark.parity,
  pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
  # What peft says of any AdaLoRA directory, its own too, and of a matrix of rank 0.
  pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match"),
  pytest.mark.filterwarnings("ignore:.*tensor.s. have invalid shape"),
]
BATCH = inputs(120)


def test_masks_and_scores_equal_pefts_live():
  """On the golden's gradients."""
  live = make_adalora.reference()
  for key, want in ours.GOLDEN.items():
    np.testing.assert_allclose(live[key], want, rtol=1e-5, atol=1e-6, err_msg=key)
  for step, (train, _) in enumerate(ours.run(ours.method(), ours.problem()[1])):
    for name in ours.SHAPES:
      np.testing.assert_allclose(train[name]["kernel"].e, live[f"e_{name}"][step], atol=1e-5)


def test_of_equal_scores_peft_prunes_all_and_ours_the_last_ones():
  """It masks whatever is not above the k-th smallest score: with ties too much, here everything."""
  gradients = [jax.tree.map(np.zeros_like, step) for step in ours.problem()[1]]
  live = make_adalora.reference(gradients)
  left = lambda step: sum(int((live[f"e_{name}"][step] != 0).sum()) for name in ours.SHAPES)
  assert left(5) == 12 and left(-1) == 0
  train, state = ours.run(ours.method(), gradients)[-1]
  masks = ours.alive(train)
  assert sum(int(x.sum()) for x in masks.values()) == int(state.budget) == 6
  assert masks["l0/kernel"].all() and not masks["l2/kernel"].any()


@pytest.mark.parametrize("scan", [False, True])
def test_our_directory_in_peft(scan, tmp_path):
  """With unequal ranks and a matrix of rank 0; `rslora` is nothing that PEFT's AdaLoRA has."""
  model, params = pj.load_pretrained(GOLDEN / "bert_tiny", num_labels=3, scan_layers=scan)
  method = pj.adalora(5, 8.0, ["query", "value"], target_rank=2)
  layout = pj.linen.layout(model, np.zeros((1, 4), np.int32))
  attached = method.attach(jax.random.key(0), params, layout)
  rng = np.random.default_rng(0)

  def drawn(path, leaf):
    if not isinstance(leaf, SVDLoRA):
      return leaf
    e = rng.standard_normal(leaf.e.shape) * (rng.random(leaf.e.shape) < 0.5)
    e = 0 * e if path.endswith("layers_1/attention/self/value/kernel") else e
    return leaf.replace(a=10 * leaf.a, b=10 * leaf.b, e=jnp.asarray(e, jnp.float32))

  attached = paths.map_leaves(drawn, attached)
  hf_peft.save(tmp_path, attached, model, rslora=scan)
  theirs = classifier(GOLDEN / "bert_tiny", num_labels=3)
  plain = logits(theirs, BATCH)
  adapted = PeftModel.from_pretrained(theirs, tmp_path)
  got = pj.apply(model, attached, *BATCH)
  assert_near(got, logits(adapted, BATCH))
  assert np.abs(plain - got).max() > 0.01
  loaded, _ = hf_peft.load(tmp_path, params, model)
  assert pj.tree.ranks(loaded) == pj.tree.ranks(attached)
  assert_near(pj.apply(model, loaded, *BATCH), got)


def test_pefts_directory_in_ours(tmp_path):
  """As saved after its own allocation."""
  plain = lambda: classifier(GOLDEN / "bert_tiny", num_labels=3)
  config = AdaLoraConfig(
    task_type="SEQ_CLS",
    init_r=4,
    target_r=2,
    tinit=1,
    tfinal=2,
    deltaT=1,
    total_step=6,
    lora_alpha=16,
    target_modules=["query", "value"],
  )
  adapted = get_peft_model(plain(), config)
  draw(adapted, 5, "lora_")
  optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
  tokens, mask, types = (torch.from_numpy(np.array(x)).long() for x in BATCH)
  for step in range(6):
    out = adapted(input_ids=tokens, attention_mask=mask, token_type_ids=types)
    out.logits.square().mean().backward()
    optimizer.step()
    adapted.base_model.update_and_allocate(step)
    optimizer.zero_grad()
  want = logits(adapted, BATCH)
  adapted.save_pretrained(tmp_path)
  assert_near(logits(PeftModel.from_pretrained(plain(), tmp_path), BATCH), want)
  model, params = pj.load_pretrained(GOLDEN / "bert_tiny", num_labels=3)
  loaded, trained = hf_peft.load(tmp_path, params, model)
  assert sum(pj.tree.ranks(loaded).values()) == 8
  assert_near(pj.apply(model, loaded, *BATCH), want)
  tx = pj.adalora(4, target_rank=2, targets=["query", "value"]).optimizer(optax.sgd(0.1), 10)
  assert int(tx.init(pj.partition(loaded, trained)[0]).budget) == 8  # and it can be trained on
